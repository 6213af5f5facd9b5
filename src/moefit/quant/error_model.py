"""Errors of encoded weights, measured and expected.

An error is the sum of squared differences as a fraction of the sum of squared weights. `GAUSSIAN`
holds the values for normally distributed weights, which trained experts are close to; a test
measures them. They are used wherever the error of the expert itself has not been measured.

Shapes: R rows (output units), C columns (input units), I weights of some rows.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moefit.quant.backend import decoded
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
"""By format name, with the `fitted` encoder and groups of 64."""
_CHUNK_ROWS = 256  # small enough for the processor's cache


def relative_error(matrices: Iterable[tuple[GroupedMatrix, Tensor]]) -> float:
    """Return the squared error of encoded matrices, divided by the sum of squared weights.

    Args:
        matrices: Pairs of an encoded matrix and its original weights [R, C].

    Returns:
        |W - W^|^2 / |W|^2 over all matrices together; 0 if there are none.
    """
    error = square = 0.0
    for matrix, weight_RC in matrices:
        chunks = zip(matrix.split(_CHUNK_ROWS), weight_RC.split(_CHUNK_ROWS), strict=True)
        for chunk, part_RC in chunks:
            chunk_RC = part_RC.float()
            square += _sum_of_squares(chunk_RC)
            error += _sum_of_squares(decoded(chunk, torch.float32).sub_(chunk_RC))
    return error / square if square else 0.0


def _sum_of_squares(chunk_RC: Tensor) -> float:
    chunk_I = chunk_RC.flatten()
    return float(chunk_I @ chunk_I)
