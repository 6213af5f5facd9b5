"""Compute linear layers in the model's dtype with the compiled CPU kernels.

torch's matrix products choose an algorithm by the number of rows, so an output depends in its last
bits on how many tokens share the step. The kernels sum each output in an order that depends on
nothing else, and read weights at the memory's speed for one token.

`use_linear_kernels` replaces weights by a subclass of `torch.Tensor` whose `F.linear` calls the
kernels, so that attention projections, shared experts, output heads and routers of any family are
covered without code per family. All other operations on the weights are torch's.

Shapes: T tokens, I input features, O output features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moefit.quant.cpu_kernels import NATIVE_DTYPES, KernelMatrix, kernels

_CONVERSIONS = {Tensor.float, Tensor.to, Tensor.type, Tensor.detach}
"""Functions of a weight whose results are weights, such as a router's `weight.float()`."""


class KernelWeight(Tensor):
    """A weight [O, I] on a CPU whose linear layer is computed by the compiled kernels."""

    _matrix: KernelMatrix | None = None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the kernels for `F.linear`, torch for everything else."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and (y := _linear(*args, **kwargs)) is not None:
                return y
            result = func(*args, **kwargs)
            if func in _CONVERSIONS and isinstance(args[0], KernelWeight) and _usable(result):
                return result if isinstance(result, cls) else result.as_subclass(cls)
            return result

    def kernel_matrix(self) -> KernelMatrix:
        """Return the weight as kernels take it; made anew if the memory has changed."""
        if self._matrix is None or self._matrix.matrix.codes != self.data_ptr():
            self._matrix = KernelMatrix(self.detach().as_subclass(Tensor))
        return self._matrix


def _usable(weight: object) -> bool:
    """Return whether kernels support a tensor as the weight of a linear layer."""
    return (
        isinstance(weight, Tensor)
        and weight.device.type == "cpu"
        and weight.dtype in NATIVE_DTYPES
        and weight.dim() == 2
        and weight.is_contiguous()
        and weight.numel() > 0
    )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return x W^T + b by kernels; None if they do not support it."""
    compiled = kernels()
    if (
        compiled is None
        or not isinstance(weight, KernelWeight)
        or not _usable(weight)
        or input.dtype != weight.dtype
        or input.device.type != "cpu"
        or (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
    ):
        return None
    x_TI = input.reshape(-1, input.shape[-1])
    bias_O = None if bias is None else bias.float().contiguous()
    y_TO = compiled.linear(x_TI, weight.kernel_matrix(), input.dtype, bias_O)
    return y_TO.view(*input.shape[:-1], y_TO.shape[-1])


def use_linear_kernels(model: nn.Module) -> Callable[[], None]:
    """Use the kernels for every matrix of a model that lies on a CPU, until it is undone.

    Tied weights stay tied. Without compiled kernels nothing changes.

    Returns:
        A function that undoes the change.
    """
    if kernels() is None:
        return lambda: None
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module, name, weight in list(_matrices(model)):
        if weight not in replaced:
            own = weight.detach().as_subclass(KernelWeight)
            replaced[weight] = nn.Parameter(own, requires_grad=False)  # kernels have no gradients
        setattr(module, name, replaced[weight])

    def undo() -> None:
        original = {id(new): old for old, new in replaced.items()}
        for module, name, weight in list(_matrices(model)):
            if id(weight) in original:
                setattr(module, name, original[id(weight)])

    return undo


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the parameters that may be weights of linear layers, with their modules and names."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if _usable(parameter):
                yield module, name, parameter
