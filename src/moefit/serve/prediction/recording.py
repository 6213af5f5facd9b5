"""Record what probes are fitted on: what a model computes for a text, in files.

`record` runs the text through the served model in exact mode and writes, for each MoE block, what
its experts are given, its router's logits and its choice, and the later routers as maps of these
inputs, so that the model can be closed before anything is fitted.

Shapes: T tokens, D model width, E experts.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from moefit.checkpoint.safetensors import bytes_of
from moefit.errors import CheckpointError, UnsupportedModelError
from moefit.moe.routing import Routing
from moefit.moe.scoring import ScoringRule
from moefit.serve.config import LoadSettings
from moefit.serve.hf.generation_config import IGNORE
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.load import load_model
from moefit.serve.memory.budget import format_bytes
from moefit.serve.model import ServedModel
from moefit.serve.packed.calibrate import CalibrationText
from moefit.serve.packed.file import WRITING
from moefit.serve.prediction.next_router import NextRouter, preferences
from moefit.serve.prediction.probes import DEPTHS, place_name, width_of

Progress = Callable[[int, int], None]
_HELD_OUT = 8  # one of so many tokens is not fitted on


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRouter:
    """How a block chooses by its logits."""

    rule: ScoringRule | None
    bias_E: Tensor | None
    num_experts: int

    @classmethod
    def of(cls, experts: VirtualExperts) -> "RecordedRouter":
        """Return the router of a served block, without the block."""
        bias_E = None if experts.bias_E is None else experts.bias_E.detach().cpu().clone()
        return cls(rule=experts.scoring, bias_E=bias_E, num_experts=experts.num_experts)

    def recall(self, logits_TE: Tensor, chosen_TE: Tensor) -> float:
        """Return the share of chosen experts among as many that logits prefer."""
        scores_TE = preferences(self.rule, self.bias_E, logits_TE)
        rank_TE = scores_TE.argsort(-1, descending=True).argsort(-1)
        found_TE = chosen_TE & (rank_TE < chosen_TE.sum(-1, keepdim=True))
        return float(found_TE.sum() / chosen_TE.sum().clamp_min(1))

    def loss(self, made_TE: Tensor, logits_TE: Tensor) -> Tensor:
        """Return the mean loss of predicted logits against the router's."""
        kind = "softmax" if self.rule is None else self.rule.score
        if kind == "softmax":
            made_TE, p_TE = made_TE.log_softmax(-1), logits_TE.softmax(-1)
            return F.kl_div(made_TE, p_TE, reduction="batchmean")
        if kind == "given":  # of any range
            return F.mse_loss(made_TE, logits_TE)
        # Scores of an expert that do not depend on the others', which a softmax would leave open.
        per_token = F.binary_cross_entropy_with_logits(
            made_TE, logits_TE.sigmoid(), reduction="sum"
        )
        return per_token / len(made_TE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What a model computed for a text, in files of one folder.

    Attributes:
        folder: Of the files.
        tokens: By block; 0 for a block whose router is not known, or that text does not reach.
        width: D.
        dtype: Of inputs.
        routers: By block.
    """

    folder: Path
    tokens: Sequence[int]
    width: int
    dtype: torch.dtype
    routers: Sequence[RecordedRouter]

    def fitted(self, block: int) -> int:
        """Return the tokens that probes of a block are fitted on; the others measure them."""
        return self.tokens[block] - self.tokens[block] // _HELD_OUT

    def inputs(self, block: int) -> Tensor:
        """Return what a block's experts were given [T, D]."""
        return self._tensor(_INPUTS, block, self.width, self.dtype)

    def logits(self, block: int) -> Tensor:
        """Return a block's logits [T, E]."""
        return self._tensor(_LOGITS, block, self.routers[block].num_experts, torch.float32)

    def choice(self, block: int) -> Tensor:
        """Return a mask of the experts that a block chose [T, E]."""
        return self._tensor(_CHOICE, block, self.routers[block].num_experts, torch.bool)

    def starts(self, block: int) -> Mapping[str, Tensor]:
        """Return weights and biases of the next routers as maps of a block's inputs."""
        return load_file(_file(self.folder, _STARTS, block))

    def ahead(self, block: int) -> list[int]:
        """Return the distances at which blocks can be predicted from one."""
        there = range(block + 1, min(block + DEPTHS, len(self.tokens) - 1) + 1)
        same = self.tokens[block]
        return [one - block for one in there if same and self.tokens[one] == same]

    def _tensor(self, kind: str, block: int, columns: int, dtype: torch.dtype) -> Tensor:
        tokens, path = self.tokens[block], _file(self.folder, kind, block)
        flat = torch.from_file(str(path), size=tokens * columns, dtype=dtype)
        return flat.view(tokens, columns)


_INPUTS, _LOGITS, _CHOICE, _STARTS = "inputs", "logits", "choice", "starts"


def _file(folder: Path, kind: str, block: int) -> Path:
    return folder / f"{kind}-{block:03d}{WRITING}"  # removed as a file that was not finished


@torch.inference_mode()
def record(
    skeleton: Skeleton, text: CalibrationText, folder: Path, progress: Progress
) -> Recording:
    """Run a text through a model, and write what probes are fitted on.

    Args:
        skeleton: The model.
        text: The text, and the memory budget.
        folder: Is created.
        progress: Called with the windows read, and all of them.

    Raises:
        CheckpointError: The disk has too little free space, or inputs are not finite.
        MoefitError: The model cannot be loaded; see `load_model`.
    """
    folder.mkdir(parents=True)
    _check_disk_space(skeleton, text, folder)
    windows = text.windows
    settings = LoadSettings(
        memory=text.memory,
        context=windows.context,
        dtype=skeleton.dtype,
        generation_config=IGNORE,
    )
    with ExitStack() as stack:
        served = stack.enter_context(load_model(skeleton.checkpoint.folder, settings))
        blocks = list(served.blocks.values())
        _write_starts(served, windows.context, folder)
        recorder = stack.enter_context(_Recorder(blocks, folder, width_of(skeleton)))
        stack.enter_context(served.watched(recorder))
        progress(0, len(windows))
        for row in range(len(windows)):
            inputs = windows.inputs(row, served.model.device)
            served.model.base_model(**inputs, use_cache=False)
            progress(row + 1, len(windows))
        return Recording(
            folder=folder,
            tokens=recorder.tokens,
            width=width_of(skeleton),
            dtype=recorder.dtype,
            routers=[RecordedRouter.of(one) for one in blocks],
        )


def _write_starts(served: ServedModel, context: int, folder: Path) -> None:
    """Write the next routers as maps of each block's inputs, so that the model can be closed."""
    with served.zero_experts():
        routers = NextRouter.of(served.model, served.blocks, context)
    for block in range(len(served.blocks)):
        tensors: dict[str, Tensor] = {}
        for ahead in range(1, DEPTHS + 1):
            if (found := routers.linear(block, ahead)) is not None:
                name = place_name(block, ahead)
                tensors[f"{name}.weight"] = found.weight_ED.cpu().contiguous()
                if found.bias_E is not None:
                    tensors[f"{name}.bias"] = found.bias_E.cpu().contiguous()
        save_file(tensors, _file(folder, _STARTS, block))


def _check_disk_space(skeleton: Skeleton, text: CalibrationText, folder: Path) -> None:
    width, itemsize = width_of(skeleton), skeleton.dtype.itemsize
    experts = sum(one.num_experts for one in skeleton.blocks)
    per_token = len(skeleton.blocks) * width * itemsize + 5 * experts
    needed = text.windows.targets * per_token + 4 * DEPTHS * width * experts
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"fitting probes takes {format_bytes(needed)} in {folder} until it ends, but only "
            f"{format_bytes(free)} are free; free some space, give fewer tokens, or set "
            "XDG_CACHE_HOME to a folder on a larger disk"
        )


class _Recorder:
    """A `StepWatcher` that appends inputs, logits and choices of each step to files."""

    def __init__(self, blocks: Sequence[VirtualExperts], folder: Path, width: int):
        self._blocks, self._width, self._folder = blocks, width, folder
        self._files: dict[tuple[str, int], BinaryIO] = {}
        self._chosen, self._read, self._unknown = [0] * len(blocks), [0] * len(blocks), set[int]()
        self.dtype = torch.float32
        self._stack = ExitStack()

    @property
    def tokens(self) -> list[int]:
        """Tokens by block; 0 where logits are not known for all of them."""
        return [
            read if read == chosen and block not in self._unknown else 0
            for block, (read, chosen) in enumerate(zip(self._read, self._chosen, strict=True))
        ]

    def __enter__(self) -> "_Recorder":
        for block in range(len(self._blocks)):
            for kind in (_INPUTS, _LOGITS, _CHOICE):
                file = _file(self._folder, kind, block).open("wb")
                self._files[kind, block] = self._stack.enter_context(file)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def chosen(self, block: int, routing: Routing) -> None:
        """Keep a choice, and the logits that it was made by."""
        experts, logits = self._blocks[block], self._blocks[block].state.logits_TE
        number, rows = experts.num_experts, len(routing.ids_TK)
        if logits is None or logits.numel() != rows * number:
            self._unknown.add(block)
            return
        mask_TE = torch.zeros(rows, number + 1, dtype=torch.bool)  # the last column is padding
        mask_TE.scatter_(1, routing.ids_TK.cpu(), True)
        self._write(_CHOICE, block, mask_TE[:, :number])
        self._write(_LOGITS, block, logits.reshape(rows, number).float())
        self._chosen[block] += rows

    def read(self, block: int, x_TD: Tensor) -> None:
        """Keep the inputs of a block."""
        name = self._blocks[block].block.name
        if not bool(x_TD.isfinite().all()):
            raise CheckpointError(
                f"the inputs of {name} are not finite on this text in {x_TD.dtype}, so that no "
                "probes can be fitted; give another --dtype"
            )
        if x_TD.shape[1] != self._width:
            raise UnsupportedModelError(
                f"no probes are fitted: {name} is given vectors of {x_TD.shape[1]} numbers, not of "
                f"the model's {self._width}; leave --probes out"
            )
        self.dtype = x_TD.dtype
        self._read[block] += len(x_TD)
        self._write(_INPUTS, block, x_TD)

    def computed(self, block: int) -> None:
        """Nothing follows the end of a block."""

    def _write(self, kind: str, block: int, tensor: Tensor) -> None:
        self._files[kind, block].write(bytes_of(tensor.contiguous().cpu()))
