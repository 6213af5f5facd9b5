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
_IN_TURN = RotaryForm(pairs_in=True, pairs_out=True, halves=False, in_turn=True)
_COMPLEX = "freqs_cis"  # what families call complex numbers in place of cosines and sines


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryRule:
    """What a family's function does.

    Attributes:
        tensors: Number of tensors that it rotates: (queries, keys, cosines, sines) or (heads,
            cosines, sines), or with complex numbers in place of cosines and sines.
        whole: The form if there are as many cosines as elements of a head; None for another.
        half: The same if there are half as many.
        part: The same if there are fewer, in any number.
    """

    tensors: int
    whole: RotaryForm | None
    half: RotaryForm | None
    part: RotaryForm | None

    @property
    def is_complex(self) -> bool:
        """Return whether it is given complex numbers."""
        return self.whole is not None and self.whole.in_turn

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
        number = self._rule.tensors
        if (
            len(arguments) == number + (1 if self._rule.is_complex else 2)
            and named.keys() <= {"unsqueeze_dim"}
            and all(isinstance(one, Tensor) for one in arguments)
        ):
            heads, (cos, sin) = list(arguments[:number]), _angles(*arguments[number:])
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


def _angles(first: Tensor, sin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines; of complex numbers twice both in turn."""
    if sin is not None:
        return first, sin
    in_turn = torch.view_as_real(first).flatten(-2) if first.dtype == torch.complex64 else first
    return in_turn, in_turn


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


def rotaries_of(module: nn.Module) -> list[RotaryFunction]:
    """Return the functions by kernels that a module's `forward` may call."""
    function = getattr(vars(module).get("forward"), "__func__", None)
    if not isinstance(function, FunctionType):
        return []
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    return [one for one in named if isinstance(one, RotaryFunction)]


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
    """Return whether something is a function of cosines and sines, or of complex numbers."""
    if not isinstance(function, FunctionType):
        return False
    names = set(inspect.signature(function).parameters)
    return {"cos", "sin"} <= names or _COMPLEX in names


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
        if _rotates_by_complex_numbers(function, tensors, dtype):
            return RotaryRule(tensors=tensors, whole=_IN_TURN, half=None, part=None)
    return None


@torch.inference_mode()
def _rotates_by_complex_numbers(
    function: Callable[..., Any], tensors: int, dtype: torch.dtype
) -> bool:
    """Return whether a function multiplies neighbours, as one complex number, by others.

    Up to rounding: torch may fuse a product with a sum.
    """
    generator = torch.Generator().manual_seed(0)
    heads = _heads(generator, tensors, dtype)
    in_turn = torch.randn(2, 5, _WIDTH, generator=generator)
    factors = torch.view_as_complex(in_turn.view(2, 5, -1, 2))
    found = _called(function, *(one.clone() for one in heads), factors.clone())
    if len(found) != tensors:
        return False
    step = torch.finfo(dtype).eps
    return all(
        isinstance(one, Tensor)
        and one.dtype == dtype
        and one.shape == head.shape
        and torch.allclose(one.float(), wanted.float(), rtol=step, atol=1e-6)
        for one, head in zip(found, heads, strict=True)
        for wanted in (plain_rotate(head, in_turn, in_turn, _IN_TURN),)
    )


def _heads(generator: torch.Generator, tensors: int, dtype: torch.dtype) -> list[Tensor]:
    """Return random queries and keys, or one of them."""
    shapes = ((2, 3, 5, _WIDTH), (2, 1, 5, _WIDTH))[:tensors]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _called(function: Callable[..., Any], *given: Tensor) -> list[Any]:
    """Return what a function returns, as a list; empty if it takes other arguments."""
    try:
        found = function(*given)
    except Exception:  # noqa: BLE001 - a function of other arguments
        return []
    return list(found) if isinstance(found, tuple) else [found]


@torch.inference_mode()
def _form(
    function: Callable[..., Any], tensors: int, cosines: int, dtype: torch.dtype
) -> RotaryForm | None:
    """Return the form in which a function rotates heads with so many cosines, or None."""
    generator = torch.Generator().manual_seed(0)
    heads = _heads(generator, tensors, dtype)
    cos, sin = (torch.randn(2, 5, cosines, generator=generator).to(dtype) for _ in range(2))
    made = _called(function, *(one.clone() for one in heads), cos.clone(), sin.clone())
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
