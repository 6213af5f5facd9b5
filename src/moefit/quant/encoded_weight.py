"""The weight of an encoded layer, for families whose code reads `layer.weight`.

Most of them only ask for its dtype or device, at each step, so nothing is decoded for that. An
operation decodes the whole matrix, and frees it afterwards.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moefit.quant.backend import decoded
from moefit.quant.grouped_int import GroupedMatrix
from moefit.quant.scaled.held import HeldMatrix


class EncodedWeight(Tensor):
    """A matrix in codes that acts as a tensor of the values that they stand for."""

    _matrix: GroupedMatrix | HeldMatrix
    __torch_function__ = cast(Any, torch._C._disabled_torch_function_impl)

    @staticmethod
    def of(matrix: GroupedMatrix | HeldMatrix, dtype: torch.dtype) -> "EncodedWeight":
        """Return a matrix as a tensor of a dtype."""
        weight = torch.Tensor._make_wrapper_subclass(
            EncodedWeight,
            (matrix.rows, matrix.cols),
            dtype=dtype,
            device=matrix.codes_RB.device,
        )
        assert isinstance(weight, EncodedWeight)
        weight._matrix = matrix
        return weight

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute with the decoded values."""
        args, kwargs = pytree.tree_map_only(EncodedWeight, _values, (args, kwargs or {}))
        return func(*args, **cast(dict[str, Any], kwargs))


def _values(weight: EncodedWeight) -> Tensor:
    return decoded(weight._matrix, weight.dtype)
