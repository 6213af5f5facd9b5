"""Matrices of llama.cpp's k-quants: their values, and kernels compared with torch.

A product has the error of activations in steps of 2^-15 of the largest of 64, and of float32 sums
of halves of groups, of codes times scales and of minima, which may cancel.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from k_quants import (
    BITS_A_WEIGHT,
    codes_of,
    held_as,
    k_matrix,
    of_blocks,
    parts_of,
    random_blocks,
)
from levels import (
    HERE,
    assert_equal_with_fused_multiply_add,
    at,
    awkward,
    compiled,
    levels,
    normal,
)
from torch import Tensor

from moefit.checkpoint.gguf.blocks import K_QUANTS, decode_blocks
from moefit.checkpoint.gguf.types import BY_NAME
from moefit.quant.backend import decoded
from moefit.quant.cpu_kernels import KernelMlp
from moefit.quant.grouped_int import rows_of
from moefit.quant.scaled import k_quants as module
from moefit.quant.scaled.k_quants import KQuantMatrix, fill_blocks

torch.set_num_threads(1)
types = pytest.mark.parametrize("type", K_QUANTS)
SHAPES = ((1, 256), (17, 512), (35, 768))


def sizes(type: str, blocks_RB: Tensor) -> Tensor:
    """Return |d * scale * (code - zero)| + |m * minimum| of each weight, [R, C]."""
    parts = parts_of(type, blocks_RB)
    each = 256 // parts.scales_nG.shape[1]
    scales_nV = parts.scales_nG.double().repeat_interleave(each, 1)
    size_nV = (parts.d_n1.double() * scales_nV * (parts.codes_nV.double() - parts.zero)).abs()
    if parts.minima_nG is not None and parts.m_n1 is not None:
        minima_nV = parts.minima_nG.double().repeat_interleave(each, 1)
        size_nV += (parts.m_n1.double() * minima_nV).abs()
    return size_nV.view(len(blocks_RB), -1)


def bound(x_TI: Tensor, weight_RC: Tensor, size_RC: Tensor) -> Tensor:
    """Return the error bound [T, O]."""
    step_TG = x_TI.double().unflatten(1, (-1, 64)).abs().amax(-1) / 16256 / 2
    step_TC = step_TG.repeat_interleave(64, 1)
    size_TO = (x_TI.double().abs() + step_TC) @ size_RC.T
    rounding = 2.0**-23 * (x_TI.shape[1] / 16 + 4)
    return step_TC @ weight_RC.abs().T * 1.01 + size_TO * rounding


@types
def test_values_are_those_of_the_blocks(type: str) -> None:
    for number, (rows, cols) in enumerate(SHAPES):
        blocks_RB = random_blocks(type, rows, cols, seed=number)
        matrix = of_blocks(type, blocks_RB)
        values = decode_blocks(type, blocks_RB.view(-1, BY_NAME[type].nbytes)).view(rows, cols)
        assert torch.equal(matrix.dense(), values)
        assert torch.equal(decoded(matrix, torch.bfloat16), values.bfloat16())
        size = matrix.codes_RB.nbytes + matrix.meta_RMG.nbytes
        assert size == blocks_RB.nbytes == rows * cols * BITS_A_WEIGHT[type] / 8
        assert 0.3 < float(values.std() / 0.02) < 3, "as in models"


@types
def test_values_equal_the_package(type: str) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf (moefit[gguf])")
    blocks_RB = torch.randint(0, 256, (40, BY_NAME[type].nbytes * 3), dtype=torch.uint8)
    with np.errstate(all="ignore"):  # some of the scales are not finite
        values = gguf.quants.dequantize(blocks_RB.numpy(), gguf.GGMLQuantizationType[type.upper()])
    fine = torch.from_numpy(values).isfinite().all(1)
    found = of_blocks(type, blocks_RB).dense()
    assert fine.sum() > 10 and torch.equal(found[fine], torch.from_numpy(values)[fine])


@types
def test_rows_filled_in_parts_equal_all_at_once(type: str) -> None:
    """As gate and up are, at any row; by the kernel and by its reference in torch."""
    blocks_RB = random_blocks(type, 35, 512)
    whole, parts = of_blocks(type, blocks_RB), KQuantMatrix.empty(35, 512, held_as(type))
    for first, last in ((19, 35), (0, 7), (7, 19)):
        some_RB = blocks_RB[first:last].contiguous()
        parts.fill(first, codes_of(some_RB))
        again = KQuantMatrix.empty(35, 512, held_as(type))
        again.codes_RB.copy_(parts.codes_RB)
        again.meta_RMG.copy_(parts.meta_RMG)
        fill_blocks(again, first, some_RB)
        assert torch.equal(again.codes_RB, parts.codes_RB)
        assert torch.equal(again.meta_RMG, parts.meta_RMG)
    assert torch.equal(parts.codes_RB, whole.codes_RB)
    assert torch.equal(parts.meta_RMG, whole.meta_RMG)


def test_torch_fills_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = k_matrix("q5_k", 20, 256)
    monkeypatch.setattr(module, "kernels", lambda: None)
    found = k_matrix("q5_k", 20, 256)
    for one, other in zip(
        rows_of(found.codes_RB, found.meta_RMG),
        rows_of(expected.codes_RB, expected.meta_RMG),
        strict=True,
    ):
        assert torch.equal(one, other)


@levels
@types
def test_products_equal_dense_matrices(level: str, type: str) -> None:
    for number, (rows, cols) in enumerate(SHAPES):
        blocks_RB = random_blocks(type, rows, cols, seed=number)
        matrix = of_blocks(type, blocks_RB)
        weight_RC = matrix.dense()
        assert torch.equal(at(level).decode(matrix, torch.float32), weight_RC)
        x_TI = normal(37, cols, seed=number)
        one_by_one = torch.cat([at(level).linear(x_1I, matrix) for x_1I in x_TI.split(1)])
        for tokens in (1, 2, 3, 5, 16, 21, 37):
            y_TO = at(level).linear(x_TI[:tokens], matrix)
            assert torch.equal(y_TO, one_by_one[:tokens])
            error_TO = (y_TO.double() - x_TI[:tokens].double() @ weight_RC.double().T).abs()
            allowed_TO = bound(x_TI[:tokens], weight_RC.double(), sizes(type, blocks_RB))
            assert (error_TO <= allowed_TO).all()


@levels
@types
def test_number_of_threads_changes_nothing(level: str, type: str) -> None:
    matrix, x_TI = k_matrix(type, 150, 256), normal(6, 256)
    one = at(level).linear(x_TI, matrix)
    torch.set_num_threads(3)
    try:
        assert torch.equal(at(level).linear(x_TI, matrix), one)
    finally:
        torch.set_num_threads(1)


@levels
@types
@pytest.mark.parametrize("byte", [0, 255])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_largest_sums_do_not_overflow(level: str, type: str, byte: int, sign: float) -> None:
    """All codes and scales as far from 0 as they can be, and activations of full size."""
    blocks_RB = random_blocks(type, 17, 512)
    blocks_nB, random_nB = (
        one.view(-1, BY_NAME[type].nbytes) for one in (blocks_RB, blocks_RB.clone())
    )
    blocks_nB[:] = byte
    for at_byte in {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,)}.get(type, (0, 2)):
        blocks_nB[:, at_byte : at_byte + 2] = random_nB[:, at_byte : at_byte + 2]
    if type == "q6_k":
        blocks_nB[:, 192:208] = 128  # scales of -128
    matrix, x_TI = of_blocks(type, blocks_RB), torch.full((5, 512), sign)
    weight_RC = matrix.dense().double()
    error_TO = (at(level).linear(x_TI, matrix).double() - x_TI.double() @ weight_RC.T).abs()
    assert (error_TO <= bound(x_TI, weight_RC, sizes(type, blocks_RB))).all()


@compiled
@types
def test_levels_give_equal_integers(type: str) -> None:
    """Results differ by the rounding of float32 sums alone, far less than a step of activations."""
    blocks_RB, x_TI = random_blocks(type, 35, 512), normal(3, 512)
    matrix = of_blocks(type, blocks_RB)
    first, *others = [at(level).linear(x_TI, matrix) for level in HERE]
    rounding = x_TI.double().abs() @ sizes(type, blocks_RB).T * 2.0**-22
    assert all(((one - first).abs() <= rounding).all() for one in others)


@compiled
@types
@pytest.mark.parametrize("tokens", [1, 3, 22, 40])
def test_levels_with_fused_multiply_add_give_equal_bits(type: str, tokens: int) -> None:
    for rows, cols in ((35, 512), (3, 256)):
        matrix, x_TI = k_matrix(type, rows, cols), awkward(tokens, cols)
        assert_equal_with_fused_multiply_add(lambda at, x=x_TI, m=matrix: at.linear(x, m))


@compiled
@settings(deadline=None, max_examples=40)
@given(
    type=st.sampled_from(K_QUANTS),
    level=st.sampled_from(HERE or ("portable",)),
    rows=st.integers(1, 70),
    blocks=st.integers(1, 4),
    tokens=st.integers(1, 20),
    size=st.sampled_from([-20, 0, 20]),
    seed=st.integers(0, 2**31),
)
def test_products_of_any_shape(type, level, rows, blocks, tokens, size, seed: int) -> None:
    blocks_RB = random_blocks(type, rows, 256 * blocks, seed=seed)
    matrix, x_TI = of_blocks(type, blocks_RB), normal(tokens, 256 * blocks) * 2.0**size
    weight_RC = matrix.dense().double()
    error_TO = (at(level).linear(x_TI, matrix).double() - x_TI.double() @ weight_RC.T).abs()
    assert (error_TO <= bound(x_TI, weight_RC, sizes(type, blocks_RB))).all()


@levels
@types
def test_nan_affects_only_its_token(level: str, type: str) -> None:
    x_TI = normal(5, 256)
    x_TI[2, 255] = torch.nan
    fine_T = at(level).linear(x_TI, k_matrix(type, 40, 256)).isfinite().all(-1)
    assert fine_T.tolist() == [True, True, False, True, True]


@levels
@pytest.mark.parametrize("pair", [("q4_k", "q6_k"), ("q5_k", "q4_k"), ("q2_k", "q3_k")])
def test_experts_equal_their_products(level: str, pair: tuple[str, str]) -> None:
    """Both matrices of different types, as in files of mixed ones."""
    run, x_TD = at(level), normal(4, 256).bfloat16()
    mlp = KernelMlp(
        w_in=k_matrix(pair[0], 512, 256),
        w_out=k_matrix(pair[1], 256, 256),
        activation="silu",
        gated=True,
    )
    h_TI = run.linear(x_TD, mlp.w_in).bfloat16().float()
    gate_TF, up_TF = h_TI.chunk(2, dim=-1)
    h_TF = (torch.nn.functional.silu(gate_TF).bfloat16().float() * up_TF).bfloat16()
    expected = run.linear(h_TF, mlp.w_out)
    found = run.experts(x_TD, [mlp], [range(4)])
    assert ((found - expected).abs() <= 2.0**-7 * expected.abs().amax()).all()
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    for x_D, y_D in zip(x_TD, found, strict=True):
        assert torch.equal(run.token(x_D[None], [mlp], weight)[0][0], y_D.bfloat16())
