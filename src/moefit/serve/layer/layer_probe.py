"""Recognise the decoder layers whose attention block one call of the kernels computes.

A step of the model itself is recorded: a layer is recognised if the call gives the same bits, and
if the layer uses no operation of torch that the call does not know.

Shapes: G KV heads, L tokens of a cache, C head width, T tokens, D model width, K experts per token.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from moefit.cache_argument import CACHE_NAMES, forward_with_cache
from moefit.moe.routing import Routing
from moefit.quant.attention import AttentionOptions
from moefit.quant.cpu_kernels import NATIVE_DTYPES, kernels
from moefit.quant.kv_int8 import Int8Rows
from moefit.serve.hf.attention import RECORDED_NAME
from moefit.serve.hf.latent import LatentRows
from moefit.serve.layer.decoder_layer import (
    IGNORED,
    LayerForward,
    arguments_of,
    own_rows,
    window_of,
)
from moefit.serve.layer.layer_chain import LayerChain, chains_of
from moefit.serve.layer.layer_parts import LayerParts, RoutedExperts, candidates
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.layer.shared_modules import SharedModules
from moefit.serve.layer.step_threads import use_one_thread_of_torch

_LOG = logging.getLogger(__name__)


def use_layer_kernels(
    model: PreTrainedModel, dtype: torch.dtype, context: int | None
) -> Callable[[], None]:
    """Use one call for the attention block of every layer that is recognised, until it is undone.

    Args:
        model: The model, whose linear layers, norms, rotary embeddings and attention use kernels
            already, and whose experts return zeros.
        dtype: The dtype of hidden states.
        context: Tokens that a sequence may have; None for any number.

    Returns:
        A function that undoes the change.
    """
    changed: list[nn.Module] = []
    undone: list[Callable[[], None]] = []

    def undo() -> None:
        for one in undone:
            one()
        for module in changed:
            vars(module).pop("forward", None)

    if kernels() is None or dtype not in NATIVE_DTYPES or model.config.is_encoder_decoder:
        return undo
    found = _by_module(model)
    if not found or (context is not None and context < _PROMPT + 1):
        return undo
    made: list[tuple[LayerForward, list[_Step]]] = []
    first = {module: parts[0] for module, parts in found.items()}
    for module, steps in _recorded(model, first, context).items():
        tried = (_recognised(module, parts, steps, dtype) for parts in found[module])
        for forward in islice(filter(None, tried), 1):
            cast(Any, module).forward = forward
            changed.append(module)
            made.append((forward, steps))
    follows = [False, *(_all_follow(one[1], other[1]) for one, other in pairwise(made))]
    for run in chains_of([forward for forward, _ in made], follows):
        LayerChain(run)
    if len(changed) == model.config.get_text_config(decoder=True).num_hidden_layers:
        undone.append(use_one_thread_of_torch(model))
    return undo


def _by_module(model: nn.Module) -> dict[nn.Module, list[LayerParts]]:
    """Return the parts that each module may have."""
    found: dict[nn.Module, list[LayerParts]] = {}
    for module, parts in candidates(model):
        found.setdefault(module, []).append(parts)
    return found


def _recognised(
    module: nn.Module, parts: LayerParts, steps: "list[_Step]", dtype: torch.dtype
) -> LayerForward | None:
    """Return the call for a layer; None if it does not give the recorded steps."""
    options = steps[0].options
    if options is None or not all(_same(options, step.options) for step in steps):
        return None
    windows = {window_of(step.named.get("attention_mask")) for step in steps}
    if len(windows) != 1:
        return None
    (window,) = windows
    trial = LayerForward(module, parts, options, dtype, direct=False, window=window)
    if not all(_agrees(trial, step) for step in steps):
        return None
    routed, dense = parts.routed, parts.dense
    direct = (routed is not None and all(_is_routed(routed, step) for step in steps)) or (
        dense is not None and all(_is_dense(dense, step) for step in steps)
    )
    return LayerForward(module, parts, options, dtype, direct=direct, window=window)


@dataclass(slots=True)
class _Step:
    """What a layer computes for one token.

    Attributes:
        x: The layer's input.
        named: Its other arguments.
        before: Keys and values of its cache before.
        after: The same after.
        feed: What the feed-forward block was given and returned.
        output: The layer's output.
        routed: The hidden states, experts and weights that experts were given.
        options: With which attention was called; None if it was called with others, or with other
            keys and values than the cache's.
        operations: Names of torch's operations in the layer, outside of its feed-forward block.
        feed_operations: The same in that block, outside of its router and its experts.
    """

    x: Tensor | None = None
    named: dict[str, Any] = field(default_factory=dict)
    before: tuple[Tensor, Tensor] | None = None
    after: tuple[Tensor, Tensor] | None = None
    feed: tuple[Any, Any] | None = None
    output: Any = None
    routed: tuple[Tensor, Routing] | None = None
    options: AttentionOptions | None = None
    operations: list[str] = field(default_factory=list)
    feed_operations: list[str] = field(default_factory=list)


_JOINS = "cat"
_PROMPT, _LATER = 5, 6  # tokens before the first recorded one, and between it and the second


@torch.inference_mode()
def _recorded(
    model: PreTrainedModel, candidates: Mapping[nn.Module, LayerParts], context: int | None
) -> dict[nn.Module, list[_Step]]:
    """Return what each layer computes for one or two tokens; empty if the model cannot be run so.

    The second token lies further on, where the context has room: a layer may depend on the length.
    """
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    low, generator = min(3, vocabulary - 1), torch.Generator().manual_seed(0)
    chunks = [_PROMPT, 1, _LATER, 1]
    if context is not None and context < sum(chunks):
        chunks = chunks[:2]
    ids_1T = torch.randint(low, vocabulary, (1, sum(chunks)), generator=generator)
    cache, found = _whole_cache(model), dict[nn.Module, list[_Step]]()
    try:
        for part_1T in ids_1T.split(chunks, dim=1):
            recorder = _Recorder()
            if part_1T.shape[1] > 1:
                _, cache = forward_with_cache(model, cache, input_ids=part_1T)
                continue
            with recorder.following(candidates), recorder.attention(model, candidates):
                _, cache = forward_with_cache(model, cache, input_ids=part_1T)
            for module, step in recorder.steps.items():
                found.setdefault(module, []).append(step)
    except Exception:  # noqa: BLE001 - any error in a family's code
        _LOG.debug("layers are computed by the family's own modules", exc_info=True)
        return {}
    return found


def _whole_cache(model: PreTrainedModel) -> Cache | None:
    """Return a cache that keeps all keys where a model's own drops those outside of windows.

    The engine's KV cache keeps them too. None: the model makes its own.
    """
    types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    return DynamicCache() if types == {"full_attention", "sliding_attention"} else None


class _Recorder(TorchDispatchMode):
    """Records what layers compute for one token, with the operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[nn.Module, _Step] = {}
        self._inside: _Step | None = None
        self._operations: list[str] | None = None  # to which operations are added

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it if it is neither a view nor an allocation."""
        name = func._schema.name.partition("::")[2]
        if self._operations is not None and not func.is_view and name not in _HARMLESS:
            self._operations.append(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def following(self, candidates: Mapping[nn.Module, LayerParts]) -> Iterator[None]:
        """Record within the block."""
        hooks = []
        for module, parts in candidates.items():
            step, feed = _Step(), parts.feed_forward
            begin, end = self._layer_hooks(module, parts.index, step)
            hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            hooks.append(module.register_forward_hook(end))
            begin, end = self._feed_hooks(step)
            hooks.append(feed.register_forward_pre_hook(begin))
            hooks.append(feed.register_forward_hook(end))
            if parts.routed is not None:
                for one in (parts.routed.router, parts.routed.experts):
                    hooks.append(one.register_forward_pre_hook(self._pause))
                hooks.append(parts.routed.router.register_forward_hook(self._resume(step)))
                hooks.append(parts.routed.experts.register_forward_hook(_experts_hook(step)))
                hooks.append(parts.routed.experts.register_forward_hook(self._resume(step)))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def attention(
        self, model: PreTrainedModel, candidates: Mapping[nn.Module, LayerParts]
    ) -> Iterator[None]:
        """Record the options of calls of attention within the block."""
        before = model.config._attn_implementation
        own, own_mask = AttentionInterface()[before], AttentionMaskInterface()[before]
        layer_of = {parts.attention: module for module, parts in candidates.items()}

        def recorded(module: nn.Module, *given: Any, **named: Any) -> Any:
            if (step := self._inside) is not None and module in layer_of:
                index = candidates[layer_of[module]].index
                step.options = _options(named) if _are_cached(given[1:3], step, index) else None
            return own(module, *given, **named)

        AttentionInterface.register(RECORDED_NAME, recorded)
        AttentionMaskInterface.register(RECORDED_NAME, own_mask)
        model.config._attn_implementation = RECORDED_NAME
        try:
            yield
        finally:
            model.config._attn_implementation = before
            AttentionInterface.register(RECORDED_NAME, own)  # forgets this recorder

    def _layer_hooks(self, module: nn.Module, index: int, step: _Step) -> tuple[Any, Any]:
        def begin(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            step.x, step.named = given[0].clone(), named
            step.before = _cached(named, index)
            self._inside, self._operations = step, step.operations

        def end(_module: nn.Module, _given: Any, output: Any) -> None:
            self._inside = self._operations = None
            step.output, step.after = output, _cached(step.named, index)
            self.steps[module] = step

        return begin, end

    def _feed_hooks(self, step: _Step) -> tuple[Any, Any]:
        def begin(_module: nn.Module, given: tuple[Any, ...]) -> None:
            self._operations = None
            step.feed = given[0].clone(), None
            self._operations = step.feed_operations

        def end(_module: nn.Module, _given: Any, output: Any) -> None:
            assert step.feed is not None
            output = output[0] if isinstance(output, tuple) else output
            self._operations = None
            step.feed = step.feed[0], output.clone()
            self._operations = step.operations

        return begin, end

    def _pause(self, *_: Any) -> None:
        self._operations = None

    def _resume(self, step: _Step) -> Any:
        def resume(*_: Any) -> None:
            self._operations = step.feed_operations

        return resume


def _are_cached(given: tuple[Any, ...], step: _Step, index: int) -> bool:
    """Return whether attention is given all keys and values of the layer's cache, and no others."""
    cache = next((step.named[n] for n in CACHE_NAMES if step.named.get(n) is not None), None)
    layer = cache.layers[index] if cache is not None else None
    own = getattr(layer, "keys", None), getattr(layer, "values", None)
    if given and isinstance(given[0], LatentRows):
        given = given[0].as_subclass(Tensor), given[0].rotated
    return len(given) == 2 and all(
        isinstance(one, Tensor)
        and isinstance(mine, Tensor)
        and (one.data_ptr(), one.shape, one.stride())
        == (mine.data_ptr(), mine.shape, mine.stride())
        for one, mine in zip(given, own, strict=True)
    )


def _all_follow(steps: Sequence[_Step], others: Sequence[_Step]) -> bool:
    """Return whether a layer is given what another returns, with the same arguments but masks."""
    return len(steps) == len(others) and all(map(_follows, steps, others))


def _follows(step: _Step, other: _Step) -> bool:
    if step.x is None or other.x is None or not torch.equal(step.output, other.x):
        return False
    one, two = (arguments_of(each.x, each.named) for each in (step, other) if each.x is not None)
    return one is not None and two is not None and one.same_as(two)


def _same(options: AttentionOptions, other: AttentionOptions | None) -> bool:
    return (
        other is not None
        and (options.scale, options.window, options.softcap)
        == (other.scale, other.window, other.softcap)
        and options.sinks_H is other.sinks_H
    )


def _options(named: Mapping[str, Any]) -> AttentionOptions | None:
    """Return the options of a call of attention; None if it has others."""
    known = {name: named.get(name) for name in ("scaling", "sliding_window", "softcap", "s_aux")}
    others = {name: value for name, value in named.items() if name not in known}
    if others.get("is_causal") is False or others.get("dropout"):
        return None
    if any(isinstance(value, Tensor) for name, value in others.items() if name not in IGNORED):
        return None
    return AttentionOptions(
        scale=known["scaling"],
        window=known["sliding_window"],
        softcap=known["softcap"],
        sinks_H=known["s_aux"],
    )


def _experts_hook(step: _Step) -> Any:
    """Return a hook that records what experts are given, and returns the hidden states."""

    def end(experts: VirtualExperts, given: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        x_TD = given[0].reshape(-1, given[0].shape[-1])
        step.routed = x_TD.clone(), experts.block.layout.routing(len(x_TD), *given[1:])
        return given[0].clone()

    return end


_HARMLESS = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "copy_", "clone"),
    *("_to_copy", "lift_fresh", "_unsafe_view", "_reshape_alias", "arange"),
}


def _cached(named: Mapping[str, Any], index: int) -> tuple[Tensor, Tensor] | None:
    """Return copies of a layer's keys and values [1, G, L, C]."""
    cache = next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)
    layers = getattr(cache, "layers", ())
    if index >= len(layers):
        return None
    keys, values = (getattr(layers[index], name, None) for name in ("keys", "values"))
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        return None
    return _copy(keys), _copy(values)


def _copy(cache: Tensor) -> Tensor:
    return cache.changed(Tensor.clone) if isinstance(cache, Int8Rows) else cache.clone()


def _is_routed(routed: RoutedExperts, step: _Step) -> bool:
    """Return whether a feed-forward block is its router and its experts, and nothing else.

    In the recorded step experts returned what they were given, so the block must return its input,
    plus the output of its shared expert if it has one.
    """
    kernel = routed.forward.kernel()
    if kernel is None or step.routed is None or step.feed is None:
        return False
    x_TD, chosen = step.routed
    given_TD, returned_TD = (one.view(x_TD.shape) for one in step.feed)
    _, made = kernel(given_TD)
    return (
        torch.equal(x_TD, given_TD)
        and _returns(routed, x_TD, returned_TD, step.feed_operations)
        and made.weights_TK.dtype == chosen.weights_TK.dtype
        and torch.equal(made.ids_TK, chosen.ids_TK)
        and torch.equal(made.weights_TK, chosen.weights_TK)
    )


def _is_dense(mlp: SharedModules, step: _Step) -> bool:
    """Return whether a feed-forward block is an MLP, for which torch only multiplies."""
    if step.feed is None:
        return False
    given_TD, returned_TD = (one.view(-1, one.shape[-1]) for one in step.feed)
    kernel = mlp.kernel(given_TD.dtype)
    if kernel is None or list(step.feed_operations) != ["mul"]:
        return False
    return torch.equal(returned_TD, kernel.add(given_TD, torch.zeros_like(returned_TD)))


def _returns(
    routed: RoutedExperts, x_TD: Tensor, returned_TD: Tensor, operations: Sequence[str]
) -> bool:
    """Return whether a block returns x, plus its shared expert's output, and does no more.

    Torch may only multiply the expert's hidden units, multiply it by its factor, and add.
    """
    if routed.shared is None:
        return not operations and torch.equal(returned_TD, x_TD)
    shared = routed.shared.kernel(x_TD.dtype)
    if shared is None or list(operations) not in (["mul", "add"], ["mul", "mul", "add"]):
        return False
    return torch.equal(returned_TD, shared.add(x_TD, x_TD.clone()))


def _agrees(forward: LayerForward, step: _Step) -> bool:
    """Return whether one call gives the bits of a recorded step.

    Besides kernels, the layer may use nothing but the additions of its two residuals, and join the
    parts of queries for latents: what has no effect on this token, such as a limit of values, may
    have one on others.
    """
    operations = [one for one in step.operations if one != _JOINS or not forward.parts.latent]
    if operations != ["add", "add"] or not isinstance(step.output, Tensor):
        return False
    if step.x is None or step.before is None or step.after is None or step.feed is None:
        return False
    if not all(isinstance(one, Tensor) and one.shape == step.x.shape for one in step.feed):
        return False
    keys, values = (_with_room(one) for one in step.before)
    made = forward.compute(step.x, step.named, rows=own_rows(keys, values, forward.window))
    if made is None:
        return False
    sum_TD, normed_TD = (one.view(step.x.shape) for one in (made.sum_TD, made.normed_TD))
    return (
        torch.equal(normed_TD, step.feed[0])
        and torch.equal(sum_TD + step.feed[1], step.output)
        and all(map(_equal, (keys, values), step.after))
    )


def _with_room(cache: Tensor) -> Tensor:
    """Return cached keys or values [1, G, L, C] with room for another token."""
    if isinstance(cache, Int8Rows):
        shape = cache.shape[0], cache.shape[1], cache.shape[2] + 1, cache.shape[3]
        longer = Int8Rows.zeros(*shape)
        longer.codes()[:, :, :-1], longer.scales[:, :, :-1] = cache.codes(), cache.scales
        return longer
    return torch.cat([cache, torch.zeros_like(cache[:, :, :1])], dim=2)


def _equal(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, Int8Rows) and isinstance(other, Int8Rows):
        same = torch.equal(one.codes(), other.codes())
        return same and torch.equal(one.scales, other.scales)
    return torch.equal(one, other)
