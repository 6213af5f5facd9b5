"""Record the inputs of every MoE block, and of dense layers if asked for, on a calibration text.

`record_block_inputs` runs the text through the served model in exact mode, under a memory budget,
and writes the inputs and router weights of each block to two files. An interrupted run leaves no
metadata file, so its data is discarded. `BlockInputs.rows` selects the rows that one expert is
calibrated on.

Shapes: T tokens, D model width, E experts, N rows of one expert.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefit.checkpoint.model_folder import read_json
from moefit.checkpoint.safetensors import bytes_of
from moefit.errors import CheckpointError
from moefit.serve.config import LoadSettings
from moefit.serve.hf.generation_config import IGNORE
from moefit.serve.hf.quant_linear import quantizable_modules
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.load import load_model
from moefit.serve.memory.budget import format_bytes
from moefit.serve.packed.dense_inputs import DenseInputs, DenseRecorder
from moefit.serve.windows import Windows

MAX_OTHER_TOKENS = 512  # tokens of a block that an expert was not chosen for
OTHER_TOKENS_WEIGHT = 64  # total weight of these, in units of one token of the expert's own
_METADATA = "calibration.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """A tokenized text for calibration.

    Args:
        text: Name of the text, for display.
        digest: Identifies the text and its tokenization.
        windows: Token ids; of an encoder-decoder, pairs.
        memory: Budget in bytes for running the model over the text; None for no limit.
    """

    text: str
    digest: str
    windows: Windows
    memory: int | None = None


class RecordedInputs:
    """Recorded inputs of all blocks, stored in files of one folder.

    Attributes:
        dense: Those of dense layers; None if they were not recorded.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any]):
        self._folder, self._metadata = folder, metadata
        dense = metadata.get("dense")
        self.dense = None if dense is None else DenseInputs(folder, dense)

    def block(self, index: int) -> "BlockInputs | None":
        """Return the inputs of block number `index`; None if no token reached the block."""
        metadata = self._metadata["blocks"][index]
        tokens, width, experts = metadata["tokens"], metadata["width"], metadata["experts"]
        if not tokens:
            return None
        x_TD = torch.from_file(
            str(_inputs_file(self._folder, index)),
            size=tokens * width,
            dtype=getattr(torch, metadata["dtype"]),
        )
        weight_TE = torch.from_file(
            str(_weights_file(self._folder, index)), size=tokens * experts, dtype=torch.float32
        )
        return BlockInputs(x_TD.view(tokens, width), weight_TE.view(tokens, experts))


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """Inputs of one block, and the router weight of each expert per token (0 if not chosen)."""

    x_TD: Tensor
    weight_TE: Tensor

    def rows(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the rows that an expert is calibrated on, and the weight of each row.

        Rows are all tokens that the router sent to the expert, weighted by the square of the router
        weight, which is how the expert's error enters the block's output. Up to `MAX_OTHER_TOKENS`
        other tokens of the block are added with a small total weight, so that an expert with few or
        no tokens of its own is not fitted to those alone.

        Returns:
            x_ND and weight_N.
        """
        square_T = self.weight_TE[:, expert].square()
        own_N, other_N = square_T.nonzero()[:, 0], (square_T == 0).nonzero()[:, 0]
        if len(other_N) > MAX_OTHER_TOKENS:
            other_N = other_N[torch.linspace(0, len(other_N) - 1, MAX_OTHER_TOKENS).long()]
        own_weight_N = square_T[own_N]
        mean_weight = own_weight_N.mean() if len(own_N) else torch.tensor(1.0)
        other_weight = mean_weight * OTHER_TOKENS_WEIGHT / max(1, len(other_N))
        other_weight_N = other_weight.expand(len(other_N))
        return self.x_TD[torch.cat([own_N, other_N])], torch.cat([own_weight_N, other_weight_N])


def record_block_inputs(
    skeleton: Skeleton,
    calibration: CalibrationText,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    dense: bool = False,
) -> RecordedInputs:
    """Record the inputs of all blocks on a text, or reuse the recording in `folder`.

    Args:
        skeleton: The model to calibrate.
        calibration: The text and the memory budget.
        folder: Where the recording is stored. A recording of another text is replaced.
        progress: Callback with the number of windows done and in total.
        dense: Record the inputs of dense layers too.

    Raises:
        CheckpointError: The disk has too little free space, or a block's inputs are not finite.
        MoefitError: The model cannot be loaded; see `load_model`.
    """
    metadata = _read_metadata(folder)
    recorded = None if metadata is None else (metadata["digest"], len(metadata["blocks"]))
    enough = metadata is not None and ("dense" in metadata or not dense)
    if enough and recorded == (calibration.digest, len(skeleton.blocks)):
        assert metadata is not None
        return RecordedInputs(folder, metadata)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _check_disk_space(skeleton, calibration, folder)
    metadata = _record(skeleton, calibration, folder, progress, dense=dense)
    partial_file = folder / f".{_METADATA}"
    partial_file.write_text(json.dumps(metadata))
    partial_file.rename(folder / _METADATA)
    return RecordedInputs(folder, metadata)


def _inputs_file(folder: Path, index: int) -> Path:
    return folder / f"inputs-{index:03d}"


def _weights_file(folder: Path, index: int) -> Path:
    return folder / f"weights-{index:03d}"


def _read_metadata(folder: Path) -> dict[str, Any] | None:
    """Return the metadata of a finished recording; None if missing, damaged or inconsistent."""
    try:
        metadata = read_json(folder / _METADATA)
        consistent = (
            all(
                _has_size(
                    _inputs_file(folder, index), block, "width", getattr(torch, block["dtype"])
                )
                and _has_size(_weights_file(folder, index), block, "experts", torch.float32)
                for index, block in enumerate(metadata["blocks"])
            )
            and DenseInputs(folder, metadata.get("dense", {})).are_complete()
        )
        return metadata if consistent and isinstance(metadata["digest"], str) else None
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _has_size(file: Path, block: dict[str, Any], columns: str, dtype: torch.dtype) -> bool:
    """Return whether the file's size matches the block's metadata."""
    return file.stat().st_size == block["tokens"] * block[columns] * dtype.itemsize


def _check_disk_space(skeleton: Skeleton, calibration: CalibrationText, folder: Path) -> None:
    width = skeleton.model.config.get_text_config(decoder=True).hidden_size
    per_token = sum(
        width * skeleton.dtype.itemsize + 4 * block.num_experts for block in skeleton.blocks
    )
    windows = calibration.windows  # a token is read by one side of an encoder-decoder
    tokens = windows.targets + round(windows.source_tokens * len(windows))
    _refuse_full_disk(tokens * per_token, folder)


def _refuse_full_disk(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"calibration takes {format_bytes(needed)} in {folder} until packing ends, but only "
            f"{format_bytes(free)} are free; free some space, give fewer tokens, or set "
            "XDG_CACHE_HOME to a folder on a larger disk"
        )


def _record(
    skeleton: Skeleton,
    calibration: CalibrationText,
    folder: Path,
    progress: Callable[[int, int], None],
    *,
    dense: bool,
) -> dict[str, Any]:
    """Run the text through the model, write the files and return their metadata."""
    windows = calibration.windows
    settings = LoadSettings(
        memory=calibration.memory,
        context=windows.context,
        dtype=skeleton.dtype,
        generation_config=IGNORE,
    )
    with ExitStack() as stack:
        served = stack.enter_context(load_model(skeleton.checkpoint.folder, settings))
        recorders = [
            stack.enter_context(_Recorder(experts, folder, index))
            for index, experts in enumerate(served.blocks.values())
        ]
        others = None
        if dense:
            others = stack.enter_context(_dense_recorder(skeleton, served.model, folder))
        run = served.model.base_model if others is None else served.model
        progress(0, len(windows))
        with torch.inference_mode():
            for row in range(len(windows)):
                run(**windows.inputs(row, served.model.device), use_cache=False)
                if others is not None and row == 0:
                    _refuse_full_disk(others.nbytes * (len(windows) - 1), folder)
                progress(row + 1, len(windows))
        return {
            "digest": calibration.digest,
            "text": calibration.text,
            "blocks": [recorder.metadata for recorder in recorders],
            **({} if others is None else {"dense": others.metadata}),
        }


def _dense_recorder(skeleton: Skeleton, model: PreTrainedModel, folder: Path) -> DenseRecorder:
    """Return a recorder of the linear layers that `--dense-precision` encodes."""
    names = quantizable_modules(skeleton.model, skeleton.blocks)
    modules = {name: model.get_submodule(name) for name in names}
    linear = {name: one for name, one in modules.items() if isinstance(one, nn.Linear)}
    return DenseRecorder(linear, model.get_output_embeddings(), folder)


class _Recorder:
    """Append the inputs and router weights of one block to its files at each forward pass."""

    def __init__(self, experts: VirtualExperts, folder: Path, index: int):
        self._experts = experts
        self._tokens, self._width, self._dtype = 0, 0, "float32"
        self._inputs: BinaryIO = _inputs_file(folder, index).open("wb")
        self._weights: BinaryIO = _weights_file(folder, index).open("wb")
        self._hook = experts.register_forward_pre_hook(self._append)

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._inputs.close()
        self._weights.close()

    @property
    def metadata(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "width": self._width,
            "dtype": self._dtype,
            "experts": self._experts.num_experts,
        }

    def _append(self, _module: Any, arguments: tuple[Tensor, ...]) -> None:
        block, x_TD = self._experts.block, arguments[0].reshape(-1, arguments[0].shape[-1])
        if not bool(x_TD.isfinite().all()):
            raise CheckpointError(
                f"the inputs of {block.name} are not finite on this text in {x_TD.dtype}, so it "
                "cannot be used for calibration; give another --dtype, or pack without --text"
            )
        routing = block.layout.routing(len(x_TD), *arguments[1:])
        weight_TE = torch.zeros(len(x_TD), block.num_experts + 1)  # the last column is padding
        weight_TE.scatter_add_(1, routing.ids_TK.cpu(), routing.weights_TK.float().cpu())
        self._inputs.write(bytes_of(x_TD.contiguous().cpu()))
        self._weights.write(bytes_of(weight_TE[:, :-1].contiguous()))
        self._tokens += len(x_TD)
        self._width, self._dtype = x_TD.shape[1], str(x_TD.dtype).removeprefix("torch.")
