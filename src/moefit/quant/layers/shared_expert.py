"""An expert that every token passes through, and functions of each element, by the kernels.

down(silu(gate(x)) * up(x)), times sigmoid(factor(x)) where there is such a factor, is added to the
sum of the routed experts. `plain_shared_expert` is the reference in torch. Each product and each
function is that of its own kernel, so results are equal to theirs bit by bit, and a token's do not
depend on other tokens.

Shapes: T tokens, D model width, F hidden width.
"""

from ctypes import Structure, addressof, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.graphs import outside_of_graphs
from moefit.quant.backend import decoded
from moefit.quant.cpu_kernels import NATIVE_DTYPES, KernelMatrix, Kernels, MatrixStruct


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    """A linear layer: its weight, and its bias in float32 if it has one."""

    weight: KernelMatrix
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return x W^T + bias in the dtype of x, computed in float32."""
        weight = self.weight.weight
        weight_OI = weight if isinstance(weight, Tensor) else decoded(weight, torch.float32)
        return F.linear(x_TI.float(), weight_OI.float(), self.bias_O).to(x_TI.dtype)

    def struct(self) -> "LinearStruct":
        """Return the C structure, whose pointers are to the weights' memory."""
        bias = None if self.bias_O is None else self.bias_O.data_ptr()
        return LinearStruct(self.weight.matrix, bias)


class LinearStruct(Structure):
    """`Linear` of csrc/products.h."""

    _fields_ = (("matrix", MatrixStruct), ("bias", c_void_p))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedExpert:
    """What a shared expert computes.

    Attributes:
        gate: Linear layer [F, D]; `up` likewise.
        up: The other factor of hidden units.
        down: Linear layer [D, F].
        factor: Linear layer [1, D], whose sigmoid is the output's factor; None for none.
    """

    gate: Linear
    up: Linear
    down: Linear
    factor: Linear | None = None

    def supported(self, dtype: torch.dtype) -> bool:
        """Return whether kernels compute it for tokens of a dtype."""
        width, hidden = self.down.weight.rows, self.down.weight.cols
        shapes = [(self.gate, (hidden, width)), (self.up, (hidden, width))]
        if self.factor is not None:
            shapes.append((self.factor, (1, width)))
        return dtype in NATIVE_DTYPES and all(
            (one.weight.rows, one.weight.cols) == shape for one, shape in shapes
        )


def plain_shared_expert(shared: SharedExpert, x_TD: Tensor) -> Tensor:
    """Return a shared expert's output in the dtype of x; the reference for the kernel."""
    y_TD = shared.down(F.silu(shared.gate(x_TD)) * shared.up(x_TD))
    return y_TD if shared.factor is None else torch.sigmoid(shared.factor(x_TD)) * y_TD


class _SharedExpert(Structure):
    _fields_ = tuple((name, LinearStruct) for name in ("gate", "up", "down", "factor"))


class SharedExpertKernel:
    """A shared expert, computed by kernels in one call.

    Args:
        kernels: The compiled library.
        shared: The expert; `supported` must hold for the tokens.
    """

    def __init__(self, kernels: Kernels, shared: SharedExpert):
        self._kernels, self._shared = kernels, shared  # keeps the weights' memory
        linears = shared.gate, shared.up, shared.down, shared.factor
        self._struct = _SharedExpert(
            *(LinearStruct() if one is None else one.struct() for one in linears)
        )
        self.address = addressof(self._struct)

    @outside_of_graphs
    def add(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """Return y + the expert's output for x; both in one of `NATIVE_DTYPES`.

        Args:
            x_TD: Tokens.
            y_TD: What the output is added to, in place if it is consecutive.
        """
        y_TD = y_TD.contiguous()
        self._kernels.add_shared(self.address, x_TD.contiguous(), y_TD)
        return y_TD
