"""The attention block of a decoder layer, with the norms around it, as one call of the kernels.

x + attention(norm(x)), and the norm of that sum, which the layer's feed-forward block reads. The
call writes the tokens' keys and values to the cache. `plain_attention_block` is the reference in
torch. Each operation is that of its own kernel (`cpu_kernels.linear`, `layer_operations`,
`attention`), so results are equal to theirs bit by bit.

Shapes: T tokens, D model width, H heads, G KV heads, C head width, Z value width, R cosines, L
places of a cache.
"""

from collections.abc import Sequence
from ctypes import Structure, addressof, c_int64, c_void_p
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from moefit.graphs import outside_of_graphs
from moefit.moe.routing import Routing
from moefit.quant.attention import (
    LANES,
    MAX_GROUP_HEADS,
    AttentionOptions,
    AttentionStruct,
    KeySegment,
    SegmentStruct,
    plain_attention,
)
from moefit.quant.cpu_kernels import (
    NATIVE_DTYPES,
    Kernels,
)
from moefit.quant.kv_int8 import Int8Rows
from moefit.quant.layers.layer_operations import (
    NormForm,
    NormStruct,
    RotaryForm,
    RotaryStruct,
    RouterKernel,
    plain_norm,
    plain_rotate,
    rotary_struct,
)
from moefit.quant.layers.shared_expert import Linear, LinearStruct


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Norm:
    """A norm: its form, and its weight if it has one."""

    form: NormForm
    weight_D: Tensor | None
    width: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of consecutive rows of `width` elements, in the shape of x."""
        return plain_norm(x.view(-1, self.width), self.weight_D, self.form).view(x.shape)

    def struct(self, dtype: torch.dtype) -> NormStruct:
        """Return the C structure, whose pointer is to the weight's memory."""
        kind, weight, form = NATIVE_DTYPES[dtype], self.weight_D, self.form
        return NormStruct(
            None if weight is None else weight.data_ptr(), self.width, kind,
            kind if weight is None else NATIVE_DTYPES[weight.dtype],
            form.round_first, form.eps, form.added,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionBlock:
    """What an attention block computes.

    Attributes:
        before: Norm of the block's input.
        after: Norm of the sum.
        query: Linear layer of queries, [H * C, D]; `key`, `value` and `output` likewise.
        of_queries: Norm of queries, as wide as a head or as all heads; None for none.
        of_keys: Norm of keys.
        heads: H.
        groups: G.
        rotary: How heads are rotated.
        options: Variant of attention.
    """

    before: Norm
    after: Norm
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    of_queries: Norm | None
    of_keys: Norm | None
    heads: int
    groups: int
    rotary: RotaryForm
    options: AttentionOptions

    @property
    def head_width(self) -> int:
        """Return C."""
        return self.query.weight.rows // self.heads

    @property
    def value_width(self) -> int:
        """Return Z."""
        return self.value.weight.rows // self.groups

    def fits(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> bool:
        """Return whether a cache [..., G, L, C] has the block's heads, in a dtype or int8."""
        rounded = isinstance(keys, Int8Rows) and isinstance(values, Int8Rows)
        return (
            keys.shape[-3] == values.shape[-3] == self.groups
            and keys.shape[-1] == self.head_width
            and values.shape[-1] == self.value_width
            and (rounded or keys.dtype == values.dtype == dtype)
        )

    def parts(self, dtype: torch.dtype) -> tuple[Structure, ...]:
        """Return the norms and the linear layers as `Block` of csrc/layers/block.h has them."""
        norms = self.before, self.after, self.of_queries, self.of_keys
        linears = self.query, self.key, self.value, self.output
        return (
            *(NormStruct() if one is None else one.struct(dtype) for one in norms),
            *(one.struct() for one in linears),
        )

    def attention(self, cache: "CacheRows", dtype: torch.dtype) -> AttentionStruct:
        """Return the structure of attention to a cache."""
        keys, values, kind = cache.keys_GLC, cache.values_GLZ, NATIVE_DTYPES[dtype]
        scale = self.head_width**-0.5 if self.options.scale is None else self.options.scale
        return AttentionStruct(
            self.heads, self.groups, self.head_width, self.value_width,
            kind, _INT8 if isinstance(keys, Int8Rows) else kind,
            self.heads * self.head_width, self.head_width,
            *keys.stride()[:2], *values.stride()[:2],
            *(one.scales.stride(0) if isinstance(one, Int8Rows) else 0 for one in (keys, values)),
            cache.window or 0, scale, self.options.softcap or 0.0,
        )  # fmt: skip

    def latents(self) -> None:
        """Return nothing: heads attend to keys and values."""

    def supported(self, dtype: torch.dtype, cosines: int) -> bool:
        """Return whether kernels compute the block for tokens of a dtype and R cosines each."""
        width, heads, groups = self.before.width, self.heads, self.groups
        shapes = [
            (self.query, (heads * self.head_width, width)),
            (self.key, (groups * self.head_width, width)),
            (self.value, (groups * self.value_width, width)),
            (self.output, (width, heads * self.value_width)),
        ]
        rotated = self.rotary.rotated(cosines)
        return (
            dtype in NATIVE_DTYPES
            and all((one.weight.rows, one.weight.cols) == shape for one, shape in shapes)
            and self.after.width == width
            and all(
                one is None or one.width in (self.head_width, number * self.head_width)
                for one, number in ((self.of_queries, heads), (self.of_keys, groups))
            )
            and self.head_width % LANES == 0
            and self.value_width % LANES == 0
            and heads % groups == 0
            and heads <= groups * MAX_GROUP_HEADS
            and rotated % 2 == 0
            and 0 < rotated <= self.head_width
        )


class Block(Protocol):
    """An attention block of some form: `AttentionBlock`, or `LatentBlock` of latent_block.py."""

    @property
    def rotary(self) -> RotaryForm:
        """Return how heads are rotated."""
        ...

    @property
    def options(self) -> AttentionOptions:
        """Return the variant of attention."""
        ...

    def fits(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> bool:
        """Return whether a cache is one of this block."""
        ...

    def supported(self, dtype: torch.dtype, cosines: int) -> bool:
        """Return whether kernels compute the block for tokens of a dtype and R cosines each."""
        ...

    def parts(self, dtype: torch.dtype) -> tuple[Structure, ...]:
        """Return the norms and the linear layers as `Block` of csrc/layers/block.h has them."""
        ...

    def attention(self, cache: "CacheRows", dtype: torch.dtype) -> AttentionStruct:
        """Return the structure of attention to a cache, without sinks."""
        ...

    def latents(self) -> Structure | None:
        """Return what is different where heads attend to latents; None where they do not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRows:
    """Where the tokens of a step belong in a layer's cache.

    Attributes:
        keys_GLC: Keys of all places, in the tokens' dtype or `Int8Rows`.
        values_GLZ: Values.
        requests: (first place, past tokens, new tokens) of each request; the new tokens' places
            follow those of the past ones.
        window: Number of keys that a token attends to; None for all.
    """

    keys_GLC: Tensor
    values_GLZ: Tensor
    requests: Sequence[tuple[int, int, int]]
    window: int | None = None


def plain_attention_block(
    block: AttentionBlock, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, cache: CacheRows
) -> tuple[Tensor, Tensor]:
    """Return the sum and its norm [T, D], and write keys and values; the reference for the kernel.

    Args:
        block: The block.
        x_TD: Hidden states of the requests' new tokens, one request after the other.
        cos_TR: Cosines of each token.
        sin_TR: Sines.
        cache: In the tokens' dtype.
    """
    normed_TD, tokens = block.before(x_TD), len(x_TD)
    query, key = block.query(normed_TD), block.key(normed_TD)
    query = block.of_queries(query) if block.of_queries else query
    key = block.of_keys(key) if block.of_keys else key
    heads = (one.view(1, tokens, -1, block.head_width).transpose(1, 2) for one in (query, key))
    query_HTC, key_GTC = (
        plain_rotate(one, cos_TR[None], sin_TR[None], block.rotary)[0] for one in heads
    )
    value_GTZ = block.value(normed_TD).view(tokens, block.groups, -1).transpose(0, 1)
    options, outputs, row = replace(block.options, window=cache.window), [], 0
    for start, past, new in cache.requests:
        rows, places = slice(row, row + new), slice(start + past, start + past + new)
        cache.keys_GLC[:, places], cache.values_GLZ[:, places] = (
            key_GTC[:, rows],
            value_GTZ[:, rows],
        )
        seen = slice(start, start + past + new)
        segment = KeySegment(
            keys_GLC=cache.keys_GLC[:, seen],
            values_GLZ=cache.values_GLZ[:, seen],
            past=past,
            new=new,
        )
        outputs.append(plain_attention(query_HTC[:, rows].transpose(0, 1), segment, options))
        row += new
    attended_TO = torch.cat(outputs).flatten(1).to(x_TD.dtype)
    sum_TD = x_TD + block.output(attended_TO)
    return sum_TD, block.after(sum_TD)


class _Block(Structure):
    _fields_ = (
        *((name, NormStruct) for name in ("before", "after", "of_queries", "of_keys")),
        *((name, LinearStruct) for name in ("query", "key", "value", "output")),
        ("rotary", RotaryStruct),
        ("angles", c_int64),
        ("attention", AttentionStruct),
        ("latents", c_void_p),
    )


_INT8 = 8  # of csrc/matrix.h
_MOST_KNOWN = 64  # layouts that one kernel remembers


class _Choice(Structure):
    _fields_ = tuple((name, c_void_p) for name in ("router", "logits", "weights", "ids"))


@dataclass(frozen=True, slots=True)
class BlockOutput:
    """What one call returns.

    Attributes:
        sum_TD: The block's input and its attention, summed.
        normed_TD: The norm of that.
        logits_TE: Logits of the router that reads the norm, if one was given.
        routing: Its choice.
    """

    sum_TD: Tensor
    normed_TD: Tensor
    logits_TE: Tensor | None = None
    routing: Routing | None = None


class AttentionBlockKernel:
    """An attention block, and the router that reads its output, computed by kernels.

    Args:
        kernels: The compiled library.
        block: The block; `block.supported` must hold.
        dtype: The dtype of tokens.
        cosines: R.
    """

    def __init__(self, kernels: Kernels, block: Block, dtype: torch.dtype, cosines: int):
        self._kernels, self.block, self._dtype = kernels, block, dtype  # keeps the weights' memory
        self.cosines, self._size = cosines, dtype.itemsize
        sinks_H = block.options.sinks_H
        self._sinks_H = None if sinks_H is None else sinks_H.float().contiguous()
        self._parts = *block.parts(dtype), rotary_struct(block.rotary, dtype, cosines), cosines
        self._latents = block.latents()
        self._known: dict[tuple[Any, ...], _Block] = {}  # by the layout of caches

    @outside_of_graphs
    def __call__(
        self,
        x_TD: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        cache: CacheRows,
        router: RouterKernel | None = None,
    ) -> BlockOutput:
        """Return what `plain_attention_block` and the router do.

        Args:
            x_TD: Hidden states, consecutive like all tensors here.
            cos_TR: Cosines of each token.
            sin_TR: Sines.
            cache: In the tokens' dtype, or int8.
            router: A router to call with the norm.
        """
        struct, tuples = self.arguments(cache)
        segments = (SegmentStruct * len(tuples))(*tuples)
        row = tuples[-1][-1] + tuples[-1][-2]
        sum_TD, normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
        logits_TE = made = choice = None
        if router is not None:
            logits_TE, made = router.empty(row)
            weights, ids = made.weights_TK.data_ptr(), made.ids_TK.data_ptr()
            choice = _Choice(router.address, logits_TE.data_ptr(), weights, ids)
        self._kernels.block(
            addressof(struct), segments, row, x_TD, cos_TR, sin_TR, (sum_TD, normed_TD), choice
        )
        return BlockOutput(sum_TD, normed_TD, logits_TE, made)

    def arguments(self, cache: CacheRows) -> tuple[Structure, list[tuple[int, ...]]]:
        """Return the C structure for a cache's layout, and the segment of each request."""
        keys, values, segments, row = cache.keys_GLC, cache.values_GLZ, list[tuple[int, ...]](), 0
        struct, key_size, value_size = self._struct(cache), keys.stride(1), values.stride(1)
        key_at, value_at, key_scale, value_scale = keys.data_ptr(), values.data_ptr(), 0, 0
        if isinstance(keys, Int8Rows) and isinstance(values, Int8Rows):
            key_scale, value_scale = keys.scales.data_ptr(), values.scales.data_ptr()
        else:
            key_size, value_size = key_size * self._size, value_size * self._size
        for start, past, new in cache.requests:
            segments.append((
                key_at + start * key_size,
                value_at + start * value_size,
                key_scale and key_scale + 4 * start,
                value_scale and value_scale + 4 * start,
                past, new, row,
            ))  # fmt: skip
            row += new
        return struct, segments

    def _struct(self, cache: CacheRows) -> _Block:
        """Return the structure for a cache's layout."""
        keys, values, window = cache.keys_GLC, cache.values_GLZ, cache.window
        key = keys.stride(), values.stride(), window, keys.dtype
        if (found := self._known.get(key)) is not None:
            return found
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        attention = self.block.attention(cache, self._dtype)
        attention.sinks = None if self._sinks_H is None else self._sinks_H.data_ptr()
        latents = None if self._latents is None else addressof(self._latents)
        found = self._known[key] = _Block(*self._parts, attention, latents)
        return found
