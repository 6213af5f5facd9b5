"""Encoding errors by format: bounds for any weights, and the gain of fitting."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import CheckpointError
from moefit.quant.cpu_kernels import kernels, status
from moefit.quant.encode import Encoder, encode
from moefit.quant.grouped_int import GROUP, PLANES, ROWS_AT_ONCE, groups_of

torch.set_num_threads(1)
BOTH: tuple[Encoder, ...] = ("nearest", "fitted")
widths = pytest.mark.parametrize("bits", PLANES)
encoders = pytest.mark.parametrize("encoder", BOTH)
HALF, SMALLEST_HALF = 2.0**-11, 2.0**-24  # float16's relative rounding; its least step


@pytest.fixture(autouse=True, scope="module", params=["torch", "kernels"])
def computing(request):
    """All tests run with kernels and with torch."""
    if request.param == "kernels" and kernels() is None:
        pytest.skip(f"no kernels: {status()}")
    way = (lambda: None) if request.param == "torch" else kernels
    with mock.patch("moefit.quant.encode.kernels", way):
        yield


def normal(rows: int, cols: int, *, seed: int = 0, tails: int | None = None) -> Tensor:
    """Return Gaussian weights, or Student's t with `freedom` degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    weight_RC = torch.randn(rows, cols, generator=generator)
    if tails is not None:
        chi_RC = torch.randn(tails, rows, cols, generator=generator).square().mean(0)
        weight_RC /= chi_RC.sqrt()
    return weight_RC


def in_groups(value_RC: Tensor) -> Tensor:
    """Return groups [R, G, 64]; the last is padded with its last value."""
    cols = value_RC.shape[1]
    padding = groups_of(cols) * GROUP - cols
    return F.pad(value_RC[None], (0, padding), mode="replicate")[0].unflatten(1, (-1, GROUP))


def squared_error(weight_RC: Tensor, bits: int, encoder: Encoder, **how) -> Tensor:
    return (encode(weight_RC, bits, encoder, **how).dense() - weight_RC).double().square()


weights = st.builds(
    lambda rows, cols, seed, tails, size, offset: (
        (normal(rows, cols, seed=seed, tails=tails) + offset) * 10.0**size
    ).clamp(-65504, 65504),
    rows=st.integers(1, 5),
    cols=st.sampled_from([1, 2, 40, 63, 64, 65, 128, 200]),
    seed=st.integers(0, 2**31),
    tails=st.sampled_from([None, 2, 4]),
    size=st.integers(-9, 5),
    offset=st.sampled_from([0.0, 0.0, 3.0, -1000.0]),
)


@settings(deadline=None, max_examples=150)
@given(weights, st.sampled_from(sorted(PLANES)))
def test_nearest_error_is_at_most_half_a_step(weight_RC: Tensor, bits: int) -> None:
    """Return half a step plus the float16 rounding of scale and minimum."""
    matrix = encode(weight_RC, bits, "nearest")
    group_RGI = in_groups(weight_RC.double())
    low_RG, high_RG = group_RGI.amin(-1), group_RGI.amax(-1)
    reach_RG = high_RG - low_RG
    if bits == 8:
        low_RG, reach_RG = torch.zeros_like(low_RG), group_RGI.abs().amax(-1)
    rounded_RG = HALF * (low_RG.abs() + reach_RG) + SMALLEST_HALF / 2
    scale_RG = matrix.by_row()[1][:, 0]
    bound_RG = scale_RG.double() / 2 + rounded_RG
    float32_RG = 2.0**-22 * group_RGI.abs().amax(-1)
    error_RGI = (in_groups(matrix.dense()).double() - group_RGI).abs()
    assert (error_RGI <= (bound_RG + float32_RG)[..., None]).all()
    # A step is not wider than it has to be.
    step_RG = reach_RG / (127 if bits == 8 else 2**bits - 1)
    assert (scale_RG <= step_RG * (1 + HALF) + SMALLEST_HALF).all()


@settings(deadline=None, max_examples=100)
@given(weights, st.sampled_from(sorted(PLANES)), st.booleans())
def test_fitted_is_never_worse_than_nearest(weight_RC: Tensor, bits: int, weighted: bool) -> None:
    """Return the minimised error by group."""
    cols = weight_RC.shape[1]
    generator = torch.Generator().manual_seed(cols)
    moments_C = torch.rand(cols, generator=generator).pow(4) + 1e-3 if weighted else None
    errors = [
        squared_error(weight_RC, bits, encoder, moments_C=moments_C)
        * (1 if moments_C is None else moments_C)
        for encoder in BOTH
    ]
    padding = groups_of(cols) * GROUP - cols
    nearest_RG, fitted_RG = (
        F.pad(e, (0, padding)).unflatten(1, (-1, GROUP)).sum(-1) for e in errors
    )
    # Beside float32's rounding of the weights, which no encoder sees.
    noise = cols * (2.0**-22 * float(weight_RC.abs().max())) ** 2
    assert (fitted_RG <= nearest_RG * (1 + 1e-4) + noise).all()


@pytest.mark.parametrize("tails", [None, 4])
@pytest.mark.parametrize(("bits", "share"), [(2, 0.6), (3, 0.8), (4, 0.9), (5, 0.95), (6, 1)])
def test_fitted_is_clearly_better_below_five_bits(bits: int, share: float, tails) -> None:
    weight_RC = normal(64, 512, tails=tails)
    nearest, fitted = (float(squared_error(weight_RC, bits, e).mean()) for e in BOTH)
    assert fitted < share * nearest


def test_more_bits_are_better() -> None:
    errors = [float(squared_error(normal(16, 512), bits, "fitted").mean()) for bits in PLANES]
    assert errors == sorted(errors, reverse=True)


@widths
@encoders
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e-7, -3e-5, 65504.0, -65504.0])
def test_group_of_equal_weights_is_exact(bits: int, encoder: Encoder, value: float) -> None:
    dense_RC = encode(torch.full((2, 100), value), bits, encoder).dense()
    assert dense_RC.unique().numel() == 1
    assert abs(float(dense_RC[0, 0]) - value) <= HALF * abs(value) + SMALLEST_HALF / 2


@widths
@encoders
@pytest.mark.parametrize("bound", [65504.0, 1e-7, 1e-38, 1e-45])
def test_extreme_weights_stay_finite(bits, encoder, bound: float) -> None:
    generator = torch.Generator().manual_seed(bits)
    uniform_RC = torch.rand(32, 128, generator=generator)
    for weight_RC in (uniform_RC, uniform_RC - 1, (uniform_RC - 0.5) * 2, uniform_RC.round()):
        weight_RC = weight_RC * bound
        dense_RC = encode(weight_RC, bits, encoder).dense()
        assert dense_RC.isfinite().all()
        reach = float(weight_RC.max() - weight_RC.min())
        assert (dense_RC - weight_RC).abs().max() <= reach * (0.5 if bits == 2 else 0.3) + 1e-7


@encoders
def test_tiny_weights_round_to_float16_scales(encoder: Encoder) -> None:
    """Unused units of trained models, for which int8 would equal dropping them."""
    weight_RC = normal(8, 256) * 1e-6
    for bits in (4, 6, 8):
        error = float((encode(weight_RC, bits, encoder).dense() - weight_RC).norm())
        assert error < 0.15 * float(weight_RC.norm())


@widths
@pytest.mark.parametrize("cols", [1, 30, 64, 65, 129])
@pytest.mark.parametrize("rows", [1, ROWS_AT_ONCE + 1])
def test_rows_and_groups_are_encoded_independently(bits: int, cols: int, rows: int) -> None:
    weight_RC = normal(rows, cols)
    whole = encode(weight_RC, bits).dense()
    assert torch.equal(encode(weight_RC[-1:], bits).dense(), whole[-1:])
    last = (groups_of(cols) - 1) * GROUP
    assert torch.equal(encode(weight_RC[:, last:], bits).dense(), whole[:, last:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [2, 8])
def test_any_dtype_and_stride(dtype: torch.dtype, bits: int) -> None:
    weight_RC = normal(70, 90).to(dtype)
    expected = encode(weight_RC.float(), bits).dense()
    assert torch.equal(encode(weight_RC, bits).dense(), expected)
    assert torch.equal(encode(weight_RC.T.contiguous().T, bits).dense(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_inputs_of_high_energy_count_more(bits: int) -> None:
    weight_RC = normal(32, 256)
    moments_C = torch.full((256,), 0.01)
    moments_C[::8] = 10.0
    even = squared_error(weight_RC, bits, "fitted")
    aware = squared_error(weight_RC, bits, "fitted", moments_C=moments_C)
    assert float(aware[:, ::8].sum()) < 0.8 * float(even[:, ::8].sum())
    assert float((aware * moments_C).sum()) < float((even * moments_C).sum())


def test_scaling_moments_has_no_effect() -> None:
    weight_RC = normal(4, 128)
    moments_C = torch.rand(128, generator=torch.Generator().manual_seed(0)) ** 4
    made = [encode(weight_RC, 3, moments_C=moments_C * scale) for scale in (1.0, 2.0**-60, 2.0**40)]
    assert all(torch.equal(one.dense(), made[0].dense()) for one in made)
    nothing = encode(weight_RC, 3, moments_C=torch.zeros(128))
    assert torch.equal(nothing.dense(), encode(weight_RC, 3).dense())


@widths
@encoders
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, float("nan")),
        (torch.bfloat16, float("nan")),
        (torch.float16, float("-inf")),
        (torch.float32, float("inf")),
        (torch.float32, 65505.0),
        (torch.bfloat16, 65536.0),
        (torch.float64, -1e300),
    ],
)
def test_unencodable_weights_raise(bits: int, encoder: Encoder, dtype, value: float) -> None:
    weight_RC = normal(ROWS_AT_ONCE + 9, 70).to(dtype)
    weight_RC[ROWS_AT_ONCE + 3, 65] = value
    with pytest.raises(
        CheckpointError, match=rf"output {ROWS_AT_ONCE + 3} for input 65 is .*finite"
    ):
        encode(weight_RC, bits, encoder)
