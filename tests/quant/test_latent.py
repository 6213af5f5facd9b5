"""Attention to cached latents, compared with expanded keys and values in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import HERE, at, compiled, levels, normal

from moefit.quant.attention import AttentionOptions
from moefit.quant.cpu_kernels import KernelMatrix, Weight
from moefit.quant.encode import encode
from moefit.quant.latent import (
    LatentHeads,
    LatentSegment,
    attend_to_latents,
    plain_latent_attention,
)

pytestmark = compiled
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = tuple(ROUNDING)
KEYS, VALUES, ROTATED = 24, 40, 16


def latent_heads(
    dtype: torch.dtype, bits: int | None = None, *, heads: int = 6, latent: int = 48
) -> LatentHeads:
    weight_OC = (normal(heads * (KEYS + VALUES), latent) / latent**0.5).to(dtype)
    weight: Weight = weight_OC if bits is None else encode(weight_OC, bits)
    return LatentHeads(
        weight=KernelMatrix(weight), heads=heads, keys=KEYS, values=VALUES, rotated=ROTATED
    )


def segment(heads: LatentHeads, past: int, new: int, dtype: torch.dtype) -> LatentSegment:
    return LatentSegment(
        latents_LC=normal(past + new, heads.latent, seed=past).to(dtype),
        rotated_LR=normal(past + new, ROTATED, seed=past + 1).to(dtype),
        past=past,
        new=new,
    )


def queries(heads: LatentHeads, tokens: int, dtype: torch.dtype):
    return normal(tokens, heads.heads, KEYS + ROTATED, seed=5).to(dtype)


@levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("number", [1, 6, 34])
def test_equal_to_expanded_keys_and_values(
    level: str, dtype: torch.dtype, bits: int | None, number: int
) -> None:
    heads = latent_heads(dtype, bits, heads=number)
    assert heads.supported(dtype) and not heads.supported(torch.float64)
    for window in (None, 9):
        options = AttentionOptions(scale=0.2, window=window)
        one, query_THC = segment(heads, 70, 67, dtype), queries(heads, 67, dtype)
        made = attend_to_latents(at(level), heads, query_THC, [one], options)
        wanted = plain_latent_attention(heads, query_THC, one, options)
        assert made.dtype == dtype and made.shape == wanted.shape
        close = ROUNDING[dtype]
        torch.testing.assert_close(made.double(), wanted, rtol=close, atol=close)


@settings(deadline=None, max_examples=15)
@given(chunks=st.lists(st.integers(1, 90), min_size=1, max_size=4), dtype=st.sampled_from(DTYPES))
def test_outputs_do_not_depend_on_chunks_and_others(chunks: list[int], dtype: torch.dtype) -> None:
    heads, options, total = latent_heads(dtype), AttentionOptions(scale=0.3), sum(chunks)
    kernels, query_THC = at(HERE[-1]), queries(latent_heads(dtype), sum(chunks), dtype)
    whole = segment(heads, 0, total, dtype)
    wanted = attend_to_latents(kernels, heads, query_THC, [whole], options)
    segments, past = list[LatentSegment](), 0
    for new in chunks:
        segments.append(
            LatentSegment(
                latents_LC=whole.latents_LC[: past + new],
                rotated_LR=whole.rotated_LR[: past + new],
                past=past,
                new=new,
            )
        )
        past += new
    made = attend_to_latents(kernels, heads, query_THC, segments, options)
    assert torch.equal(made, wanted)


@levels
@pytest.mark.parametrize("number", [6, 32])
def test_long_requests_beside_each_other(level: str, number: int) -> None:
    """In spans of the attention kernel, 64 queries of several requests at a time."""
    heads, options = latent_heads(torch.bfloat16, heads=number), AttentionOptions(scale=0.2)
    places = [(1100, 1), (0, 130), (515, 3), (20, 1)]
    segments = [segment(heads, past, new, torch.bfloat16) for past, new in places]
    query_THC = queries(heads, sum(new for _, new in places), torch.bfloat16)
    together = attend_to_latents(at(level), heads, query_THC, segments, options)
    parts = [part.split([new for _, new in places]) for part in (query_THC, together)]
    for one, own_THC, made in zip(segments, *parts, strict=True):
        alone = attend_to_latents(at(level), heads, own_THC, [one], options)
        assert torch.equal(made, alone)
        wanted = plain_latent_attention(heads, own_THC, one, options)
        torch.testing.assert_close(made.double(), wanted, rtol=2**-8, atol=2**-8)
