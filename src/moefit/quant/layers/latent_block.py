"""An attention block with latent attention (MLA), as one call of the kernels.

The cache holds a latent vector per token, which `attention_block.py` has as its key, and the
rotated part of keys, which it has as its value; heads attend as in `quant/latent.py`.
`plain_latent_block` is the reference in torch. Each operation is that of its own kernel, so results
are equal to theirs bit by bit.

Shapes: T tokens, D model width, H heads, N and R widths of a key's parts, V width of a value, C
latent width, L places of a cache.
"""

from ctypes import Structure
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moefit.quant.attention import AttentionOptions, AttentionStruct
from moefit.quant.cpu_kernels import NATIVE_DTYPES
from moefit.quant.kv_int8 import Int8Rows
from moefit.quant.latent import (
    LatentHeads,
    LatentHeadsStruct,
    LatentSegment,
    groups_of_heads,
    plain_latent_attention,
)
from moefit.quant.layers.attention_block import CacheRows, Norm
from moefit.quant.layers.layer_operations import NormStruct, RotaryForm, plain_rotate
from moefit.quant.layers.shared_expert import Linear, LinearStruct


class _Latents(Structure):
    _fields_ = (("heads", LatentHeadsStruct), ("query_in", LinearStruct))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentBlock:
    """What an attention block with latent attention computes.

    Attributes:
        before: Norm of the block's input.
        after: Norm of the sum.
        query_in: The first of two linear layers of queries; None where there is one.
        of_queries: Norm between them; None likewise.
        query: Linear layer of queries, [H * (N + R), D or the width between both].
        key: Linear layer of latents and rotated parts of keys, [C + R, D].
        of_keys: Norm of latents.
        expansion: How heads expand latents.
        output: Linear layer, [D, H * V].
        rotary: How the last R elements of queries and keys are rotated.
        options: Variant of attention.
    """

    before: Norm
    after: Norm
    query_in: Linear | None
    of_queries: Norm | None
    query: Linear
    key: Linear
    of_keys: Norm
    expansion: LatentHeads
    output: Linear
    rotary: RotaryForm
    options: AttentionOptions

    def fits(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> bool:
        """Return whether a cache has latents [..., 1, L, C] and rotated parts [..., 1, L, R]."""
        return (
            not isinstance(keys, Int8Rows)
            and keys.dtype == values.dtype == dtype
            and keys.shape[-3] == values.shape[-3] == 1
            and keys.shape[-1] == self.expansion.latent
            and values.shape[-1] == self.expansion.rotated
        )

    def supported(self, dtype: torch.dtype, cosines: int) -> bool:
        """Return whether kernels compute the block for tokens of a dtype and R cosines each."""
        width, heads, inner = self.before.width, self.expansion, self.query_in
        queries = heads.heads * (heads.keys + heads.rotated)
        shapes = [
            (self.query, (queries, width if inner is None else inner.weight.rows)),
            (self.key, (heads.latent + heads.rotated, width)),
            (self.output, (width, heads.heads * heads.values)),
        ]
        if inner is not None:
            shapes.append((inner, (inner.weight.rows, width)))
        between = None if self.of_queries is None else self.of_queries.width
        return (
            heads.supported(dtype)
            and all((one.weight.rows, one.weight.cols) == shape for one, shape in shapes)
            and between == (None if inner is None else inner.weight.rows)
            and self.after.width == width
            and self.of_keys.width == heads.latent
            and self.rotary.rotated(cosines) == heads.rotated
            and self.options.sinks_H is None
        )

    def parts(self, dtype: torch.dtype) -> tuple[Structure, ...]:
        """Return the norms and the linear layers as `Block` of csrc/layers/block.h has them."""
        norms = self.before, self.after, self.of_queries, self.of_keys
        return (
            *(NormStruct() if one is None else one.struct(dtype) for one in norms),
            self.query.struct(),
            self.key.struct(),
            LinearStruct(),
            self.output.struct(),
        )

    def attention(self, cache: CacheRows, dtype: torch.dtype) -> AttentionStruct:
        """Return the structure of attention to latents, whose queries are float32."""
        heads, latents, rotated = self.expansion, cache.keys_GLC, cache.values_GLZ
        groups, width = groups_of_heads(heads.heads), heads.latent + heads.rotated
        scale = (heads.keys + heads.rotated) ** -0.5
        token = latents.stride(1)
        return AttentionStruct(
            heads.heads, groups, width, heads.latent,
            NATIVE_DTYPES[torch.float32], NATIVE_DTYPES[dtype], heads.heads * width, width,
            0, token, 0, token, 0, 0, cache.window or 0,
            scale if self.options.scale is None else self.options.scale,
            self.options.softcap or 0.0, None, heads.rotated, rotated.stride(1),
        )  # fmt: skip

    def latents(self) -> Structure:
        """Return what is different where heads attend to latents."""
        query_in = LinearStruct() if self.query_in is None else self.query_in.struct()
        return _Latents(self.expansion.struct(), query_in)


def plain_latent_block(
    block: LatentBlock, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, cache: CacheRows
) -> tuple[Tensor, Tensor]:
    """Return the sum and its norm [T, D], and write to the cache; the reference for the kernel.

    Args:
        block: The block.
        x_TD: Hidden states of the requests' new tokens, one request after the other.
        cos_TR: Cosines of each token.
        sin_TR: Sines.
        cache: Latents and rotated parts of keys, in the tokens' dtype.
    """
    normed_TD, tokens, heads = block.before(x_TD), len(x_TD), block.expansion
    inner = normed_TD
    if block.query_in is not None and block.of_queries is not None:
        inner = block.of_queries(block.query_in(normed_TD))
    query_THC = block.query(inner).view(tokens, heads.heads, -1)
    latents_TC, part_TR = block.key(normed_TD).split([heads.latent, heads.rotated], dim=-1)
    latents_TC = block.of_keys(latents_TC.contiguous())

    def rotated(x_THR: Tensor) -> Tensor:
        x_1HTR = x_THR.transpose(0, 1)[None]
        return plain_rotate(x_1HTR, cos_TR[None], sin_TR[None], block.rotary)[0].transpose(0, 1)

    first, last = query_THC.split([heads.keys, heads.rotated], dim=-1)
    query_THC, part_TR = torch.cat([first, rotated(last)], dim=-1), rotated(part_TR[:, None])[:, 0]
    scale = query_THC.shape[-1] ** -0.5 if block.options.scale is None else block.options.scale
    options, outputs, row = replace(block.options, scale=scale, window=cache.window), [], 0
    for start, past, new in cache.requests:
        rows, places = slice(row, row + new), slice(start + past, start + past + new)
        cache.keys_GLC[0, places], cache.values_GLZ[0, places] = latents_TC[rows], part_TR[rows]
        seen = slice(start, start + past + new)
        segment = LatentSegment(
            latents_LC=cache.keys_GLC[0, seen],
            rotated_LR=cache.values_GLZ[0, seen],
            past=past,
            new=new,
        )
        outputs.append(plain_latent_attention(heads, query_THC[rows], segment, options))
        row += new
    sum_TD = x_TD + block.output(torch.cat(outputs).flatten(1).to(x_TD.dtype))
    return sum_TD, block.after(sum_TD)
