"""Allocate slots: the memory of one expert's tensors in one buffer.

A CPU slot is an anonymous mapping of its own, because memory freed to the C library's heap need not
return to the operating system.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moefit.moe.families import TensorSpec
from moefit.quant.format import Format, Weights

_HUGE = 2 << 20  # bytes; from here on huge pages reduce address translation


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Slot:
    """Memory for one expert, freed with the last reference to the slot.

    Args:
        format: How the expert's matrices are stored.
        specs: Shapes and dtypes of the expert's tensors, by name.
        buffer_B: All bytes; one copy of this buffer moves the whole expert.
        tensors: Views into `buffer_B`.
    """

    format: Format
    specs: Mapping[str, TensorSpec]
    buffer_B: Tensor
    tensors: Weights

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer_B.nbytes

    def over(self, buffer_B: Tensor) -> "Slot":
        """Return a slot of the same format over another buffer of the same size."""
        assert buffer_B.nbytes == self.nbytes, (buffer_B.nbytes, self.nbytes)
        return Slot(self.format, self.specs, buffer_B, self.format.bind(buffer_B, self.specs))


def allocate_slot(format: Format, specs: Mapping[str, TensorSpec], device: torch.device) -> Slot:
    """Return a slot with undefined content. Raises OSError if there is no memory."""
    size = format.nbytes(specs)
    if device.type == "cpu":
        buffer_B = host_bytes(size)
    else:
        buffer_B = torch.empty(size, dtype=torch.uint8, device=device)
    return Slot(format, specs, buffer_B, format.bind(buffer_B, specs))


def host_bytes(size: int) -> Tensor:
    """Return zeroed host memory in a mapping of its own, unmapped with the last reference."""
    return torch.frombuffer(_mapping(size), dtype=torch.uint8)


def _mapping(size: int) -> mmap.mmap:
    # Private, because a shared mapping gets no huge pages and takes three times as long to fill.
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
