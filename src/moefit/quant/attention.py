"""Compute attention on CPUs with the compiled kernels, directly on keys and values of a cache.

Keys and values are in the queries' dtype, or int8 with a scale per token and head (`kv_int8.py`).
Calls `csrc/attention.cpp`. Every output is summed in an order that depends only on the positions of
its own request, so results are bit-identical for any batch, any chunking of the prompt and any
number of threads.

Shapes: N segments, T query tokens, H query heads, G KV heads, C key width, Z value width, L keys.
"""

from collections.abc import Sequence
from ctypes import Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from moefit.graphs import outside_of_graphs
from moefit.quant.cpu_kernels import NATIVE_DTYPES, Kernels, kernels
from moefit.quant.kv_int8 import Int8Rows, floats_of

LANES = 16  # widths of keys and values are multiples of it


class AttentionStruct(Structure):
    """`Attention` of csrc/attention.h."""

    _fields_ = (
        *((name, c_int64) for name in ("heads", "groups", "width", "value_width")),
        *((name, c_int64) for name in ("kind", "cache")),
        *((name, c_int64) for name in ("query_token", "query_head")),
        *((name, c_int64) for name in ("key_group", "key_token", "value_group", "value_token")),
        *((name, c_int64) for name in ("key_scale_group", "value_scale_group")),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("more_width", c_int64),
        ("more_token", c_int64),
    )


class SegmentStruct(Structure):
    """`Segment` of csrc/attention.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("past", c_int64),
        ("fresh", c_int64),
        ("row", c_int64),
        ("more", c_void_p),
    )


_OneSegment = SegmentStruct * 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySegment:
    """One request's part of a batch.

    Attributes:
        keys_GLC: Keys, of which past + new are used: in the queries' dtype, or `Int8Rows`.
        values_GLZ: Values, likewise.
        past: Number of keys before the first query token.
        new: Number of query tokens; their keys follow the past ones.
        more_LR: Last elements of keys, of which all heads have the same, where they lie apart.
    """

    keys_GLC: Tensor
    values_GLZ: Tensor
    past: int
    new: int
    more_LR: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """Differences of a family's attention from softmax(q k / sqrt(C)) v.

    Attributes:
        scale: Factor of the scores; None for 1 / sqrt(C).
        window: Number of keys that a query attends to, including its own; None for all.
        softcap: If given, scores become softcap * tanh(score / softcap).
        sinks_H: If given, a score per head that is part of the softmax but has no value.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None


def can_attend(query_THC: Tensor, segment: KeySegment) -> bool:
    """Return whether the kernels support these tensors' device, dtype and shapes."""
    tensors = query_THC, segment.keys_GLC, segment.values_GLZ
    return (
        all(one.device.type == "cpu" for one in tensors)
        and query_THC.dtype in NATIVE_DTYPES
        and all(_is_known_cache(one, query_THC.dtype) for one in tensors[1:])
        and segment.keys_GLC.dtype == segment.values_GLZ.dtype
        and all(one.shape[-1] % LANES == 0 and one.stride(-1) == 1 for one in tensors)
        and query_THC.shape[1] % segment.keys_GLC.shape[0] == 0
        and query_THC.shape[1] // segment.keys_GLC.shape[0] <= MAX_GROUP_HEADS
    )


def _is_known_cache(cache_GLC: Tensor, dtype: torch.dtype) -> bool:
    if isinstance(cache_GLC, Int8Rows):
        return cache_GLC.scales.stride(-1) == 1
    return cache_GLC.dtype == dtype


MAX_GROUP_HEADS = 32  # query heads of one KV head: ROWS of csrc/attention.h


@outside_of_graphs
def attend_by_kernels(
    query_THC: Tensor, segments: Sequence[KeySegment], options: AttentionOptions
) -> Tensor | None:
    """Return `attend` with this processor's kernels; None if they do not support the tensors."""
    compiled = kernels()
    if compiled is None or not segments or not can_attend(query_THC, segments[0]):
        return None
    return attend(compiled, query_THC, segments, options)


def attend(
    kernels: Kernels,
    query_THC: Tensor,
    segments: Sequence[KeySegment],
    options: AttentionOptions,
) -> Tensor:
    """Return the causal attention of each segment's queries over its own keys.

    Args:
        kernels: The compiled library.
        query_THC: Queries of all segments, one segment after the other.
        segments: Requests with T query tokens in total and equal strides; `can_attend` must hold,
            but queries may be in float32 for a cache in another dtype.
        options: Variant of attention.

    Returns:
        Outputs [T, H, Z] in the queries' dtype.
    """
    tokens, heads, width = query_THC.shape
    first = segments[0]
    groups, _, value_width = first.values_GLZ.shape
    more = (0, 0) if first.more_LR is None else (first.more_LR.shape[1], first.more_LR.stride(0))
    assert tokens == sum(one.new for one in segments)
    assert first.keys_GLC.shape[2] + more[0] == width
    sinks_H = None if options.sinks_H is None else options.sinks_H.float().contiguous()
    kind = NATIVE_DTYPES[query_THC.dtype]
    rounded = isinstance(first.keys_GLC, Int8Rows)
    struct = AttentionStruct(
        heads, groups, width, value_width, kind,
        _INT8 if rounded else NATIVE_DTYPES[first.keys_GLC.dtype],
        *query_THC.stride()[:2], *first.keys_GLC.stride()[:2], *first.values_GLZ.stride()[:2],
        _scale_stride(first.keys_GLC), _scale_stride(first.values_GLZ),
        options.window or 0, width**-0.5 if options.scale is None else options.scale,
        options.softcap or 0.0, None if sinks_H is None else sinks_H.data_ptr(), *more,
    )  # fmt: skip
    array, row = (SegmentStruct * len(segments))(), 0
    for number, one in enumerate(segments):
        keys, values = one.keys_GLC, one.values_GLZ
        assert keys.shape[1] >= one.past + one.new
        assert _strides(keys) == _strides(first.keys_GLC)
        assert _strides(values) == _strides(first.values_GLZ)
        assert one.more_LR is None or one.more_LR.stride() == (more[1], 1)
        array[number] = SegmentStruct(
            keys.data_ptr(), values.data_ptr(), _scales(keys), _scales(values),
            one.past, one.new, row, None if one.more_LR is None else one.more_LR.data_ptr(),
        )  # fmt: skip
        row += one.new
    out_THZ = query_THC.new_empty(tokens, heads, value_width)
    kernels.attention(struct, array, query_THC, out_THZ)
    return out_THZ


@outside_of_graphs
def attend_alone(
    query_HTC: Tensor, keys_GLC: Tensor, values_GLZ: Tensor, options: AttentionOptions
) -> Tensor | None:
    """Return `attend` for one sequence and its last T tokens, with less work around the kernel.

    Args:
        query_HTC: Queries, heads first.
        keys_GLC: All keys.
        values_GLZ: All values.
        options: Variant of attention.

    Returns:
        Outputs [T, H, Z]; None if kernels do not support the tensors, or if this is not the plain
        case that is worth a path of its own: a cache in the queries' dtype, and no sinks.
    """
    compiled, dtype = kernels(), query_HTC.dtype
    kind = NATIVE_DTYPES.get(dtype)
    if (
        compiled is None
        or kind is None
        or options.sinks_H is not None
        or not (query_HTC.is_cpu and keys_GLC.is_cpu and values_GLZ.is_cpu)
        or not (keys_GLC.dtype is dtype and values_GLZ.dtype is dtype)
        or isinstance(keys_GLC, Int8Rows)
    ):
        return None
    heads, tokens, width = query_HTC.shape
    groups, seen, value_width = values_GLZ.shape
    (q_head, q_token, q_one), (k_group, k_token, k_one), (v_group, v_token, v_one) = (
        query_HTC.stride(), keys_GLC.stride(), values_GLZ.stride(),
    )  # fmt: skip
    if (
        keys_GLC.shape != (groups, seen, width)
        or width % LANES
        or value_width % LANES
        or q_one != 1
        or k_one != 1
        or v_one != 1
        or heads % groups
        or heads > groups * MAX_GROUP_HEADS
        or not 0 < tokens <= seen
    ):
        return None
    struct = AttentionStruct(
        heads, groups, width, value_width, kind, kind, q_token, q_head, k_group, k_token, v_group,
        v_token, 0, 0, options.window or 0,
        width**-0.5 if options.scale is None else options.scale, options.softcap or 0.0, None,
    )  # fmt: skip
    keys, values = keys_GLC.data_ptr(), values_GLZ.data_ptr()
    segment = _OneSegment((keys, values, None, None, seen - tokens, tokens, 0))
    out_THZ = query_HTC.new_empty(tokens, heads, value_width)
    compiled.attention(struct, segment, query_HTC, out_THZ)
    return out_THZ


_INT8 = 8  # of csrc/matrix.h


def _scales(cache_GLC: Tensor) -> int | None:
    return cache_GLC.scales.data_ptr() if isinstance(cache_GLC, Int8Rows) else None


def _scale_stride(cache_GLC: Tensor) -> int:
    return cache_GLC.scales.stride(0) if isinstance(cache_GLC, Int8Rows) else 0


def _strides(cache_GLC: Tensor) -> tuple[int, ...]:
    return *cache_GLC.stride(), _scale_stride(cache_GLC)


def plain_attention(query_THC: Tensor, segment: KeySegment, options: AttentionOptions) -> Tensor:
    """Return the attention of one segment in float64; the reference for `attend`."""
    heads, groups = query_THC.shape[1], segment.keys_GLC.shape[0]
    seen = segment.past + segment.new
    keys_HLC, values_HLZ = (
        floats_of(one, torch.float64)[:, :seen].repeat_interleave(heads // groups, 0)
        for one in (segment.keys_GLC, segment.values_GLZ)
    )
    scale = query_THC.shape[2] ** -0.5 if options.scale is None else options.scale
    scores_HTL = query_THC.double().transpose(0, 1) @ keys_HLC.transpose(1, 2) * scale
    if options.softcap:
        scores_HTL = torch.tanh(scores_HTL / options.softcap) * options.softcap
    query_T1 = torch.arange(segment.past, seen)[:, None]
    key_1L = torch.arange(seen)[None]
    hidden_TL = key_1L > query_T1
    if options.window:
        hidden_TL = hidden_TL | (key_1L <= query_T1 - options.window)
    scores_HTL = scores_HTL.masked_fill(hidden_TL, -torch.inf)
    if options.sinks_H is not None:
        sinks_HT1 = options.sinks_H.double()[:, None, None].expand(-1, segment.new, 1)
        scores_HTL = torch.cat([scores_HTL, sinks_HT1], dim=-1)
    shares_HTL = scores_HTL.softmax(-1)[..., :seen]
    return (shares_HTL @ values_HLZ).transpose(0, 1)
