"""Weight matrices in grouped integers: codes in bit planes, with a scale and a minimum per group.

Defines the memory layout that every kernel reads, and `EncodedRows`, what these matrices have in
common with those of a checkpoint's own codes (`scaled/`). A row is divided into groups of 64
weights; each group has its codes packed in bit planes, one scale and, for asymmetric formats, one
minimum.
Everything here is plain torch and serves as the reference for the compiled kernels.

Shapes: R rows, C columns, G groups of a row, N groups, B bytes, M values of metadata per group.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor

GROUP = 64
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def pack(codes_NG: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [N, 64] into bit planes [N, bits * 8]."""
    planes, below = [], 0
    for width in PLANES[bits]:
        field_NG = (codes_NG >> below) & ((1 << width) - 1)
        planes.append(_pack_fields(field_NG, width))
        below += width
    return torch.cat(planes, dim=1)


def unpack(bytes_NB: Tensor, bits: int) -> Tensor:
    """Unpack bit planes [N, bits * 8] into codes [N, 64]; the inverse of `pack`."""
    codes_NG = bytes_NB.new_zeros(len(bytes_NB), GROUP)
    start, below = 0, 0
    for width in PLANES[bits]:
        plane_NB = bytes_NB[:, start : start + width * 8]
        field_NG = _unpack_fields(plane_NB, width)
        codes_NG |= field_NG << below
        start, below = start + width * 8, below + width
    return codes_NG


def _pack_fields(field_NG: Tensor, width: int) -> Tensor:
    parts = field_NG.view(len(field_NG), 8 // width, width * 8).unbind(1)
    packed_NB = torch.zeros_like(parts[0])
    for index, part_NB in enumerate(parts):
        packed_NB |= part_NB << index * width
    return packed_NB


def _unpack_fields(plane_NB: Tensor, width: int) -> Tensor:
    shifts = range(0, 8, width)
    return torch.cat([(plane_NB >> shift) & ((1 << width) - 1) for shift in shifts], dim=1)


SLAB = 16  # rows that are interleaved
ROWS_AT_ONCE = 256  # limits the memory that encoding and decoding need besides the matrix


class EncodedRows(ABC):
    """What matrices of codes and metadata have in common.

    Attributes:
        codes_RB: Codes, uint8.
        meta_RMG: Metadata.
    """

    __slots__ = ()
    codes_RB: Tensor
    meta_RMG: Tensor
    cols: int

    @property
    def rows(self) -> int:
        """R."""
        return len(self.codes_RB)

    @property
    @abstractmethod
    def kind(self) -> int:
        """The number by which kernels know the format (csrc/matrix.h)."""

    def split(self, rows: int = ROWS_AT_ONCE) -> Iterator[Self]:
        """Yield views of `rows` rows each, a multiple of 16."""
        assert rows % SLAB == 0
        parts = self.codes_RB.split(rows), self.meta_RMG.split(rows)
        for codes_RB, meta_RMG in zip(*parts, strict=True):
            yield replace(cast(Any, self), codes_RB=codes_RB, meta_RMG=meta_RMG)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [R, C], decoded in torch; the reference for every kernel."""
        weight_RC = torch.empty(self.rows, self.cols, dtype=dtype, device=self.codes_RB.device)
        for part, target_RC in zip(self.split(), weight_RC.split(ROWS_AT_ONCE), strict=True):
            target_RC.copy_(part._dense())
        return weight_RC

    @abstractmethod
    def _dense(self) -> Tensor:
        """Return the weights in float32."""


@dataclass(frozen=True, slots=True)
class GroupedMatrix(EncodedRows):
    """A matrix with weight = scale * code + minimum; with 8 bits, weight = scale * (code - 128).

    Codes and metadata are interleaved in slabs of 16 rows, so only slices of whole slabs are valid.

    Attributes:
        bits: Bits per code.
        cols: C.
        codes_RB: Codes in bit planes, uint8 [R, G * bits * 8].
        meta_RMG: Scales and then minima, float16 [R, 2, G]; only scales, [R, 1, G], with 8 bits.
    """

    bits: int
    cols: int
    codes_RB: Tensor
    meta_RMG: Tensor

    @classmethod
    def empty(cls, rows: int, cols: int, bits: int) -> Self:
        """Return a matrix with uninitialised memory."""
        codes_RB = torch.empty(rows, groups_of(cols) * bits * GROUP // 8, dtype=torch.uint8)
        meta_shape = rows, meta_per_group(bits), groups_of(cols)
        return cls(bits, cols, codes_RB, torch.empty(meta_shape, dtype=torch.float16))

    @classmethod
    def from_rows(cls, bits: int, cols: int, codes_RB: Tensor, meta_RMG: Tensor) -> Self:
        """Return a matrix of consecutive rows, which are interleaved into slabs in place."""
        to_slabs(codes_RB, meta_RMG)
        return cls(bits, cols, codes_RB, meta_RMG)

    @property
    def kind(self) -> int:
        """The number by which kernels know the format: the bits per code."""
        return self.bits

    def by_row(self, ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return copies of codes and metadata in row-major order, of all rows or of `ids_T`."""
        return rows_of(self.codes_RB, self.meta_RMG, ids_T)

    def take(self, ids_T: Tensor) -> "GroupedMatrix":
        """Return a matrix of these rows, copied."""
        return GroupedMatrix.from_rows(self.bits, self.cols, *self.by_row(ids_T))

    def _dense(self) -> Tensor:
        groups = groups_of(self.cols)
        codes_RB, meta_RMG = self.by_row()
        codes = unpack(codes_RB.reshape(self.rows * groups, self.bits * 8), self.bits)
        code_RGI = codes.view(self.rows, groups, GROUP).float()
        scale_RG1 = meta_RMG[:, 0, :, None].float()
        min_RG1 = -128 * scale_RG1 if self.bits == 8 else meta_RMG[:, 1, :, None].float()
        value_RGI = code_RGI * scale_RG1 + min_RG1
        return value_RGI.flatten(1)[:, : self.cols]


def to_slabs(codes_RB: Tensor, meta_RMG: Tensor) -> None:
    """Interleave consecutive rows into slabs of 16, in place; rows after the last slab remain."""
    whole = len(codes_RB) // SLAB * SLAB
    if not whole:
        return
    codes_RW = codes_RB[:whole].view(torch.int32)
    before = codes_RW.clone().view(-1, SLAB, codes_RW.shape[1])
    codes_RW.copy_(before.transpose(1, 2).reshape(codes_RW.shape))
    meta = meta_RMG[:whole]
    before = meta.clone().view(-1, SLAB, *meta.shape[1:])
    meta.copy_(before.permute(0, 3, 2, 1).reshape(meta.shape))


def rows_of(
    codes_RB: Tensor, meta_RMG: Tensor, ids_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return copies of rows in row-major order: the inverse of `to_slabs`.

    Args:
        codes_RB: Codes in slabs.
        meta_RMG: Metadata of 16 bits in slabs.
        ids_T: The rows; None for all.
    """
    rows, meta, groups = meta_RMG.shape
    if ids_T is None:
        ids_T = torch.arange(rows, device=codes_RB.device)
    codes_RW = codes_RB.view(torch.int32)
    codes_TW = _rows_of_slabs(codes_RW, ids_T)
    meta_TH = _rows_of_slabs(meta_RMG.reshape(rows, groups * meta), ids_T)
    tail_T = ids_T >= rows // SLAB * SLAB
    meta_TMG = meta_TH.view(len(ids_T), groups, meta).transpose(1, 2).contiguous()
    codes_TW[tail_T] = codes_RW[ids_T[tail_T]]
    meta_TMG[tail_T] = meta_RMG[ids_T[tail_T]]
    return codes_TW.view(torch.uint8), meta_TMG


def _rows_of_slabs(units_RU: Tensor, ids_T: Tensor) -> Tensor:
    """Return rows of U units from slabs, [T, U]; rows after the last slab are undefined."""
    rows, width = units_RU.shape
    whole = rows // SLAB * SLAB
    if not whole:
        return units_RU.new_zeros(len(ids_T), width)
    slab_SUL = units_RU[:whole].reshape(-1, width, SLAB)
    ids_T = ids_T.clamp_max(whole - 1)
    return slab_SUL[ids_T // SLAB, :, ids_T % SLAB]


def groups_of(cols: int) -> int:
    """Return the number of groups per row."""
    return -(-cols // GROUP)


def meta_per_group(bits: int) -> int:
    """Return the number of float16 values per group: a scale and, below 8 bits, a minimum."""
    return 1 if bits == 8 else 2


def codes_bytes(rows: int, cols: int, bits: int) -> int:
    """Return the bytes of a matrix's codes."""
    return rows * groups_of(cols) * bits * GROUP // 8


def meta_bytes(rows: int, cols: int, bits: int) -> int:
    """Return the bytes of a matrix's scales and minima."""
    return rows * groups_of(cols) * meta_per_group(bits) * 2


def bits_per_weight(bits: int) -> float:
    """Return the bits per weight, including scales and minima.

    >>> bits_per_weight(4), bits_per_weight(8)
    (4.5, 8.25)
    """
    return bits + meta_per_group(bits) * 16 / GROUP
