"""What each matrix of an expert is given, while the family's own code computes the expert.

Owns the listening: products with one of the expert's matrices are recognised by the matrix itself,
so that no layout need be known. A matrix that takes part in no product that can be recognised is
left out of the answer.

Shapes: N tokens, D model width, C input units of a matrix.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moefit.moe.families import Layout, Tensors

_PRODUCTS = (F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)


def inputs_of(
    layout: Layout, tensors: Tensors, x_ND: Tensor
) -> tuple[Mapping[str, Tensor], Tensor]:
    """The inputs [N, C] of each matrix by short name, and the expert's output [N, D]."""
    with _Listening(tensors) as heard:
        y_ND = layout.output(tensors, x_ND)
    return heard.inputs, y_ND


class _Listening(TorchFunctionMode):
    """Keeps the left side of products whose right side is one of `tensors`."""

    def __init__(self, tensors: Tensors):
        super().__init__()
        self._names = {id(tensor): short for short, tensor in tensors.items() if tensor.dim() == 2}
        self.inputs: dict[str, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS and len(args) > 1:
            short = self._names.get(id(args[1]))
            if short is not None:
                self.inputs[short] = args[0].detach().reshape(-1, args[0].shape[-1])
        return func(*args, **(kwargs or {}))
