"""Latent attention (MLA) of a served model by kernels, without expanding what the cache holds.

transformers caches a latent vector per token and expands all of them at every step (`expand_kv`).
Where that is recognised by its results, the instance gets an `expand_kv` that returns the latents
as they are (`LatentRows`), which attention functions pass to `quant/latent.py`.

Shapes: B sequences, T new tokens, H heads, N, R and V widths of a key's parts and of a value, C
latent width, L tokens of a cache.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefit.cache_argument import forward_with_cache
from moefit.quant.attention import AttentionOptions
from moefit.quant.cpu_kernels import KernelMatrix, kernels
from moefit.quant.latent import LatentHeads, LatentSegment, attend_to_latents
from moefit.serve.hf.native_linear import addresses_of, linear_of

_LOG = logging.getLogger(__name__)
# Of the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.0125, torch.bfloat16: 0.1}


class LatentRows(Tensor):
    """Latents of cached tokens [B, 1, L, C], for attention instead of expanded keys.

    A tensor derived from it is a plain tensor.

    Attributes:
        rotated: Rotated parts of keys [B, 1, L, R].
        heads: How heads expand latents.
        own_expand: The family's own function of both.
    """

    rotated: Tensor
    heads: LatentHeads
    own_expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all heads."""
        return self.own_expand(self.as_subclass(Tensor), self.rotated)

    def storages(self) -> set[int]:
        """Return the addresses of its storages."""
        return {one.untyped_storage().data_ptr() for one in (self, self.rotated)}

    def attend(
        self,
        query_THC: Tensor,
        places: Sequence[tuple[int, int, int, int]],
        options: AttentionOptions,
    ) -> Tensor:
        """Return attention [T, H, V] of queries to the latents of their own requests.

        Args:
            query_THC: Queries of all requests, one after the other, [T, H, N + R].
            places: (sequence, first place, past, new) of each request.
            options: Variant of attention.
        """
        compiled = kernels()
        assert compiled is not None, "kernels were there when the latents were passed on"
        latents_BLC, rotated_BLR = self.as_subclass(Tensor)[:, 0], self.rotated[:, 0]
        segments = [
            LatentSegment(
                latents_LC=latents_BLC[b, start : start + past + new],
                rotated_LR=rotated_BLR[b, start : start + past + new],
                past=past,
                new=new,
            )
            for b, start, past, new in places
        ]
        if options.scale is None:
            options = replace(options, scale=query_THC.shape[-1] ** -0.5)
        return attend_to_latents(compiled, self.heads, query_THC, segments, options)


class _Expansion:
    """An `expand_kv` that returns latents as they are while kernels compute attention."""

    def __init__(self, module: Any, heads: LatentHeads, config: Any, names: Sequence[str]):
        self._module, self._heads, self._config = module, heads, config
        self._names, self._own = frozenset(names), module.expand_kv
        self._linear, self._weights = module.kv_b_proj, addresses_of(module.kv_b_proj)

    def __call__(self, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """Return `LatentRows` and the latents, or what the family's own function returns."""
        if not self._usable(latents, rotated):
            return self._own(latents, rotated)
        rows = latents.as_subclass(LatentRows)
        rows.rotated, rows.heads, rows.own_expand = rotated, self._heads, self._own
        return rows, latents

    def heads(self) -> LatentHeads | None:
        """Return how heads expand latents; None if that has changed since."""
        linear = self._module.kv_b_proj
        unchanged = (
            linear is self._linear  # others put adapters or hooks there
            and "forward" not in vars(linear)
            and not (linear._forward_hooks or linear._forward_pre_hooks)
            and addresses_of(linear) == self._weights
        )
        return self._heads if unchanged else None

    def _usable(self, latents: Tensor, rotated: Tensor) -> bool:
        return (
            kernels() is not None
            and latents.is_cpu
            and latents.dim() == 4
            and latents.shape[1] == 1
            and rotated.dtype == latents.dtype
            and rotated.stride(-1) == latents.stride(-1) == 1
            and self._heads.supported(latents.dtype)
            and self._config._attn_implementation in self._names
            and not torch.is_grad_enabled()
            and self.heads() is not None
        )


def use_latent_kernels(
    model: PreTrainedModel, dtype: torch.dtype, name: str, names: Sequence[str]
) -> Callable[[], None]:
    """Attend to cached latents in every module that is recognised, until it is undone.

    Args:
        model: The model, whose linear layers and attention use kernels already.
        dtype: The dtype of hidden states.
        name: Attention implementation to use outside of the engine.
        names: All implementations that know `LatentRows`.

    Returns:
        A function that undoes the change.
    """
    changed = list[nn.Module]()

    def undo() -> None:
        for module in changed:
            vars(module).pop("expand_kv", None)
        changed.clear()

    compiled, before = kernels(), model.config._attn_implementation
    found = {one: heads for one in model.modules() if (heads := _heads_of(one, dtype)) is not None}
    if compiled is None or not found or model.device.type != "cpu":
        return undo
    wanted = _logits(model)
    for module, heads in found.items():
        config = getattr(module, "config", model.config)  # of its part, in a model of several parts
        cast(Any, module).expand_kv = _Expansion(module, heads, config, names)
        changed.append(module)
    model.config._attn_implementation = name
    made = _logits(model)
    if wanted is None or made is None or not _close(made, wanted, _TOLERANCE[dtype]):
        _LOG.debug("latent attention is computed by the family's own modules")
        model.config._attn_implementation = before
        undo()
    return undo


def expansion_of(module: nn.Module) -> LatentHeads | None:
    """Return how a module expands latents to which kernels attend; None for another module."""
    expand = vars(module).get("expand_kv")
    return expand.heads() if isinstance(expand, _Expansion) else None


@torch.inference_mode()
def _heads_of(module: Any, dtype: torch.dtype) -> LatentHeads | None:
    """Return how a module's `expand_kv` expands latents; None if it is not of that form."""
    linear = getattr(module, "kv_b_proj", None)
    names = "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
    widths = [getattr(module, name, None) for name in names]
    if (
        not isinstance(linear, nn.Module)
        or not callable(getattr(module, "expand_kv", None))
        or not all(isinstance(one, int) for one in widths)
        or (known := linear_of(linear)) is None
        or known.bias_O is not None
    ):
        return None
    keys, rotated, values = cast(list[int], widths)
    weight: KernelMatrix = known.weight
    heads = LatentHeads(
        weight=weight,
        heads=weight.rows // (keys + values),
        keys=keys,
        values=values,
        rotated=rotated,
    )
    if not heads.supported(dtype):
        return None
    generator = torch.Generator().manual_seed(0)
    latents, parts = (
        torch.randn(1, 1, 3, width, generator=generator).to(dtype)
        for width in (weight.cols, rotated)
    )
    try:
        own = module.expand_kv(latents, parts)
    except Exception:  # noqa: BLE001 - any error in a family's code
        return None
    both = linear(latents).view(1, 3, heads.heads, keys + values).transpose(1, 2)
    wanted = torch.cat([both[..., :keys], parts.expand(-1, heads.heads, -1, -1)], dim=-1)
    same = torch.equal(own[0], wanted) and torch.equal(own[1], both[..., keys:])
    return heads if same else None


@torch.inference_mode()
def _logits(model: PreTrainedModel) -> Tensor | None:
    """Return the logits of a short text, in parts; None if the model cannot be run so."""
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(min(3, vocabulary - 1), vocabulary, (1, 9), generator=generator)
    cache, rows = None, []
    try:
        for part_1T in ids_1T.split([5, 1, 2, 1], dim=1):
            output, cache = forward_with_cache(model, cache, input_ids=part_1T)
            rows.append(output.logits)
    except Exception:  # noqa: BLE001 - any error in a family's code
        return None
    return torch.cat(rows, dim=1).float()


def _close(made: Tensor, wanted: Tensor, tolerance: float) -> bool:
    error = (made - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)
    return bool(error <= tolerance)
