"""Read experts from storage into slots in host memory.

What is packed is read as it is. From the checkpoint, byte ranges are read directly into the slot
where the layout allows it, and codes of a quantised one are copied as they are where slots can hold
them; other layouts go through transformers' own conversion. Experts in formats of integers are then
encoded.
"""

import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moefit.checkpoint.safetensors import Checkpoint
from moefit.checkpoint.sources import ExpertSource, Targets
from moefit.errors import CheckpointError
from moefit.moe.families import MoeBlock, Tensors
from moefit.quant.format import Format
from moefit.quant.scaled.held import FilledMatrix, HeldMatrix
from moefit.serve.cache.slot import Slot
from moefit.serve.packed.store import PackedStore


class ExpertStore:
    """All experts of a checkpoint, by block name and number. Thread-safe.

    `bytes_read` counts the bytes read from storage so far.

    Args:
        checkpoint: The model's files.
        experts: By block name, where each expert's bytes are.
        blocks: The MoE blocks by name.
        packed: Experts that were written as slots hold them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: Mapping[str, tuple[ExpertSource, ...]],
        blocks: Mapping[str, MoeBlock],
        packed: PackedStore | None = None,
    ):
        self._checkpoint, self._experts, self._blocks = checkpoint, experts, blocks
        self.packed = packed or PackedStore({})
        self._lock = threading.Lock()
        self.bytes_read = 0

    @property
    def staging_bytes(self) -> int:
        """Upper bound on the bytes besides the slot while one expert is read."""
        sources = (source for sources in self._experts.values() for source in sources)
        return max((source.staging_bytes for source in sources), default=0)

    def close(self) -> None:
        """Close the files of the checkpoint and of the packed store."""
        self._checkpoint.close()
        self.packed.close()

    def source(self, formats: Mapping[str, Format]) -> str:
        """Return where experts come from, as text for reports.

        Args:
            formats: By block name, the format of its slots.
        """
        encoded = {block: format for block, format in formats.items() if format.is_encoded}
        otherwise = "encoded while reading" if encoded else "checkpoint"
        asked = encoded or formats
        missing = sum(not self.packed.has(block, format) for block, format in asked.items())
        if missing == len(asked):
            return otherwise
        if not missing:
            return "packed"
        how = otherwise if encoded else f"from the {otherwise}"
        return f"packed, but {how} in {missing} of {len(asked)}"

    def files(self, block: str, format: Format) -> set[Path]:
        """Return the files from which a block's experts of this format are read."""
        if self.packed.has(block, format):
            return {self.packed.path(block, format)}
        return {span.path for source in self._experts[block] for span in source.spans}

    @torch.inference_mode()  # the slot may have been allocated in it
    def read(self, block: str, expert: int, into: Slot) -> None:
        """Fill a slot in host memory.

        Raises:
            CheckpointError: The expert cannot be read; the slot's content is then undefined.
        """
        source = self._experts[block][expert]
        count = source.nbytes
        if self.packed.has(block, into.format):
            count = self.packed.read(block, expert, into)
        elif not into.format.is_encoded:
            source.read_into(self._checkpoint, _targets(into))
        else:
            self.encode(block, expert, self.native(block, expert), into)
        with self._lock:
            self.bytes_read += count

    def native(self, block: str, expert: int) -> Tensors:
        """Return an expert in the model's dtypes, in new tensors. Raises CheckpointError."""
        specs = self._blocks[block].layout.specs
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        self._experts[block][expert].read_into(self._checkpoint, tensors)
        return tensors

    def encode(self, block: str, expert: int, native: Tensors, into: Slot) -> None:
        """Encode an expert that `native` returned into a slot.

        Raises:
            CheckpointError: It cannot be encoded; the message names the expert.
        """
        try:
            into.format.encode(into.tensors, native, self._blocks[block].layout.specs)
        except CheckpointError as error:
            raise CheckpointError(f"expert {expert} of {block}: {error}") from error

    def norms(self, block: str) -> list[float]:
        """Return the Frobenius norm of each expert over all its tensors (SwapMoE's |E_i|).

        Reads every expert of the block once.
        """
        return [
            sum(float(one.float().norm()) ** 2 for one in source.values(self._checkpoint)) ** 0.5
            for source in self._experts[block]
        ]


def _targets(slot: Slot) -> Targets:
    """Return what a source fills in a slot of the checkpoint's own format."""
    targets: dict[str, Tensor | FilledMatrix] = {}
    for short, weight in slot.tensors.items():
        if isinstance(weight, Tensor):
            targets[short] = weight
        else:
            assert isinstance(weight, HeldMatrix), "not of the checkpoint's own format"
            targets[short] = FilledMatrix(weight)
    return targets
