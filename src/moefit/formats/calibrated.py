"""One expert encoded with an eye on its inputs, and judged by its outputs.

Owns the order of it: the expert runs over its rows once, as the checkpoint has it; what each matrix
was given there decides how that is rounded, in every format. What a format loses is then the
squared error of the expert's output over that output's square, which is what the choice of
precision wants to know. Vectors are copied; so are matrices whose inputs could not be seen encoded
as without a calibration.

Shapes: N rows (tokens), D model width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moefit.errors import CheckpointError
from moefit.formats.compensated import encode_compensated
from moefit.formats.encoders import encode_into
from moefit.formats.format import Weights, dense_tensors
from moefit.formats.moments import Moments, moments_of
from moefit.formats.observed import inputs_of
from moefit.moe.families import Layout, Tensors


class CalibratedExpert:
    """An expert's own tensors, and the rows by which it is judged: x_ND, what each counts."""

    def __init__(self, layout: Layout, native: Tensors, x_ND: Tensor, count_N: Tensor):
        self._layout, self._native = layout, native
        self._x_ND, self._count_N = x_ND.float(), count_N
        with torch.inference_mode():
            inputs, self._y_ND = inputs_of(layout, _in_float(native), self._x_ND)
            self._moments: Mapping[str, Sequence[Moments]] = {
                short: moments_of(input_NC, count_N) for short, input_NC in inputs.items()
            }

    def encode(self, weights: Weights) -> None:
        """Fill bound tensors. Raises CheckpointError for weights that no format can hold."""
        for short, tensor in self._native.items():
            target = weights[short]
            if isinstance(target, Tensor):
                target.copy_(tensor)
                continue
            weight_RC = tensor.T if self._layout.specs[short].inputs_first else tensor
            try:
                if short in self._moments:
                    encode_compensated(target, weight_RC, self._moments[short])
                else:
                    encode_into(target, weight_RC, "fitted")
            except CheckpointError as error:
                raise CheckpointError(f"{short}: {error}") from error

    def relative_error(self, weights: Weights) -> float:
        """|y - y^|^2 / |y|^2 over the rows; 0 for an expert that gives nothing."""
        with torch.inference_mode():
            tensors = _in_float(dense_tensors(self._layout.specs, weights, torch.float32))
            off_ND = self._layout.output(tensors, self._x_ND).sub_(self._y_ND)
        square = float(self._y_ND.square().sum(-1) @ self._count_N)
        return float(off_ND.square().sum(-1) @ self._count_N) / square if square else 0.0


def _in_float(tensors: Tensors) -> Tensors:
    return {short: tensor.float() for short, tensor in tensors.items()}
