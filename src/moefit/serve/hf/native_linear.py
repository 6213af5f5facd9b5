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
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moefit.graphs import outside_of_graphs
from moefit.quant.cpu_kernels import NATIVE_DTYPES, KernelMatrix, kernels
from moefit.quant.layers.shared_expert import Linear
from moefit.serve.hf.quant_linear import EncodedLinear

_CONVERSIONS = {Tensor.float, Tensor.to, Tensor.type, Tensor.detach}
"""Functions of a weight whose results are weights, such as a router's `weight.float()`."""


class KernelWeight(Tensor):
    """A weight [O, I] on a CPU whose linear layer is computed by the compiled kernels."""

    _matrix: KernelMatrix | None = None

    @classmethod
    @outside_of_graphs
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
        known = self._matrix
        if (
            known is None
            or known.matrix.codes != self.data_ptr()
            or (known.rows, known.cols) != self.shape
            or cast(Tensor, known.weight).dtype != self.dtype
        ):
            known = self._matrix = KernelMatrix(self.detach().as_subclass(Tensor))
        return known

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a copy that the kernels compute too."""
        if id(self) not in memo:
            copy = self.detach().as_subclass(Tensor).clone().as_subclass(KernelWeight)
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if _is_parameter(self) else copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the weight as torch's own class, so that any process can read it."""
        plain = self.detach().as_subclass(Tensor)
        plain = nn.Parameter(plain, self.requires_grad) if _is_parameter(self) else plain
        return plain.__reduce_ex__(protocol)


def _is_parameter(weight: Tensor) -> bool:
    return isinstance(weight, nn.Parameter)


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


@outside_of_graphs
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return x W^T + b by kernels; None if they do not support it."""
    compiled = kernels()
    if (
        compiled is None
        or not isinstance(weight, KernelWeight)
        or not _usable(weight)
        or not _fits(input, weight, bias)
    ):
        return None
    x_TI = input.reshape(-1, input.shape[-1])
    bias_O = None if bias is None else bias.float().contiguous()
    y_TO = compiled.linear(x_TI, weight.kernel_matrix(), input.dtype, bias_O)
    return y_TO.view(*input.shape[:-1], y_TO.shape[-1])


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether kernels support a product; torch computes the others or says what is wrong."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    return (
        all(one.dtype == weight.dtype and one.device.type == "cpu" for one in tensors)
        and input.shape[-1:] == weight.shape[1:]
        and (bias is None or bias.shape == weight.shape[:1])
        and not input.is_neg()
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
    )


def linear_of(module: nn.Module) -> Linear | None:
    """Return a linear layer that kernels compute, or None for another module."""
    if isinstance(module, EncodedLinear):
        return Linear(weight=module.kernel_matrix, bias_O=module.float_bias)
    if type(module) is nn.Linear and isinstance(weight := module.weight, KernelWeight):
        bias = None if module.bias is None else module.bias.detach().float().contiguous()
        return Linear(weight=weight.kernel_matrix(), bias_O=bias)
    return None


def addresses_of(module: nn.Module) -> list[int]:
    """Return the addresses of a module's weights: others if they are replaced or moved."""
    if isinstance(module, EncodedLinear):
        return [id(module.kernel_matrix)]
    return [one.data_ptr() for one in module._parameters.values() if one is not None]


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
