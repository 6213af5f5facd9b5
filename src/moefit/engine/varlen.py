"""Variable-length batches: several requests in one forward pass, without padding.

`Segments` describes which tokens of a step belong to which request, `VarlenCache` presents the KV
pool as the model's cache, `WindowMask` describes a layer's mask without materialising it, and
`varlen_attention` lets each request attend to its own tokens. Unsupported model features raise
`UnpackableError`.

Shapes: T tokens, H query heads, G key-value heads, C head width, P places of the pool, L length of
a sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from moefit.engine.kv_pool import KvPool
from moefit.errors import UnsupportedModelError
from moefit.quant.attention import AttentionOptions, KeySegment, attend, can_attend
from moefit.quant.cpu_kernels import kernels


class UnpackableError(UnsupportedModelError):
    """The model uses an attention feature that variable-length batches do not support."""


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
        if (mask := self.masks.get(name)) is None:
            query_T1 = torch.arange(segment.past, seen, device=like.device)[:, None]
            key_1L = torch.arange(first_key(segment, window), seen, device=like.device)[None]
            hidden = key_1L > query_T1
            if window is not None:
                hidden |= key_1L <= query_T1 - window
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            self.masks[name] = mask.masked_fill_(hidden, -torch.inf)
        return self.masks[name]


def first_key(segment: Segment, window: int | None) -> int:
    """Return the first key that any of a segment's new tokens attends to."""
    return 0 if window is None else max(0, segment.past + 1 - window)


class VarlenCache(Cache):
    """The KV pool as the cache of a model during one step.

    Attributes:
        pool: The KV pool.
        gather: Return the step's keys and values contiguously instead of the pool itself; for
            families that transform them before attention (latent attention).
    """

    def __init__(self, pool: KvPool):
        super().__init__(layers=[])
        self.pool, self.gather = pool, False
        self._segments: tuple[Segment, ...] = ()
        self._places_R = self._gathered_N = torch.empty(0, dtype=torch.long)
        self._held = 0

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
            if len(self._places_R) == 1:
                pool_GPC[:, self._segments[0].end - 1] = new_GRC[:, 0]
            else:
                pool_GPC.index_copy_(1, self._places_R, new_GRC)
        if not self.gather:
            return pair[0][None], pair[1][None]
        if len(self._segments) == 1:
            one = self._segments[0]
            return pair[0][None, :, one.start : one.end], pair[1][None, :, one.start : one.end]
        key, value = (one.index_select(1, self._gathered_N)[None] for one in pair)
        return key, value

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
        return self.pool.extents.places


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
    segments.storages.add(key.untyped_storage().data_ptr())
    options = AttentionOptions(scale=scaling, window=window, softcap=softcap, sinks_H=s_aux)
    rows_THC = query[0].transpose(0, 1) if query.shape[0] == 1 else query[:, :, 0]
    if (out_THZ := _kernel_attention(rows_THC, key[0], value[0], segments, options)) is not None:
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
        outputs.append(torch_attention(part_HTC, pair, mask_TL, options))
    if query.shape[0] == 1:
        return torch.cat([out_HTC.transpose(0, 1) for out_HTC in outputs])[None], None
    return torch.stack(outputs).transpose(1, 2), None


_IGNORED_TENSORS = {"position_ids", "cache_position"}


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
    tensors = {name for name, value in others.items() if isinstance(value, Tensor)}
    if unknown := tensors - _IGNORED_TENSORS:
        names = ", ".join(sorted(unknown))
        raise UnpackableError(f"its attention receives unsupported tensors: {names}")
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
    return attend(compiled, query_THC, keys, options)


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
        mask_TL: Additive mask, or None.
        options: Scale, softcap and sinks.
    """
    if options.softcap is not None or options.sinks_H is not None:
        return eager_attention(query_HTC, pair, mask_TL, options)
    key_1GLC, value_1GLC = pair[0][None], pair[1][None]
    heads, new, width = query_HTC.shape
    if new == 1:  # treat a group's heads as rows of one query, to avoid repeating keys
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
