"""Attention over the texts of several requests in one forward pass.

Owns the attention function that transformers calls by the name `moefit_packed` (`register`). A step
is either tokens of requests behind one another, [1, T], or one token of each, [B, 1]; each attends
to its own request's keys alone. What a model asks for that is not done here exactly as it says
raises UnpackableError. Knows nothing of which requests, or why.

Shapes: B sequences, T tokens, H query heads, G KV heads, C head width, L keys of a request, P
places of the pool.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from moefit.engine.segments import Segments, UnpackableError, first_key
from moefit.engine.window_mask import window_mask
from moefit.formats.attention import AttentionOptions, KeySegment, attend, can_attend
from moefit.formats.kernels import kernels

NAME = "moefit_packed"


def packed_attention(  # noqa: PLR0913 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment over its own keys; what transformers calls by name.

    query [1, H, T, C] or [B, H, 1, C]; key and value [1, G, P or all L, C]. Gives [1, T, H, C] or
    [B, 1, H, C]. Raises UnpackableError for what the model asks that is not done exactly.
    """
    window = getattr(attention_mask, "window", -1)
    if segments is None or window == -1:
        raise UnpackableError("its attention is not told of the segments or of the mask")
    if sliding_window is not None and sliding_window != window:
        raise UnpackableError(f"a window of {sliding_window} keys, but the mask has {window}")
    if others.get("is_causal") is False:
        raise UnpackableError("its attention is not causal")
    if unknown := _tensors(others) - _HARMLESS:
        raise UnpackableError(f"its attention is given {', '.join(sorted(unknown))} to see to")
    segments.storages.add(key.untyped_storage().data_ptr())
    how = AttentionOptions(scale=scaling, window=window, softcap=softcap, sinks_H=s_aux)
    rows_THC = query[0].transpose(0, 1) if query.shape[0] == 1 else query[:, :, 0]
    if (out_THZ := _by_kernels(rows_THC, key[0], value[0], segments, how)) is not None:
        return (out_THZ[None] if query.shape[0] == 1 else out_THZ[:, None]), None
    if query.shape[0] == 1:
        parts = query[0].split([one.new for one in segments.rows], dim=1)  # [H, T, C]
    else:
        parts = query.unbind(0)  # [H, 1, C]
    outputs = []
    for part_HTC, segment in zip(parts, segments.rows, strict=True):
        begin = segment.start + first_key(segment, window)
        pair = key[0, :, begin : segment.end], value[0, :, begin : segment.end]
        mask_TL = None if segment.new == 1 else segments.mask(segment, window, query)
        outputs.append(torch_attention(part_HTC, pair, mask_TL, how))
    if query.shape[0] == 1:
        return torch.cat([out_HTC.transpose(0, 1) for out_HTC in outputs])[None], None
    return torch.stack(outputs).transpose(1, 2), None


_HARMLESS = {"position_ids", "cache_position"}


def _tensors(given: dict[str, Any]) -> set[str]:
    return {name for name, value in given.items() if isinstance(value, Tensor)}


def _by_kernels(
    query_THC: Tensor,
    key_GPC: Tensor,
    value_GPC: Tensor,
    segments: Segments,
    how: AttentionOptions,
) -> Tensor | None:
    """All segments in one call, [T, H, C]; None where the kernels do not know such tensors."""
    keys = [
        KeySegment(
            keys_GLC=key_GPC[:, one.start : one.end],
            values_GLZ=value_GPC[:, one.start : one.end],
            past=one.past,
            new=one.new,
        )
        for one in segments.rows
    ]
    compiled = kernels()
    if compiled is None or not can_attend(query_THC, keys[0]):
        return None
    return attend(compiled, query_THC, keys, how)


def torch_attention(
    query_HTC: Tensor, pair: tuple[Tensor, Tensor], mask_TL: Tensor | None, how: AttentionOptions
) -> Tensor:
    """One segment's output [H, T, C]; pair: its keys and values [G, L, C]."""
    if how.softcap is not None or how.sinks_H is not None:
        return scored_attention(query_HTC, pair, mask_TL, how)
    key_1GLC, value_1GLC = pair[0][None], pair[1][None]
    heads, new, width = query_HTC.shape
    if new == 1:  # heads of one group as rows of one query: no key is repeated
        query = query_HTC.reshape(1, key_1GLC.shape[1], -1, width)
        out = F.scaled_dot_product_attention(query, key_1GLC, value_1GLC, scale=how.scale)
        return out.reshape(heads, 1, -1)
    return F.scaled_dot_product_attention(
        query_HTC[None],
        key_1GLC,
        value_1GLC,
        attn_mask=mask_TL,
        scale=how.scale,
        enable_gqa=heads != key_1GLC.shape[1],
    )[0]


def scored_attention(
    query_HTC: Tensor, pair: tuple[Tensor, Tensor], mask_TL: Tensor | None, how: AttentionOptions
) -> Tensor:
    """The same with all scores written out, as families with sinks or soft caps compute it."""
    key_GLC, value_GLC = pair
    (heads, new, width), groups = query_HTC.shape, key_GLC.shape[0]
    query_GRC = query_HTC.reshape(groups, -1, width)
    scale = width**-0.5 if how.scale is None else how.scale
    scores_HTL = (query_GRC @ key_GLC.transpose(1, 2)).view(heads, new, -1) * scale
    if how.softcap is not None:
        scores_HTL = torch.tanh(scores_HTL / how.softcap) * how.softcap
    if mask_TL is not None:
        scores_HTL = scores_HTL + mask_TL
    if how.sinks_H is not None:
        sinks_HT1 = how.sinks_H.to(scores_HTL.dtype).view(-1, 1, 1).expand(-1, new, 1)
        scores_HTL = torch.cat([scores_HTL, sinks_HT1], dim=-1)
    shares_HTL = scores_HTL.softmax(-1, dtype=torch.float32).to(value_GLC.dtype)
    shares_HTL = shares_HTL[..., : key_GLC.shape[1]]
    return (shares_HTL.reshape(groups, -1, key_GLC.shape[1]) @ value_GLC).view(heads, new, -1)


def register() -> None:
    """Make `moefit_packed` known to transformers; may be called again."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, window_mask)


@contextmanager
def in_force(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend this way within the block, and as before afterwards."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
