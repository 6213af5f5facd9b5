"""A weight matrix of small integers with a scale and a minimum for every 64 of a row.

Owns its shape in bytes and its decoding, which says what the kernels must compute. Rows are output
units. A row that is no multiple of 64 long is padded; padding decodes to whatever, and is cut off.

Shapes: R rows, C columns, G groups a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moefit.formats.planes import GROUP, unpack

ROWS_AT_ONCE = 256  # so that what encoding and decoding hold beside a matrix stays small


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """weight = scale * code + minimum; with 8 bits, weight = scale * (code - 128).

    codes_RB: uint8 [R, G * bits * 8]. meta_RMG: float16 [R, 2, G], scales and then minima;
    [R, 1, G] with 8 bits.
    """

    bits: int
    cols: int
    codes_RB: Tensor
    meta_RMG: Tensor

    @classmethod
    def empty(cls, rows: int, cols: int, bits: int) -> Self:
        """One to be filled."""
        codes_RB = torch.empty(rows, groups_of(cols) * bits * GROUP // 8, dtype=torch.uint8)
        meta_shape = rows, meta_per_group(bits), groups_of(cols)
        return cls(bits, cols, codes_RB, torch.empty(meta_shape, dtype=torch.float16))

    @property
    def rows(self) -> int:
        """R."""
        return len(self.codes_RB)

    def split(self, rows: int = ROWS_AT_ONCE) -> "Iterator[GroupedMatrix]":
        """Views of so many rows each."""
        parts = self.codes_RB.split(rows), self.meta_RMG.split(rows)
        for codes_RB, meta_RMG in zip(*parts, strict=True):
            yield GroupedMatrix(self.bits, self.cols, codes_RB, meta_RMG)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [R, C]: the plain way, which every kernel is compared with."""
        weight_RC = torch.empty(self.rows, self.cols, dtype=dtype, device=self.codes_RB.device)
        for part, target_RC in zip(self.split(), weight_RC.split(ROWS_AT_ONCE), strict=True):
            target_RC.copy_(part._dense())
        return weight_RC

    def _dense(self) -> Tensor:
        groups = groups_of(self.cols)
        codes = unpack(self.codes_RB.reshape(self.rows * groups, -1), self.bits)
        code_RGI = codes.view(self.rows, groups, GROUP).float()
        scale_RG1 = self.meta_RMG[:, 0, :, None].float()
        least_RG1 = -128 * scale_RG1 if self.bits == 8 else self.meta_RMG[:, 1, :, None].float()
        value_RGI = code_RGI * scale_RG1 + least_RG1
        return value_RGI.flatten(1)[:, : self.cols]


def groups_of(cols: int) -> int:
    """G."""
    return -(-cols // GROUP)


def meta_per_group(bits: int) -> int:
    """Numbers of 16 bits beside each group's codes."""
    return 1 if bits == 8 else 2


def codes_bytes(rows: int, cols: int, bits: int) -> int:
    """Bytes of the codes of a matrix."""
    return rows * groups_of(cols) * bits * GROUP // 8


def meta_bytes(rows: int, cols: int, bits: int) -> int:
    """Bytes of the scales and minima of a matrix."""
    return rows * groups_of(cols) * meta_per_group(bits) * 2


def bits_per_weight(bits: int) -> float:
    """What a weight takes, scales included.

    >>> bits_per_weight(4), bits_per_weight(8)
    (4.5, 8.25)
    """
    return bits + meta_per_group(bits) * 16 / GROUP
