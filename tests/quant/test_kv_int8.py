"""Rows of an int8 cache: kernel and torch, error, and NaN."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import HERE, compiled, levels, normal
from torch import Tensor

from moefit.quant import kv_int8
from moefit.quant.cpu_kernels import kernels
from moefit.quant.kv_int8 import Int8Rows, bytes_per_row, quantize_rows, write_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(one: Int8Rows, other: Int8Rows) -> bool:
    equal = (one.scales == other.scales) | (one.scales.isnan() & other.scales.isnan())
    return torch.equal(one.codes(), other.codes()) and bool(equal.all())


def written(level: str | None, rows_GRC: Tensor, monkeypatch: pytest.MonkeyPatch) -> Int8Rows:
    """Write rows to places 3, 4, ... of a cache, by kernels of a level or (None) in torch."""
    heads, tokens, width = rows_GRC.shape
    target_GPC = Int8Rows.zeros(heads, tokens + 5, width)
    chosen = None if level is None else kernels(level)
    with monkeypatch.context() as patch:
        patch.setattr(kv_int8, "kernels", lambda: chosen)
        write_rows(target_GPC, torch.arange(3, 3 + tokens), rows_GRC)
    assert not target_GPC.codes()[:, :3].any() and not target_GPC.codes()[:, 3 + tokens :].any()
    return target_GPC.part(slice(None), slice(3, 3 + tokens))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_levels_equal_torch_bitwise(dtype: torch.dtype, monkeypatch) -> None:
    @settings(deadline=None, max_examples=40)
    @given(
        shape=st.tuples(
            st.integers(1, 3), st.integers(1, 9), st.sampled_from([16, 48, 64, 128, 144])
        ),
        size=st.sampled_from([1e-35, 1e-3, 1.0, 300.0]),
        seed=st.integers(0, 99),
    )
    def check(shape: tuple[int, int, int], size: float, seed: int) -> None:
        rows_GRC = (normal(*shape, seed=seed) * size).to(dtype)
        expected = quantize_rows(rows_GRC)
        for level in (*HERE, None):
            assert same(written(level, rows_GRC, monkeypatch), expected), level

    check()


@levels
def test_rows_may_be_strided_by_token(level: str, monkeypatch) -> None:
    rows_GRC = normal(7, 2, 64).transpose(0, 1)  # as attention projections give them
    assert same(written(level, rows_GRC, monkeypatch), quantize_rows(rows_GRC))


@pytest.mark.parametrize("level", [None, *HERE])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_row_has_nan_scale(level: str | None, bad: float, monkeypatch) -> None:
    rows_GRC = normal(1, 4, 32)
    rows_GRC[0, 2, 17] = bad
    rows_GRC[0, 1] = 0.0
    found = written(level, rows_GRC, monkeypatch)
    assert found.scales.isnan().tolist() == [[False, False, True, False]]
    assert found.dequantized(torch.float32)[0, 2].isnan().all()
    assert not found.dequantized(torch.float32)[0, 1].any()


@pytest.mark.parametrize("width", [8, 24, 64, 128])
def test_error_is_at_most_half_a_step(width: int) -> None:
    rows = normal(50, width)
    rounded = quantize_rows(rows)
    error = (rounded.dequantized(torch.float64) - rows.double()).abs().amax(-1)
    assert (error <= rows.abs().amax(-1).double() / 127 * 0.5000001).all()
    assert (rounded.codes().abs().amax(-1) == 127).all()


def test_rows_are_independent() -> None:
    rows_GRC = normal(2, 9, 48).bfloat16()
    whole, pieces = Int8Rows.zeros(2, 9, 48), Int8Rows.zeros(2, 9, 48)
    write_rows(whole, torch.arange(9), rows_GRC)
    for first, last in ((0, 1), (1, 6), (6, 9)):
        write_rows(pieces, torch.arange(first, last), rows_GRC[:, first:last])
    assert same(whole, pieces)


def test_parts_and_copies_keep_their_scales() -> None:
    rows = quantize_rows(normal(2, 9, 16))
    part = rows.part(slice(1), slice(3, 5))
    assert torch.equal(part.dequantized(torch.float32), rows.dequantized(torch.float32)[:1, 3:5])
    copied = copy.deepcopy(rows)
    assert same(copied, rows) and copied.data_ptr() != rows.data_ptr()
    assert type(rows[0]) is Tensor, "what was derived from it has no scales"
    assert rows.nbytes + rows.scales.nbytes == 18 * bytes_per_row(16)
