"""Fill matrices in memory from the codes that a checkpoint stores.

Nothing is rounded: codes are reordered, and scales are repeated where a group is longer than those
of the matrix. `fill_rows` is the torch reference of the compiled kernel.

Shapes: R rows, C columns, G groups of a row, M values of metadata per group, B bytes.
"""

import torch
from torch import Tensor

from moefit.checkpoint.formats.encoding import StoredCodes
from moefit.quant.cpu_kernels import kernels
from moefit.quant.grouped_int import GROUP, SLAB, groups_of, pack, rows_of, to_slabs
from moefit.quant.scaled.matrix import HALF, ScaledMatrix, code_bits, scale_parts


def fill(matrix: ScaledMatrix, first: int, stored: StoredCodes) -> None:
    """Fill rows of a matrix in host memory.

    Args:
        matrix: Whose format the codes have.
        first: The first row to fill.
        stored: Codes and scales of as many rows as are filled.
    """
    codes_RB, meta_RMG = stored.codes_RB.contiguous(), meta_of(matrix, stored)
    assert first + len(codes_RB) <= matrix.rows
    assert codes_RB.shape[1] * 8 == matrix.cols * code_bits(matrix.stored)
    if (compiled := kernels()) is not None:
        compiled.fill(matrix, first, codes_RB, 128 if stored.signed else 0, meta_RMG)
    else:
        fill_rows(matrix, first, codes_RB ^ 128 if stored.signed else codes_RB, meta_RMG)


def fill_rows(matrix: ScaledMatrix, first: int, codes_RB: Tensor, meta_RMG: Tensor) -> None:
    """Fill rows of a matrix from unsigned codes and its metadata, row by row."""
    rows, bits, groups = len(codes_RB), code_bits(matrix.stored), groups_of(matrix.cols)
    if bits == 4:  # two in a byte, the first input below
        codes_RB = torch.stack([codes_RB & 15, codes_RB >> 4], dim=-1).flatten(1)
    padded_RC = codes_RB.new_zeros(rows, groups * GROUP)
    padded_RC[:, : codes_RB.shape[1]] = codes_RB
    packed_RB = pack(padded_RC.view(-1, GROUP), bits).view(rows, -1)
    begin = first // SLAB * SLAB
    end = min(matrix.rows, -(-(first + rows) // SLAB) * SLAB)
    codes, meta = rows_of(matrix.codes_RB, matrix.meta_RMG, torch.arange(begin, end))
    codes[first - begin : first - begin + rows] = packed_RB
    meta[first - begin : first - begin + rows] = meta_RMG
    to_slabs(codes, meta)
    matrix.codes_RB[begin:end], matrix.meta_RMG[begin:end] = codes, meta


def meta_of(matrix: ScaledMatrix, stored: StoredCodes) -> Tensor:
    """Return the metadata [R, M, G] of rows, as int16."""
    kind, groups = matrix.stored, groups_of(matrix.cols)
    scales_RG = stored.scales_RG
    bytes_only = kind.scales == "e8m0" and not kind.zeros
    if bytes_only and stored.group == HALF and scales_RG.shape[1] == 2 * groups:
        return scales_RG.contiguous().view(torch.int16)[:, None]  # they are stored just so
    starts = torch.arange(groups)[:, None] * GROUP + torch.arange(2) * HALF
    # Behind the last column there is no group; its values are not used.
    index_GH = (starts // stored.group).clamp_max(stored.scales_RG.shape[1] - 1)
    if kind.scales == "e8m0":
        parts = [_joined(stored.scales_RG[:, index_GH])]
    else:
        scale_RG = stored.scales_RG.view(torch.int16)
        parts = [scale_RG[:, index_GH[:, half]] for half in range(scale_parts(kind))]
    if kind.zeros:
        assert stored.zeros_RG is not None
        parts.append(_joined(stored.zeros_RG[:, index_GH]))
    return torch.stack(parts, dim=1).contiguous()


def _joined(bytes_RGH: Tensor) -> Tensor:
    """Return pairs of bytes, [R, G, 2], as 16 bits with the first below."""
    return bytes_RGH.contiguous().view(torch.int16)[..., 0]
