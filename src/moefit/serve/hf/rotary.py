"""Compute a model's rotary embeddings by the compiled CPU kernels.

Families rotate queries and keys in a function of their own, `apply_rotary_pos_emb`, with some
fifteen small operations of torch. Which functions do so is recognised by what they return for
random heads. An attention module then gets a `forward` of its own: the family's code, which finds
the kernel under the function's name. Nothing outside the served model changes.

Shapes: B sequences, T tokens, H heads, C head width, R cosines per token.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import FunctionType, MethodType
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from moefit.graphs import outside_of_graphs
from moefit.quant.cpu_kernels import NATIVE_DTYPES, kernels
from moefit.quant.layers.layer_operations import RotaryForm, RotaryKernel, plain_rotate

_WIDTH = 24  # of the example's heads
_FORMS = (
    RotaryForm(),
    *(
        RotaryForm(pairs_in=pairs_in, pairs_out=pairs_out, halves=False, doubled=doubled)
        for doubled, pairs_in, pairs_out in product((True, False), repeat=3)
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryRule:
    """What a family's function does.

    Attributes:
        tensors: Number of tensors that it rotates: (queries, keys, cosines, sines) or (heads,
            cosines, sines).
        whole: The form if there are as many cosines as elements of a head; None for another.
        half: The same if there are half as many.
        part: The same if there are fewer, in any number.
    """

    tensors: int
    whole: RotaryForm | None
    half: RotaryForm | None
    part: RotaryForm | None

    def form(self, cosines: int, width: int) -> RotaryForm | None:
        """Return the form for a number of cosines per token and a width of heads."""
        if cosines == width:
            return self.whole
        if cosines < width and self.part is not None:
            return self.part
        return self.half if 2 * cosines == width else None


class RotaryFunction:
    """A family's function, computed by kernels where they support the arguments."""

    def __init__(self, own: Callable[..., Any], rule: RotaryRule):
        self.own, self._rule = own, rule
        self._kernels: dict[RotaryForm, RotaryKernel] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return what the family's function returns."""
        if (
            len(arguments) == self._rule.tensors + 2
            and named.keys() <= {"unsqueeze_dim"}
            and all(isinstance(one, Tensor) for one in arguments)
        ):
            *heads, cos, sin = arguments
            made = self._rotated(heads, cos, sin, named.get("unsqueeze_dim", 1))
            if made is not None:
                return tuple(made) if self._rule.tensors > 1 else made[0]
        return self.own(*arguments, **named)

    def form(self, cosines: int, width: int) -> RotaryForm | None:
        """Return the form for a number of cosines and a width of heads; None if it is unknown."""
        return self._rule.form(cosines, width)

    @outside_of_graphs
    def _rotated(
        self, heads: list[Tensor], cos: Tensor, sin: Tensor, head_dim: int
    ) -> list[Tensor] | None:
        """Return the kernel's results; None if it does not support the arguments.

        Args:
            heads: Queries and keys: [B, H, T, C], or [B, T, H, C] if `head_dim` is 2.
            cos: Cosines [B, T, R].
            sin: Sines.
            head_dim: Dimension that cosines lack.
        """
        compiled = kernels()
        form = self.form(cos.shape[-1], heads[0].shape[-1])
        if form is None or compiled is None or head_dim not in (1, 2) or _need_gradients(heads):
            return None
        if (kernel := self._kernels.get(form)) is None:
            kernel = self._kernels[form] = RotaryKernel(compiled, form)
        if head_dim == 1:
            return kernel(cos, sin, *heads)
        made = kernel(cos, sin, *(one.transpose(1, 2) for one in heads))
        return None if made is None else [one.transpose(1, 2) for one in made]


def _need_gradients(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


def use_rotary_kernels(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Use the kernels for a model's rotary embeddings on a CPU, until it is undone.

    Without compiled kernels nothing changes.

    Args:
        model: The model.
        dtype: The dtype of queries and keys.

    Returns:
        A function that undoes the change.
    """
    if kernels() is None or dtype not in NATIVE_DTYPES:
        return lambda: None
    changed: list[nn.Module] = []
    for module in model.modules():
        forward = type(module).forward
        if "forward" in vars(module) or not isinstance(forward, FunctionType):
            continue
        if (own := _with_kernels(forward, dtype)) is not None:
            cast(Any, module).forward = MethodType(own, module)
            changed.append(module)

    def undo() -> None:
        for module in changed:
            vars(module).pop("forward", None)

    return undo


def rotary_of(module: nn.Module, cosines: int, width: int) -> RotaryForm | None:
    """Return how a module's `forward` rotates queries and keys by kernels; None if it does not.

    Args:
        module: An attention module.
        cosines: Number of cosines per token.
        width: Width of heads.
    """
    forward = vars(module).get("forward")
    function = getattr(forward, "__func__", None)
    if not isinstance(function, FunctionType):
        return None
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    found = [one for one in named if isinstance(one, RotaryFunction)]
    return found[0].form(cosines, width) if len(found) == 1 else None


@cache
def _with_kernels(forward: FunctionType, dtype: torch.dtype) -> FunctionType | None:
    """Return a copy of a `forward` that calls kernels for its rotary functions; None for none."""
    found: dict[str, RotaryFunction] = {}
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if _may_rotate(function) and (rule := rotary_rule(function, dtype)) is not None:
            found[name] = RotaryFunction(function, rule)
    return with_globals(forward, found) if found else None


def with_globals(forward: FunctionType, others: Mapping[str, Any]) -> FunctionType:
    """Return a copy of a function that finds other things under some global names.

    The copy has global names of its own, as they are now.
    """
    copy = FunctionType(
        forward.__code__,
        {**forward.__globals__, **others},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    copy.__dict__.update(forward.__dict__)
    return copy


def _may_rotate(function: object) -> TypeGuard[FunctionType]:
    """Return whether something is a function of cosines and sines."""
    return isinstance(function, FunctionType) and {"cos", "sin"} <= set(
        inspect.signature(function).parameters
    )


def rotary_rule(function: Callable[..., Any], dtype: torch.dtype) -> RotaryRule | None:
    """Return how a function rotates heads, or None if it does anything else.

    Args:
        function: Called with random queries and keys [B, H, T, C], cosines and sines [B, T, R].
        dtype: The dtype of all of them.
    """
    for tensors in (2, 1):
        whole, half, third = (
            _form(function, tensors, _WIDTH // divisor, dtype) for divisor in (1, 2, 3)
        )
        if whole is not None or half is not None:
            part = half if half == third else None
            return RotaryRule(tensors=tensors, whole=whole, half=half, part=part)
    return None


@torch.inference_mode()
def _form(
    function: Callable[..., Any], tensors: int, cosines: int, dtype: torch.dtype
) -> RotaryForm | None:
    """Return the form in which a function rotates heads with so many cosines, or None."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    heads = [normal(2, 3, 5, _WIDTH), normal(2, 1, 5, _WIDTH)][:tensors]
    cos, sin = normal(2, 5, cosines), normal(2, 5, cosines)
    try:
        found = function(*(one.clone() for one in heads), cos.clone(), sin.clone())
    except Exception:  # noqa: BLE001 - a function of other arguments
        return None
    made = list(found) if isinstance(found, tuple) else [found]
    if len(made) != tensors or not all(isinstance(one, Tensor) for one in made):
        return None
    for form in _FORMS:
        if form.rotated(cosines) <= _WIDTH:
            wanted = [plain_rotate(one, cos, sin, form) for one in heads]
            if all(
                one.dtype == dtype and torch.equal(one, other)
                for one, other in zip(made, wanted, strict=True)
            ):
                return form
    return None
