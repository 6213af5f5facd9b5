"""The memory of slots: one expert's tensors in one buffer that can be given back at once.

Owns buffers. A slot on the CPU is an anonymous mapping of its own, because memory that was freed to
the C library's heap need not return to the operating system. Knows nothing of which expert is
where.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moefit.moe.families import TensorSpec
from moefit.quant.format import Format, Weights

_HUGE = 2 << 20  # from this size on, huge pages save address translation


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Slot:
    """One expert's memory. It is given back when the last reference to the slot is gone.

    `tensors` are views into `buffer_B`, so that one copy of bytes moves a whole expert.
    """

    format: Format
    specs: Mapping[str, TensorSpec]
    buffer_B: Tensor
    tensors: Weights

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.buffer_B.nbytes

    def over(self, buffer_B: Tensor) -> "Slot":
        """A slot of the same layout in other memory, of as many bytes."""
        assert buffer_B.nbytes == self.nbytes, (buffer_B.nbytes, self.nbytes)
        return Slot(self.format, self.specs, buffer_B, self.format.bind(buffer_B, self.specs))


def allocate_slot(format: Format, specs: Mapping[str, TensorSpec], device: torch.device) -> Slot:
    """A slot whose content is undefined."""
    size = format.nbytes(specs)
    if device.type == "cpu":
        buffer_B = host_bytes(size)
    else:
        buffer_B = torch.empty(size, dtype=torch.uint8, device=device)
    return Slot(format, specs, buffer_B, format.bind(buffer_B, specs))


def host_bytes(size: int) -> Tensor:
    """Host memory of its own, zeros, that goes back to the system with the last reference."""
    return torch.frombuffer(_mapping(size), dtype=torch.uint8)


def _mapping(size: int) -> mmap.mmap:
    # Private: a shared mapping gets no huge pages, and takes thrice as long to fill.
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
