"""What a format loses of an expert, as a share of the sum of its squared weights.

Owns the figures that the choice of precision starts from where nobody has measured the expert
itself: those of normally distributed weights, which trained experts come close to. A test measures
them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moefit.formats.format import Format, Weights
from moefit.formats.matrix import GroupedMatrix
from moefit.moe.families import Tensors, TensorSpec

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


def relative_error(weights: Weights, native: Tensors, specs: Mapping[str, TensorSpec]) -> float:
    """The encoded matrices' squared error over their sum of squares; 0 if nothing is encoded."""
    error = square = 0.0
    for short, weight in weights.items():
        if isinstance(weight, GroupedMatrix):
            own_RC = native[short].T if specs[short].inputs_first else native[short]
            own_RC = own_RC.float()
            error += _squares(weight.dense() - own_RC)
            square += _squares(own_RC)
    return error / square if square else 0.0


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def expected_error(format: Format) -> float:
    """The figure for a format, measured or not."""
    return GAUSSIAN[format.name.removesuffix("-nearest")]
