"""Attention by compiled kernels, compared with a reference, and its invariances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import HERE, compiled, levels, normal
from torch import Tensor, nn
from torch.nn import functional as F

from moefit.quant.attention import (
    AttentionOptions,
    KeySegment,
    attend,
    attend_alone,
    can_attend,
    plain_attention,
)
from moefit.quant.cpu_kernels import kernels
from moefit.quant.kv_int8 import Int8Rows, quantize_rows
from moefit.serve.hf import attention as attention_module
from moefit.serve.hf.attention import cpu_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}
pytestmark = compiled


CACHES = pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])


def segments_of(
    sizes: list[tuple[int, int]],
    groups: int,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    *,
    int8: bool = False,
) -> list[KeySegment]:
    """One request per (past, new) tokens, all views of one pool."""
    places = sum(past + new for past, new in sizes)
    keys_GPC = normal(groups, places, width, seed=1).to(dtype)
    values_GPZ = normal(groups, places, value_width, seed=2).to(dtype)
    rounded = [quantize_rows(one) for one in (keys_GPC, values_GPZ)] if int8 else None
    segments, start = [], 0
    for past, new in sizes:
        mine = slice(start, start + past + new)
        keys, values = (
            (keys_GPC[:, mine], values_GPZ[:, mine])
            if rounded is None
            else (one.part(slice(None), mine) for one in rounded)
        )
        segments.append(KeySegment(keys_GLC=keys, values_GLZ=values, past=past, new=new))
        start = mine.stop
    return segments


def float_values(segment: KeySegment) -> Tensor:
    values = segment.values_GLZ
    return values.dequantized(torch.float32) if isinstance(values, Int8Rows) else values


def assert_attention(
    level: str, query_THC: Tensor, segments: list[KeySegment], options: AttentionOptions, off: float
) -> None:
    compiled_at = kernels(level)
    assert compiled_at is not None and compiled_at.level == level
    out_THZ = attend(compiled_at, query_THC, segments, options)
    assert out_THZ.dtype == query_THC.dtype
    parts = zip(
        query_THC.split([s.new for s in segments]),
        out_THZ.split([s.new for s in segments]),
        segments,
        strict=True,
    )
    for query, out, segment in parts:
        expected = plain_attention(query, segment, options)
        size = float_values(segment).abs().max().item()
        torch.testing.assert_close(out.double(), expected, rtol=off, atol=off * size)


@CACHES
@levels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [[(0, 1)], [(5, 1), (0, 9)], [(63, 1), (64, 1), (65, 1)], [(510, 5), (1100, 1), (0, 70)]],
    ids=str,
)
def test_attention_equals_reference(level: str, dtype: str, sizes, int8: bool) -> None:
    segments = segments_of(sizes, 2, 64, 48, DTYPES[dtype], int8=int8)
    query_THC = normal(sum(new for _, new in sizes), 6, 64).to(DTYPES[dtype])
    assert_attention(level, query_THC, segments, AttentionOptions(), ROUNDING[dtype])


@CACHES
@levels
@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(scale=0.3),
        AttentionOptions(window=1),
        AttentionOptions(window=70, scale=1.0),
        AttentionOptions(softcap=2.0),
        AttentionOptions(sinks_H=normal(4, seed=5)),
        AttentionOptions(sinks_H=normal(4, seed=5), window=600, softcap=9.0),
    ],
    ids=["scale", "window-1", "window-70", "softcap", "sinks", "all"],
)
def test_attention_options_of_families(level: str, options: AttentionOptions, int8: bool) -> None:
    segments = segments_of([(700, 3), (0, 80), (530, 1)], 4, 32, 16, torch.float32, int8=int8)
    assert_attention(level, normal(84, 4, 32), segments, options, 5e-6)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 40)), min_size=1, max_size=4),
    groups=st.integers(1, 3),
    share=st.sampled_from([1, 2, 3, 7, 8]),
    width=st.sampled_from([16, 48, 128, 144]),
    window=st.none() | st.integers(1, 700),
    int8=st.booleans(),
)
def test_any_shape(
    sizes, groups: int, share: int, width: int, window: int | None, int8: bool
) -> None:
    segments = segments_of(sizes, groups, width, 80, torch.float32, int8=int8)
    query_THC = normal(sum(new for _, new in sizes), groups * share, width, seed=7)
    for level in HERE:
        assert_attention(level, query_THC, segments, AttentionOptions(window=window), 5e-6)


def out_of(
    query_THC: Tensor, segments: list[KeySegment], options: AttentionOptions | None = None
) -> Tensor:
    best = kernels()
    assert best is not None
    return attend(best, query_THC, segments, options or AttentionOptions())


@CACHES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_result_does_not_depend_on_prompt_chunks(
    dtype: str, window: int | None, chunk: int, int8: bool
) -> None:
    (whole,) = segments_of([(0, 600)], 2, 64, 64, DTYPES[dtype], int8=int8)
    query_THC = normal(600, 8, 64).to(DTYPES[dtype])
    options = AttentionOptions(window=window)
    expected = out_of(query_THC, [whole], options)
    for past in range(0, 600, chunk):
        new = min(chunk, 600 - past)
        piece = KeySegment(keys_GLC=whole.keys_GLC, values_GLZ=whole.values_GLZ, past=past, new=new)
        got = out_of(query_THC[past : past + new], [piece], options)
        assert torch.equal(got, expected[past : past + new])


@CACHES
def test_result_does_not_depend_on_batch(int8: bool) -> None:
    sizes = [(1500, 1), (20, 30), (0, 1), (513, 4)]
    segments = segments_of(sizes, 2, 64, 64, torch.bfloat16, int8=int8)
    query_THC = normal(36, 4, 64).bfloat16()
    together = out_of(query_THC, segments).split([1, 30, 1, 4])
    for query, segment, out in zip(query_THC.split([1, 30, 1, 4]), segments, together, strict=True):
        assert torch.equal(out_of(query, [segment]), out)


@CACHES
def test_result_does_not_depend_on_threads(int8: bool) -> None:
    segments = segments_of([(1500, 1)], 1, 64, 64, torch.bfloat16, int8=int8)
    query_THC = normal(1, 4, 64).bfloat16()
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(out_of(query_THC, segments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_nan_propagates() -> None:
    (segment,) = segments_of([(80, 1)], 1, 16, 16, torch.float32)
    segment.keys_GLC[0, 70, 3] = torch.nan
    assert out_of(normal(1, 2, 16), [segment]).isnan().all()
    segment.keys_GLC[0, 70, 3] = 0.0
    segment.values_GLZ[0, 3, 5] = torch.inf
    out = out_of(normal(1, 2, 16), [segment])
    assert out[..., 5].isinf().all() and out[..., :5].isfinite().all()


@CACHES
@pytest.mark.parametrize("width, groups", [(8, 2), (24, 1), (16, 3)])
def test_unsupported_shapes_use_torch(width: int, groups: int, int8: bool) -> None:
    (segment,) = segments_of([(4, 1)], groups, width, 16, torch.float32, int8=int8)
    assert not can_attend(normal(1, 4, width), segment)


def test_codes_without_scales_are_ignored() -> None:
    (segment,) = segments_of([(4, 1)], 2, 16, 16, torch.float32, int8=True)
    assert can_attend(normal(1, 4, 16), segment)
    lost = segment.keys_GLC[:, :5]
    assert type(lost) is Tensor and lost.dtype == torch.int8
    broken = KeySegment(keys_GLC=lost, values_GLZ=segment.values_GLZ, past=4, new=1)
    assert not can_attend(normal(1, 4, 16), broken)


def test_nan_row_of_int8_cache_propagates() -> None:
    (segment,) = segments_of([(80, 1)], 1, 16, 16, torch.float32, int8=True)
    assert isinstance(segment.keys_GLC, Int8Rows)
    segment.keys_GLC.scales[0, 70] = torch.nan
    assert out_of(normal(1, 2, 16), [segment]).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("past, new", [(0, 1), (70, 1), (0, 9), (33, 5)])
def test_one_sequence_alone_has_the_same_bits(past: int, new: int, dtype: str) -> None:
    (segment,) = segments_of([(past, new)], 2, 32, 16, DTYPES[dtype])
    query_HTC = normal(4, new, 32).to(DTYPES[dtype])
    for options in (AttentionOptions(), AttentionOptions(scale=0.3, window=7, softcap=2.0)):
        expected = out_of(query_HTC.transpose(0, 1), [segment], options)
        alone = attend_alone(query_HTC, segment.keys_GLC, segment.values_GLZ, options)
        assert alone is not None and torch.equal(alone, expected)


def test_what_one_sequence_alone_does_not_support() -> None:
    plain, query = AttentionOptions(), normal(4, 1, 32)
    (one,) = segments_of([(9, 1)], 2, 32, 32, torch.float32)
    keys, values = one.keys_GLC, one.values_GLZ
    (int8,) = segments_of([(9, 1)], 2, 32, 32, torch.float32, int8=True)
    assert attend_alone(query, keys, values, plain) is not None
    for tensors in (
        (query[..., :30], keys[..., :30], values),  # no whole vectors
        (query.half(), keys, values),
        (query[:3], keys, values),  # heads that groups do not divide
        (normal(4, 11, 32), keys, values),  # more queries than keys
        (query, keys.transpose(1, 2).contiguous().transpose(1, 2), values),
        (query, int8.keys_GLC, int8.values_GLZ),
    ):
        assert attend_alone(*tensors, plain) is None
    assert attend_alone(query, keys, values, AttentionOptions(sinks_H=torch.zeros(4))) is None


class Causal(nn.Module):
    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("new, length", [(1, 40), (40, 40), (5, 40)])
def test_equals_transformers_sdpa(batch: int, new: int, length: int) -> None:
    query, key, value = normal(batch, 4, new, 32), *normal(2, batch, 2, length, 32, seed=3)
    mask = None if new in (1, length) else torch.ones(new, length).tril(length - new).bool()
    out, _ = cpu_attention(Causal(), query, key, value, mask, scaling=0.2)
    expected = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and new > 1,
        scale=0.2,
        enable_gqa=True,
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("flag", [None, False, True])
def test_transformers_flags_do_not_disable_kernels(flag, monkeypatch) -> None:
    """Families pass on flags (output_router_logits); flags that change attention use torch."""
    calls = []
    real = attention_module._by_kernels
    monkeypatch.setattr(
        attention_module, "_by_kernels", lambda *given: calls.append(1) or real(*given)
    )
    query, key, value = normal(1, 4, 1, 32), *normal(2, 1, 2, 40, 32, seed=3)
    cpu_attention(Causal(), query, key, value, None, output_router_logits=flag)
    assert calls == [1]
    bias = torch.zeros(1, 4, 1, 40)
    cpu_attention(Causal(), query, key, value, None, position_bias=bias)
    assert calls == [1]
