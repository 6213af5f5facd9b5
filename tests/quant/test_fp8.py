"""Matrices of 8-bit floats: their values, and kernels compared with torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import HERE, at, compiled, levels, normal
from scaled_codes import fp8_codes, matrix_of
from torch import Tensor

from moefit.checkpoint.formats.encoding import StoredCodes
from moefit.quant.backend import decoded
from moefit.quant.cpu_kernels import KernelMlp
from moefit.quant.scaled.fp8 import Fp8Matrix, fp8_bytes

torch.set_num_threads(1)


def assert_product(y_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> None:
    size_TO = x_TI.double().abs() @ weight_OI.double().abs().T
    error_TO = (y_TO.double() - x_TI.double() @ weight_OI.double().T).abs()
    assert (error_TO <= size_TO * 2.0**-23 * (x_TI.shape[1] / 8 + 16)).all()


@pytest.mark.parametrize(("rows", "cols", "group"), [(1, 1, 128), (5, 300, 128), (33, 512, 256)])
def test_values_are_code_times_scale(rows: int, cols: int, group: int) -> None:
    some = fp8_codes(rows, cols, group)
    made = Fp8Matrix.empty(rows, cols)
    made.fill(0, some)
    scale_RC = some.scales_RG.repeat_interleave(group, dim=1)[:, :cols]
    values_RC = some.codes_RB.view(torch.float8_e4m3fn).float() * scale_RC
    assert torch.equal(made.dense(), values_RC)
    assert torch.equal(decoded(made, torch.float32), values_RC)
    assert torch.equal(decoded(made, torch.bfloat16), values_RC.bfloat16())
    assert (made.codes_RB.nbytes, made.meta_RMG.nbytes) == fp8_bytes(rows, cols)


@compiled
def test_every_code_is_decoded() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127]
    made = Fp8Matrix.empty(1, len(codes))
    made.fill(0, StoredCodes(codes_RB=codes[None], scales_RG=torch.ones(1, 1), group=256))
    for level in HERE:
        found = at(level).decode(made, torch.float32)[0]
        assert torch.equal(found, codes.view(torch.float8_e4m3fn).float())


@levels
def test_products_equal_dense_matrices(level: str) -> None:
    for rows, cols in ((1, 1), (3, 63), (33, 200), (5, 1088)):
        matrix = matrix_of(rows, cols)
        assert torch.equal(at(level).decode(matrix, torch.float32), matrix.dense())
        x_TI = normal(21, cols)
        one_by_one = torch.cat([at(level).linear(x_1I, matrix) for x_1I in x_TI.split(1)])
        for tokens in (0, 1, 2, 3, 5, 16, 21):
            y_TO = at(level).linear(x_TI[:tokens], matrix)
            assert torch.equal(y_TO, one_by_one[:tokens])
            assert_product(y_TO, x_TI[:tokens], matrix.dense())


@compiled
@settings(deadline=None, max_examples=30)
@given(
    level=st.sampled_from(HERE or ("portable",)),
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    tokens=st.integers(1, 20),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**31),
)
def test_products_of_any_shape(level, rows, cols, tokens, dtype, seed: int) -> None:
    matrix, x_TI = matrix_of(rows, cols, seed=seed), normal(tokens, cols, seed=seed).to(dtype)
    assert_product(at(level).linear(x_TI, matrix), x_TI.float(), matrix.dense())


@levels
def test_experts_equal_their_products(level: str) -> None:
    run, x_TD = at(level), normal(4, 96).bfloat16()
    mlp = KernelMlp(w_in=matrix_of(128, 96), w_out=matrix_of(96, 64), activation="silu", gated=True)
    gate_TF, up_TF = run.linear(x_TD, mlp.w_in).bfloat16().float().chunk(2, dim=-1)
    h_TF = (torch.nn.functional.silu(gate_TF).bfloat16().float() * up_TF).bfloat16()
    expected = run.linear(h_TF, mlp.w_out)
    found = run.experts(x_TD, [mlp], [range(4)])
    assert ((found - expected).abs() <= 2.0**-7 * expected.abs().amax()).all()
