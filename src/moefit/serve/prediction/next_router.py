"""Predict the experts of a later layer: its norm and router on the present layer's state.

Between two MoE blocks the hidden state changes by one block's output and one attention block, which
are small beside the residual sum. So router l + d, applied to the state after the attention of
layer l, chooses mostly the experts that it will choose (training-free prediction, such as
arXiv 2502.12224). Its norm can be applied to what the experts of layer l are given, because that is
the same state, normalised: with x_l = g_l n + b_l for the normalised state n, the later norm gives
g_(l+d) n + b_(l+d). So no layer has to be changed, and one product of [E, D] per layer is added.

Norms and routers are recognised by a recorded pass of the model, not by their classes: each
element of a norm's output must be an affine function of the normalised input, and a router's
logits its matrix times the norm's output.

Shapes: T tokens, D model width, E experts.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moefit.moe.scoring import ScoringRule
from moefit.serve.config import AUTO_PRECISION, LoadSettings
from moefit.serve.layer.moe_layer import VirtualExperts

FORMATS_DEPEND = (
    "under precision auto the formats of slots would depend on what was guessed; give one "
    "precision, such as int4"
)
_LOG = logging.getLogger(__name__)
_TOKENS = 48  # of the recorded pass
_LEAST_TOKENS = 8
_UNEXPLAINED = 0.02  # share of variance that rounding in 16 bits may leave
_SMALL_GAIN = 1e-3  # relative to the mean gain of a norm: what it removes cannot be restored


class Predictor(Protocol):
    """Guesses which experts a later block will choose."""

    def scores(self, block: int, ahead: int, x_TD: Tensor) -> Tensor | None:
        """Return a score per expert of block `block + ahead` [T, E]; the largest are chosen.

        Args:
            block: Index of the block whose experts are given `x_TD` now.
            ahead: Blocks from there to the one that is predicted, 1 or more.
            x_TD: Inputs of the block's experts.

        Returns:
            The scores in float32, or None if that block cannot be predicted.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Norm:
    """x = gain * n + shift of a normalised state n [D]; centred by its mean in layer norms."""

    gain_D: Tensor
    shift_D: Tensor
    centred: bool


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """logits = x W^T + b, of the inputs of a block's experts."""

    weight_ED: Tensor
    bias_E: Tensor | None

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return the logits [T, E] in float32."""
        return F.linear(x_TD, self.weight_ED, self.bias_E).float()


def preferences(rule: ScoringRule | None, bias_E: Tensor | None, logits_TE: Tensor) -> Tensor:
    """Return scores [T, E] whose largest a router selects, finite for all experts.

    Args:
        rule: The router's; None if unknown, then the largest logits are selected.
        bias_E: What the rule adds for its choice, if anything.
        logits_TE: Its logits.
    """
    if rule is None or (rule.groups is None and not rule.biased):
        return logits_TE  # scores are increasing functions of logits
    scores_TE = rule.preference(logits_TE, bias_E)
    # Experts of groups that are not selected are the least probable, but not impossible.
    excluded_TE = scores_TE.isneginf()
    return scores_TE.masked_fill(excluded_TE, float(scores_TE[~excluded_TE].min()))


@dataclass(frozen=True, slots=True, eq=False)
class _Router:
    """logits = x W^T + b, and what the rule adds before it selects."""

    logits: LinearMap
    experts: VirtualExperts

    def scores(self, x_TD: Tensor) -> Tensor:
        return preferences(self.experts.scoring, self.experts.bias_E, self.logits(x_TD))


@dataclass(slots=True, eq=False)
class _Seen:
    """What one block was given in the recorded pass."""

    x_TD: Tensor | None = None
    router_x_TD: Tensor | None = None
    logits_TE: Tensor | None = None
    norm: tuple[Tensor, Tensor] | None = None  # input and output [T, D]


class NextRouter:
    """The router of a later block, applied to the state of the present one.

    Args:
        norms: The norm before each block, in order; None where it was not recognised.
        routers: Each block's router; None likewise.
    """

    def __init__(self, norms: Sequence[_Norm | None], routers: Sequence[_Router | None]):
        self._norms, self._routers = norms, routers
        self._changes: dict[tuple[int, int], tuple[Tensor, Tensor | None] | None] = {}

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel, blocks: Mapping[str, VirtualExperts], context: int | None):
        """Return the predictor of a model, from one pass over random tokens.

        Args:
            model: The model; its experts must return zeros, so that nothing is read.
            blocks: Its MoE blocks by name, in the order in which they are computed.
            context: The largest number of tokens in a step; None for any.
        """
        tokens = _TOKENS if context is None else min(_TOKENS, context)
        nothing = cls([None] * len(blocks), [None] * len(blocks))
        if tokens < _LEAST_TOKENS or model.config.is_encoder_decoder:
            return nothing
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids_1T = torch.randint(min(3, vocabulary - 1), vocabulary, (1, tokens), generator=generator)
        recording = _Recording(model, blocks)
        try:
            with recording.hooks():
                model(input_ids=ids_1T.to(model.device), use_cache=False)
        except Exception:  # noqa: BLE001 - any error in a family's code
            _LOG.debug("the next layer's experts are not predicted", exc_info=True)
            return nothing
        seen = list(recording.seen.values())
        norms = [None if one.norm is None else _fitted_norm(*one.norm) for one in seen]
        routers = [
            _linear_router(model, experts, one)
            for experts, one in zip(blocks.values(), seen, strict=True)
        ]
        return cls(norms, routers)

    def predicts(self, block: int, ahead: int = 1) -> bool:
        """Return whether block `block + ahead` can be predicted from block `block`."""
        return self._change(block, ahead) is not None

    def scores(self, block: int, ahead: int, x_TD: Tensor) -> Tensor | None:
        """Return the router's scores [T, E]; see `Predictor`."""
        if (change := self._change(block, ahead)) is None:
            return None
        ratio_D, shift_D = change
        router = self._routers[block + ahead]
        assert router is not None
        y_TD = x_TD * ratio_D
        return router.scores(y_TD if shift_D is None else y_TD + shift_D)

    def linear(self, block: int, ahead: int) -> LinearMap | None:
        """Return the logits of block `block + ahead` as a map of block `block`'s inputs, float32.

        None if that block cannot be predicted.
        """
        if (change := self._change(block, ahead)) is None:
            return None
        ratio_D, shift_D = change
        router = self._routers[block + ahead]
        assert router is not None
        weight_ED, bias_E = router.logits.weight_ED.float(), router.logits.bias_E
        parts = [] if bias_E is None else [bias_E.float()]
        if shift_D is not None:
            parts.append(weight_ED @ shift_D.float())
        return LinearMap(weight_ED * ratio_D.float(), sum(parts[1:], parts[0]) if parts else None)

    def _change(self, block: int, ahead: int) -> tuple[Tensor, Tensor | None] | None:
        """Return ratio and shift [D] from the output of a block's norm to that of a later one."""
        if (block, ahead) not in self._changes:
            self._changes[block, ahead] = self._changed(block, ahead)
        return self._changes[block, ahead]

    def _changed(self, block: int, ahead: int) -> tuple[Tensor, Tensor | None] | None:
        if block + ahead >= len(self._norms):
            return None
        here, there, router = self._norms[block], self._norms[block + ahead], None
        router = self._routers[block + ahead]
        if here is None or there is None or router is None or here.centred != there.centred:
            return None
        if here.gain_D.shape != there.gain_D.shape:
            return None
        usable_D = here.gain_D.abs() > _SMALL_GAIN * here.gain_D.abs().mean()
        ratio_D = torch.where(usable_D, there.gain_D / here.gain_D, 0.0)
        shift_D = there.shift_D - ratio_D * here.shift_D
        dtype = router.logits.weight_ED.dtype
        return ratio_D.to(dtype), shift_D.to(dtype) if here.centred else None


@dataclass(slots=True)
class _Recording:
    """Inputs of norms, routers and experts in one pass."""

    model: PreTrainedModel
    blocks: Mapping[str, VirtualExperts]
    seen: dict[str, _Seen] = field(default_factory=dict)
    _last_norms: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Record passes of the model within the block."""
        attached: list[RemovableHandle] = []
        self.seen = {name: _Seen() for name in self.blocks}
        widths = {cast(Tensor, self.model.get_input_embeddings().weight).shape[-1]}
        for module in self.model.modules():
            if _may_be_norm(module, widths):
                attached.append(module.register_forward_hook(self._norm))
        for name, experts in self.blocks.items():
            if experts.router is None:
                continue
            router = self.model.get_submodule(experts.router)
            attached.append(router.register_forward_hook(self._router_hook(self.seen[name])))
            attached.append(experts.register_forward_pre_hook(self._experts_hook(self.seen[name])))
        try:
            yield
        finally:
            for hook in attached:
                hook.remove()

    def _norm(self, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(output, Tensor) and inputs[0].shape == output.shape:
            self._last_norms = [*self._last_norms[-3:], (_rows(inputs[0]), _rows(output))]

    def _router_hook(self, seen: _Seen) -> Any:
        def record(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            found = [one for one in outputs if isinstance(one, Tensor) and one.is_floating_point()]
            seen.router_x_TD = _rows(inputs[0]).clone()
            wide = max(found, key=lambda one: one.shape[-1])
            seen.logits_TE = _rows(wide).float()

        return record

    def _experts_hook(self, seen: _Seen) -> Any:
        def record(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x_TD = seen.x_TD = _rows(inputs[0]).clone()
            for before_TD, after_TD in reversed(self._last_norms):
                if after_TD.shape == x_TD.shape and torch.equal(after_TD, x_TD):
                    seen.norm = before_TD.clone(), x_TD
                    return

        return record


def obstacle(model: PreTrainedModel, num_blocks: int, settings: LoadSettings) -> str:
    """Return why no experts of a model are predicted with these settings; empty if they may be.

    Args:
        model: The model; not a pre-gated one, which needs no prediction.
        num_blocks: Its MoE blocks.
        settings: With which it is loaded.
    """
    if settings.prefetch == "off":
        return "it is off"
    if reason := unpredictable(model, num_blocks):
        return reason
    return FORMATS_DEPEND if settings.precision == AUTO_PRECISION else ""


def unpredictable(model: PreTrainedModel, num_blocks: int) -> str:
    """Return why a model's experts cannot be predicted, whatever the settings; else nothing."""
    if num_blocks == 1:
        return "the model has one MoE layer, and prediction begins with the second"
    if model.config.is_encoder_decoder:
        return "the experts of encoder-decoders are not predicted"
    return ""


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def _may_be_norm(module: nn.Module, widths: set[int]) -> bool:
    """Return whether a module has vectors of the model's width as its only parameters."""
    own = [one for one in module._parameters.values() if one is not None]
    return not module._modules and all(one.dim() == 1 and len(one) in widths for one in own)


def _fitted_norm(before_TD: Tensor, after_TD: Tensor) -> _Norm | None:
    """Return gain and shift per element by least squares, or None if they do not explain a norm."""
    x_TD, y_TD = before_TD.float(), after_TD.float()
    for centred in (False, True):
        n_TD = x_TD - x_TD.mean(-1, keepdim=True) if centred else x_TD
        n_TD = n_TD / n_TD.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        mean_n_D, mean_y_D = n_TD.mean(0) * centred, y_TD.mean(0) * centred
        product_D = ((n_TD - mean_n_D) * (y_TD - mean_y_D)).sum(0)
        gain_D = product_D / (n_TD - mean_n_D).square().sum(0).clamp_min(1e-12)
        shift_D = mean_y_D - gain_D * mean_n_D
        error = float((y_TD - gain_D * n_TD - shift_D).square().sum())
        if error <= _UNEXPLAINED**2 * float(y_TD.square().sum()):
            return _Norm(gain_D, shift_D, centred)
    return None


def _linear_router(model: nn.Module, experts: VirtualExperts, seen: _Seen) -> _Router | None:
    """Return the router as a linear map of the experts' input, or None if it is no such."""
    x_TD, logits_TE = seen.router_x_TD, seen.logits_TE
    if experts.router is None or x_TD is None or logits_TE is None or seen.x_TD is None:
        return None
    if x_TD.shape != seen.x_TD.shape or not torch.allclose(x_TD.float(), seen.x_TD.float()):
        return None
    parameters = dict(model.get_submodule(experts.router).named_parameters())
    vectors = [one for one in parameters.values() if one.shape == (experts.num_experts,)]
    for weight in parameters.values():
        if weight.shape != (experts.num_experts, x_TD.shape[-1]):
            continue
        weight_ED = weight.detach().as_subclass(Tensor)
        for bias in (None, *vectors):
            bias_E = None if bias is None else bias.detach().as_subclass(Tensor).to(weight.dtype)
            found_TE = F.linear(x_TD.to(weight.dtype), weight_ED, bias_E).float()
            error = float((found_TE - logits_TE).square().sum())
            spread_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
            if error <= _UNEXPLAINED**2 * float(spread_TE.square().sum()):
                return _Router(LinearMap(weight_ED, bias_E), experts)
    return None
