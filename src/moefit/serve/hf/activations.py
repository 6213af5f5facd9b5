"""Compute a model's functions of each element, silu and sigmoid, by the compiled CPU kernels.

torch rounds them by an element's place in its tensor, so that a token's values depend in their last
bits on the other tokens of the step; kernels do not. A module without weights whose only operation
is silu gets a `forward` of its own on the instance. A module that calls `F.sigmoid` gets its
family's code, which finds the kernel under that name, as for rotary embeddings (`rotary.py`).
"""

import dis
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moefit.graphs import outside_of_graphs
from moefit.quant.cpu_kernels import NATIVE_DTYPES, kernels
from moefit.serve.hf.rotary import with_globals


class _Elementwise:
    """A function of each element by the kernel, or a family's own for other inputs."""

    def __init__(self, function: str, own: Callable[..., Tensor], dtype: torch.dtype):
        self._function, self._own, self._dtype = function, own, dtype

    @outside_of_graphs
    def __call__(self, *given: Any, **named: Any) -> Tensor:
        compiled = kernels()
        if (
            compiled is None
            or named
            or len(given) != 1
            or not isinstance(x := given[0], Tensor)
            or x.dtype != self._dtype
            or not x.is_cpu
            or not x.numel()
            or (torch.is_grad_enabled() and x.requires_grad)
        ):
            return self._own(*given, **named)
        return compiled.elementwise(self._function, x)


class _SiluForward(_Elementwise):
    """The `forward` of a module that computes silu."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__("silu", MethodType(type(module).forward, module), dtype)
        self._module = module

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle with the module."""
        return _SiluForward, (self._module, self._dtype)


class _Functional:
    """torch.nn.functional for one family's code, with its sigmoid by the kernel."""

    def __init__(self, dtype: torch.dtype):
        self.sigmoid = _Elementwise("sigmoid", F.sigmoid, dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def use_activation_kernels(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Use the kernels for silu and sigmoid of a model on a CPU, until it is undone.

    Without compiled kernels, and in other dtypes than they know, nothing changes.

    Args:
        model: The model.
        dtype: The dtype of hidden states.

    Returns:
        A function that undoes the change.
    """
    if kernels() is None or dtype not in NATIVE_DTYPES:
        return lambda: None
    changed: list[nn.Module] = []
    for module in model.modules():
        if "forward" in vars(module):
            continue
        forward = type(module).forward
        if is_silu(module, dtype):
            cast(Any, module).forward = _SiluForward(module, dtype)
        elif isinstance(forward, FunctionType) and (own := _with_sigmoid(forward, dtype)):
            cast(Any, module).forward = MethodType(own, module)
        else:
            continue
        changed.append(module)

    def undo() -> None:
        for module in changed:
            vars(module).pop("forward", None)

    return undo


def computes_silu(module: nn.Module) -> bool:
    """Return whether a module computes silu by the kernel."""
    return isinstance(vars(module).get("forward"), _SiluForward)


class _Names(TorchDispatchMode):
    """Records the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def is_silu(module: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether a module is silu of each element: one operation of torch, and its values.

    Args:
        module: A module.
        dtype: The dtype of what it is given.
    """
    own = {name for name in vars(module) if not name.startswith("_")}
    if own - {"training", "inplace"} or module._modules or module._parameters or module._buffers:
        return False
    x = (3 * torch.randn(64, generator=torch.Generator().manual_seed(0))).to(dtype)
    given = x.clone()
    try:
        with _Names() as names:
            made = module(given)
    except Exception:  # noqa: BLE001 - a module of other arguments
        return False
    return (
        names.found == ["aten::silu"]
        and isinstance(made, Tensor)
        and torch.equal(given, x)
        and torch.equal(made, F.silu(x))
    )


@cache
def _with_sigmoid(forward: FunctionType, dtype: torch.dtype) -> FunctionType | None:
    """Return a copy of a `forward` whose `F.sigmoid` is the kernel; None if it does not call it."""
    found = {
        one.argval
        for one, after in pairwise(dis.get_instructions(forward))
        if one.opname == "LOAD_GLOBAL"
        and after.argval == "sigmoid"
        and forward.__globals__.get(one.argval) is F
    }
    return with_globals(forward, dict.fromkeys(found, _Functional(dtype))) if found else None
