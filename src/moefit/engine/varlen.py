"""Variable-length batches: several requests in one forward pass, without padding.

`Segments` says which tokens of a step belong to which request, `PackedCache` gives the model the KV
pool as its cache, `WindowMask` carries a layer's mask without materialising it, and
`packed_attention` lets each request attend to its own tokens. What a model needs that is not
supported raises `UnpackableError`.

Shapes: T tokens, H query heads, C head width, L length of a sequence.
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
    """The family asks of attention what packing does not do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """`new` tokens of one request, behind `past` that its places hold already.

    start: its first place, or where its keys begin among those that were gathered.
    """

    start: int
    past: int
    new: int

    @property
    def end(self) -> int:
        """Behind its last key, once the new ones are there."""
        return self.start + self.past + self.new


@dataclass(slots=True, kw_only=True)
class Segments:
    """What attention must know of a step. masks: made when first needed, the same in all layers."""

    rows: tuple[Segment, ...]
    masks: dict[tuple[Segment, int, torch.dtype], Tensor] = field(default_factory=dict)
    storages: set[int] = field(default_factory=set)  # of the keys that attention was given

    def mask(self, segment: Segment, window: int | None, like: Tensor) -> Tensor:
        """What new tokens may not see, as minus infinity: [T, L], L from `first_key` on."""
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
    """The first of a request's keys that any of its new tokens sees."""
    return 0 if window is None else max(0, segment.past + 1 - window)


class VarlenCache(Cache):
    """The pool, as a model sees it during one step.

    gathers: give the model a step's keys and values side by side instead of the pool itself; for
    families that go on computing with them before they attend (latent attention).
    """

    def __init__(self, pool: KvPool):
        super().__init__(layers=[])
        self.pool, self.gathers = pool, False
        self._segments: tuple[Segment, ...] = ()
        self._places_R = self._gathered_N = torch.empty(0, dtype=torch.long)
        self._held = 0

    def begin(self, segments: Sequence[Segment], held: int, device: torch.device) -> Segments:
        """The next step reads these, places of the pool. held: tokens of all requests after it."""
        self._segments, self._held = tuple(segments), held
        places = [p for one in segments for p in range(one.start + one.past, one.end)]
        self._places_R = torch.tensor(places, device=device)
        if not self.gathers:
            return Segments(rows=self._segments)
        keys = [p for one in segments for p in range(one.start, one.end)]
        self._gathered_N = torch.tensor(keys, device=device)
        rows, start = [], 0
        for one in segments:
            rows.append(Segment(start=start, past=one.past, new=one.new))
            start = rows[-1].end
        return Segments(rows=tuple(rows))

    def tokens_held(self) -> int:
        """Of all requests, this step's included."""
        return self._held

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values to their places; gives all that attention needs."""
        pair = self.pool.layer(layer_idx, key_states, value_states)
        for pool_GPC, new in zip(pair, (key_states, value_states), strict=True):
            new_GRC = new[0] if new.shape[0] == 1 else new[:, :, 0].transpose(0, 1)
            if len(self._places_R) == 1:
                pool_GPC[:, self._segments[0].end - 1] = new_GRC[:, 0]
            else:
                pool_GPC.index_copy_(1, self._places_R, new_GRC)
        if not self.gathers:
            return pair[0][None], pair[1][None]
        if len(self._segments) == 1:
            one = self._segments[0]
            return pair[0][None, :, one.start : one.end], pair[1][None, :, one.start : one.end]
        key, value = (one.index_select(1, self._gathered_N)[None] for one in pair)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Raise UnpackableError: requests differ in it, and positions are given with the tokens."""
        raise UnpackableError("it counts positions by the cache's length")

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Of no use to a mask that is said, not written."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Of no use either."""
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Places of the pool."""
        return self.pool.extents.places


class WindowMask(Tensor):
    """The mask of a layer, said instead of written out: causal, over `window` keys, or all.

    Models hand it on unread. What became of it on the way, a part of it say, has no window.
    """

    window: int | None

    @classmethod
    def of(cls, window: int | None, device: torch.device) -> "WindowMask":
        """A mask that says so."""
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
    """What transformers calls to make a mask; see its `masking_utils.py`.

    Raises UnpackableError for a mask that is neither causal nor a sliding window.
    """
    if attention_mask is not None:
        raise UnpackableError("it has an attention mask of its own")
    if mask_function is causal_mask_function:
        return WindowMask.of(None, torch.device(device))
    if use_vmap or local_size is None or not _slides(mask_function, int(local_size)):
        raise UnpackableError("its attention mask is neither causal nor a sliding window")
    return WindowMask.of(int(local_size), torch.device(device))


def _slides(mask_function: Callable, window: int) -> bool:
    """Whether it is a sliding window, at positions around the multiples of its size."""
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


def register_varlen_attention() -> None:
    """Make `moefit_packed` known to transformers; may be called again."""
    AttentionInterface.register(ATTENTION_NAME, varlen_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, window_mask)


@contextmanager
def varlen_attention_enabled(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend this way within the block, and as before afterwards."""
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
