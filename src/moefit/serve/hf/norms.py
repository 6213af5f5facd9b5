"""Compute a model's root-mean-square norms by the compiled CPU kernels.

A family's norm takes some ten small operations of torch. Modules are recognised by what they
return for random rows, not by their class, and their `forward` is replaced on the instance:
parameters, names and class stay, and modules that do anything else are not changed.

Shapes: R rows, D width of a row.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from moefit.graphs import outside_of_graphs
from moefit.quant.cpu_kernels import NATIVE_DTYPES, Kernels, kernels
from moefit.quant.layers.layer_operations import NormForm, NormKernel, plain_norm

_LARGEST_EPS = 0.1
_WIDTH = 64  # of the example for norms without a weight, which accept any
_DIFFERENT = 0.02  # share of elements that may be rounded otherwise; of another form, a quarter is


class _KernelForward:
    """The `forward` of one norm: by the kernel, or the module's own for other inputs."""

    def __init__(self, module: nn.Module, form: NormForm, dtype: torch.dtype):
        self._module, self.form, self._dtype = module, form, dtype
        self._own: Callable[..., Tensor] = type(module).forward
        self._kernel: NormKernel | None = None

    @outside_of_graphs
    def __call__(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        compiled, weight = kernels(), self._module._parameters.get("weight")
        if (
            compiled is None
            or others
            or named
            or x.dtype != self._dtype
            or not x.is_cpu
            or not x.numel()
            or (torch.is_grad_enabled() and _needs_gradient(x, weight))
        ):
            return self._own(self._module, x, *others, **named)
        kernel = self._kernel
        if kernel is None or not kernel.fits(x, weight):
            kernel = self._kernel = _kernel(compiled, x, weight, self.form)
        return kernel(x)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the kernel, whose pointers are of this process."""
        return _KernelForward, (self._module, self.form, self._dtype)


def _needs_gradient(x: Tensor, weight: Tensor | None) -> bool:
    return x.requires_grad or (weight is not None and weight.requires_grad)


def _kernel(compiled: Kernels, x: Tensor, weight: Tensor | None, form: NormForm) -> NormKernel:
    return NormKernel(compiled, weight, form, x.dtype, x.shape[-1])


def use_norm_kernels(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Use the kernels for every norm of a model that lies on a CPU, until it is undone.

    Without compiled kernels nothing changes.

    Args:
        model: The model, with its weights loaded.
        dtype: The dtype of hidden states.

    Returns:
        A function that undoes the change.
    """
    if kernels() is None or dtype not in NATIVE_DTYPES:
        return lambda: None
    replaced: list[nn.Module] = []
    for module in _candidates(model):
        if (form := norm_form(module, dtype)) is not None:
            cast(Any, module).forward = _KernelForward(module, form, dtype)
            replaced.append(module)

    def undo() -> None:
        for module in replaced:
            vars(module).pop("forward", None)

    return undo


def norm_of(module: nn.Module) -> NormForm | None:
    """Return the form of a norm that kernels compute, or None for another module."""
    forward = vars(module).get("forward")
    return forward.form if isinstance(forward, _KernelForward) else None


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    """Yield modules that may be norms: at most a vector `weight`, and an epsilon."""
    for module in model.modules():
        parameters = dict(module.named_parameters(recurse=False))
        weight = parameters.get("weight")
        if (
            not module._modules
            and not module._buffers
            and parameters.keys() <= {"weight"}
            and (weight is None or (weight.dim() == 1 and weight.is_cpu and weight.numel()))
            and "forward" not in vars(module)
            and _epsilons(module)
        ):
            yield module


def _epsilons(module: nn.Module) -> set[float]:
    return {
        value
        for name, value in vars(module).items()
        if "eps" in name and isinstance(value, float) and 0 < value < _LARGEST_EPS
    }


@torch.inference_mode()
def norm_form(module: nn.Module, dtype: torch.dtype) -> NormForm | None:
    """Return the form of root-mean-square norm that a module computes, or None if it is no such.

    Args:
        module: A module with at most a parameter `weight` [D], and its epsilon as an attribute.
        dtype: The dtype of rows.
    """
    weight_D = cast(Tensor | None, module._parameters.get("weight"))
    if weight_D is not None and weight_D.dtype not in (dtype, torch.float32):
        return None
    x_RD = _example(_WIDTH if weight_D is None else len(weight_D), dtype)
    try:
        found_RD = module(x_RD.clone())
    except Exception:  # noqa: BLE001 - it is another kind of module
        return None
    if not isinstance(found_RD, Tensor) or found_RD.dtype != dtype or found_RD.shape != x_RD.shape:
        return None
    first = (True, False) if weight_D is not None and weight_D.dtype == dtype else (False,)
    for eps in sorted(_epsilons(module)):
        for added in (0, 1) if weight_D is not None else (0,):
            for round_first in first:
                form = NormForm(eps=eps, added=added, round_first=round_first)
                if _agree(found_RD, plain_norm(x_RD, weight_D, form)):
                    return form
    return None


def _example(width: int, dtype: torch.dtype) -> Tensor:
    """Return rows so small that epsilon matters, rows so large that it does not, and zeros."""
    generator = torch.Generator().manual_seed(0)
    sizes_R1 = torch.tensor([1e-4, 1e-3, 1e-2, 0.1, 1.0, 1.0, 1.0, 30.0, 0.0])[:, None]
    return (torch.randn(len(sizes_R1), width, generator=generator) * sizes_R1).to(dtype)


def _agree(found_RD: Tensor, wanted_RD: Tensor) -> bool:
    """Return whether results are the same up to the order of a row's sum.

    In 16 bits that changes the rounding of few elements; another form, of every fourth.
    """
    step = torch.finfo(found_RD.dtype).eps
    exact = found_RD.dtype == torch.float32
    close = torch.isclose(
        found_RD.float(), wanted_RD.float(), rtol=16 * step if exact else step, atol=0
    )
    same = close if exact else found_RD == wanted_RD
    return bool(close.all()) and float((~same).float().mean()) <= _DIFFERENT
