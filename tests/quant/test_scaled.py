"""Matrices of a checkpoint's own codes: their values, and kernels compared with torch.

A product has the error of activations in steps of 2^-15 of the largest of 64, and of float32 sums
of halves of groups, which may cancel.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import (
    HERE,
    assert_equal_with_fused_multiply_add,
    at,
    awkward,
    compiled,
    levels,
    normal,
)
from scaled_codes import CASES, SHAPES, random_codes, scaled, values
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moefit.checkpoint.formats.encoding import StoredCodes
from moefit.quant.backend import decoded
from moefit.quant.cpu_kernels import KernelMlp
from moefit.quant.grouped_int import rows_of
from moefit.quant.scaled import fill as module
from moefit.quant.scaled.fill import fill, fill_rows, meta_of
from moefit.quant.scaled.matrix import ScaledMatrix, kind_of, scaled_bytes

torch.set_num_threads(1)
cases = pytest.mark.parametrize("name", CASES)


def bound(x_TI: Tensor, weight_RC: Tensor) -> Tensor:
    """Return the error bound [T, O]."""
    padded_TC = torch.nn.functional.pad(x_TI.double(), (0, -x_TI.shape[1] % 64))
    step_TG = padded_TC.unflatten(1, (-1, 64)).abs().amax(-1) / 16256 / 2
    step_TC = step_TG.repeat_interleave(64, 1)[:, : x_TI.shape[1]]
    size_TO = (x_TI.double().abs() + step_TC) @ weight_RC.abs().T
    return step_TC @ weight_RC.abs().T * 1.01 + size_TO * 2.0**-23 * (x_TI.shape[1] / 32 + 4)


@cases
def test_values_are_those_of_the_formula(name: str) -> None:
    for rows, cols in SHAPES:
        stored = random_codes(name, rows, cols)
        matrix = ScaledMatrix.empty(rows, cols, CASES[name][0])
        fill(matrix, 0, stored)
        assert torch.equal(matrix.dense(), values(name, stored))
        assert torch.equal(decoded(matrix, torch.bfloat16), values(name, stored).bfloat16())
        held = matrix.codes_RB.nbytes, matrix.meta_RMG.nbytes
        assert held == scaled_bytes(rows, cols, matrix.stored)


@cases
def test_rows_filled_in_parts_equal_all_at_once(name: str) -> None:
    """As gate and up are, at any row; by the kernel and by its reference in torch."""
    stored = random_codes(name, 35, 128)
    whole, parts = scaled(name, 35, 128), ScaledMatrix.empty(35, 128, CASES[name][0])
    for first, last in ((19, 35), (0, 7), (7, 19)):
        zeros = None if stored.zeros_RG is None else stored.zeros_RG[first:last]
        some = StoredCodes(
            codes_RB=stored.codes_RB[first:last],
            scales_RG=stored.scales_RG[first:last],
            group=stored.group,
            zeros_RG=zeros,
            signed=stored.signed,
        )
        codes_RB = some.codes_RB ^ 128 if some.signed else some.codes_RB
        fill(parts, first, some)
        again = ScaledMatrix.empty(35, 128, CASES[name][0])
        again.codes_RB.copy_(parts.codes_RB)
        again.meta_RMG.copy_(parts.meta_RMG)
        fill_rows(again, first, codes_RB, meta_of(again, some))
        assert torch.equal(again.codes_RB, parts.codes_RB)
        assert torch.equal(again.meta_RMG, parts.meta_RMG)
    assert torch.equal(parts.codes_RB, whole.codes_RB)
    assert torch.equal(parts.meta_RMG, whole.meta_RMG)


def test_torch_fills_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scaled("mxfp4", 20, 96)
    monkeypatch.setattr(module, "kernels", lambda: None)
    found = scaled("mxfp4", 20, 96)
    for one, other in zip(
        rows_of(found.codes_RB, found.meta_RMG),
        rows_of(expected.codes_RB, expected.meta_RMG),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_every_exponent_is_exact() -> None:
    """2^-127, which is a subnormal number, to 2^127; 255 is not a number and never stored."""
    stored = StoredCodes(
        codes_RB=torch.full((255, 16), 0x72, dtype=torch.uint8),  # 1, 6, 1, 6, ...
        scales_RG=torch.arange(255, dtype=torch.uint8)[:, None],
        group=32,
    )
    matrix = ScaledMatrix.empty(255, 32, CASES["mxfp4"][0])
    fill(matrix, 0, stored)
    one, six = decoded(matrix, torch.float32)[:, :2].double().T
    powers = (torch.arange(255).double() - 127).exp2()
    assert torch.equal(one, powers) and torch.equal(six[:-2], 6 * powers[:-2])


def test_formats_have_different_kinds() -> None:
    found = {kind_of(kind) for kind, _ in CASES.values()}
    assert len(found) == len({(k.codes, k.scales, k.group, k.zeros) for k, _ in CASES.values()})
    assert all(kind >= 64 for kind in found)


@levels
@cases
def test_products_equal_dense_matrices(level: str, name: str) -> None:
    for number, (rows, cols) in enumerate(SHAPES):
        matrix = scaled(name, rows, cols, seed=number)
        weight_RC = matrix.dense()
        assert torch.equal(at(level).decode(matrix, torch.float32), weight_RC)
        x_TI = normal(21, cols, seed=number)
        one_by_one = torch.cat([at(level).linear(x_1I, matrix) for x_1I in x_TI.split(1)])
        for tokens in (1, 2, 3, 5, 16, 21):
            y_TO = at(level).linear(x_TI[:tokens], matrix)
            assert torch.equal(y_TO, one_by_one[:tokens])
            error_TO = (y_TO.double() - x_TI[:tokens].double() @ weight_RC.double().T).abs()
            assert (error_TO <= bound(x_TI[:tokens], weight_RC.double())).all()


@compiled
@cases
def test_levels_give_equal_integers(name: str) -> None:
    """Results differ by the rounding of float32 sums alone, far less than a step of activations."""
    matrix, x_TI = scaled(name, 35, 384), normal(3, 384)
    first, *others = [at(level).linear(x_TI, matrix) for level in HERE]
    rounding = x_TI.double().abs() @ matrix.dense().double().abs().T * 2.0**-22
    assert all(((one - first).abs() <= rounding).all() for one in others)


@compiled
@cases
@pytest.mark.parametrize("tokens", [1, 3, 22, 40])
def test_levels_with_fused_multiply_add_give_equal_bits(name: str, tokens: int) -> None:
    matrix, x_TI = scaled(name, 35, 384), awkward(tokens, 384)
    assert_equal_with_fused_multiply_add(lambda at: at.linear(x_TI, matrix))


@compiled
@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from([*CASES]),
    level=st.sampled_from(HERE or ("portable",)),
    rows=st.integers(1, 70),
    groups=st.integers(1, 9),
    tokens=st.integers(1, 20),
    size=st.sampled_from([-20, 0, 20]),
    seed=st.integers(0, 2**31),
)
def test_products_of_any_shape(name, level, rows, groups, tokens, size, seed: int) -> None:
    matrix, x_TI = scaled(name, rows, 32 * groups, seed=seed), normal(tokens, 32 * groups)
    x_TI *= 2.0**size
    weight_RC = matrix.dense().double()
    error_TO = (at(level).linear(x_TI, matrix).double() - x_TI.double() @ weight_RC.T).abs()
    assert (error_TO <= bound(x_TI, weight_RC)).all()


@levels
@cases
def test_nan_affects_only_its_token(level: str, name: str) -> None:
    x_TI = normal(5, 160)
    x_TI[2, 159] = torch.nan
    fine_T = at(level).linear(x_TI, scaled(name, 40, 160)).isfinite().all(-1)
    assert fine_T.tolist() == [True, True, False, True, True]


@levels
@cases
def test_experts_equal_their_products(level: str, name: str) -> None:
    run, x_TD = at(level), normal(4, 96).bfloat16()
    mlp = KernelMlp(
        w_in=scaled(name, 128, 96), w_out=scaled(name, 96, 64), activation="silu", gated=True
    )
    h_TI = run.linear(x_TD, mlp.w_in).bfloat16().float()
    gate_TF, up_TF = h_TI.chunk(2, dim=-1)
    h_TF = (torch.nn.functional.silu(gate_TF).bfloat16().float() * up_TF).bfloat16()
    expected = run.linear(h_TF, mlp.w_out)
    found = run.experts(x_TD, [mlp], [range(4)])
    assert ((found - expected).abs() <= 2.0**-7 * expected.abs().amax()).all()


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clamped_experts_with_biases_equal_their_products(level: str, dtype: torch.dtype) -> None:
    """gpt-oss's: rounded after each operation, as transformers' module is."""
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_local_experts": 1}
    module, run, x_TD = GptOssExperts(GptOssConfig(**sizes)), at(level), normal(4, 96).to(dtype)
    biases = (8 * normal(1, 128)[0]).to(dtype), normal(1, 96)[0].to(dtype)  # beyond the clamp
    mlp = KernelMlp(
        w_in=scaled("mxfp4", 128, 96), w_out=scaled("mxfp4", 96, 64), activation="clamped",
        gated=True, biases=biases,
    )  # fmt: skip
    h_TF = module._apply_gate(run.linear(x_TD, mlp.w_in, dtype, biases[0].float()))
    expected = run.linear(h_TF, mlp.w_out, torch.float32, biases[1].float())
    found = run.experts(x_TD, [mlp], [range(4)])
    slack = max(torch.finfo(dtype).eps, 2.0**-14) * expected.abs().amax()
    assert ((found - expected).abs() <= slack).all()
    weight = torch.ones(1, 1, dtype=dtype)
    for x_D, y_D in zip(x_TD, found, strict=True):
        assert torch.equal(run.token(x_D[None], [mlp], weight)[0][0], y_D.to(dtype))
