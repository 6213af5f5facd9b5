"""What formats share: codes become values by look-up, and are multiplied by a grid of scales.

A grid [r, c] belongs to a matrix [R, C] in blocks of (rows, columns): one scale for the matrix, one
per row, one per group of a row's columns, or one per two-dimensional block. The last block of a row
or column may be shorter.

Shapes: R rows, C columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from moefit.checkpoint.formats.encoding import CHUNK
from moefit.errors import CheckpointError

Block = tuple[int, int]
"""Rows and columns that share a scale."""
Operation = Callable[[Tensor, Tensor], Any]
"""Such as `Tensor.mul_`."""
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)])
"""Values of the 4-bit float E2M1 by code."""
FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""Values of the 8-bit float E4M3 by code."""


def values_in_bytes(values: Tensor) -> Tensor:
    """Return a table of the values in each byte, the lowest bits first.

    Args:
        values: Value of each code of 2, 4 or 8 bits, in float32.

    Returns:
        256 entries; several values are viewed as one number, which a look-up copies as it is.
    """
    bits = len(values).bit_length() - 1
    codes = torch.arange(256)
    shifts = range(0, 8, bits)
    found = torch.stack([values[codes >> shift & len(values) - 1] for shift in shifts], dim=1)
    whole = {8: torch.float32, 4: torch.float64, 2: torch.complex128}[bits]
    return found.view(whole).view(-1)


def look_up(table: Tensor, bytes_RB: Tensor) -> Tensor:
    """Return the float32 values [R, B * n] of bytes [R, B], by a table of n values per byte.

    torch converts 8-bit floats one by one; a look-up takes a quarter of the time.
    """
    found = table.index_select(0, bytes_RB.reshape(-1).int())
    return found.view(bytes_RB.shape).view(torch.float32)


def row_chunks(rows: int, cols: int) -> Iterator[slice]:
    """Yield slices of rows that hold a bounded number of values.

    >>> [(one.start, one.stop) for one in row_chunks(5, 1 << 16)]
    [(0, 2), (2, 4), (4, 5)]
    """
    size = max(1, CHUNK // max(1, cols))
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))


def held_group(group: int, cols: int) -> int | None:
    """Return the `group` of `ScaledCodes` for groups of so many columns; None if none fits.

    >>> held_group(32, 96), held_group(128, 256), held_group(96, 96), held_group(16, 64)
    (32, 64, 64, None)
    """
    if group >= cols or group % 64 == 0:
        return 64
    return 32 if group % 32 == 0 else None


HELD_SCALES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""Names in `ScaledCodes` of the dtypes of scales."""


def grid_shape(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """Return the shape of a grid of scales.

    >>> grid_shape((576, 7168), (128, 128))
    (5, 56)
    """
    return ceil(shape[0] / block[0]), ceil(shape[1] / block[1])


def scale_values(scales: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents with a bias of 127 (E8M0)."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).to(
        torch.float32
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """One number per block of a matrix [R, C].

    Attributes:
        values_rc: The numbers, in float32.
        row_of: For each of R rows, its row in the grid.
        width: Columns of the matrix per column of the grid.
        column_of: For each of C columns, its column in the grid, if they are not consecutive.
    """

    values_rc: Tensor
    row_of: Tensor
    width: int
    column_of: Tensor | None = None

    @classmethod
    def of_blocks(cls, values_rc: Tensor, shape: tuple[int, int], block: Block) -> "Grid":
        """Return the grid of a matrix of this shape that is divided into equal blocks."""
        rows = torch.arange(shape[0]) // block[0]
        return cls(values_rc=values_rc.view(grid_shape(shape, block)), row_of=rows, width=block[1])

    def apply(self, operation: Operation, values_RC: Tensor, rows: slice) -> None:
        """Apply an in-place operation to some rows of the matrix and their numbers."""
        count, cols = values_RC.shape
        numbers_Rc = self.values_rc[self.row_of[rows]]
        if self.column_of is not None:
            operation(values_RC, numbers_Rc[:, self.column_of])
        elif cols == numbers_Rc.shape[1] * self.width:
            operation(values_RC.view(count, -1, self.width), numbers_Rc[..., None])
        else:
            operation(values_RC, numbers_Rc.repeat_interleave(self.width, dim=1)[:, :cols])

    def any_nonzero(self, values_RC: Tensor) -> Tensor:
        """Return for each number whether any value of its block is not zero."""
        (_, cols), (_, c) = values_RC.shape, self.values_rc.shape
        column_of = self.column_of
        if column_of is None:
            column_of = torch.arange(cols) // self.width
        used_Rc = torch.zeros(len(values_RC), c).index_add_(1, column_of, (values_RC != 0).float())
        return torch.zeros_like(self.values_rc).index_add_(0, self.row_of, used_Rc) > 0


def scale_into(
    out: Tensor,
    values: Callable[[slice], Tensor],
    scales: Grid,
    rounded: torch.dtype = torch.float32,
) -> None:
    """Write `values * scales` to a matrix.

    Args:
        out: The matrix [R, C].
        values: Returns the unscaled values of some rows, in new memory, in float32.
        scales: One per block.
        rounded: The dtype in which the format multiplies, if the matrix is of another.

    Raises:
        CheckpointError: A scale is not finite, or zero where values are not.
    """
    _check(scales, values, out.shape[0])
    rows, cols = out.shape
    for chunk in row_chunks(rows, cols):
        product = values(chunk)
        scales.apply(Tensor.mul_, product, chunk)
        out[chunk] = product if rounded in (torch.float32, out.dtype) else product.to(rounded)


def _check(scales: Grid, values: Callable[[slice], Tensor], rows: int) -> None:
    """Raise CheckpointError for scales that cannot be meant."""
    if not bool(scales.values_rc.isfinite().all()):
        raise CheckpointError("it has scales that are not finite")
    zero = scales.values_rc == 0
    # Rare, so that no memory is reserved for all values at once.
    if bool(zero.any()) and bool((scales.any_nonzero(values(slice(0, rows))) & zero).any()):
        raise CheckpointError("it has scales of zero for values that are not zero")
