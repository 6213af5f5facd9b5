"""Compute routers by the compiled CPU kernels: logits, and from them experts and weights.

`router_probe` finds which module outputs a block's logits and the rule that turns them into
weights. A router whose module returns logits, weights and ids, and nothing else, is called with
random tokens here; if a linear layer and the rule give the same, its `forward` is replaced on the
instance. Among experts of equal preference the kernel chooses as torch does.

Shapes: T tokens, D model width, E experts, K chosen per token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from moefit.graphs import outside_of_graphs
from moefit.moe.routing import Routing
from moefit.moe.scoring import ScoringRule
from moefit.quant.cpu_kernels import (
    NATIVE_DTYPES,
    KernelMatrix,
    Kernels,
    kernels,
)
from moefit.quant.layers.layer_operations import RouterKernel, RoutingKernel, can_route
from moefit.serve.layer.moe_layer import VirtualExperts

_TOKENS = 256  # of the example
_DIFFERENT = 0.02  # share of weights in 16 bits that may be rounded otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterForm:
    """What a router computes and returns.

    Attributes:
        rule: From logits to weights.
        bias_E: Bias that the rule adds to the scores.
        linear_bias: Name of the bias of the linear layer, or None.
        dtype: The dtype of hidden states.
        product: The dtype in which the linear layer is computed.
        logits: The dtype of logits.
        weights: The dtype of weights.
        chosen: K.
        order: Positions of logits, weights and ids in the output.
        flattens: Whether tokens may also be given as [B, T, D], with the same output.
        takes_bias: Whether the router is given the rule's bias beside tokens.
    """

    rule: ScoringRule
    bias_E: Tensor | None
    linear_bias: str | None
    dtype: torch.dtype
    product: torch.dtype
    logits: torch.dtype
    weights: torch.dtype
    chosen: int
    order: tuple[int, int, int]
    flattens: bool
    takes_bias: bool = False

    def takes(self, others: Sequence[object]) -> bool:
        """Return whether what a router is given beside tokens is what it was recognised with."""
        if not self.takes_bias or self.bias_E is None:
            return not others
        (bias,) = others if len(others) == 1 else (None,)
        return (
            isinstance(bias, Tensor)
            and bias.data_ptr() == self.bias_E.data_ptr()
            and (bias.dtype, bias.numel()) == (self.bias_E.dtype, self.bias_E.numel())
        )


class RouterForward:
    """The `forward` of one router: by kernels, or the module's own for other inputs."""

    def __init__(self, module: nn.Module, form: RouterForm):
        self._module, self.form = module, form
        self._own: Callable[..., Any] = type(module).forward
        self._kernel: RouterKernel | None = None

    @outside_of_graphs
    def __call__(self, x: Tensor, *others: Any, **named: Any) -> Any:
        """Return what the router's own `forward` does."""
        compiled, form = kernels(), self.form
        weight_ED = cast(Tensor, self._module._parameters["weight"])
        if (
            compiled is None
            or not form.takes(others)
            or named
            or not (x.dim() == 2 or (form.flattens and x.dim() == 3))
            or x.dtype != form.dtype
            or not x.is_cpu
            or not x.numel()
            or (torch.is_grad_enabled() and (x.requires_grad or weight_ED.requires_grad))
        ):
            return self._own(self._module, x, *others, **named)
        kernel = self._kernel
        if kernel is None or kernel.matrix.matrix.codes != weight_ED.data_ptr():
            kernel = self._prepare(compiled, weight_ED)
        logits_TE, routing = kernel(x.reshape(-1, x.shape[-1]))
        made: list[Tensor] = [logits_TE] * 3
        made[form.order[1]], made[form.order[2]] = routing.weights_TK, routing.ids_TK
        return tuple(made)

    def choose(self, logits_TE: Tensor) -> Routing:
        """Return the choice for logits, after a first call."""
        assert self._kernel is not None
        return self._kernel.routing(logits_TE)

    def kernel(self) -> RouterKernel | None:
        """Return the router as one call; None if there are no kernels."""
        compiled, weight_ED = kernels(), cast(Tensor, self._module._parameters["weight"])
        if compiled is None:
            return None
        kernel = self._kernel
        if kernel is None or kernel.matrix.matrix.codes != weight_ED.data_ptr():
            kernel = self._prepare(compiled, weight_ED)
        return kernel

    def _prepare(self, compiled: Kernels, weight_ED: Tensor) -> RouterKernel:
        form, plain_ED = self.form, weight_ED.detach().as_subclass(Tensor)
        bias = form.linear_bias and self._module._parameters[form.linear_bias]
        bias_E = bias.detach().float().contiguous() if isinstance(bias, Tensor) else None
        routing = RoutingKernel(
            compiled,
            form.rule,
            form.bias_E,
            experts=len(plain_ED),
            chosen=form.chosen,
            dtypes=(form.logits, form.weights),
        )
        self._kernel = RouterKernel(
            compiled,
            KernelMatrix(plain_ED),
            bias_E,
            product=form.product,
            logits=form.logits,
            routing=routing,
        )
        return self._kernel

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the kernels, whose pointers are of this process."""
        return RouterForward, (self._module, self.form)


def use_router_kernels(
    model: nn.Module, served: Mapping[str, VirtualExperts], dtype: torch.dtype
) -> Callable[[], None]:
    """Use the kernels for every router that is recognised, until it is undone.

    Args:
        model: The model, with its weights loaded and the rules of its routers found.
        served: The served experts by block name.
        dtype: The dtype of hidden states.

    Returns:
        A function that undoes the change.
    """
    changed: list[nn.Module] = []
    for experts in served.values():
        if experts.router is None or experts.scoring is None or kernels() is None:
            continue
        module = model.get_submodule(experts.router)
        if "forward" in vars(module):
            continue
        if (form := router_form(module, experts.scoring, experts.bias_E, dtype)) is not None:
            cast(Any, module).forward = RouterForward(module, form)
            changed.append(module)

    def undo() -> None:
        for module in changed:
            vars(module).pop("forward", None)

    return undo


@torch.inference_mode()
def router_form(
    module: nn.Module, rule: ScoringRule, bias_E: Tensor | None, dtype: torch.dtype
) -> RouterForm | None:
    """Return what a router computes, or None if kernels do not compute the same.

    Args:
        module: The router, with a matrix `weight` [E, D] and no modules in it.
        rule: The rule that turns its logits into weights.
        bias_E: The rule's bias, if any.
        dtype: The dtype of hidden states.
    """
    weight_ED = module._parameters.get("weight")
    if (
        weight_ED is None
        or weight_ED.dim() != 2
        or not weight_ED.is_cpu
        or not weight_ED.is_contiguous()
        or not {dtype, weight_ED.dtype} <= NATIVE_DTYPES.keys()
        or not can_route(rule, len(weight_ED))
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(_TOKENS, weight_ED.shape[1], generator=generator)
    # Scores from far, where a router that caps them shows it, to close, which one that rounds them
    # does not tell apart.
    x_TD *= 8.0 ** (1 - torch.arange(_TOKENS) % 5)[:, None]
    x_TD = x_TD.to(dtype)
    for others in ((), (bias_E,)):
        if (found := _called(module, x_TD.clone(), *others)) is not None:
            break
    else:
        return None
    order = _order(found, len(weight_ED))
    if order is None:
        return None
    logits_TE, weights_TK, ids_TK = (found[at] for at in order)
    sequences = _called(module, x_TD.view(2, -1, x_TD.shape[-1]), *others)
    flattens = sequences is not None and _same_logits(sequences[order[0]], logits_TE)
    for form in _forms(module, rule, bias_E, dtype):
        form = RouterForm(
            **form,
            logits=logits_TE.dtype,
            weights=weights_TK.dtype,
            chosen=ids_TK.shape[1],
            order=order,
            flattens=flattens,
            takes_bias=bool(others),
        )
        if _agrees(form, module, x_TD, found):
            return form
    return None


def _order(found: object, num_experts: int) -> tuple[int, int, int] | None:
    """Return the positions of logits, weights and ids in an output, or None if it has others."""
    if not isinstance(found, tuple) or len(found) != 3:
        return None
    if not all(isinstance(one, Tensor) and one.dim() == 2 for one in found):
        return None
    ids = [at for at, one in enumerate(found) if one.dtype == torch.int64]
    floats = [at for at, one in enumerate(found) if one.dtype in NATIVE_DTYPES]
    if len(ids) != 1 or len(floats) != 2:
        return None
    chosen = found[ids[0]].shape[1]
    wide = [at for at in floats if found[at].shape[1] == num_experts]
    narrow = [at for at in floats if found[at].shape[1] == chosen and at not in wide]
    return (wide[0], narrow[0], ids[0]) if len(wide) == len(narrow) == 1 else None


def _called(module: nn.Module, *given: Any) -> Any:
    """Return what a router returns, or None if it takes other arguments."""
    try:
        return module(*given)
    except Exception:  # noqa: BLE001 - any error in a family's code
        return None


def _same_logits(other_TE: Tensor, logits_TE: Tensor) -> bool:
    return other_TE.shape == logits_TE.shape and _close(other_TE, logits_TE)


def _forms(
    module: nn.Module, rule: ScoringRule, bias_E: Tensor | None, dtype: torch.dtype
) -> Sequence[dict[str, Any]]:
    """Return the ways in which logits may be computed."""
    biases: list[str | None] = [None]
    biases += [
        name for name, one in module._parameters.items() if one is not None and one.dim() == 1
    ]
    products = dict.fromkeys((dtype, torch.float32))
    return [
        {
            "rule": rule,
            "bias_E": bias_E,
            "linear_bias": bias,
            "dtype": dtype,
            "product": product_dtype,
        }
        for product_dtype, bias in product(products, biases)
    ]


def _agrees(form: RouterForm, module: nn.Module, x_TD: Tensor, found: Sequence[Tensor]) -> bool:
    """Return whether kernels give a router's outputs, up to rounding and ties.

    Choices are compared for the same logits. Logits are close only up to rounding, and in 16 bits
    a last bit may change a choice.
    """
    forward = RouterForward(module, form)
    own_logits, own_weights, own_ids = (found[at] for at in form.order)
    given = (form.bias_E,) if form.takes_bias else ()
    logits = forward(x_TD, *given)[form.order[0]]
    # Logits that are wider than their product have its values.
    if not torch.equal(own_logits.to(form.product).to(own_logits.dtype), own_logits):
        return False
    if not _close(logits, own_logits, torch.finfo(form.product).eps):
        return False
    routing, own = _sorted(forward.choose(own_logits)), _sorted(Routing(own_ids, own_weights))
    clear_T = _clear(own_logits, own_ids.shape[1], form)
    if clear_T.sum() < len(x_TD) / 4:
        return False
    mine, theirs = routing.weights_TK[clear_T], own.weights_TK[clear_T]
    return (
        torch.equal(routing.ids_TK[clear_T], own.ids_TK[clear_T])
        and _close(mine, theirs)
        and (mine.dtype == torch.float32 or _share(mine != theirs) <= _DIFFERENT)
    )


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())


def _clear(logits_TE: Tensor, chosen: int, form: RouterForm) -> Tensor:
    """Return a mask [T] of tokens whose choice does not depend on rounding or on ties."""
    preference_TE = form.rule.preference(logits_TE, form.bias_E)
    best_TK = preference_TE.topk(min(chosen + 1, preference_TE.shape[1])).values
    if best_TK.shape[1] == chosen:
        return torch.ones(len(best_TK), dtype=torch.bool)
    return best_TK[:, -2] - best_TK[:, -1] > 1e-4 * best_TK[:, -2].abs()


def _close(one: Tensor, other: Tensor, step: float = 0.0) -> bool:
    """Return whether rows are equal up to rounding, which is relative to their largest value.

    Args:
        one: Rows.
        other: Rows.
        step: Of what they were rounded to before, if that was coarser than their dtype.
    """
    step = max(torch.finfo(one.dtype).eps, 1e-5, step)
    size = other.float().abs()
    allowed = step * (size + size.amax(-1, keepdim=True) / 8)
    return bool(((one.float() - other.float()).abs() <= allowed).all())


def _sorted(routing: Routing) -> Routing:
    ids_TK, place_TK = routing.ids_TK.sort(-1)
    return Routing(ids_TK, routing.weights_TK.gather(-1, place_TK))
