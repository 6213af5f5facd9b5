"""What a format loses of an expert, as a share of the sum of its squared weights.

Owns the figures that the choice of precision starts from where nobody has measured the expert
itself: those of normally distributed weights, which trained experts come close to. A test measures
them.

Shapes: R rows (output units), C columns, I weights of some rows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moefit.moe.families import Tensors, TensorSpec
from moefit.quant.backend import decoded
from moefit.quant.format import Format, Weights
from moefit.quant.grouped_int import GroupedMatrix

GAUSSIAN: Mapping[str, float] = {
    "int2": 1.02e-1,
    "int3": 2.72e-2,
    "int4": 6.74e-3,
    "int5": 1.63e-3,
    "int6": 4.06e-4,
    "int8": 3.45e-5,
    "native": 0.0,
}
"""Relative squared errors of `fitted` encoding, groups of 64."""
_ROWS_AT_ONCE = 256  # few enough to stay in the processor's cache


def relative_error(weights: Weights, native: Tensors, specs: Mapping[str, TensorSpec]) -> float:
    """The encoded matrices' squared error over their sum of squares; 0 if nothing is encoded."""
    error = square = 0.0
    for short, matrix in weights.items():
        if isinstance(matrix, GroupedMatrix):
            own_RC = native[short].T if specs[short].inputs_first else native[short]
            for first in range(0, matrix.rows, _ROWS_AT_ONCE):
                part_RC = own_RC[first : first + _ROWS_AT_ONCE].float()
                square += _squares(part_RC)
                error += _squares(_decoded(matrix, first).sub_(part_RC))
    return error / square if square else 0.0


def _squares(part_RC: Tensor) -> float:
    part_I = part_RC.flatten()
    return float(part_I @ part_I)


def _decoded(matrix: GroupedMatrix, first: int) -> Tensor:
    last = first + _ROWS_AT_ONCE
    rows = GroupedMatrix(
        matrix.bits, matrix.cols, matrix.codes_RB[first:last], matrix.meta_RMG[first:last]
    )
    return decoded(rows, torch.float32)


def expected_error(format: Format) -> float:
    """The figure for a format, measured or not."""
    return GAUSSIAN[format.name.removesuffix("-nearest")]
