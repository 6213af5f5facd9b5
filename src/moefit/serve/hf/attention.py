"""CPU attention of a served model: compiled kernels where they apply, else torch.

Registers attention functions with transformers. `moefit_cpu` computes what `sdpa` does: for one new
token, torch's kernel reads keys and values at a tenth of the memory bandwidth, ours at most of it.
`moefit_int8` attends to an int8 cache. Masks that a window describes are not materialised
(`WindowMask`). The engine's attention over many requests (`engine/varlen.py`) shares these parts.

Shapes: B sequences, T new tokens, H query heads, G KV heads, L keys, C head width.
"""

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from moefit.errors import UnsupportedModelError
from moefit.quant.attention import (
    AttentionOptions,
    KeySegment,
    attend_alone,
    attend_by_kernels,
)
from moefit.quant.cpu_kernels import kernels
from moefit.quant.kv_int8 import Int8Rows, floats_of, part_of
from moefit.serve.hf.latent import LatentRows

NAME, INT8_NAME, RECORDED_NAME = "moefit_cpu", "moefit_int8", "moefit_recorded"
LATENT_NAMES = INT8_NAME, "moefit_packed", RECORDED_NAME
"""Attention implementations that know `LatentRows`: those of `engine/varlen.py` and, where they are
recorded, of `layer/layer_probe.py` too."""
_IGNORED_ARGUMENTS = {
    "position_ids",
    "cache_position",
    "sliding_window",
    "output_attentions",
    "use_cache",
}


_OTHER_ATTENTION = ("position_bias", "softcap", "s_aux", "cache")


def cpu_attention(  # noqa: PLR0913 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return attention as transformers' `sdpa` does.

    Args:
        module: The attention module.
        query: [B, H, T, C].
        key: [B, G, L, C].
        value: [B, G, L, C].
        attention_mask: None for all keys (T = 1) or causal attention (T = L). With a mask, torch
            is used.
        dropout: As in `sdpa`; kernels are only used if 0.
        scaling: Factor of the scores; None for 1 / sqrt(C).
        is_causal: None for the module's own setting.
        others: Further arguments of transformers; kernels are only used if they have no effect.

    Returns:
        [B, T, H, C] in the queries' dtype, and None.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    new, length = query.shape[2], key.shape[2]
    plain = attention_mask is None and not dropout and (new == 1 or (causal and new == length))
    extra = any(
        value is not None
        and (
            name in _OTHER_ATTENTION
            or (isinstance(value, Tensor) and name not in _IGNORED_ARGUMENTS)
        )
        for name, value in others.items()
    )
    if plain and not extra and not (torch.is_grad_enabled() and query.requires_grad):
        out = _by_kernels(query, key, value, AttentionOptions(scale=scaling))
        if out is not None:
            return out, None
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **others,
    )


def _by_kernels(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> Tensor | None:
    """Compute attention with kernels; return None if they do not support the tensors."""
    batch, _, new, _ = query.shape
    if batch == 1 and not isinstance(key, Int8Rows):
        out_THZ = attend_alone(query[0], key[0], value[0], options)
        if out_THZ is not None:
            return out_THZ[None]
    segments = [
        KeySegment(
            keys_GLC=part_of(key, b),
            values_GLZ=part_of(value, b),
            past=key.shape[2] - new,
            new=new,
        )
        for b in range(batch)
    ]
    query_THC = query.transpose(1, 2).flatten(0, 1)
    out_THZ = attend_by_kernels(query_THC, segments, options)
    return None if out_THZ is None else out_THZ.view(batch, new, *out_THZ.shape[1:])


class UnpackableError(UnsupportedModelError):
    """The model uses an attention feature that moefit's own attention does not support."""


def refuse_tensors(others: dict[str, Any]) -> None:
    """Raise UnpackableError for arguments of attention that are tensors and not known."""
    tensors = {name for name, value in others.items() if isinstance(value, Tensor)}
    if unknown := tensors - {"position_ids", "cache_position"}:
        names = ", ".join(sorted(unknown))
        raise UnpackableError(f"its attention receives unsupported tensors: {names}")


def refuse_lost_scales(*caches: Tensor) -> None:
    """Raise UnpackableError for codes of an int8 cache whose scales are missing."""
    if any(one.dtype == torch.int8 and not isinstance(one, Int8Rows) for one in caches):
        raise UnpackableError("it changes cached keys or values before attention")


def int8_attention(  # noqa: PLR0913 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend to an int8 cache, to cached latents, or to the keys of a pass without a cache.

    Computed by kernels where a window describes the mask, else by torch with dequantised keys and
    values.

    Args:
        module: The attention module.
        query: [B, H, T, C].
        key: [B, G, L, C].
        value: [B, G, L, C].
        attention_mask: A `WindowMask`, a mask of `sdpa`, or None as in `cpu_attention`.
        scaling: Factor of the scores; None for 1 / sqrt(C).
        softcap: Soft limit of the scores.
        s_aux: Attention sinks [H].
        is_causal: None for the module's own setting.
        others: Further arguments; tensors among them are not supported.

    Returns:
        [B, T, H, C] in the queries' dtype, and None.

    Raises:
        UnpackableError: If the model uses a feature that is not supported exactly.
    """
    refuse_tensors(others)
    refuse_lost_scales(key, value)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    new, length = query.shape[2], key.shape[2]
    if attention_mask is None and (new == 1 or (causal and new == length)):
        attention_mask = WindowMask.of(None, query.device)
    window = _window_of(attention_mask)
    options = AttentionOptions(scale=scaling, window=window, softcap=softcap, sinks_H=s_aux)
    if isinstance(key, LatentRows):
        if isinstance(attention_mask, WindowMask):
            places = [(b, 0, length - new, new) for b in range(len(query))]
            out_THV = key.attend(query.transpose(1, 2).flatten(0, 1), places, options)
            return out_THV.view(len(query), new, *out_THV.shape[1:]), None
        key, value = key.expanded()
    if isinstance(attention_mask, WindowMask):
        gradients = torch.is_grad_enabled() and query.requires_grad
        if not gradients and (out := _by_kernels(query, key, value, options)) is not None:
            return out, None
        attention_mask = additive_mask(length - new, new, window, query)[None, None]
    return _by_torch(query, key, value, attention_mask, options), None


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Return [B, T, H, C], one sequence after the other; its keys alone are dequantised."""
    if mask is not None and mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        mask = zeros.masked_fill_(~mask, torch.finfo(query.dtype).min)
    outputs = []
    for b in range(len(query)):
        pair = floats_of(part_of(key, b), query.dtype), floats_of(part_of(value, b), query.dtype)
        own = None if mask is None else mask[b if len(mask) > 1 else 0, ..., : key.shape[2]]
        outputs.append(torch_attention(query[b], pair, own, options).transpose(0, 1))
    return torch.stack(outputs)


class WindowMask(Tensor):
    """Description of a layer's mask: causal, over the last `window` keys or all of them.

    Models pass it to attention unchanged. A tensor derived from it has no `window`.
    """

    window: int | None

    @classmethod
    def of(cls, window: int | None, device: torch.device) -> "WindowMask":
        """Return the mask for a window."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).as_subclass(cls)
        mask.window = window
        return mask


def _window_of(mask: Tensor | None) -> int | None:
    """Return the window of a mask, or None. Raises UnpackableError for a mask that was changed."""
    if isinstance(mask, WindowMask) and not hasattr(mask, "window"):
        raise UnpackableError("it changes its attention mask")
    return getattr(mask, "window", None)


def window_mask(
    *,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_sizes: Any,
) -> WindowMask:
    """Return the mask of a layer; transformers calls this (see its `masking_utils.py`).

    Raises:
        UnpackableError: If the mask is neither causal nor a sliding window.
    """
    if attention_mask is not None:
        raise UnpackableError("it has an attention mask of its own")
    if mask_function is causal_mask_function:
        return WindowMask.of(None, torch.device(device))
    if use_vmap or local_size is None or not _is_sliding_window(mask_function, int(local_size)):
        raise UnpackableError("its attention mask is neither causal nor a sliding window")
    return WindowMask.of(int(local_size), torch.device(device))


def _is_sliding_window(mask_function: Callable, window: int) -> bool:
    """Return whether a mask function is a sliding window, tested around multiples of its size."""
    at = torch.tensor(sorted({max(0, window * n + d) for n in range(4) for d in (-1, 0, 1)}))
    zero, sliding = torch.tensor(0), sliding_window_causal_mask_function(window)
    one, other = (
        mask(zero, zero, at[:, None], at[None]).expand(len(at), len(at))
        for mask in (mask_function, sliding)
    )
    return torch.equal(one, other)


def window_or_full_mask(*, attention_mask: Tensor | None = None, **given: Any) -> Tensor | None:
    """Return a `WindowMask` where one describes the mask, else the mask of `sdpa`.

    transformers calls this as `window_mask`; padding that hides nothing is ignored. A window counts
    from the last key, so a cache that has room behind it, as static ones do, is not described.
    """
    end = given.get("q_offset", 0) + given["q_length"] - given.get("kv_offset", 0)
    if int(end) != given["kv_length"]:
        given["allow_is_causal_skip"] = False
        return sdpa_mask(attention_mask=attention_mask, **given)
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    try:
        return window_mask(attention_mask=attention_mask, **given)
    except UnpackableError:
        return sdpa_mask(attention_mask=attention_mask, **given)


def additive_mask(
    past: int, new: int, window: int | None, like: Tensor, *, first: int = 0
) -> Tensor:
    """Return the mask [T, past + new - first] to add to scores: 0, or -inf for hidden keys.

    Args:
        past: Keys before the first query.
        new: Number of queries.
        window: Keys that a query attends to, including its own; None for all.
        like: Tensor that determines dtype and device.
        first: First key of the mask.
    """
    query_T1 = torch.arange(past, past + new, device=like.device)[:, None]
    key_1L = torch.arange(first, past + new, device=like.device)[None]
    hidden = key_1L > query_T1
    if window is not None:
        hidden |= key_1L <= query_T1 - window
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, -torch.inf)


def torch_attention(
    query_HTC: Tensor,
    pair: tuple[Tensor, Tensor],
    mask_TL: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Return one segment's output [H, T, C], computed by PyTorch.

    Args:
        query_HTC: Queries.
        pair: Keys and values [G, L, C].
        mask_TL: Additive mask, also [1 or H, T, L], or None.
        options: Scale, softcap and sinks.
    """
    if options.softcap is not None or options.sinks_H is not None:
        return eager_attention(query_HTC, pair, mask_TL, options)
    key_1GLC, value_1GLC = pair[0][None], pair[1][None]
    heads, new, width = query_HTC.shape
    if new == 1 and mask_TL is None:
        # Treat a group's heads as rows of one query, to avoid repeating keys.
        query = query_HTC.reshape(1, key_1GLC.shape[1], -1, width)
        out = F.scaled_dot_product_attention(query, key_1GLC, value_1GLC, scale=options.scale)
        return out.reshape(heads, 1, -1)
    return F.scaled_dot_product_attention(
        query_HTC[None],
        key_1GLC,
        value_1GLC,
        attn_mask=mask_TL,
        scale=options.scale,
        enable_gqa=heads != key_1GLC.shape[1],
    )[0]


def eager_attention(
    query_HTC: Tensor,
    pair: tuple[Tensor, Tensor],
    mask_TL: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Return the same with explicit scores, which sinks and soft caps require."""
    key_GLC, value_GLC = pair
    (heads, new, width), groups = query_HTC.shape, key_GLC.shape[0]
    query_GRC = query_HTC.reshape(groups, -1, width)
    scale = width**-0.5 if options.scale is None else options.scale
    scores_HTL = (query_GRC @ key_GLC.transpose(1, 2)).view(heads, new, -1) * scale
    if options.softcap is not None:
        scores_HTL = torch.tanh(scores_HTL / options.softcap) * options.softcap
    if mask_TL is not None:
        scores_HTL = scores_HTL + mask_TL
    if options.sinks_H is not None:
        sinks_HT1 = options.sinks_H.to(scores_HTL.dtype).view(-1, 1, 1).expand(-1, new, 1)
        scores_HTL = torch.cat([scores_HTL, sinks_HT1], dim=-1)
    shares_HTL = scores_HTL.softmax(-1, dtype=torch.float32).to(value_GLC.dtype)
    shares_HTL = shares_HTL[..., : key_GLC.shape[1]]
    return (shares_HTL.reshape(groups, -1, key_GLC.shape[1]) @ value_GLC).view(heads, new, -1)


def use_kernels(model: PreTrainedModel, *, int8: bool = False) -> Callable[[], None]:
    """Use the kernels for a model's attention on a CPU.

    The model is unchanged if its attention is neither `sdpa` nor has sinks, if there are no
    compiled kernels, or if its family's code depends on the name of the attention implementation.
    For an int8 cache it is always changed; whether the result is right is checked after loading.

    Args:
        model: The model.
        int8: Whether its caches are int8.

    Returns:
        A function that undoes the change.
    """
    before = model.config._attn_implementation
    by_kernels = model.device.type == "cpu" and attention_by_kernels(model)
    if int8 or (by_kernels and before != "sdpa"):  # the function for int8 knows sinks and windows
        register_int8_attention()
        model.config._attn_implementation = INT8_NAME
    elif by_kernels:
        AttentionInterface.register(NAME, cpu_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.config._attn_implementation = NAME

    def undo() -> None:
        model.config._attn_implementation = before

    return undo


def register_int8_attention() -> None:
    """Register `moefit_int8` with transformers; repeated calls are harmless."""
    AttentionInterface.register(INT8_NAME, int8_attention)
    AttentionMaskInterface.register(INT8_NAME, window_or_full_mask)


def attention_by_kernels(model: PreTrainedModel) -> bool:
    """Return whether kernels can compute a model's attention on a CPU."""
    own = model.config._attn_implementation
    sinks = own == "eager" and _has_sinks(model) and not _says(model, _CHANGES_MASK)
    known = own == "sdpa" or sinks
    return known and kernels() is not None and not _says(model, _COMPARED)


def _has_sinks(model: PreTrainedModel) -> bool:
    """Return whether attention has one sink per head (gpt-oss), for which torch has no function."""
    return any(name.endswith("self_attn.sinks") for name, _ in model.named_parameters())


_COMPARED = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\s+in\b)")
# A mask that the family's code makes longer (DeepSeek-V4) is no longer that of a window.
_CHANGES_MASK = re.compile(r"\b(pad\(|cat\(\s*[\[(])\s*attention_mask\b")


def _says(model: PreTrainedModel, pattern: re.Pattern[str]) -> bool:
    """Return whether a pattern is found in the code of the model's family."""
    files = {type(module).__module__ for module in model.modules()}
    own = [sys.modules[name] for name in files if "modeling_" in name]
    return any(pattern.search(inspect.getsource(module)) for module in own)
