"""Find the modules of layers that may be of the common form, by their names and kinds.

Norm, attention with rotary embeddings, residual, norm, feed-forward block, residual. Whether a
layer is of that form is not decided here: `layer_probe.py` compares what it returns.

Shapes: R cosines per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from moefit.quant.attention import AttentionOptions
from moefit.quant.layers.attention_block import AttentionBlock, Block, Norm
from moefit.quant.layers.latent_block import LatentBlock
from moefit.quant.layers.shared_expert import Linear
from moefit.serve.hf.latent import expansion_of
from moefit.serve.hf.native_linear import linear_of
from moefit.serve.hf.norms import norm_of
from moefit.serve.hf.rotary import RotaryFunction, rotaries_of
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.layer.router_kernels import RouterForward
from moefit.serve.layer.shared_modules import SharedModules, dense_mlp, shared_modules


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedExperts:
    """A feed-forward block that is a router and experts, and no more than a shared expert besides.

    Attributes:
        experts: The experts.
        router: The router's module.
        forward: Its `forward`.
        shared: An expert whose output is added to theirs; None for none.
    """

    experts: VirtualExperts
    router: nn.Module
    forward: RouterForward
    shared: SharedModules | None

    def modules(self) -> list[nn.Module]:
        """Return the modules that a call computes."""
        return [self.router, self.experts, *(self.shared.all if self.shared else ())]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerParts:
    """The modules of a layer that may be of the common form.

    Attributes:
        attention: The attention module.
        feed_forward: The module that reads the second norm.
        replaced: All modules that one call computes.
        index: Position of the layer in caches.
        rotary: How heads are rotated.
        latent: Whether heads attend to latents.
        routed: What the feed-forward block may be; None if it has no experts.
        dense: The same of a block without experts, whose MLP is that of a shared expert.
    """

    attention: nn.Module
    feed_forward: nn.Module
    replaced: tuple[nn.Module, ...]
    index: int
    rotary: RotaryFunction
    latent: bool
    routed: RoutedExperts | None
    dense: SharedModules | None


_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_LATENT_LINEARS, _LATENT_NORM = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), "kv_a_layernorm"
_TWO_LINEARS, _BETWEEN = ("q_a_proj", "q_b_proj"), "q_a_layernorm"
_NORMS = ("input_layernorm", "post_attention_layernorm")


def candidates(model: nn.Module) -> Iterator[tuple[nn.Module, LayerParts]]:
    """Yield modules with the children of a layer of the common form.

    More than once where its attention may rotate heads by one of several functions.
    """
    for module in model.modules():
        children = dict(module.named_children())
        norms = [children.pop(name, None) for name in _NORMS]
        attentions = [one for one in children.values() if _is_attention(one) or _is_latent(one)]
        if (
            "forward" in vars(module)
            or len(children) != 2
            or len(attentions) != 1
            or any(one is None or norm_of(one) is None for one in norms)
        ):
            continue
        (attention,) = attentions
        (feed_forward,) = (one for one in children.values() if one is not attention)
        known = [one for one in norms if one is not None]
        for rotary in rotaries_of(attention):
            yield (
                module,
                LayerParts(
                    attention=attention,
                    feed_forward=feed_forward,
                    replaced=(attention, *attention.children(), *known),
                    index=cast(int, attention.layer_idx),
                    rotary=rotary,
                    latent=_is_latent(attention),
                    routed=_routed(feed_forward),
                    dense=dense_mlp(feed_forward),
                ),
            )


def _routed(feed_forward: nn.Module) -> RoutedExperts | None:
    """Return the router and the experts of a feed-forward block, if it has one of each."""
    children = list(feed_forward.children())
    experts = [one for one in children if isinstance(one, VirtualExperts)]
    routers = [one for one in children if isinstance(vars(one).get("forward"), RouterForward)]
    if len(experts) != 1 or len(routers) != 1:
        return None
    (router,) = routers
    others = [one for one in children if one is not router and one is not experts[0]]
    shared = shared_modules(others) if others else None
    if others and shared is None:
        return None
    return RoutedExperts(
        experts=experts[0], router=router, forward=vars(router)["forward"], shared=shared
    )


def _is_attention(module: nn.Module) -> bool:
    children = dict(module.named_children())
    linears = [children.pop(name, None) for name in _LINEARS]
    return (
        all(one is not None and linear_of(one) is not None for one in linears)
        and all(name in _HEAD_NORMS and norm_of(one) is not None for name, one in children.items())
        and isinstance(getattr(module, "layer_idx", None), int)
        and isinstance(getattr(module, "head_dim", None), int)
    )


def _is_latent(module: nn.Module) -> bool:
    children = dict(module.named_children())
    two = _TWO_LINEARS[0] in children
    linears = [*_LATENT_LINEARS, *(_TWO_LINEARS if two else ("q_proj",))]
    norms = [_LATENT_NORM, *([_BETWEEN] if two else [])]
    return (
        children.keys() == {*linears, *norms}
        and all(linear_of(children[name]) is not None for name in linears)
        and all(norm_of(children[name]) is not None for name in norms)
        and isinstance(getattr(module, "layer_idx", None), int)
        and expansion_of(module) is not None
    )


def block_of(
    module: nn.Module, parts: LayerParts, options: AttentionOptions, cosines: int
) -> Block | None:
    """Return what a layer's attention block may compute; None if it has another form.

    Args:
        module: The layer.
        parts: Its parts.
        options: With which it calls attention.
        cosines: R.
    """
    if parts.latent:
        return _latent_block(module, parts, options, cosines)
    attention = parts.attention
    width = cast(int, attention.head_dim)
    linears = [linear_of(attention.get_submodule(name)) for name in _LINEARS]
    before, after = (_norm(module.get_submodule(name)) for name in _NORMS)
    of_queries, of_keys = (_norm(getattr(attention, name, None)) for name in _HEAD_NORMS)
    rotary = parts.rotary.form(cosines, width)
    if any(one is None for one in (*linears, before, after, rotary)):
        return None
    query, key, value, output = cast(list[Linear], linears)
    if query.weight.rows % width or key.weight.rows % width:
        return None
    own = [one for one in attention._parameters.values() if one is not None]
    if len(own) != (options.sinks_H is not None) or not all(one is options.sinks_H for one in own):
        return None  # a weight that is not known, or other sinks than those of the recorded step
    return AttentionBlock(
        before=cast(Norm, before),
        after=cast(Norm, after),
        query=query,
        key=key,
        value=value,
        output=output,
        of_queries=of_queries,
        of_keys=of_keys,
        heads=query.weight.rows // width,
        groups=key.weight.rows // width,
        rotary=cast(Any, rotary),
        options=options,
    )


def _latent_block(
    module: nn.Module, parts: LayerParts, options: AttentionOptions, cosines: int
) -> LatentBlock | None:
    """Return the same where heads attend to latents."""
    attention = parts.attention
    before, after = (_norm(module.get_submodule(name)) for name in _NORMS)
    of_keys, of_queries = (_norm(getattr(attention, n, None)) for n in (_LATENT_NORM, _BETWEEN))
    key, _, output = (linear_of(attention.get_submodule(name)) for name in _LATENT_LINEARS)
    query_in, query = (_linear(getattr(attention, name, None)) for name in _TWO_LINEARS)
    query = query or _linear(getattr(attention, "q_proj", None))
    expansion = expansion_of(attention)
    if expansion is None or any(one is not None for one in attention._parameters.values()):
        return None  # a weight that is not known
    rotary = parts.rotary.form(cosines, expansion.rotated)
    if any(one is None for one in (before, after, of_keys, query, key, output, rotary)):
        return None
    return LatentBlock(
        before=cast(Norm, before),
        after=cast(Norm, after),
        query_in=query_in,
        of_queries=of_queries,
        query=cast(Linear, query),
        key=cast(Linear, key),
        of_keys=cast(Norm, of_keys),
        expansion=expansion,
        output=cast(Linear, output),
        rotary=cast(Any, rotary),
        options=options,
    )


def _linear(module: nn.Module | None) -> Linear | None:
    return None if module is None else linear_of(module)


def _norm(module: nn.Module | None) -> Norm | None:
    if module is None or (form := norm_of(module)) is None:
        return None
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    plain_D = weight.detach().as_subclass(Tensor)
    return Norm(form=form, weight_D=plain_D, width=len(plain_D))
