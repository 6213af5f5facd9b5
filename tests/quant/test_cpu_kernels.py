"""Every level of the compiled kernels compared with torch, within derived bounds.

Weights are those of `GroupedMatrix.dense`. A product has the error of float32 sums; with grouped
integers also that of activations in steps of 2^-15 of the largest of 64, or of 2^-8 for weights of
up to 4 bits.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import (
    HERE,
    MACHINE,
    assert_equal_with_fused_multiply_add,
    at,
    awkward,
    compiled,
    largest_integer,
    levels,
    normal,
)
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import ConfigError
from moefit.moe.layouts import ACTIVATIONS
from moefit.moe.routing import plain_weighted_sum
from moefit.quant import cpu_kernels as module
from moefit.quant import library
from moefit.quant.cpu_kernels import KernelMlp, Weight, kernels, status
from moefit.quant.encode import encode
from moefit.quant.grouped_int import GROUP, PLANES, GroupedMatrix, groups_of
from moefit.quant.library import LEVELS, SWITCH, available_levels, level_note

torch.set_num_threads(1)
widths = pytest.mark.parametrize("bits", PLANES)
NATIVE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = tuple(NATIVE.values())
KINDS = [*NATIVE, *PLANES]


@pytest.fixture
def fresh():
    """Clear caches before and after."""
    caches = module.kernels, library.library, available_levels
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


def weight_of(kind, rows: int, cols: int, *, seed: int = 0) -> Weight:
    value_RC = normal(rows, cols, seed=seed) / cols**0.5
    return value_RC.to(NATIVE[kind]) if kind in NATIVE else encode(value_RC, kind, "nearest")


def dense(weight: Weight) -> Tensor:
    """Return the product in float64."""
    return (weight if isinstance(weight, Tensor) else weight.dense()).double()


def rounded_inputs(x_TI: Tensor, bits: int) -> Tensor:
    """Return activations as the integers of products with weights of `bits` represent them."""
    cols = x_TI.shape[1]
    x_TGI = F.pad(x_TI, (0, groups_of(cols) * GROUP - cols)).unflatten(1, (-1, GROUP))
    most_TG1, top = x_TGI.abs().amax(-1, keepdim=True), largest_integer(bits)
    integers_TGI = (x_TGI * (top / most_TG1)).round()
    seen_TGI = torch.where(most_TG1 < 1e-30, 0, integers_TGI.double() * most_TG1.double() / top)
    return seen_TGI.flatten(1)[:, :cols]


def error_bound(weight: Weight, x_TI: Tensor, level: str) -> Tensor:
    """Return the error bound of float32 sums [T, O]."""
    if isinstance(weight, Tensor):
        terms_OI, grid_TI = weight.abs().double(), torch.zeros_like(x_TI)
    else:  # scale * code and minimum are summed apart, and may cancel
        _, meta_OMG = weight.by_row()
        scale_OG, least_OG = meta_OMG[:, 0].double(), meta_OMG[:, -1].double()
        top_OG = scale_OG * (2**weight.bits) + (0 if weight.bits == 8 else least_OG.abs())
        terms_OI = top_OG.repeat_interleave(GROUP, 1)[:, : weight.cols]
        padded_TGI = F.pad(x_TI, (0, groups_of(weight.cols) * GROUP - weight.cols))
        padded_TGI = padded_TGI.unflatten(1, (-1, GROUP))
        top = largest_integer(weight.bits)
        grid_TGI = (padded_TGI.abs().amax(-1, keepdim=True) / top / 2).expand(padded_TGI.shape)
        grid_TI = grid_TGI.flatten(1)[:, : weight.cols]
    summing = 2.0**-23 * (x_TI.shape[1] / 16 + 16)
    sums_TO = x_TI.abs().double() @ terms_OI.T * summing
    return sums_TO + 1.01 * grid_TI.double() @ dense(weight).abs().T + 1e-30


def assert_product(y_TO: Tensor, x_TI: Tensor, weight: Weight, level: str) -> None:
    assert y_TO.dtype == torch.float32
    error_TO = (y_TO.double() - x_TI.double() @ dense(weight).T).abs()
    assert (error_TO <= error_bound(weight, x_TI, level)).all()


# One product


@levels
@pytest.mark.parametrize("kind", KINDS)
def test_product_equals_dense_matrix(level: str, kind) -> None:
    for rows, cols in ((1, 1), (3, 63), (33, 64), (3, 65), (33, 200), (5, 1088)):
        weight = weight_of(kind, rows, cols)
        for tokens in (0, 1, 2, 3, 4, 5, 9):
            x_TI = normal(tokens, cols, seed=tokens)
            assert_product(at(level).linear(x_TI, weight), x_TI, weight, level)


@compiled
@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([*PLANES]),
    rows=st.integers(1, 40),
    cols=st.integers(1, 300),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_products_equal_those_of_rounded_activations(bits, rows, cols, tokens, seed: int) -> None:
    """But for float32 sums, and activations that fall half way between two integers."""
    weight = weight_of(bits, rows, cols, seed=seed)
    x_TI = normal(tokens, cols, seed=seed + 1)
    wanted_TO = rounded_inputs(x_TI, bits) @ dense(weight).T
    size_TO = x_TI.abs().double() @ (dense(weight).abs() + 1).T
    for level in HERE:
        off_TO = (at(level).linear(x_TI, weight).double() - wanted_TO).abs()
        assert (off_TO <= 2.0**-16 * size_TO).float().mean() > 0.97, level


@compiled
@settings(deadline=None, max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    tokens=st.integers(1, 6),
    size=st.sampled_from([-20, -6, 0, 6, 20]),
    seed=st.integers(0, 2**31),
)
def test_products_of_any_shape(kind, rows, cols, tokens, size, seed: int) -> None:
    weight = weight_of(kind, rows, cols, seed=seed)
    x_TI = normal(tokens, cols, seed=seed + 1) * 10.0**size
    for level in HERE:
        assert_product(at(level).linear(x_TI, weight), x_TI, weight, level)


@levels
@pytest.mark.parametrize("kind", KINDS)
def test_token_result_does_not_depend_on_batch(level: str, kind) -> None:
    """Decoding and prompts of any length agree bitwise."""
    weight, run = weight_of(kind, 37, 200), at(level)
    for dtype in DTYPES:
        x_TI = normal(70, 200).to(dtype)
        alone_TO = torch.cat([run.linear(x_TI[t : t + 1], weight, dtype) for t in range(70)])
        for count in (2, 3, 5, 8, 15, 16, 17, 21, 22, 33, 48, 70):
            together_TO = run.linear(x_TI[:count], weight, dtype)
            assert torch.equal(together_TO, alone_TO[:count]), (dtype, count)


@levels
@pytest.mark.parametrize("kind", [8, 3, *NATIVE])
def test_many_tokens_and_columns_agree_with_single_ones(level: str, kind) -> None:
    """More columns than are converted at once, and more tokens than are summed at once."""
    weight, run, x_TI = weight_of(kind, 29, 1100), at(level), normal(290, 1100)
    together_TO = run.linear(x_TI, weight)
    for t in (0, 15, 16, 255, 256, 271, 272, 287, 288, 289):
        assert torch.equal(run.linear(x_TI[t : t + 1], weight)[0], together_TO[t]), t
    assert_product(together_TO, x_TI, weight, level)


@levels
@widths
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_largest_codes_and_activations_do_not_overflow(level: str, bits: int, tokens: int) -> None:
    """All products of a group have one sign and the largest size."""
    for byte in (0, 255):
        weight = GroupedMatrix.empty(16, 128, bits)
        weight.codes_RB.fill_(byte)
        weight.meta_RMG.fill_(0.25)
        for value in (1.0, -1.0):
            x_TI = torch.full((tokens, 128), value)
            assert_product(at(level).linear(x_TI, weight), x_TI, weight, level)
            x_TI[:, ::3] *= 0.9921  # low parts of the largest size
            assert_product(at(level).linear(x_TI, weight), x_TI, weight, level)


@compiled
@widths
@pytest.mark.parametrize("tokens", [1, 3, 22, 40])
def test_integer_products_are_equal_at_all_levels_with_fused_multiply_add(
    bits: int, tokens: int
) -> None:
    for rows, cols in ((50, 200), (3, 64), (16, 1)):
        weight, x_TI = weight_of(bits, rows, cols), awkward(tokens, cols)
        for dtype in DTYPES:
            some_TI = x_TI.to(dtype)
            assert_equal_with_fused_multiply_add(
                lambda at, x=some_TI, w=weight, to=dtype: at.linear(x, w, to)
            )


@levels
@pytest.mark.parametrize("kind", [4, "bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_bias_is_added_before_rounding(level: str, kind, tokens: int) -> None:
    weight, bias_O = weight_of(kind, 50, 100), normal(50, seed=3)
    x_TI = normal(tokens, 100).bfloat16()
    if kind == "float32":
        x_TI = x_TI.float()
    exact_TO = at(level).linear(x_TI, weight, torch.float32) + bias_O
    y_TO = at(level).linear(x_TI, weight, x_TI.dtype, bias_O)
    torch.testing.assert_close(y_TO, exact_TO.to(x_TI.dtype), rtol=2**-8, atol=1e-3)
    assert (y_TO == exact_TO.to(x_TI.dtype)).float().mean() > 0.9  # rounded once


@levels
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_outliers_affect_only_their_group(level: str, bits: int) -> None:
    """With values of 10^4 and 10^-3, other groups keep their precision."""
    weight = weight_of(bits, 48, 192)
    x_TI = normal(3, 192) * 1e-3
    quiet_TO = at(level).linear(x_TI, weight)
    x_TI[1, 70] = 1e4
    y_TO = at(level).linear(x_TI, weight)
    assert_product(y_TO, x_TI, weight, level)
    assert torch.equal(y_TO[::2], quiet_TO[::2])
    expected_TO = x_TI.double() @ dense(weight).T
    step = 1.2 / largest_integer(bits) / 2 + 2e-4
    assert (y_TO - expected_TO)[1].abs().max() < step * expected_TO[1].abs().max()


@levels
@pytest.mark.parametrize("kind", KINDS)
def test_nan_affects_only_its_token(level: str, kind) -> None:
    weight = weight_of(kind, 40, 150)
    for bad, col in ((torch.nan, 3), (torch.inf, 149), (-torch.inf, 64)):
        x_TI = normal(5, 150)
        x_TI[2, col] = bad
        y_TO = at(level).linear(x_TI, weight)
        assert not y_TO[2].isfinite().any()
        assert y_TO[[0, 1, 3, 4]].isfinite().all()


@levels
@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("cols", [1, 37, 64, 75])
def test_nan_weights_affect_only_their_row(level: str, kind, cols: int) -> None:
    """Vectors that are wider than what is left of a row read nothing of the next."""
    weight_RC = weight_of(kind, 9, cols)
    assert isinstance(weight_RC, Tensor)
    weight_RC[5] = torch.nan
    for dtype in DTYPES:
        y_TR = at(level).linear(normal(7, cols).to(dtype), weight_RC, dtype)
        assert y_TR[:, 5].isnan().all()
        assert y_TR[:, [0, 1, 2, 3, 4, 6, 7, 8]].isfinite().all()


@levels
@widths
def test_tiny_activations_give_tiny_results(level: str, bits: int) -> None:
    """The reciprocal of their scale is not finite."""
    weight = weight_of(bits, 8, 100)
    for size in (1e-29, 1e-33, 1e-38, 1e-45, 0.0):
        y_TO = at(level).linear(torch.full((2, 100), size), weight)
        assert (y_TO.abs() <= size * 100 * 2).all()


@levels
def test_unsupported_widths_are_not_read(level: str) -> None:
    with pytest.raises(AssertionError):
        at(level).linear(normal(2, 65), weight_of(4, 8, 64))


# Decoding


@levels
@widths
def test_decoding_equals_torch_bitwise(level: str, bits: int) -> None:
    for rows, cols in ((1, 1), (3, 65), (300, 130)):
        weight = weight_of(bits, rows, cols)
        assert isinstance(weight, GroupedMatrix)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            decoded = at(level).decode(weight, dtype)
            assert decoded.dtype == dtype and torch.equal(decoded, weight.dense(dtype))


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float16_scales_equal_torch(level: str, dtype: torch.dtype) -> None:
    """Includes subnormal, infinite and NaN scales and minima."""
    half_R = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    for bits, code in ((8, 129), (4, 0)):
        rows = GroupedMatrix.empty(len(half_R), 1, bits)
        rows.codes_RB.fill_(code)
        rows.meta_RMG.fill_(0)
        rows.meta_RMG[:, -1, 0] = half_R
        matrix = GroupedMatrix.from_rows(bits, 1, rows.codes_RB, rows.meta_RMG)
        decoded = at(level).decode(matrix, dtype)
        torch.testing.assert_close(decoded, matrix.dense(dtype), rtol=0, atol=0, equal_nan=True)


# Experts


def make_mlp(
    kind_in, kind_out, *, width=72, inner=40, activation="silu", gated=True, seed=0
) -> KernelMlp:
    w_in = weight_of(kind_in, inner * (1 + gated), width, seed=seed)
    w_out = weight_of(kind_out, width, inner, seed=seed + 1)
    return KernelMlp(w_in=w_in, w_out=w_out, activation=activation, gated=gated)


def expected(x_RD: Tensor, mlp: KernelMlp, level: str) -> tuple[Tensor, Tensor]:
    """Return the result in float64, and the error bound of both products."""
    act = ACTIVATIONS[mlp.activation]
    in_RI, off_RI = x_RD.double() @ dense(mlp.w_in).T, error_bound(mlp.w_in, x_RD, level)
    first = in_RI.shape[1] // (1 + mlp.gated)
    gate_RF, off_RF = in_RI[:, :first], off_RI[:, :first]
    # How steep the activation may be; float32 computes it from x and numbers near 1.
    steep_RF = 2 * (gate_RF.abs() + off_RF) if mlp.activation == "relu2" else torch.tensor(1.2)
    h_RF, off_RF = act(gate_RF), steep_RF * (off_RF + 2.0**-21 * gate_RF.abs())
    if mlp.gated:
        up_RF, up_off_RF = in_RI[:, first:], off_RI[:, first:]
        h_RF, off_RF = h_RF * up_RF, (h_RF.abs() + off_RF) * up_off_RF + off_RF * up_RF.abs()
    most_RF = h_RF.abs() + off_RF
    off_RD = off_RF @ dense(mlp.w_out).abs().T + error_bound(mlp.w_out, most_RF, level)
    return h_RF @ dense(mlp.w_out).T, off_RD


def assert_experts(
    level: str, x_TD: Tensor, mlps: list[KernelMlp], tokens: list[list[int]]
) -> None:
    y_RD = at(level).experts(x_TD, mlps, tokens)
    parts = [expected(x_TD[mine], mlp, level) for mlp, mine in zip(mlps, tokens, strict=True)]
    wanted_RD, bound_RD = (torch.cat(part) for part in zip(*parts, strict=True))
    assert y_RD.dtype == torch.float32
    assert y_RD.shape == wanted_RD.shape
    assert ((y_RD.double() - wanted_RD).abs() <= bound_RD).all()


ROUTED = [
    [[0]],
    [[0, 1, 2, 3, 4]],
    [[2, 2]],  # one token that chose the same expert twice
    [[], [0], [], [4, 1, 4], []],  # without rows: first, between and last
    [[3, 0], [1], [2, 2, 2, 0, 1, 4, 3]],
]


@levels
@pytest.mark.parametrize("tokens", ROUTED)
def test_experts_of_mixed_formats_in_one_call(level: str, tokens: list[list[int]]) -> None:
    kinds = [4, "bfloat16", 8, 2, "float32", 5, 3, 6, "float16"]
    mlps = [make_mlp(kinds[e], kinds[-1 - e], seed=e) for e in range(len(tokens))]
    assert_experts(level, normal(5, 72), mlps, tokens)


@levels
@pytest.mark.parametrize("activation", [one for one in module.ACTIVATIONS if one in ACTIVATIONS])
@pytest.mark.parametrize("gated", [False, True])
def test_activations_equal_torch(level: str, activation: str, gated: bool) -> None:
    x_TD = normal(5, 72) * torch.tensor([0.01, 0.3, 1.0, 10.0, 300.0])[:, None]
    mlp = make_mlp("float32", 8, activation=activation, gated=gated)
    assert_experts(level, x_TD, [mlp], [[0, 1, 2, 3, 4]])


@compiled
@settings(deadline=None, max_examples=60)
@given(
    kinds=st.lists(st.tuples(*[st.sampled_from(KINDS)] * 2), min_size=1, max_size=4),
    width=st.integers(1, 150),
    inner=st.integers(1, 140),
    gated=st.booleans(),
    data=st.data(),
)
def test_experts_of_any_shape(kinds, width: int, inner: int, gated: bool, data) -> None:
    mlps = [
        make_mlp(*pair, width=width, inner=inner, gated=gated, activation="relu", seed=n)
        for n, pair in enumerate(kinds)
    ]
    rows = st.lists(st.integers(0, 3), max_size=7)
    tokens = [data.draw(rows) for _ in mlps]
    for level in HERE:
        assert_experts(level, normal(4, width), mlps, tokens)


@levels
def test_no_routed_tokens_give_zero(level: str) -> None:
    assert at(level).experts(normal(3, 72), [], []).shape == (0, 72)
    assert at(level).experts(normal(3, 72), [make_mlp(4, 4)] * 2, [[], []]).shape == (0, 72)
    assert at(level).experts(normal(0, 72), [make_mlp(4, 4)], [[]]).shape == (0, 72)


@levels
@pytest.mark.parametrize("activation", module.ACTIVATIONS)
def test_nan_passes_through_experts(level: str, activation: str) -> None:
    x_TD = normal(3, 72)
    x_TD[1, 5] = torch.nan
    for kind in (4, "float32"):
        mlp = make_mlp(kind, kind, activation=activation)
        y_RD = at(level).experts(x_TD, [mlp], [[0, 1, 2]])
        assert y_RD[1].isnan().all() and y_RD[::2].isfinite().all()


@levels
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(8, torch.bfloat16), (3, torch.bfloat16), ("bfloat16", torch.bfloat16),
     ("float16", torch.float16)],
)  # fmt: skip
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_rounding_equals_torch(level: str, kind, dtype: torch.dtype, activation: str) -> None:
    x_TD, act = normal(6, 72).to(dtype), {"silu": F.silu, "gelu": F.gelu}[activation]
    mlp = make_mlp(kind, kind, activation=activation)
    y_RD = at(level).experts(x_TD, [mlp], [[*range(6)]])
    w_in, w_out = (dense(w).float() for w in (mlp.w_in, mlp.w_out))
    gate_RF, up_RF = F.linear(x_TD.float(), w_in).to(dtype).chunk(2, dim=-1)
    wanted_RD = F.linear((act(gate_RF) * up_RF).float(), w_out)
    # A hidden unit on the border of two numbers may fall either way: half a step of few.
    # Activations of 8 bits are coarser than bfloat16.
    difference_RD, most = (y_RD - wanted_RD).abs(), 16 if kind == 3 else 1
    half_step = torch.finfo(dtype).eps / 4
    assert difference_RD.max() <= most * half_step * wanted_RD.abs().max()
    assert difference_RD.median() <= most * half_step / 8 * wanted_RD.abs().max()


@levels
def test_experts_write_only_their_rows(level: str) -> None:
    mlps = [make_mlp(4, 8, seed=0), make_mlp("float32", 3, seed=1)]
    for x_1D in (normal(1, 72), normal(1, 72).bfloat16(), normal(1, 72).half()):
        y_KD = torch.full((4, 72), 7.0)
        at(level).one_token(x_1D, mlps, [3, 1], y_KD)
        wanted_ND = at(level).experts(x_1D, mlps, [[0], [0]])
        assert torch.equal(y_KD[[3, 1]], wanted_ND)
        assert (y_KD[[0, 2]] == 7).all()


@levels
def test_token_is_the_weighted_sum_of_its_experts(level: str) -> None:
    first, second = make_mlp(4, 8, seed=0), make_mlp("float32", 3, seed=1)
    for x_dtype in (torch.float32, torch.bfloat16, torch.float16):
        x_1D = normal(1, 72).to(x_dtype)
        for weights_dtype in (torch.float32, x_dtype):
            for mlps in ([first], [first, second, first]):  # an expert may be chosen twice
                weights_1K = normal(1, len(mlps), seed=5).to(weights_dtype)
                y_KD = torch.empty(len(mlps), 72)
                at(level).one_token(x_1D, mlps, range(len(mlps)), y_KD)
                wanted = at(level).weighted_sum(y_KD, weights_1K, x_dtype, energy=True)
                found = at(level).token(x_1D, mlps, weights_1K, energy=True)
                assert found[0].dtype == x_dtype and torch.equal(found[0], wanted[0])
                assert found[1] is not None and wanted[1] is not None
                assert torch.equal(found[1], wanted[1])
                assert at(level).token(x_1D, mlps, weights_1K)[1] is None


@levels
@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_product_has_requested_dtype(level: str, tokens: int) -> None:
    weight = weight_of(5, 75, 150)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x_TI = normal(tokens, 150).to(dtype)
        wanted_TO = at(level).linear(x_TI.float(), weight).to(dtype)
        assert torch.equal(at(level).linear(x_TI, weight, dtype), wanted_TO)


@compiled
@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 70), st.sampled_from(DTYPES),
       st.sampled_from(DTYPES), st.integers(0, 9))  # fmt: skip
def test_weighted_sum_equals_plain_sum_bitwise(
    tokens, k, width, dtype, weights_dtype, seed: int
) -> None:
    y_RD = normal(tokens * k, width, seed=seed)
    y_RD = y_RD.to(dtype) if seed % 2 else y_RD
    weights_TK = normal(tokens, k, seed=seed + 1).to(weights_dtype)
    wanted_TD, wanted_energy_R = plain_weighted_sum(y_RD, weights_TK, dtype, energy=True)
    assert wanted_energy_R is not None
    for level in HERE:
        made_TD, energy_R = at(level).weighted_sum(y_RD, weights_TK, dtype, energy=True)
        assert made_TD.dtype == dtype
        assert torch.equal(made_TD, wanted_TD)
        assert energy_R is not None
        torch.testing.assert_close(energy_R, wanted_energy_R)
        assert at(level).weighted_sum(y_RD, weights_TK, dtype)[1] is None
    loop_TD = (y_RD.to(dtype) * weights_TK.reshape(-1, 1)).view(tokens, k, width).sum(1).to(dtype)
    torch.testing.assert_close(wanted_TD, loop_TD)


@levels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_propagates_through_weighted_sum(level: str, dtype: torch.dtype) -> None:
    y_KD = torch.tensor([[float("nan"), float("inf"), 1.0], [1.0, 1.0, 1.0]])
    made_TD, _ = at(level).weighted_sum(y_KD, torch.ones(1, 2), dtype)
    assert made_TD.isnan().tolist() == [[True, False, False]]
    assert made_TD.isinf().tolist() == [[False, True, False]]


@levels
def test_all_float16_numbers_are_converted_as_by_torch(level: str) -> None:
    """And what lies between: ties, subnormal numbers, and what is too large, which is infinite."""
    one_11 = torch.ones(1, 1)
    half_1D = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)[None]
    wide_1D, _ = at(level).weighted_sum(half_1D, one_11, torch.float32)
    torch.testing.assert_close(wide_1D, half_1D.float(), rtol=0, atol=0, equal_nan=True)
    finite_D = half_1D[half_1D.isfinite()].float().sort().values
    between_D = (finite_D[1:] + finite_D[:-1]) / 2
    above_D, below_D = (between_D * (1 + sign * 2.0**-23) for sign in (1, -1))
    edges_D = torch.tensor([65519.996, 65520.0, 1e30, -65519.996, -65520.0, -1e30, 2e-8, 3e-8])
    x_1D = torch.cat([finite_D, between_D, above_D, below_D, edges_D, half_1D[0, -2048:].float()])
    made_1D, _ = at(level).weighted_sum(x_1D[None], one_11, torch.float16)
    torch.testing.assert_close(made_1D[0], x_1D.half(), rtol=0, atol=0, equal_nan=True)
    assert made_1D.isinf().sum() >= 4
    portable_1D, _ = at("portable").weighted_sum(x_1D[None], one_11, torch.float16)
    assert torch.equal(made_1D.view(torch.int16), portable_1D.view(torch.int16)), "NaN included"


@levels
def test_products_beyond_float16_are_infinite(level: str) -> None:
    x_TI = torch.full((3, 70), 300.0).half()
    for kind in (8, "float16"):
        weight = weight_of(kind, 5, 70)
        weight = weight if isinstance(weight, GroupedMatrix) else weight.abs() + 10
        y_TO = at(level).linear(x_TI, weight, torch.float16)
        wide_TO = at(level).linear(x_TI.float(), weight)
        assert torch.equal(y_TO, wide_TO.half())
        assert kind == 8 or y_TO.isinf().all()


@levels
@pytest.mark.parametrize("kind", [8, 4, 3, "bfloat16"])
def test_results_do_not_depend_on_the_number_of_threads(level: str, kind) -> None:
    mlps = [make_mlp(kind, kind, width=200, inner=150, seed=e) for e in range(3)]
    x_TD, tokens = normal(7, 200), [[0, 1, 2, 3, 4, 5, 6], [], [3, 3]]
    made = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            run = at(level)
            matrix = weight_of(4, 90, 200)
            assert isinstance(matrix, GroupedMatrix)
            decoded = run.decode(matrix, torch.bfloat16).float()
            made.append((run.experts(x_TD, mlps, tokens), run.linear(x_TD, matrix), decoded))
    finally:
        torch.set_num_threads(1)
    for other in made[1:]:
        assert all(torch.equal(one, two) for one, two in zip(made[0], other, strict=True))


@levels
@pytest.mark.parametrize("kind", [4, "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_of_few_rows_of_many_tokens(level: str, kind, dtype: torch.dtype) -> None:
    mlps = [make_mlp(kind, kind, width=100, inner=70, seed=e) for e in range(3)]
    x_TD, tokens = normal(90, 100).to(dtype), [[89, 2, 2], [], [17]]
    made_RD = at(level).experts(x_TD, mlps, tokens)
    for row, (expert, token) in enumerate(((0, 89), (0, 2), (0, 2), (2, 17))):
        alone_1D = torch.empty(1, 100)
        at(level).one_token(x_TD[token : token + 1], [mlps[expert]], [0], alone_1D)
        assert torch.equal(made_RD[row], alone_1D[0])


@compiled
def test_kernels_called_from_several_threads_and_after_a_fork() -> None:
    """One call has the pool, the others compute alone; a forked process makes a pool of its own."""
    weight, x_TI, run = weight_of(4, 300, 200), normal(20, 200), at(HERE[-1])
    wanted_TO = run.linear(x_TI, weight)
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(run.linear, x_TI, weight) for _ in range(200)]
            assert all(torch.equal(one.result(), wanted_TO) for one in futures)
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(run.linear(x_TI, weight), wanted_TO) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)


WITHOUT_THREADS = """
import ctypes, torch
from moefit.quant.cpu_kernels import kernels

run, weight_OI, x_TI = kernels(), torch.randn(300, 200), torch.randn(20, 200)
wanted_TO = run.linear(x_TI, weight_OI)
libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(256)
libc.pthread_attr_init(attributes)
libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(1 << 47))  # which no process can map
assert libc.pthread_setattr_default_np(attributes) == 0
torch.set_num_threads(3)
assert torch.equal(run.linear(x_TI, weight_OI), wanted_TO)
"""


@compiled
def test_kernels_compute_where_the_system_allows_no_more_threads() -> None:
    command = [sys.executable, "-c", WITHOUT_THREADS]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# Which there are


@compiled
def test_best_available_level_is_used(monkeypatch, fresh) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    assert status() == MACHINE[-1]
    for number, level in enumerate(LEVELS):
        module.kernels.cache_clear()
        monkeypatch.setenv(SWITCH, level)
        assert status() == [one for one in MACHINE if LEVELS.index(one) <= number][-1]
    monkeypatch.setenv(SWITCH, "torch")
    module.kernels.cache_clear()
    assert kernels() is None and status() == "torch: MOEFIT_KERNELS=torch"


@compiled
@pytest.mark.parametrize(
    ("asked", "has", "used"),
    [
        ("amx", ("portable", "avx2"), "avx2"),  # a container that moved to another machine
        ("avx2_vnni", ("portable", "avx2", "avx512"), "avx2"),  # AVX-512 without AVX-VNNI
    ],
)
def test_level_that_the_processor_lacks_is_named(monkeypatch, fresh, caplog, asked, has, used):
    monkeypatch.setenv(SWITCH, asked)
    monkeypatch.setattr(module, "available_levels", lambda: has)
    monkeypatch.setattr(library, "available_levels", lambda: has)
    assert kernels() is kernels() and status() == used
    (said,) = caplog.records  # once
    assert said.levelname == "WARNING" and level_note() in said.getMessage()
    for part in (f"{SWITCH}={asked}", f"has {', '.join(has)} alone", f"set {SWITCH}={used}"):
        assert part in level_note()


@compiled
@pytest.mark.parametrize("asked", ["torch", "portable", None])
def test_level_that_the_processor_has_is_used_silently(monkeypatch, fresh, caplog, asked):
    if asked is None:
        monkeypatch.delenv(SWITCH, raising=False)
    else:
        monkeypatch.setenv(SWITCH, asked)
    kernels()
    assert not level_note() and not caplog.records


def test_unknown_level_raises(monkeypatch, fresh) -> None:
    monkeypatch.setenv(SWITCH, "avx")
    with pytest.raises(ConfigError, match="='avx' is none of portable, avx2, avx2_vnni"):
        kernels()


def test_missing_library_uses_torch_and_warns(monkeypatch, fresh, tmp_path) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    (tmp_path / "_kernels.of-another-system.so").write_bytes(b"not a library")
    assert kernels() is None and status() == "torch: not compiled"
