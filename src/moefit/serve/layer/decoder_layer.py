"""Compute the attention block of decoder layers in one call while few tokens are computed.

A layer makes some ten kernel calls before its feed-forward block, and as much time passes in
Python between them. Layers of the common form (norm, attention with rotary embeddings, residual,
norm) are recognised by what they return (`layer_probe.py`), and get a `forward` of their own on the
instance. Where the feed-forward block is a router and experts, the router is part of the call; an
MLP without experts is computed by another call. Other blocks stay the family's own modules.

Shapes: B sequences, T tokens, D model width, R cosines per token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moefit.cache_argument import CACHE_NAMES
from moefit.graphs import outside_of_graphs
from moefit.quant.attention import AttentionOptions
from moefit.quant.cpu_kernels import kernels
from moefit.quant.kv_int8 import part_of
from moefit.quant.layers.attention_block import (
    AttentionBlockKernel,
    Block,
    BlockOutput,
    CacheRows,
)
from moefit.quant.layers.layer_operations import RouterKernel
from moefit.quant.layers.shared_expert import SharedExpertKernel
from moefit.serve.hf.kv_cache import Int8Layer, ReservedLayer
from moefit.serve.hf.native_linear import addresses_of
from moefit.serve.layer.layer_parts import LayerParts, RoutedExperts, block_of

MOST_TOKENS = 32  # of a step that is computed so: with more, the time between calls hardly counts
UNKNOWN_WINDOW = -1
IGNORED = {"position_ids", "use_cache", "cache_position", "segments", "output_router_logits"}


@dataclass(frozen=True, slots=True, eq=False)
class FeedKernels:
    """A feed-forward block as kernels compute it.

    Attributes:
        routed: Its experts, with `router`; both None for an MLP without experts.
        router: The call for their router.
        mlp: The expert that all tokens pass through, or the whole block where it has no experts.
    """

    routed: RoutedExperts | None
    router: RouterKernel | None
    mlp: SharedExpertKernel | None


@dataclass(frozen=True, slots=True, eq=False)
class StepArguments:
    """What all layers of a step are given.

    Attributes:
        window: Of the layer's attention mask; see `window_of`. It may differ between layers.
        cache: The cache of all layers.
        cos: Cosines of each token, or complex numbers with both.
        sin: Sines, or the same.
    """

    window: int | None
    cache: Any
    cos: Tensor
    sin: Tensor

    @property
    def cosines(self) -> int:
        """Return R; of complex numbers twice as many, as they have cosines and sines in turn."""
        return self.cos.shape[-1] * (2 if self.cos.is_complex() else 1)

    def same_as(self, other: "StepArguments") -> bool:
        """Return whether these are the same objects, up to the window."""
        return self.cache is other.cache and self.cos is other.cos and self.sin is other.sin


class LayersBefore(Protocol):
    """Computes several layers at once, when the first of them is called."""

    def ready(self, place: int, x: Tensor, named: Mapping[str, Any]) -> Tensor | None:
        """Return the output of a layer that was computed together with the one before, or None.

        Args:
            place: Position of the layer among the layers that may be computed at once.
            x: What it is given.
            named: Its other arguments.
        """
        ...

    def output(
        self, place: int, x: Tensor, named: Mapping[str, Any], arguments: StepArguments
    ) -> Tensor | BlockOutput | None:
        """Return a layer's output, or what comes before its experts; None to compute it alone.

        Args:
            place: Position of the layer among the layers that may be computed at once.
            x: Its hidden states [B, T, D], for which `LayerForward.supports` holds.
            named: Its other arguments.
            arguments: The same, by what they are.
        """
        ...


class LayerForward:
    """The `forward` of one layer: by one call and its feed-forward block, or the module's own.

    Args:
        module: The layer.
        parts: Its parts.
        options: With which the layer calls attention.
        dtype: The dtype of hidden states.
        direct: Whether the feed-forward block is what `parts.routed` says, so that its router is
            part of the call and its experts are called with the choice; or what `parts.dense` says.
        window: Of the layer's attention mask in recorded steps.

    Attributes:
        routed: The block's experts, if it has some and they are called so.
        together: Computes this layer together with others, of which it is number `place`.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: LayerParts,
        options: AttentionOptions,
        dtype: torch.dtype,
        *,
        direct: bool,
        window: int | None,
    ):
        self._module, self.parts, self._options, self._dtype = module, parts, options, dtype
        self.window = window
        self._own: Callable[..., Any] = type(module).forward
        self._kernel: AttentionBlockKernel | None = None
        self.direct, self.routed = direct, parts.routed if direct else None
        self._mlp = None if not direct else parts.routed.shared if parts.routed else parts.dense
        self.together: LayersBefore | None = None
        self.place = 0
        self._weights: tuple[int, ...] = ()
        owners = [module, parts.attention, parts.feed_forward]
        if self._mlp is not None and self.routed is not None:
            owners.append(self._mlp.mlp)
        self._children = [one._modules for one in owners]
        self._hooks_of_replaced = [
            hooks
            for one in parts.replaced
            for hooks in (one._forward_hooks, one._forward_pre_hooks)
        ]
        self._made_for, self._hooks = self._parts_in_use(), self._hooks_in_use()

    @outside_of_graphs
    def __call__(self, *given: Any, **named: Any) -> Any:
        """Return what the layer's own `forward` does."""
        x = given[0] if given else named.get("hidden_states")
        if self.together is not None and given:
            made = self.together.ready(self.place, given[0], named)
            if made is not None:
                return made
        if len(given) <= 1 and isinstance(x, Tensor) and self.supports(x):
            made = self._before_feed(x, named)
            if isinstance(made, Tensor):
                return made
            if made is not None:
                return self._with_feed(made, x).view(x.shape)
        return self._own(self._module, *given, **named)

    def _before_feed(self, x: Tensor, named: Mapping[str, Any]) -> Tensor | BlockOutput | None:
        """Return the layer's output, or what comes before its feed-forward block."""
        if self.together is not None and (given := arguments_of(x, named)) is not None:
            made = self.together.output(self.place, x, named, given)
            if made is not None:
                return made
        feed = self.feed_kernels()
        return self.compute(x, named, router=None if feed is None else feed.router)

    def supports(self, x: Tensor) -> bool:
        """Return whether hidden states, modes and the layer's modules are supported."""
        return (
            x.dim() == 3
            and 0 < x.shape[0] * x.shape[1] <= MOST_TOKENS
            and x.dtype == self._dtype
            and x.is_cpu
            and not torch.is_grad_enabled()
            and not self._module.training
            and not any(self._hooks_of_replaced)
            and self._parts_in_use() == self._made_for
        )

    def has_hooks(self) -> bool:
        """Return whether others see the layer's input or output."""
        return bool(self._module._forward_hooks or self._module._forward_pre_hooks)

    def _parts_in_use(self) -> list[Any]:
        """Return the layer's modules and their `forward`, which users may replace.

        Adapters, for example, put modules of their own around linear layers.
        """
        modules = [one for owner in self._children for one in owner.values()]
        forwards = [one and one.__dict__.get("forward") for one in modules]
        return [*modules, *forwards, self.parts.attention.__dict__.get("expand_kv")]

    def _with_feed(self, made: BlockOutput, x: Tensor) -> Tensor:
        """Return the sum and the output of the feed-forward block that reads its norm [T, D]."""
        if (routed := self.routed) is not None and made.routing is not None:
            state = routed.experts.state
            state.logits_TE, state.prefilling = made.logits_TE, x.shape[1] > 1
            output_TD = routed.experts.compute(made.normed_TD, made.routing)
            shared = None if self._mlp is None else self._mlp.kernel(self._dtype)
            output_TD = output_TD if shared is None else shared.add(made.normed_TD, output_TD)
            return made.sum_TD + output_TD
        feed = self.feed_kernels() if self.routed is None else None
        if feed is not None and feed.mlp is not None:
            return feed.mlp.add(made.normed_TD, made.sum_TD)
        output = self.parts.feed_forward(made.normed_TD.view(x.shape))
        output = output[0] if isinstance(output, tuple) else output
        return made.sum_TD + output.reshape(made.sum_TD.shape)

    def feed_kernels(self) -> FeedKernels | None:
        """Return the feed-forward block as kernels compute it.

        None if it is of another form, or others put hooks or weights in it.
        """
        if not self.direct or self._hooks != self._hooks_in_use():
            return None
        routed = self.routed
        router = None if routed is None else routed.forward.kernel()
        mlp = None if self._mlp is None else self._mlp.kernel(self._dtype)
        if (router is None) != (routed is None) or (mlp is None) != (self._mlp is None):
            return None
        return FeedKernels(routed, router, mlp)

    def _hooks_in_use(self) -> tuple[int, ...]:
        """Return the numbers of the hooks of the feed-forward block and the modules in it."""
        modules = list[nn.Module]()
        if self.routed is not None:
            modules = [self.parts.feed_forward, *self.routed.modules()]
        elif self._mlp is not None:
            modules = self._mlp.all
        return tuple(
            [key for one in modules for key in (*one._forward_hooks, *one._forward_pre_hooks)]
        )

    def compute(
        self,
        x: Tensor,
        named: Mapping[str, Any],
        *,
        rows: CacheRows | None = None,
        router: RouterKernel | None = None,
    ) -> BlockOutput | None:
        """Return what the call makes; None if it does not support the arguments.

        Args:
            x: Hidden states [B, T, D].
            named: The layer's other arguments.
            rows: Where tokens belong in a cache; None for the cache among the arguments.
            router: A router that the call includes.
        """
        if (given := arguments_of(x, named)) is None:
            return None
        tokens = x.shape[0] * x.shape[1]
        if (ready := self.ready(tokens, given, rows)) is None:
            return None
        kernel, rows = ready
        return kernel(x.reshape(tokens, -1).contiguous(), given.cos, given.sin, rows, router)

    def ready(
        self, tokens: int, given: StepArguments, rows: CacheRows | None = None
    ) -> tuple[AttentionBlockKernel, CacheRows] | None:
        """Return the call and the tokens' places in the cache, which is then one step longer.

        Args:
            tokens: T.
            given: The step's arguments.
            rows: Places to use instead.
        """
        kernel = self._known(given.cosines)
        if kernel is None or kernel.block.rotary.in_turn != given.cos.is_complex():
            return None
        rows = rows or self._rows(given, tokens, kernel.block)
        return None if rows is None else (kernel, rows)

    def _rows(self, given: StepArguments, tokens: int, block: Block) -> CacheRows | None:
        """Return where tokens belong in the cache, which is then as long as after the step."""
        window, cache = given.window, given.cache
        if window == UNKNOWN_WINDOW or self._options.window not in (None, window):
            return None
        if (rows := getattr(cache, "rows", None)) is not None:
            found = rows(self.parts.index, window)
            fits = found is not None and block.fits(found.keys_GLC, found.values_GLZ, self._dtype)
            return found if fits else None
        if type(cache).update is not Cache.update:
            return None  # a user's own cache
        layer = cache.layers[self.parts.index] if self.parts.index < len(cache.layers) else None
        if layer is None or type(layer) not in (ReservedLayer, Int8Layer) or tokens != 1:
            return None
        keys, values = layer.keys, layer.values
        if keys is None or values is None or not block.fits(keys, values, self._dtype):
            return None
        if (room := layer.room(1)) is None:
            return None
        keys_1GLC, values_1GLZ = room
        return own_rows(keys_1GLC, values_1GLZ, window)

    def _known(self, cosines: int) -> AttentionBlockKernel | None:
        kernel, compiled = self._kernel, kernels()
        if compiled is None:
            return None
        weights = tuple([address for one in self.parts.replaced for address in addresses_of(one)])
        if kernel is None or kernel.cosines != cosines or self._weights != weights:
            block = block_of(self._module, self.parts, self._options, cosines)
            if block is None or not block.supported(self._dtype, cosines):
                return None
            kernel = self._kernel = AttentionBlockKernel(compiled, block, self._dtype, cosines)
            self._weights = weights
        return kernel


def arguments_of(x: Tensor, named: Mapping[str, Any]) -> StepArguments | None:
    """Return a layer's arguments beside its hidden states [B, T, D]; None for others than known."""
    mask, cache, angles = None, None, None
    for name, value in named.items():
        if name == "attention_mask":
            mask = value
        elif name in CACHE_NAMES:
            cache = value
        elif name == "position_embeddings":
            angles = value
        elif (
            name not in IGNORED
            and name != "hidden_states"
            and value is not None
            and value is not False
        ):
            return None
    if isinstance(angles, Tensor) and angles.is_complex():
        angles = angles, angles
    if cache is None or not isinstance(angles, tuple) or len(angles) != 2:
        return None
    cos, sin = angles
    if not _are_angles(cos, sin, x.shape[0] * x.shape[1], x.dtype):
        return None
    described = mask is not None or not hasattr(cache, "rows")  # packed requests need a mask
    return StepArguments(window_of(mask) if described else UNKNOWN_WINDOW, cache, cos, sin)


def window_of(mask: Any) -> int | None:
    """Return the window that an attention mask describes: None for all keys.

    `UNKNOWN_WINDOW` stands for a mask of another kind, such as one that hides padding.
    """
    return None if mask is None else getattr(mask, "window", UNKNOWN_WINDOW)


def _are_angles(cos: Tensor, sin: Tensor, tokens: int, dtype: torch.dtype) -> bool:
    """Return whether cosines and sines are one consecutive row per token, in a dtype or complex."""
    return (
        cos.dtype == sin.dtype
        and cos.dtype in (dtype, torch.complex64)
        and cos.shape == sin.shape
        and cos.numel() == tokens * cos.shape[-1]
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


def own_rows(keys_1GLC: Tensor, values_1GLZ: Tensor, window: int | None) -> CacheRows | None:
    """Return the rows of the last token of a sequence with a cache of its own."""
    if keys_1GLC.shape[0] != 1:
        return None
    return CacheRows(
        keys_GLC=part_of(keys_1GLC, 0),
        values_GLZ=part_of(values_1GLZ, 0),
        requests=((0, keys_1GLC.shape[2] - 1, 1),),
        window=window,
    )
