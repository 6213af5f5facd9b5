"""All experts at rest, on disk, in the checkpoint's own files.

Owns reading one expert into one slot in host memory: byte ranges straight into place where the
checkpoint's layout allows, through transformers' own conversion where it does not. Where the slot's
format is another than the checkpoint's, from the packed store if that has it, else encoded on the
way. Thread-safe. Knows nothing of when or why an expert is read, nor of devices.
"""

import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moefit.checkpoint.safetensors import Checkpoint
from moefit.checkpoint.sources import ByteRange, ExpertSource
from moefit.errors import CheckpointError
from moefit.moe.families import MoeBlock, Tensors
from moefit.quant.format import Format, NativeFormat, Weights
from moefit.serve.cache.slot import Slot, bytes_of
from moefit.serve.packed.store import PackedStore


class ExpertStore:
    """Experts by block name and number."""

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
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes read from storage since the store was made."""
        return self._bytes_read

    @property
    def staging_bytes(self) -> int:
        """The most that reading one expert holds beside its slot: its recipes' sources, twice."""
        return 2 * max(
            (
                sum(part.nbytes for part in source.parts if not isinstance(part, ByteRange))
                for sources in self._experts.values()
                for source in sources
            ),
            default=0,
        )

    def close(self) -> None:
        """Close the checkpoint's files and the packed ones."""
        self._checkpoint.close()
        self.packed.close()

    def source(self, formats: Mapping[str, Format]) -> str:
        """Where blocks get experts of these formats from, in words."""
        encoded = {b: f for b, f in formats.items() if not isinstance(f, NativeFormat)}
        if not encoded:
            return "checkpoint"
        packed = sum(self.packed.has(block, format) for block, format in encoded.items())
        if packed in (0, len(encoded)):
            return "packed" if packed else "encoded while reading"
        return f"packed, but encoded while reading in {len(encoded) - packed} of {len(encoded)}"

    def files(self, block: str, format: Format) -> set[Path]:
        """The files that a block's experts of this format are read from."""
        if not isinstance(format, NativeFormat) and self.packed.has(block, format):
            return {self.packed.path(block, format)}
        parts = [part for source in self._experts[block] for part in source.parts]
        spans = [part.span for part in parts if isinstance(part, ByteRange)]
        spans += [span for part in parts if not isinstance(part, ByteRange) for span in part.spans]
        return {span.path for span in spans}

    def read(self, block: str, expert: int, into: Slot) -> None:
        """Fill a slot in host memory. Raises CheckpointError; its content is then undefined."""
        with torch.inference_mode():  # the slot's tensors may have been made in it
            self._read(block, expert, into)

    def native(self, block: str, expert: int) -> Tensors:
        """An expert in the model's own dtypes, in memory of its own. Raises CheckpointError."""
        specs = self._blocks[block].layout.specs
        tensors = {s: torch.empty(spec.shape, dtype=spec.dtype) for s, spec in specs.items()}
        self._read_native(self._experts[block][expert], tensors)
        return tensors

    def encode(self, block: str, expert: int, native: Tensors, into: Slot) -> None:
        """Fill a slot from an expert as `native` gives it. Raises CheckpointError, naming it."""
        try:
            into.format.write(into.tensors, native, self._blocks[block].layout.specs)
        except CheckpointError as error:
            raise CheckpointError(f"expert {expert} of {block}: {error}") from error

    def _read(self, block: str, expert: int, into: Slot) -> None:
        source = self._experts[block][expert]
        count = source.nbytes
        if isinstance(into.format, NativeFormat):
            self._read_native(source, into.tensors)
        elif self.packed.has(block, into.format):
            count = self.packed.read(block, expert, into)
        else:
            self.encode(block, expert, self.native(block, expert), into)
        with self._lock:
            self._bytes_read += count

    def _read_native(self, source: ExpertSource, tensors: Weights) -> None:
        for part in source.parts:
            target = tensors[part.tensor]
            assert isinstance(target, Tensor)
            if isinstance(part, ByteRange):
                end = part.start + part.span.nbytes
                self._checkpoint.read_into(part.span, bytes_of(target)[part.start : end])
            else:
                target.copy_(part.materialize(self._checkpoint))

    def norms(self, block: str) -> list[float]:
        """The Frobenius norm of each expert's tensors taken as one vector (SwapMoE's |E_i|).

        Reads every expert of the block once.
        """
        return [self._norm(source) for source in self._experts[block]]

    def _norm(self, source: ExpertSource) -> float:
        square = 0.0
        for part in source.parts:
            value = (
                self._checkpoint.tensor(part.span)
                if isinstance(part, ByteRange)
                else part.materialize(self._checkpoint)
            )
            square += float(value.float().norm()) ** 2
        return square**0.5
