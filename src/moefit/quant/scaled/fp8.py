"""Matrices of 8-bit floats (E4M3) as checkpoints store them, with a scale per row and 128 inputs.

Codes keep the checkpoint's order. Scales of blocks, rows or whole matrices are repeated, and are
held as 256 times their value, because kernels take a code's bits for a float16, which is 1 / 256 of
its value. Everything here is plain torch and is the reference for the kernels.

Shapes: R rows, C columns, G groups of 128 columns, B bytes.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moefit.checkpoint.formats.encoding import StoredCodes
from moefit.quant.grouped_int import EncodedRows

KIND = 17  # csrc/matrix.h
GROUP = 128
_OF_A_HALF = 256.0


def fp8_bytes(rows: int, cols: int) -> tuple[int, int]:
    """Return the bytes of a matrix's codes, and of its scales."""
    return rows * cols, rows * -(-cols // GROUP) * 4


@dataclass(frozen=True, slots=True)
class Fp8Matrix(EncodedRows):
    """A matrix with weight = code * scale, in float32.

    Attributes:
        cols: C.
        codes_RB: Codes, uint8 [R, C].
        meta_RMG: 256 times the scales, float32 [R, 1, G].
    """

    cols: int
    codes_RB: Tensor
    meta_RMG: Tensor

    @classmethod
    def of(cls, cols: int, codes_B: Tensor, meta_B: Tensor) -> Self:
        """Return a matrix over flat memory of the sizes of `fp8_bytes`."""
        codes_RB = codes_B.view(-1, cols)
        return cls(cols, codes_RB, meta_B.view(torch.float32).view(len(codes_RB), 1, -1))

    @classmethod
    def empty(cls, rows: int, cols: int) -> Self:
        """Return a matrix with uninitialised memory."""
        return cls.of(
            cols, *(torch.empty(size, dtype=torch.uint8) for size in fp8_bytes(rows, cols))
        )

    @property
    def kind(self) -> int:
        """The number by which kernels know the format."""
        return KIND

    def _dense(self) -> Tensor:
        scale_RG = self.meta_RMG[:, 0] / _OF_A_HALF
        scale_RC = scale_RG.repeat_interleave(GROUP, dim=1)[:, : self.cols]
        return self.codes_RB.view(torch.float8_e4m3fn).float() * scale_RC

    def fill(self, first: int, stored: StoredCodes) -> None:
        """Fill rows from `first` on."""
        codes_RB = stored.codes_RB
        rows = slice(first, first + len(codes_RB))
        self.codes_RB[rows] = codes_RB
        starts = torch.arange(self.meta_RMG.shape[2]) * GROUP
        self.meta_RMG[rows, 0] = stored.scales_RG[:, starts // stored.group] * _OF_A_HALF
