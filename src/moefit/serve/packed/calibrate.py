"""What a model's MoE blocks are given on a calibration text: read once, kept in files for packing.

Owns the pass over the text, by the model as it is served (exactly, within a budget, so that it need
not fit in memory), the files, one a block, and from them the rows by which an expert is judged: all
tokens that it answers for, each counting as its router weight's square, which is what its errors
count in the block's output; and beside them a few of the block's other tokens, which in sum count
as little as some dozens of its own, so that one that answers for few or none is not judged by
those alone. Files of a pass that was cut off are not used.

Shapes: B windows, T tokens, D model width, E experts, N rows of one expert.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moefit.checkpoint.model_folder import read_json
from moefit.errors import CheckpointError, UnsupportedModelError
from moefit.serve.cache.slot import bytes_of
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.load import load_model
from moefit.serve.memory.budget import format_bytes

OTHERS = 512  # of a block's other tokens, at most
WORTH = 64  # how many of an expert's own tokens they count as, in sum
_FACTS = "calibration.json"
_MAX_FACTS = 8 << 20  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """A text to calibrate on: windows [B, context] of token ids. `text` is its name for people.

    digest: what tells one calibration from another. memory: for the pass over the text; None is as
    much as that takes.
    """

    text: str
    digest: str
    windows_BT: Tensor
    memory: int | None = None


class RecordedInputs:
    """The blocks' inputs, in files of one folder."""

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self._folder, self._facts = folder, facts

    def block(self, index: int) -> "BlockInputs | None":
        """Of the block with this number; None if the text does not reach it."""
        facts = self._facts["blocks"][index]
        tokens, width, experts = facts["tokens"], facts["width"], facts["experts"]
        if not tokens:
            return None
        x_TD = torch.from_file(
            str(self._folder / f"inputs-{index:03d}"),
            size=tokens * width,
            dtype=getattr(torch, facts["dtype"]),
        )
        weight_TE = torch.from_file(
            str(self._folder / f"weights-{index:03d}"), size=tokens * experts, dtype=torch.float32
        )
        return BlockInputs(x_TD.view(tokens, width), weight_TE.view(tokens, experts))


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """One block's tokens, and the router weight with which each expert answers for them, or 0."""

    x_TD: Tensor
    weight_TE: Tensor

    def rows(self, expert: int) -> tuple[Tensor, Tensor]:
        """By which an expert is judged: x_ND, and what each counts, N."""
        square_T = self.weight_TE[:, expert].square()
        own_N, other_N = square_T.nonzero()[:, 0], (square_T == 0).nonzero()[:, 0]
        if len(other_N) > OTHERS:
            other_N = other_N[torch.linspace(0, len(other_N) - 1, OTHERS).long()]
        counts_N = square_T[own_N]
        each = (counts_N.mean() if len(own_N) else torch.tensor(1.0)) * WORTH / max(1, len(other_N))
        others_N = each.expand(len(other_N))
        return self.x_TD[torch.cat([own_N, other_N])], torch.cat([counts_N, others_N])


def record_block_inputs(
    skeleton: Skeleton,
    calibration: CalibrationText,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RecordedInputs:
    """The blocks' inputs on the text: from `folder` if they are there, else recorded there now.

    progress hears how many windows of how many are done. Raises UnsupportedModelError for models
    that continue no text; CheckpointError if there is no room in `folder`, or if a block's inputs
    are not finite; what `load` does.
    """
    facts = _read_facts(folder)
    blocks = len(skeleton.blocks)
    if facts is not None and (facts["digest"], len(facts["blocks"])) == (
        calibration.digest,
        blocks,
    ):
        return RecordedInputs(folder, facts)
    if skeleton.model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__} continues no text by itself; only decoders can be "
            "calibrated so far; packing without a text works"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _check_disk_space(skeleton, calibration, folder)
    facts = _record(skeleton, calibration, folder, progress)
    building = folder / f".{_FACTS}"
    building.write_text(json.dumps(facts))
    building.rename(folder / _FACTS)
    return RecordedInputs(folder, facts)


def _read_facts(folder: Path) -> dict[str, Any] | None:
    """What a finished pass wrote; None if there is none, or its files are not as it says."""
    try:
        facts = read_json(folder / _FACTS, limit=_MAX_FACTS)
        sound = all(
            _has(folder / f"inputs-{index:03d}", block, "width", getattr(torch, block["dtype"]))
            and _has(folder / f"weights-{index:03d}", block, "experts", torch.float32)
            for index, block in enumerate(facts["blocks"])
        )
        return facts if sound and isinstance(facts["digest"], str) else None
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _has(file: Path, block: dict[str, Any], columns: str, dtype: torch.dtype) -> bool:
    """Whether the file holds a block's tokens with so many numbers of this dtype each."""
    return file.stat().st_size == block["tokens"] * block[columns] * dtype.itemsize


def _check_disk_space(skeleton: Skeleton, calibration: CalibrationText, folder: Path) -> None:
    width = skeleton.model.config.get_text_config(decoder=True).hidden_size
    each = sum(width * skeleton.dtype.itemsize + 4 * one.num_experts for one in skeleton.blocks)
    needed, free = calibration.windows_BT.numel() * each, shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"calibrating takes {format_bytes(needed)} in {folder} until packing ends, where "
            f"{format_bytes(free)} are free; make room, give fewer tokens, or set XDG_CACHE_HOME "
            "to a folder on a larger disk"
        )


def _record(
    skeleton: Skeleton,
    calibration: CalibrationText,
    folder: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    windows_BT = calibration.windows_BT
    settings = LoadSettings(
        memory=calibration.memory, context=windows_BT.shape[1], dtype=skeleton.dtype
    )
    with ExitStack() as stack:
        served = stack.enter_context(load_model(skeleton.checkpoint.folder, settings))
        recorders = [
            stack.enter_context(_Recorder(experts, folder, index))
            for index, experts in enumerate(served.blocks.values())
        ]
        progress(0, len(windows_BT))
        with torch.inference_mode():
            for number, window_T in enumerate(windows_BT):
                served.model.base_model(input_ids=window_T[None], use_cache=False)
                progress(number + 1, len(windows_BT))
        return {
            "digest": calibration.digest,
            "text": calibration.text,
            "blocks": [one.facts for one in recorders],
        }


class _Recorder:
    """Writes what one block is given, as it comes."""

    def __init__(self, experts: VirtualExperts, folder: Path, index: int):
        self._experts = experts
        self._tokens, self._width, self._dtype = 0, 0, "float32"
        self._inputs: BinaryIO = (folder / f"inputs-{index:03d}").open("wb")
        self._weights: BinaryIO = (folder / f"weights-{index:03d}").open("wb")
        self._hook = experts.register_forward_pre_hook(self._hear)

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._inputs.close()
        self._weights.close()

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "width": self._width,
            "dtype": self._dtype,
            "experts": self._experts.num_experts,
        }

    def _hear(self, _module: Any, arguments: tuple[Tensor, ...]) -> None:
        block, x_TD = self._experts.block, arguments[0].reshape(-1, arguments[0].shape[-1])
        if not bool(x_TD.isfinite().all()):
            raise CheckpointError(
                f"on this text {block.name} is given numbers that are not finite, by which nothing "
                f"can be calibrated; calibrate in another dtype than {x_TD.dtype} (--dtype), or "
                "pack without a text"
            )
        routing = block.layout.routing(len(x_TD), *arguments[1:])
        weight_TE = torch.zeros(len(x_TD), block.num_experts + 1)
        weight_TE.scatter_add_(1, routing.ids_TK.cpu(), routing.weights_TK.float().cpu())
        self._inputs.write(bytes_of(x_TD.contiguous().cpu()))
        self._weights.write(bytes_of(weight_TE[:, :-1].contiguous()))
        self._tokens += len(x_TD)
        self._width, self._dtype = x_TD.shape[1], str(x_TD.dtype).removeprefix("torch.")
