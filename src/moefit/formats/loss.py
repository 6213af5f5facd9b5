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

_ROWS_AT_ONCE = 256  # few enough to stay in the processor's cache


def relative_error(weights: Weights, native: Tensors, specs: Mapping[str, TensorSpec]) -> float:
    """|W - W^|^2 / |W|^2 over an expert's encoded matrices; 0 where there are none."""
    lost = total = 0.0
    for short, matrix in weights.items():
        if isinstance(matrix, GroupedMatrix):
            own_RC = native[short].T if specs[short].inputs_first else native[short]
            for first in range(0, matrix.rows, _ROWS_AT_ONCE):
                part_RC = own_RC[first : first + _ROWS_AT_ONCE].float()
                total += _square(part_RC)
                lost += _square(_decoded(matrix, first).sub_(part_RC))
    return lost / total if total else 0.0


def _square(part_RC: Tensor) -> float:
    part_I = part_RC.flatten()
    return float(part_I @ part_I)


def _decoded(matrix: GroupedMatrix, first: int) -> Tensor:
    last = first + _ROWS_AT_ONCE
    rows = GroupedMatrix(
        matrix.bits, matrix.cols, matrix.codes_RB[first:last], matrix.meta_RMG[first:last]
    )
    compiled = kernels()
    return rows.dense() if compiled is None else compiled.decode(rows, torch.float32)
