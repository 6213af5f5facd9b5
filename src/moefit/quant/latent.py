"""Latent attention (MLA) on CPUs without expanding the keys and values of all cached tokens.

The cache holds a latent vector per token, and a rotated part of its key that all heads share. A
family expands both at every step: a head's key is W_K latent beside the rotated part, its value
W_V latent. Here a query is multiplied by W_K once and attends to the latents themselves, and W_V is
applied to their weighted sum. `plain_latent_attention` is the reference in torch. Every output is
summed in an order that depends on its own request alone.

Shapes: T tokens, H heads, N and R widths of a key's parts, C latent width, V value width, L tokens
of a cache.
"""

from collections.abc import Iterator, Sequence
from ctypes import Structure, c_int64
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moefit.graphs import outside_of_graphs
from moefit.quant.attention import LANES, AttentionOptions, KeySegment, attend, plain_attention
from moefit.quant.backend import decoded
from moefit.quant.cpu_kernels import NATIVE_DTYPES, KernelMatrix, Kernels, MatrixStruct

_MOST_HEADS = 16  # that attend to the latents together, so that several threads have work
_MOST_TOKENS = 64  # whose queries are as wide as latents at the same time


class LatentHeadsStruct(Structure):
    """`LatentHeads` of csrc/latent.h."""

    _fields_ = (
        ("matrix", MatrixStruct),
        *((name, c_int64) for name in ("heads", "keys", "values", "latent", "rotated")),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentHeads:
    """How heads expand latents.

    Attributes:
        weight: W_K and W_V of each head in turn, [H * (N + V), C].
        heads: H.
        keys: N.
        values: V.
        rotated: R.
    """

    weight: KernelMatrix
    heads: int
    keys: int
    values: int
    rotated: int

    @property
    def latent(self) -> int:
        """Return C."""
        return self.weight.cols

    def supported(self, dtype: torch.dtype) -> bool:
        """Return whether kernels compute it for tokens of a dtype."""
        widths = self.latent, self.rotated
        return (
            dtype in NATIVE_DTYPES
            and self.weight.rows == self.heads * (self.keys + self.values)
            and all(one % LANES == 0 and one > 0 for one in widths)
        )

    def struct(self) -> Structure:
        """Return the C structure, whose pointers are to the weight's memory."""
        return LatentHeadsStruct(
            self.weight.matrix, self.heads, self.keys, self.values, self.latent, self.rotated
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSegment:
    """One request's part of a batch.

    Attributes:
        latents_LC: Latents, of which past + new are used.
        rotated_LR: Rotated parts of keys, likewise.
        past: Number of tokens before the first query.
        new: Number of queries.
    """

    latents_LC: Tensor
    rotated_LR: Tensor
    past: int
    new: int


@outside_of_graphs
def attend_to_latents(
    kernels: Kernels,
    heads: LatentHeads,
    query_THC: Tensor,
    segments: Sequence[LatentSegment],
    options: AttentionOptions,
) -> Tensor:
    """Return the causal attention of each segment's queries [T, H, V] in the queries' dtype.

    Args:
        kernels: The compiled library.
        heads: How they expand latents; `supported` must hold.
        query_THC: Queries of all segments, one segment after the other, [T, H, N + R].
        segments: Requests with T queries in total.
        options: Variant of attention, with a scale.
    """
    cached = [_cached(one, groups_of_heads(heads.heads)) for one in segments]
    struct, outputs = heads.struct(), list[Tensor]()
    for first in range(0, len(query_THC), _MOST_TOKENS):
        part_THC = query_THC[first : first + _MOST_TOKENS].contiguous()
        wide_THC = kernels.latent_queries(struct, part_THC, heads.latent + heads.rotated)
        here = list(_of_queries(cached, first, first + len(part_THC)))
        summed_THC = attend(kernels, wide_THC, here, options)
        outputs.append(kernels.latent_values(struct, summed_THC, heads.values, query_THC.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def groups_of_heads(heads: int) -> int:
    """Return the number of groups of heads, each of which attends to the latents together."""
    return heads // max(n for n in range(1, _MOST_HEADS + 1) if heads % n == 0)


def _cached(one: LatentSegment, groups: int) -> KeySegment:
    """Return a request's latents as keys and values, the same for each group of heads."""
    seen = one.past + one.new
    latents_LC, more_LR = one.latents_LC[:seen], one.rotated_LR[:seen]
    shape, strides = (groups, *latents_LC.shape), (0, *latents_LC.stride())
    latents_GLC = latents_LC.as_strided(shape, strides)
    return KeySegment(
        keys_GLC=latents_GLC, values_GLZ=latents_GLC, past=one.past, new=one.new, more_LR=more_LR
    )


def _of_queries(segments: Sequence[KeySegment], first: int, end: int) -> Iterator[KeySegment]:
    """Yield the segments of queries `first` to `end - 1` of all."""
    row = 0
    for one in segments:
        begin, stop = max(first - row, 0), min(end - row, one.new)
        if begin < stop:
            yield replace(one, past=one.past + begin, new=stop - begin)
        row += one.new


def plain_latent_attention(
    heads: LatentHeads, query_THC: Tensor, segment: LatentSegment, options: AttentionOptions
) -> Tensor:
    """Return the attention of one segment in float64, with expanded keys and values."""
    weight = heads.weight.weight
    plain = weight if isinstance(weight, Tensor) else decoded(weight, torch.float32)
    both_HNC = plain.double().view(heads.heads, heads.keys + heads.values, heads.latent)
    seen = segment.past + segment.new
    latents_LC = segment.latents_LC[:seen].double()
    expanded_HLN = latents_LC @ both_HNC.transpose(1, 2)
    rotated_HLR = segment.rotated_LR[:seen].double().expand(heads.heads, -1, -1)
    expanded = KeySegment(
        keys_GLC=torch.cat([expanded_HLN[..., : heads.keys], rotated_HLR], dim=-1),
        values_GLZ=expanded_HLN[..., heads.keys :],
        past=segment.past,
        new=segment.new,
    )
    return plain_attention(query_THC, expanded, replace(options, sinks_H=None))
