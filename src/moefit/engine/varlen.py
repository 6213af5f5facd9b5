"""Variable-length batches: several requests in one forward pass, without padding.

`Segments` describes which tokens of a step belong to which request, `VarlenCache` presents the KV
pool as the model's cache, and `varlen_attention` lets each request attend to its own tokens.
Unsupported model features raise `UnpackableError`.

Shapes: T tokens, H query heads, G key-value heads, C head width, P places of the pool, L length of
a sequence.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache

from moefit.engine.kv_pool import KvPool
from moefit.quant.attention import AttentionOptions, KeySegment, attend_by_kernels
from moefit.quant.kv_int8 import Int8Rows, floats_of, part_of, write_rows
from moefit.quant.layers.attention_block import CacheRows
from moefit.serve.hf.attention import (
    UnpackableError,
    additive_mask,
    refuse_lost_scales,
    refuse_tensors,
    torch_attention,
    window_mask,
)
from moefit.serve.hf.latent import LatentRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Tokens of one request in a step.

    Attributes:
        start: First place in the pool, or first index among gathered keys.
        past: Tokens already in the cache.
        new: Tokens computed in this step.
    """

    start: int
    past: int
    new: int

    @property
    def end(self) -> int:
        """End of the keys, exclusive, including the new ones."""
        return self.start + self.past + self.new


@dataclass(slots=True, kw_only=True)
class Segments:
    """Segments of a step, with masks that are built on first use and shared by all layers."""

    rows: tuple[Segment, ...]
    masks: dict[tuple[Segment, int, torch.dtype], Tensor] = field(default_factory=dict)
    storages: set[int] = field(default_factory=set)  # addresses of the keys passed to attention

    def mask(self, segment: Segment, window: int | None, like: Tensor) -> Tensor:
        """Return the additive mask [T, L - first_key] of a segment's new tokens.

        Args:
            segment: Segment of this step.
            window: Sliding window in tokens, or None.
            like: Tensor that determines dtype and device.
        """
        seen = segment.past + segment.new
        name = (segment, window or seen, like.dtype)
        if name not in self.masks:
            first = first_key(segment, window)
            self.masks[name] = additive_mask(segment.past, segment.new, window, like, first=first)
        return self.masks[name]


def first_key(segment: Segment, window: int | None) -> int:
    """Return the first key that any of a segment's new tokens attends to."""
    return 0 if window is None else max(0, segment.past + 1 - window)


class VarlenCache(Cache):
    """The KV pool as the cache of a model during one step.

    Attributes:
        gather: Return the step's keys and values contiguously instead of the pool itself; for
            families that transform them before attention (latent attention).
        pool: The KV pool.
    """

    def __init__(self, pool: KvPool):
        super().__init__(layers=[])
        self.pool, self.gather = pool, False
        self._segments: tuple[Segment, ...] = ()
        self._places_R = self._gathered_N = torch.empty(0, dtype=torch.long)
        self._held = 0
        self._requests: tuple[tuple[int, int, int], ...] = ()

    def begin(self, segments: Sequence[Segment], held: int, device: torch.device) -> Segments:
        """Begin a step.

        Args:
            segments: Segments in places of the pool.
            held: Tokens of all requests after this step.
            device: Device of the model.

        Returns:
            The segments as attention sees them.
        """
        self._segments, self._held = tuple(segments), held
        self._requests = tuple([(one.start, one.past, one.new) for one in segments])
        places = [p for one in segments for p in range(one.start + one.past, one.end)]
        self._places_R = torch.tensor(places, device=device)
        if not self.gather:
            return Segments(rows=self._segments)
        keys = [p for one in segments for p in range(one.start, one.end)]
        self._gathered_N = torch.tensor(keys, device=device)
        rows, start = [], 0
        for one in segments:
            rows.append(Segment(start=start, past=one.past, new=one.new))
            start = rows[-1].end
        return Segments(rows=tuple(rows))

    def tokens_held(self) -> int:
        """Return the tokens of all requests, including this step's."""
        return self._held

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values and return those that attention reads."""
        pair = self.pool.layer(layer_idx, key_states, value_states)
        for pool_GPC, new in zip(pair, (key_states, value_states), strict=True):
            new_GRC = new[0] if new.shape[0] == 1 else new[:, :, 0].transpose(0, 1)
            if isinstance(pool_GPC, Int8Rows):
                write_rows(pool_GPC, self._places_R, new_GRC)
            elif len(self._places_R) == 1:
                pool_GPC[:, self._segments[0].end - 1] = new_GRC[:, 0]
            else:
                pool_GPC.index_copy_(1, self._places_R, new_GRC)
        if not self.gather:
            return part_of(pair[0], None), part_of(pair[1], None)
        if len(self._segments) == 1:
            one = self._segments[0]
            return pair[0][None, :, one.start : one.end], pair[1][None, :, one.start : one.end]
        key, value = (one.index_select(1, self._gathered_N)[None] for one in pair)
        return key, value

    def logits_before(self, block: int, logits_BTE: Tensor) -> Tensor:
        """Keep a step's router logits; return those before each token (`LogitsOfRequests`)."""
        new_RE = logits_BTE.flatten(0, 1)
        pool_PE = self.pool.logits(block, new_RE)
        pool_PE.index_copy_(0, self._places_R, new_RE)
        before_R = (self._places_R - 1).clamp_min(0)  # of a request's first token arbitrary
        return pool_PE.index_select(0, before_R).view_as(logits_BTE)

    def last_logits(self, block: int) -> Tensor | None:
        """Return the logits before a step of one token per request; see `LogitsOfRequests`."""
        pool_PE = self.pool.known_logits(block)
        if pool_PE is None or not all(one.past and one.new == 1 for one in self._segments):
            return None
        return pool_PE.index_select(0, self._places_R - 1)

    def rows(self, layer_idx: int, window: int | None) -> CacheRows | None:
        """Return where this step's tokens belong; None before the first step or if gathered."""
        if self.gather or (pair := self.pool.known(layer_idx)) is None:
            return None
        return CacheRows(
            keys_GLC=pair[0], values_GLZ=pair[1], requests=self._requests, window=window
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Raise UnpackableError: lengths differ, and positions are passed with the tokens."""
        raise UnpackableError("it computes positions from the cache's length")

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return 0; `WindowMask` does not use it."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return placeholder sizes; `WindowMask` does not use them."""
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the number of places of the pool."""
        return self.pool.places.places


ATTENTION_NAME = "moefit_packed"


def varlen_attention(  # noqa: PLR0913 - transformers' signature
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
    """Attend within each segment; transformers calls this by name.

    Args:
        module: Attention module, unused.
        query: [1, H, T, C], or [B, H, 1, C] when decoding.
        key: [1, G, P or L, C].
        value: [1, G, P or L, C].
        attention_mask: The `WindowMask` of the layer.
        segments: Segments of the step.
        scaling: Factor of the scores; C ** -0.5 if None.
        sliding_window: Window in tokens; must equal the mask's.
        softcap: Soft limit of the scores.
        s_aux: Attention sinks [H].
        others: Further arguments; tensors among them are not supported.

    Returns:
        Output [1, T, H, C] or [B, 1, H, C], and None for the attention weights.

    Raises:
        UnpackableError: If the model uses a feature that is not supported exactly.
    """
    if segments is None:
        raise UnpackableError("its attention receives no segments")
    window = _checked_window(attention_mask, sliding_window, others)
    refuse_lost_scales(key, value)
    options = AttentionOptions(scale=scaling, window=window, softcap=softcap, sinks_H=s_aux)
    rows_THC = query[0].transpose(0, 1) if query.shape[0] == 1 else query[:, :, 0]
    if isinstance(key, LatentRows):
        segments.storages |= key.storages()
        places = [(0, one.start, one.past, one.new) for one in segments.rows]
        out_THV = key.attend(rows_THC, places, options)
        return (out_THV[None] if query.shape[0] == 1 else out_THV[:, None]), None
    segments.storages.add(key.untyped_storage().data_ptr())
    key_GPC, value_GPC = part_of(key, 0), part_of(value, 0)
    if (out_THZ := _kernel_attention(rows_THC, key_GPC, value_GPC, segments, options)) is not None:
        return (out_THZ[None] if query.shape[0] == 1 else out_THZ[:, None]), None
    return _torch_attention(query, (key_GPC, value_GPC), segments, options), None


def _torch_attention(
    query: Tensor, cached: tuple[Tensor, Tensor], segments: Segments, options: AttentionOptions
) -> Tensor:
    """Return the output of `varlen_attention`, segment by segment."""
    if query.shape[0] == 1:
        parts = query[0].split([one.new for one in segments.rows], dim=1)  # [H, T, C]
    else:
        parts = query.unbind(0)  # [H, 1, C]
    outputs, window = [], options.window
    for part_HTC, segment in zip(parts, segments.rows, strict=True):
        seen = slice(segment.start + first_key(segment, window), segment.end)
        key, value = (floats_of(part_of(one, slice(None), seen), query.dtype) for one in cached)
        mask_TL = None if segment.new == 1 else segments.mask(segment, window, query)
        outputs.append(torch_attention(part_HTC, (key, value), mask_TL, options))
    if query.shape[0] == 1:
        return torch.cat([out_HTC.transpose(0, 1) for out_HTC in outputs])[None]
    return torch.stack(outputs).transpose(1, 2)


def _checked_window(
    mask: Tensor | None, sliding_window: int | None, others: dict[str, Any]
) -> int | None:
    """Return the window of a layer's mask. Raises UnpackableError; see `varlen_attention`."""
    window = getattr(mask, "window", -1)
    if window == -1:
        raise UnpackableError("its attention receives no mask of a window")
    if sliding_window is not None and sliding_window != window:
        raise UnpackableError(f"a window of {sliding_window} keys, but the mask has {window}")
    if others.get("is_causal") is False:
        raise UnpackableError("its attention is not causal")
    refuse_tensors(others)
    return window


def _kernel_attention(
    query_THC: Tensor,
    key_GPC: Tensor,
    value_GPC: Tensor,
    segments: Segments,
    options: AttentionOptions,
) -> Tensor | None:
    """Return the output of all segments [T, H, C] from one kernel call; None if unsupported."""
    keys = [
        KeySegment(
            keys_GLC=part_of(key_GPC, slice(None), slice(one.start, one.end)),
            values_GLZ=part_of(value_GPC, slice(None), slice(one.start, one.end)),
            past=one.past,
            new=one.new,
        )
        for one in segments.rows
    ]
    return attend_by_kernels(query_THC, keys, options)


def register_varlen_attention() -> None:
    """Register `moefit_packed` with transformers; repeated calls are harmless."""
    AttentionInterface.register(ATTENTION_NAME, varlen_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, window_mask)


@contextmanager
def varlen_attention_enabled(model: PreTrainedModel) -> Iterator[None]:
    """Let a model use `varlen_attention` within the block."""
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
