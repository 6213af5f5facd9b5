"""Record the inputs of linear layers on a calibration text, to calibrate dense weights.

Layers that are given the same tensor, such as the projections to queries, keys and values, share a
file. Inputs are written as they come, so that recording needs no memory; an encoded matrix is
calibrated on all of its inputs later, one matrix at a time.

Shapes: T tokens, C input units, R output units.
"""

import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefit.checkpoint.safetensors import bytes_of
from moefit.errors import CheckpointError
from moefit.quant.backend import decoded
from moefit.quant.grouped_int import ROWS_AT_ONCE, GroupedMatrix

_REMEMBERED = 8  # tensors of a pass in which a layer's input is looked for
_ERROR_ROWS = 512  # inputs on which the error of outputs is measured


class DenseRecorder:
    """Append the inputs of linear layers to files at each forward pass.

    Args:
        modules: The layers by name.
        head: The output head, which then computes one token instead of all, since its outputs are
            not needed; None to let it compute.
        folder: Of the files.
    """

    def __init__(self, modules: Mapping[str, nn.Module], head: nn.Module | None, folder: Path):
        self._folder, self._head = folder, head
        self._names = {module: name for name, module in modules.items()}
        self._leaders: dict[str, str] = {}
        self._recent: deque[tuple[weakref.ref[Tensor], str]] = deque(maxlen=_REMEMBERED)
        self._seen: dict[str, dict[str, Any]] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> "DenseRecorder":
        for module in self._names:
            self._hooks.callback(module.register_forward_pre_hook(self._append).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    @property
    def nbytes(self) -> int:
        """Bytes that were written so far."""
        return sum(
            one["tokens"] * one["width"] * getattr(torch, one["dtype"]).itemsize
            for name, one in self._seen.items()
            if self._leaders[name] == name
        )

    @property
    def metadata(self) -> dict[str, dict[str, Any]]:
        """Return what was recorded by name of the layer, with the name that its file has.

        Layers that did not get the inputs of that file throughout are left out.
        """
        return {
            name: seen | {"file": leader}
            for name, seen in self._seen.items()
            if seen["tokens"] == self._seen[leader := self._leaders[name]]["tokens"]
        }

    def _append(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        if not arguments:
            return None  # given by name, as no known family does
        x, name = arguments[0], self._names[module]
        leader = self._leader(name, x)
        x_TC = x.detach().reshape(-1, x.shape[-1])
        known = {"tokens": 0, "width": x_TC.shape[1], "dtype": str(x.dtype).removeprefix("torch.")}
        seen = self._seen.setdefault(name, known)
        same = leader == name or any(kept() is x and of == leader for kept, of in self._recent)
        seen["tokens"] += len(x_TC) if same else 0
        if leader == name:
            if not bool(x_TC.isfinite().all()):
                raise CheckpointError(
                    f"the inputs of {name} are not finite on this text in {x.dtype}, so it cannot "
                    "be used for calibration; give another --dtype, or pack without --text"
                )
            with _file(self._folder, name).open("ab") as file:
                file.write(bytes_of(x_TC.contiguous().cpu()))
            self._recent.append((weakref.ref(x), name))
        return (x[..., :1, :],) if module is self._head and x.dim() > 2 else None

    def _leader(self, name: str, x: Tensor) -> str:
        """Return the layer whose file has the inputs of this one, found at its first call."""
        if name not in self._leaders:
            found = (of for kept, of in self._recent if kept() is x)
            self._leaders[name] = next(found, name)
        return self._leaders[name]


class DenseInputs:
    """Recorded inputs of linear layers.

    Args:
        folder: Of the files.
        metadata: As `DenseRecorder.metadata` returns it.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Mapping[str, Any]]):
        self._folder, self._metadata = folder, metadata

    def file_of(self, names: list[str]) -> str | None:
        """Return which inputs the modules with these names share; None if there are none."""
        found = (self._metadata[name] for name in names if name in self._metadata)
        return next((one["file"] for one in found if one["tokens"]), None)

    def read(self, file: str) -> Tensor:
        """Return inputs [T, C]; their pages are read as they are used."""
        known = self._metadata[file]
        size, dtype = known["tokens"] * known["width"], getattr(torch, known["dtype"])
        path = _file(self._folder, file)
        return torch.from_file(str(path), size=size, dtype=dtype).view(-1, known["width"])

    def are_complete(self) -> bool:
        """Return whether all files have the sizes that the metadata says. Raises OSError."""
        return all(
            _file(self._folder, one["file"]).stat().st_size
            == one["tokens"] * one["width"] * getattr(torch, one["dtype"]).itemsize
            for one in self._metadata.values()
        )


def output_error(matrix: GroupedMatrix, weight_RC: Tensor, x_TC: Tensor) -> float:
    """Return |y - y^|^2 / |y|^2 of a linear layer's outputs on some inputs; 0 if all are 0."""
    error = square = 0.0
    x_TC = x_TC[:: -(-len(x_TC) // _ERROR_ROWS)].float()
    chunks = zip(matrix.split(ROWS_AT_ONCE), weight_RC.split(ROWS_AT_ONCE), strict=True)
    for part, part_RC in chunks:
        y_TR = x_TC @ part_RC.float().T
        square += float(y_TR.square().sum())
        error += float((x_TC @ decoded(part, torch.float32).T).sub_(y_TR).square().sum())
    return error / square if square else 0.0


def _file(folder: Path, name: str) -> Path:
    return folder / f"dense-{name}"
