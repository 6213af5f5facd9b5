"""The attention block with latent attention as one call, compared with its reference in torch."""

from dataclasses import replace

import pytest
import torch
from levels import HERE, at, compiled, largest_integer, levels, normal
from torch import Tensor

from moefit.quant.attention import AttentionOptions
from moefit.quant.cpu_kernels import KernelMatrix, Weight
from moefit.quant.encode import encode
from moefit.quant.kv_int8 import quantize_rows
from moefit.quant.latent import LatentHeads
from moefit.quant.layers.attention_block import (
    AttentionBlockKernel,
    BlockOutput,
    CacheRows,
    Norm,
)
from moefit.quant.layers.latent_block import LatentBlock, plain_latent_block
from moefit.quant.layers.layer_operations import NormForm, RotaryForm
from moefit.quant.layers.shared_expert import Linear

pytestmark = compiled
HIDDEN, HEADS, KEYS, ROTATED, VALUES, LATENT = 72, 6, 24, 16, 40, 48
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
PAIRS = RotaryForm(halves=False, doubled=True, pairs_in=True)
IN_TURN = RotaryForm(halves=False, pairs_in=True, pairs_out=True, in_turn=True)
# The width between two layers of queries, the bits of weights, and how heads are rotated.
VARIANTS: list[tuple[int | None, int | None, RotaryForm]] = [
    (None, None, IN_TURN),
    (32, None, PAIRS),
    (32, 8, RotaryForm()),
]
SIZES = [(0, 3), (7, 1), (530, 2)]


def linear(rows: int, cols: int, dtype: torch.dtype, bits: int | None, seed: int) -> Linear:
    weight_OI = (normal(rows, cols, seed=seed) / cols**0.5).to(dtype)
    weight: Weight = weight_OI if bits is None else encode(weight_OI, bits)
    bias_O = normal(rows, seed=seed + 1) * 0.1 if seed == 20 else None  # of latents alone
    return Linear(weight=KernelMatrix(weight), bias_O=bias_O)


def norm(width: int, dtype: torch.dtype, seed: int) -> Norm:
    weight_D = (1 + 0.2 * normal(width, seed=seed)).to(dtype)
    return Norm(form=NormForm(eps=1e-5), weight_D=weight_D, width=width)


def latent_block(
    dtype: torch.dtype, inner: int | None, bits: int | None, rotary: RotaryForm
) -> LatentBlock:
    expanded = linear(HEADS * (KEYS + VALUES), LATENT, dtype, bits, 30).weight
    queries = HEADS * (KEYS + ROTATED)
    return LatentBlock(
        before=norm(HIDDEN, dtype, 3),
        after=norm(HIDDEN, dtype, 4),
        query_in=linear(inner, HIDDEN, dtype, bits, 10) if inner else None,
        of_queries=norm(inner, dtype, 5) if inner else None,
        query=linear(queries, inner or HIDDEN, dtype, bits, 12),
        key=linear(LATENT + ROTATED, HIDDEN, dtype, bits, 20),
        of_keys=norm(LATENT, dtype, 6),
        expansion=LatentHeads(
            weight=expanded, heads=HEADS, keys=KEYS, values=VALUES, rotated=ROTATED
        ),
        output=linear(HIDDEN, HEADS * VALUES, dtype, bits, 40),
        rotary=rotary,
        options=AttentionOptions(scale=0.2),
    )


def inputs(dtype: torch.dtype, rotary: RotaryForm) -> tuple[Tensor, Tensor, Tensor]:
    tokens = sum(new for _, new in SIZES)
    angles_TR = normal(tokens, ROTATED, seed=7)
    cos_TR, sin_TR = (x.to(dtype) for x in (angles_TR.cos(), angles_TR.sin()))
    x_TD = normal(tokens, HIDDEN).to(dtype)
    return (x_TD, angles_TR, angles_TR) if rotary.in_turn else (x_TD, cos_TR, sin_TR)


def cache(dtype: torch.dtype, window: int | None = None) -> CacheRows:
    """Return requests that lie one after the other, with a gap between them."""
    places, requests = 1, []
    for past, new in SIZES:
        requests.append((places, past, new))
        places += past + new + 1
    return CacheRows(
        keys_GLC=normal(1, places, LATENT, seed=8).to(dtype),
        values_GLZ=normal(1, places, ROTATED, seed=9).to(dtype),
        requests=requests,
        window=window,
    )


@levels
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_block_is_that_of_the_reference(level: str, dtype: torch.dtype) -> None:
    for inner, bits, rotary in VARIANTS:
        block, given = latent_block(dtype, inner, bits, rotary), inputs(dtype, rotary)
        assert block.supported(dtype, ROTATED)
        mine, theirs = cache(dtype, window=9), cache(dtype, window=9)
        made = AttentionBlockKernel(at(level), block, dtype, ROTATED)(*given, mine)
        sum_TD, normed_TD = plain_latent_block(block, *given, theirs)
        rounding = ROUNDING[dtype] + (3 / largest_integer(bits) if bits else 0)
        for one, other in (
            (made.sum_TD, sum_TD),
            (made.normed_TD, normed_TD),
            (mine.keys_GLC, theirs.keys_GLC),
            (mine.values_GLZ, theirs.values_GLZ),
        ):
            allowed = rounding * float(other.abs().max())
            torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_requests_do_not_depend_on_each_other(dtype: torch.dtype) -> None:
    """Nor tokens of a request on those that are computed with them, bit by bit."""
    for inner, bits, rotary in VARIANTS:
        block, given = latent_block(dtype, inner, bits, rotary), inputs(dtype, rotary)
        kernel = AttentionBlockKernel(at(HERE[-1]), block, dtype, ROTATED)
        together, alone, row = cache(dtype), cache(dtype), 0
        made: BlockOutput = kernel(*given, together)
        for start, past, new in together.requests:
            for token in range(new):
                own = [one[row : row + 1] for one in given]
                one = replace(alone, requests=((start, past + token, 1),))
                found = kernel(own[0], own[1], own[2], one)
                assert torch.equal(found.normed_TD, made.normed_TD[row : row + 1])
                row += 1
        assert torch.equal(alone.keys_GLC, together.keys_GLC)
        assert torch.equal(alone.values_GLZ, together.values_GLZ)


def test_other_shapes_and_caches_are_not_supported() -> None:
    dtype = torch.float32
    block = latent_block(dtype, 32, None, PAIRS)
    assert block.supported(dtype, ROTATED)
    assert not block.supported(torch.float64, ROTATED)
    assert not block.supported(dtype, ROTATED // 2)
    for other in (
        replace(block, of_queries=None),
        replace(block, query_in=None),
        replace(block, of_keys=norm(LATENT + 1, dtype, 1)),
        replace(block, output=block.query),
        replace(block, options=AttentionOptions(sinks_H=normal(HEADS))),
    ):
        assert not other.supported(dtype, ROTATED)
    latents, parts = cache(dtype).keys_GLC, cache(dtype).values_GLZ
    assert block.fits(latents, parts, dtype)
    assert not block.fits(parts, latents, dtype)
    assert not block.fits(latents, parts, torch.bfloat16)
    assert not block.fits(quantize_rows(latents), quantize_rows(parts), dtype)
