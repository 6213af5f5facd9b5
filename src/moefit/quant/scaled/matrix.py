"""Matrices of a checkpoint's own codes and scales, in the order in which kernels read them.

Codes of 4 bits lie as those of int4 in `grouped_int.py`, codes of 8 bits as those of int8, and rows
in the same slabs of 16. Per group of 64 inputs there are values of 16 bits: a scale, or one for
each half; or the two exponents of E8M0, a byte each; then, if there are zero points, those of both
halves, a byte each. Everything here is plain torch and is the reference for the compiled kernels.

Shapes: R rows, C columns, G groups of a row, B bytes, M values of metadata per group.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moefit.moe.families import ScaledCodes
from moefit.quant.grouped_int import GROUP, EncodedRows, groups_of, rows_of, unpack

HALF = 32  # inputs of half a group
CODES = ("e2m1", "int4", "int8")
SCALES = ("e8m0", "float16", "bfloat16")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ZERO = {"e2m1": 0, "int4": 8, "int8": 128}  # where none is stored


def kind_of(codes: ScaledCodes) -> int:
    """Return the number by which kernels know a format (csrc/scaled/kinds.h)."""
    kind = 64 + CODES.index(codes.codes) + 4 * SCALES.index(codes.scales)
    return kind + 16 * (codes.group == HALF) + 32 * codes.zeros


def code_bits(codes: ScaledCodes) -> int:
    """Return the bits of a code."""
    return 8 if codes.codes == "int8" else 4


def scale_parts(codes: ScaledCodes) -> int:
    """Return the values of 16 bits that hold a group's scales."""
    return 1 if codes.scales == "e8m0" or codes.group == GROUP else 2


def meta_parts(codes: ScaledCodes) -> int:
    """Return the values of 16 bits of metadata per group: scales and zero points."""
    return scale_parts(codes) + codes.zeros


def scaled_bytes(rows: int, cols: int, codes: ScaledCodes) -> tuple[int, int]:
    """Return the bytes of a matrix's codes, and of its metadata."""
    groups = rows * groups_of(cols)
    return groups * code_bits(codes) * GROUP // 8, groups * meta_parts(codes) * 2


@dataclass(frozen=True, slots=True)
class ScaledMatrix(EncodedRows):
    """A matrix with weight = scale * (value of code - zero).

    Codes and metadata are interleaved in slabs of 16 rows, so only slices of whole slabs are valid.

    Attributes:
        stored: The format.
        cols: C.
        codes_RB: Codes, uint8.
        meta_RMG: Scales and zero points, int16 [R, M, G].
    """

    stored: ScaledCodes
    cols: int
    codes_RB: Tensor
    meta_RMG: Tensor

    @classmethod
    def of(cls, stored: ScaledCodes, cols: int, codes_B: Tensor, meta_B: Tensor) -> Self:
        """Return a matrix over flat memory of the sizes of `scaled_bytes`."""
        row_bytes = groups_of(cols) * code_bits(stored) * GROUP // 8
        codes_RB = codes_B.view(-1, row_bytes)
        shape = len(codes_RB), meta_parts(stored), groups_of(cols)
        return cls(stored, cols, codes_RB, meta_B.view(torch.int16).view(shape))

    @classmethod
    def empty(cls, rows: int, cols: int, stored: ScaledCodes) -> Self:
        """Return a matrix with uninitialised memory."""
        sizes = scaled_bytes(rows, cols, stored)
        return cls.of(stored, cols, *(torch.empty(size, dtype=torch.uint8) for size in sizes))

    @property
    def kind(self) -> int:
        """The number by which kernels know the format."""
        return kind_of(self.stored)

    def _dense(self) -> Tensor:
        groups, kind = groups_of(self.cols), self.stored
        codes_RB, meta_RMG = rows_of(self.codes_RB, self.meta_RMG)
        codes_NB = codes_RB.reshape(self.rows * groups, -1)
        code_RGHI = unpack(codes_NB, code_bits(kind)).view(self.rows, groups, 2, HALF)
        if kind.codes == "e2m1":
            table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes_RB.device)
            value_RGHI = table[code_RGHI.int()]
        else:
            value_RGHI = code_RGHI.float() - self._zeros(meta_RMG)
        value_RGHI = value_RGHI * self._scales(meta_RMG)
        return value_RGHI.reshape(self.rows, groups * GROUP)[:, : self.cols]

    def _scales(self, meta_RMG: Tensor) -> Tensor:
        """Return float32 scales of halves of groups, [R, G, H, 1]."""
        if self.stored.scales == "e8m0":
            exponents_RGH = _two_bytes(meta_RMG[:, 0])
            # 2^-127 has no exponent of its own in float32.
            words = (exponents_RGH.int() << 23).clamp_min(1 << 22)
            return words.view(torch.float32)[..., None]
        dtype = torch.float16 if self.stored.scales == "float16" else torch.bfloat16
        scale_RHG = meta_RMG[:, : scale_parts(self.stored)].contiguous().view(dtype).float()
        return scale_RHG.transpose(1, 2)[..., None]

    def _zeros(self, meta_RMG: Tensor) -> Tensor:
        """Return zero points in float32, [R, G, H, 1], or one for all."""
        if not self.stored.zeros:
            return torch.tensor(float(_ZERO[self.stored.codes]), device=meta_RMG.device)
        return _two_bytes(meta_RMG[:, -1]).float()[..., None]


def _two_bytes(words_RG: Tensor) -> Tensor:
    """Return the lower and the upper byte of 16 bits, [R, G, 2]."""
    return words_RG.contiguous()[..., None].view(torch.uint8)
