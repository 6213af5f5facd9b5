"""The compiled encoder compared with torch: the same bytes, or errors as small."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import at_level, compiled, levels
from torch import Tensor

from moefit.quant import encode as encoders
from moefit.quant.cpu_kernels import kernels
from moefit.quant.encode import Encoder, encode
from moefit.quant.grouped_int import GROUP, PLANES, GroupedMatrix, unpack
from moefit.quant.library import LEVELS, Level

widths = pytest.mark.parametrize("bits", PLANES)
NARROW = pytest.mark.parametrize("bits", [bits for bits in PLANES if bits != 8])


def random(rows: int, cols: int, seed: int = 0, *, size: int = 0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    value_RC = torch.randn(rows, cols, generator=generator).pow(3) + offset
    return (value_RC * 10.0**size).clamp(-65504, 65504)


def encoded(level: Level | None, weight_RC: Tensor, bits: int, encoder: Encoder, moments_C=None):
    """Encode with the kernels of this level, or in torch."""
    way = (lambda: None) if level is None else (lambda: kernels(level))
    with mock.patch("moefit.quant.encode.kernels", way):
        return encode(weight_RC, bits, encoder, moments_C=moments_C)


def same(one: GroupedMatrix, other: GroupedMatrix) -> bool:
    return torch.equal(one.codes_RB, other.codes_RB) and torch.equal(
        one.meta_RMG.view(torch.int16), other.meta_RMG.view(torch.int16)
    )


weights = st.builds(
    random,
    rows=st.integers(1, 4),
    cols=st.sampled_from([1, 40, 64, 65, 200]),
    seed=st.integers(0, 2**31),
    size=st.integers(-9, 5),
    offset=st.sampled_from([0.0, 0.0, 3.0, -1000.0]),
)


@levels
@settings(deadline=None, max_examples=100)
@given(weight_RC=weights, bits=st.sampled_from(sorted(PLANES)))
def test_nearest_equals_torch_bitwise(level: Level, weight_RC: Tensor, bits: int) -> None:
    expected = encoded(None, weight_RC, bits, "nearest")
    assert same(encoded(level, weight_RC, bits, "nearest"), expected)


@pytest.mark.parametrize("level", [at_level(one) for one in LEVELS[1:]])
@settings(deadline=None, max_examples=100)
@given(weight_RC=weights, bits=st.sampled_from(sorted(PLANES)), weighted=st.booleans())
def test_all_levels_agree_bitwise(
    level: Level, weight_RC: Tensor, bits: int, weighted: bool
) -> None:
    moments_C = torch.rand(weight_RC.shape[1]) if weighted else None
    expected = encoded(LEVELS[0], weight_RC, bits, "fitted", moments_C)
    assert same(encoded(level, weight_RC, bits, "fitted", moments_C), expected)


@levels
@settings(deadline=None, max_examples=50)
@given(weight_RC=weights, bits=st.sampled_from(sorted(set(PLANES) - {8})))
def test_codes_are_nearest_for_their_scale(level: Level, weight_RC: Tensor, bits: int) -> None:
    """For the resulting scale and minimum, torch gives the same codes."""
    made, cols = encoded(level, weight_RC, bits, "fitted"), weight_RC.shape[1]
    codes_RB, meta_RMG = made.by_row()
    scale_RGI, least_RGI = (
        meta_RMG[:, one, :, None].float().expand(-1, -1, GROUP) for one in (0, 1)
    )
    scale_RC, least_RC = scale_RGI.flatten(1)[:, :cols], least_RGI.flatten(1)[:, :cols]
    expected_RC = encoders._nearest(weight_RC, scale_RC, least_RC, bits)
    codes_NG = unpack(codes_RB.reshape(-1, bits * 8), bits)
    assert torch.equal(codes_NG.view(len(weight_RC), -1)[:, :cols].float(), expected_RC)


@levels
@widths
@pytest.mark.parametrize("weighted", [False, True])
def test_fitted_error_equals_torch(level: Level, bits: int, weighted: bool) -> None:
    """Searches may differ by group; over a matrix the difference is below a thousandth."""
    weight_RC = random(128, 520)
    moments_C = torch.rand(520).pow(4) + 1e-3 if weighted else torch.ones(520)
    plain, fast = (
        (encoded(one, weight_RC, bits, "fitted", moments_C).dense() - weight_RC)
        .square()
        .mul(moments_C)
        .sum()
        for one in (None, level)
    )
    assert float(fast) == pytest.approx(float(plain), rel=1e-3)


@levels
@NARROW
def test_agreement_needs_correct_kernel(level: Level, bits: int) -> None:
    """Nearest and fitted bytes differ, so the tests above detect a wrong encoder."""
    weight_RC = random(16, 128)
    nearest, fitted = (encoded(level, weight_RC, bits, one) for one in ("nearest", "fitted"))
    assert not same(nearest, fitted)


@levels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cols", [64, 100])
def test_all_float_dtypes_are_read(level: Level, dtype: torch.dtype, cols: int) -> None:
    weight_RC = random(300, cols).to(dtype)
    weight_RC[0, :4] = torch.tensor([1e-7, -3e-5, 6e-8, 0], dtype=dtype)  # subnormal halves
    for way in (weight_RC, weight_RC.T.contiguous().T):
        made = encoded(level, way, 4, "nearest")
        assert same(made, encoded(None, weight_RC, 4, "nearest"))


@compiled
def test_result_does_not_depend_on_threads() -> None:
    weight_RC, before = random(70, 200), torch.get_num_threads()
    one = encode(weight_RC, 3)
    try:
        torch.set_num_threads(3)
        assert same(encode(weight_RC, 3), one)
    finally:
        torch.set_num_threads(before)


@levels
def test_first_unencodable_weight_is_found(level: Level) -> None:
    weight_RC, target = random(40, 130), GroupedMatrix.empty(40, 130, 4)
    run = kernels(level)
    assert run is not None
    assert run.encode(weight_RC, target, fitted=True) is None
    for place in ((39, 3), (17, 129), (17, 64)):
        weight_RC[place] = torch.nan
        assert run.encode(weight_RC, target, fitted=True) == place[0] * 130 + place[1]
    with mock.patch("moefit.quant.encode.kernels", lambda: run):
        assert encoders._encode(target, weight_RC, "fitted", None) == 17 * 130 + 64
