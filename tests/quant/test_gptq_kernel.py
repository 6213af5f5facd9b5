"""Compiled calibrated encoding compared with torch: the same codes except at rounding ties."""

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import HERE, compiled, levels
from torch import Tensor

from moefit.quant.cpu_kernels import kernels
from moefit.quant.gptq import SWEEPS, encode_gptq
from moefit.quant.grouped_int import PLANES, GroupedMatrix
from moefit.quant.library import Level
from moefit.quant.moments import SecondMoments, moments_of

BITS = sorted(bits for bits in PLANES if bits > 1)
widths = pytest.mark.parametrize("bits", BITS)
SIZES = [(1, 1), (3, 40), (130, 64), (5, 65), (128, 150), (257, 200), (9, 640)]


def inputs(tokens: int, cols: int, seed: int = 0) -> Tensor:
    """Return inputs with most variance in few directions."""
    generator = torch.Generator().manual_seed(seed)
    few_KC = torch.randn(max(1, cols // 8), cols, generator=generator)
    loud_NK = torch.randn(tokens, len(few_KC), generator=generator)
    return loud_NK @ few_KC + 0.3 * torch.randn(tokens, cols, generator=generator)


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def known(x_NC: Tensor) -> Sequence[SecondMoments]:
    return moments_of(x_NC, torch.ones(len(x_NC)))


def encoded(
    level: Level | None,
    weight_RC: Tensor,
    bits: int,
    moments: Sequence[SecondMoments],
    sweeps: int = SWEEPS,
) -> GroupedMatrix:
    """Encode with the kernels of this level or torch, into a buffer with a known pattern."""
    rows, cols = weight_RC.shape
    made = GroupedMatrix.empty(rows, cols, bits)
    made.codes_RB.fill_(0xA5)
    made.meta_RMG.fill_(torch.nan)
    with mock.patch("moefit.quant.gptq.kernels", lambda: kernels(level or "torch")):
        encode_gptq(made, weight_RC, moments, sweeps=sweeps)
    return made


def other_rows(one: GroupedMatrix, other: GroupedMatrix) -> int:
    """Return the number of rows with different bytes, including padding."""
    (one_codes, one_meta), (codes, meta) = one.by_row(), other.by_row()
    codes_R = (one_codes == codes).all(1)
    meta_R = (one_meta == meta).flatten(1).all(1)
    return int((~(codes_R & meta_R)).sum())


def loss(made: GroupedMatrix, weight_RC: Tensor, moments: Sequence[SecondMoments]) -> float:
    """Return the minimised error in float64."""
    total, first = 0.0, 0
    off_RC = made.dense().double() - weight_RC.double()
    for one in moments:
        moments_PP = one.moments_GPI.transpose(0, 1).flatten(1).double()
        off_RP = torch.zeros(len(off_RC), len(moments_PP), dtype=torch.float64)
        off_RP[:, : one.cols] = off_RC[:, first : first + one.cols]
        total += float(((off_RP @ moments_PP) * off_RP).sum())
        first += one.cols
    return total


@levels
@widths
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_equals_torch_up_to_rounding(level: Level, bits: int, rows: int, cols: int) -> None:
    weight_RC, moments = weights(rows, cols), known(inputs(400, cols))
    plain, fast = (encoded(one, weight_RC, bits, moments) for one in (None, level))
    assert bool(fast.meta_RMG.isfinite().all())
    # A code that falls the other way changes what comes after it in its row, and no other row.
    assert other_rows(plain, fast) <= max(1, rows // 20)
    near = 2e-3 if rows > 100 else 2e-2
    expected = pytest.approx(loss(plain, weight_RC, moments), rel=near, abs=1e-9)
    assert loss(fast, weight_RC, moments) == expected


@compiled
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 140),
    st.sampled_from([1, 40, 64, 65, 200]),
    st.sampled_from([0, 1, 7, 300]),
    st.sampled_from(BITS),
    st.sampled_from([1e-9, 1.0, 1e4]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_inputs(
    rows: int, cols: int, tokens: int, bits: int, size: float, dead: bool, seed: int
) -> None:
    """Few or no inputs, columns without input, and any size."""
    weight_RC, x_NC = weights(rows, cols, seed), size * inputs(tokens, cols, seed)
    if dead:
        x_NC[:, ::3] = 0
    moments = known(x_NC)
    plain = encoded(None, weight_RC, bits, moments)
    for level in HERE:
        fast = encoded(level, weight_RC, bits, moments)
        assert bool(fast.dense().isfinite().all())
        # One code that falls the other way is much of the loss of a few rows.
        most = 1.1 if rows > 20 else 2
        assert loss(fast, weight_RC, moments) <= most * loss(plain, weight_RC, moments) + 1e-9


@levels
@pytest.mark.parametrize("bits", BITS)
def test_rows_of_equal_or_huge_weights(level: Level, bits: int) -> None:
    moments = known(inputs(300, 100))
    weight_RC = torch.tensor([[0.0], [0.25], [-7.0], [65504.0], [1e-7]]).repeat(1, 100)
    weight_RC[3, ::2] *= -1
    plain, fast = (encoded(one, weight_RC, bits, moments) for one in (None, level))
    assert bool(fast.dense().isfinite().all())
    assert torch.allclose(fast.dense(), plain.dense(), rtol=1e-2)


@levels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_all_dtypes_and_strides_are_read(level: Level, dtype: torch.dtype) -> None:
    weight_RC, moments = weights(70, 150).to(dtype), known(inputs(300, 150))
    expected = encoded(level, weight_RC.float(), 3, moments)
    for way in (weight_RC, weight_RC.T.contiguous().T):
        assert other_rows(encoded(level, way, 3, moments), expected) == 0


@levels
@pytest.mark.parametrize("bits", [3, 8])
def test_wide_matrix_is_encoded_in_parts(
    level: Level, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moefit.quant.moments.MAX_COLUMNS", 128)
    weight_RC, moments = weights(40, 300), known(inputs(400, 300))
    assert [one.cols for one in moments] == [128, 128, 44]
    plain, fast = (encoded(one, weight_RC, bits, moments) for one in (None, level))
    assert other_rows(plain, fast) <= 2


@levels
def test_result_does_not_depend_on_threads_or_batch(level: Level) -> None:
    """Rows do not depend on each other."""
    weight_RC, moments, before = weights(600, 200), known(inputs(400, 200)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = encoded(level, weight_RC, 3, moments)
        torch.set_num_threads(3)
        assert other_rows(encoded(level, weight_RC, 3, moments), one) == 0
    finally:
        torch.set_num_threads(before)
    part = one.take(torch.arange(77, 377))
    assert other_rows(encoded(level, weight_RC[77:377], 3, moments), part) == 0


@levels
def test_agreement_needs_correct_kernel(level: Level) -> None:
    """Bytes differ without sweeps or with other inputs, so the tests above detect errors."""
    weight_RC, moments = weights(64, 150), known(inputs(300, 150))
    made = encoded(level, weight_RC, 3, moments)
    assert other_rows(encoded(level, weight_RC, 3, moments, 0), made) > 60
    assert other_rows(encoded(level, weight_RC, 3, known(inputs(300, 150, 1))), made) > 60


def test_without_compiler_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFIT_KERNELS", "torch")
    kernels.cache_clear()
    try:
        weight_RC, moments = weights(20, 100), known(inputs(300, 100))
        made = GroupedMatrix.empty(20, 100, 3)
        encode_gptq(made, weight_RC, moments)
        assert other_rows(made, encoded(None, weight_RC, 3, moments)) <= 1
    finally:
        monkeypatch.undo()
        kernels.cache_clear()
