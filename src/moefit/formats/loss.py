"""What encoding loses, measured on the weights themselves.

Shapes: R rows (output units), C columns.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moefit.formats.format import Weights
from moefit.formats.kernels import kernels
from moefit.formats.matrix import GroupedMatrix
from moefit.moe.families import Tensors, TensorSpec

_ROWS_AT_ONCE = 1024  # so that an expert is never decoded as a whole


def relative_error(weights: Weights, native: Tensors, specs: Mapping[str, TensorSpec]) -> float:
    """|W - W^|^2 / |W|^2 over an expert's encoded matrices; 0 where there are none."""
    lost = total = 0.0
    for short, matrix in weights.items():
        if isinstance(matrix, GroupedMatrix):
            own_RC = native[short].T if specs[short].inputs_first else native[short]
            for first in range(0, matrix.rows, _ROWS_AT_ONCE):
                part_RC = own_RC[first : first + _ROWS_AT_ONCE].float()
                total += float(part_RC.square().sum())
                lost += float((_decoded(matrix, first) - part_RC).square_().sum())
    return lost / total if total else 0.0


def _decoded(matrix: GroupedMatrix, first: int) -> Tensor:
    last = first + _ROWS_AT_ONCE
    rows = GroupedMatrix(
        matrix.bits, matrix.cols, matrix.codes_RB[first:last], matrix.meta_RMG[first:last]
    )
    compiled = kernels()
    return rows.dense() if compiled is None else compiled.decode(rows, torch.float32)
