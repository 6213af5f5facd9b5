"""Encoding by the inputs' second moments, compared with the definition."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefit.errors import CheckpointError
from moefit.quant import gptq
from moefit.quant.encode import encode
from moefit.quant.gptq import SWEEPS, encode_gptq
from moefit.quant.grouped_int import GROUP, PLANES, ROWS_AT_ONCE, GroupedMatrix, pack, unpack
from moefit.quant.moments import DAMPING, moments_of

widths = pytest.mark.parametrize("bits", [bits for bits in PLANES if bits > 1])
SIZES = [1, 40, 64, 65, 150]


def compensated(
    weight_RC: Tensor,
    bits: int,
    x_NC: Tensor,
    count_N: Tensor | None = None,
    *,
    sweeps: int = SWEEPS,
) -> GroupedMatrix:
    rows, cols = weight_RC.shape
    made = GroupedMatrix.empty(rows, cols, bits)
    count_N = torch.ones(len(x_NC)) if count_N is None else count_N
    encode_gptq(made, weight_RC, moments_of(x_NC, count_N), sweeps=sweeps)
    return made


def codes_of(made: GroupedMatrix) -> Tensor:
    codes_NG = unpack(made.by_row()[0].reshape(-1, made.bits * 8), made.bits)
    return codes_NG.view(made.rows, -1)[:, : made.cols].double()


def correlated(tokens: int, cols: int, seed: int = 0) -> Tensor:
    """Return inputs with most variance in few directions, as after a trained layer."""
    generator = torch.Generator().manual_seed(seed)
    few_CK = torch.randn(max(1, cols // 8), cols, generator=generator)
    loud_NK = torch.randn(tokens, len(few_CK), generator=generator)
    return loud_NK @ few_CK + 0.3 * torch.randn(tokens, cols, generator=generator)


def output_error(made: GroupedMatrix, weight_RC: Tensor, x_NC: Tensor) -> float:
    return float((x_NC @ (made.dense() - weight_RC).T).square().sum())


def plainly(made: GroupedMatrix, weight_RC: Tensor, x_NC: Tensor) -> Tensor:
    """Reference: codes for given scales, solving each column's optimum from the previous ones."""
    moments_CC = x_NC.double().T @ x_NC.double()
    moments_CC /= moments_CC.diagonal().mean()
    moments_CC += DAMPING * torch.eye(len(moments_CC))
    weight_RC = weight_RC.double()
    scale_RC, least_RC = (
        made.by_row()[1][:, part].double().repeat_interleave(GROUP, 1)[:, : made.cols]
        for part in ((0, 1) if made.bits != 8 else (0, 0))
    )
    lowest, highest = (1, 255) if made.bits == 8 else (0, 2**made.bits - 1)
    if made.bits == 8:
        least_RC = -128 * scale_RC
    off_RC, codes_RC = torch.zeros_like(weight_RC), torch.zeros_like(weight_RC)
    for i in range(made.cols):
        # Errors of the columns behind that make the best of the errors already made.
        across = moments_CC[:i, i:] @ torch.linalg.inv(moments_CC[i:, i:])
        best_R = weight_RC[:, i] - (off_RC[:, :i] @ across)[:, 0]
        divisor_R = scale_RC[:, i].where(scale_RC[:, i] != 0, 1.0)
        code_R = ((best_R - least_RC[:, i]) / divisor_R).round().clamp(lowest, highest)
        codes_RC[:, i] = code_R
        off_RC[:, i] = code_R * scale_RC[:, i] + least_RC[:, i] - weight_RC[:, i]
    return codes_RC


@widths
@pytest.mark.parametrize("cols", SIZES)
def test_codes_match_definition(bits: int, cols: int) -> None:
    torch.manual_seed(cols)
    weight_RC, x_NC = torch.randn(9, cols), correlated(400, cols)
    made = compensated(weight_RC, bits, x_NC, sweeps=0)
    same = codes_of(made) == plainly(made, weight_RC, x_NC)
    # Where float32 puts a column just across a half, the rest of its row goes another way too.
    assert float(same.all(1).double().mean()) > 0.7
    assert float(same.double().mean()) > 0.9


@widths
def test_group_fit_accounts_for_compensation(bits: int) -> None:
    """Return the second group before rounding, solved from the definition."""
    torch.manual_seed(1)
    weight_RC, x_NC = torch.randn(40, 150), correlated(400, 150)
    made = compensated(weight_RC, bits, x_NC, sweeps=0)
    moments_CC = x_NC.double().T @ x_NC.double()
    moments_CC /= moments_CC.diagonal().mean()
    moments_CC += DAMPING * torch.eye(150)
    off_RI = (made.dense() - weight_RC)[:, :GROUP].double()
    across = moments_CC[:GROUP, GROUP:] @ torch.linalg.inv(moments_CC[GROUP:, GROUP:])
    best_RI = (weight_RC[:, GROUP:] - off_RI @ across)[:, :GROUP].float().contiguous()
    left = [torch.linalg.inv(moments_CC[i:, i:])[0, 0].reciprocal() for i in range(64, 128)]
    expected = encode(best_RI, bits, moments_C=torch.stack(left).float())
    same_R = (made.by_row()[1][:, :, 1] == expected.by_row()[1][:, :, 0]).all(1)
    assert float(same_R.double().mean()) > 0.7


@widths
@pytest.mark.parametrize("cols", SIZES)
def test_white_inputs_need_no_compensation(bits: int, cols: int) -> None:
    weight_RC = torch.randn(16, cols)
    expected = encode(weight_RC, bits, moments_C=torch.ones(cols))
    made = compensated(weight_RC, bits, torch.eye(cols), sweeps=0)
    # Counts that are all alike but for float32's rounding may end a group's search elsewhere.
    assert float((codes_of(made) == codes_of(expected)).double().mean()) > 0.98
    assert torch.allclose(made.dense(), expected.dense(), atol=2e-2)


def damped_error(made: GroupedMatrix, weight_RC: Tensor, x_NC: Tensor) -> float:
    """Return the damped error in float64 from the definition."""
    off_RC = made.dense().double() - weight_RC.double()
    moments_CC = x_NC.double().T @ x_NC.double()
    moments_CC += DAMPING * moments_CC.diagonal().mean() * torch.eye(len(moments_CC))
    return float(((off_RC @ moments_CC) * off_RC).sum())


@widths
@pytest.mark.parametrize("cols", SIZES)
def test_sweeps_never_increase_error(bits: int, cols: int) -> None:
    torch.manual_seed(cols)
    weight_RC, x_NC = torch.randn(9, cols), correlated(400, cols)
    losses = [
        damped_error(compensated(weight_RC, bits, x_NC, sweeps=sweeps), weight_RC, x_NC)
        for sweeps in (0, 1, 2, 4)
    ]
    assert all(b <= a * (1 + 1e-4) + 1e-9 for a, b in pairwise(losses))
    if bits <= 3 and cols >= 40:
        assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_sweeps_reach_local_optimum(bits: int) -> None:
    """Try each code in turn, from the definition."""
    torch.manual_seed(3)
    weight_RC, x_NC = torch.randn(2, 40), correlated(200, 40)
    made = compensated(weight_RC, bits, x_NC, sweeps=30)
    least = damped_error(made, weight_RC, x_NC)
    codes_RI = unpack(made.codes_RB.reshape(-1, bits * 8), bits)
    for row in range(2):
        for col in range(40):
            for code in range(2**bits):
                tried_RI = codes_RI.clone()
                tried_RI[row, col] = code
                other = GroupedMatrix(
                    bits, 40, pack(tried_RI, bits).view(made.codes_RB.shape), made.meta_RMG
                )
                assert damped_error(other, weight_RC, x_NC) >= least * (1 - 1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_on_other_inputs_is_lower(bits: int) -> None:
    torch.manual_seed(0)
    weight_RC = torch.randn(64, 192)
    x_NC, other_NC = correlated(4000, 192).split(2000)
    plain = output_error(encode(weight_RC, bits), weight_RC, other_NC)
    assert output_error(compensated(weight_RC, bits, x_NC), weight_RC, other_NC) < 0.5 * plain


def test_inputs_are_weighted() -> None:
    """Repeating an input equals its weight; a weight of zero equals its absence."""
    torch.manual_seed(0)
    weight_RC, x_NC = torch.randn(8, 70), correlated(300, 70)
    thrice = compensated(weight_RC, 3, torch.cat([x_NC, x_NC[:100], x_NC[:100]]))
    count_N = torch.ones(300).index_fill(0, torch.arange(100), 3.0)
    assert torch.equal(codes_of(compensated(weight_RC, 3, x_NC, count_N)), codes_of(thrice))
    x_NC[100:] = torch.randn(200, 70)
    only = compensated(weight_RC, 3, x_NC[:100])
    count_N = torch.ones(300).index_fill(0, torch.arange(100, 300), 0.0)
    assert torch.equal(codes_of(compensated(weight_RC, 3, x_NC, count_N)), codes_of(only))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.sampled_from(SIZES),
    st.integers(0, 6),
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([1e-9, 1.0, 1e4]),
    st.integers(0, 2**31),
)
def test_any_inputs_give_finite_weights(
    rows: int, cols: int, tokens: int, bits: int, size: float, seed: int
) -> None:
    """Any number and size of inputs gives a valid matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight_RC = torch.randn(rows, cols, generator=generator).clamp(-4, 4)
    x_NC = size * torch.randn(tokens, cols, generator=generator)
    dense_RC = compensated(weight_RC, bits, x_NC).dense()
    assert bool(dense_RC.isfinite().all())
    assert float(dense_RC.abs().max()) < 100


def test_no_inputs_equal_white_inputs() -> None:
    weight_RC = torch.randn(4, 100)
    for x_NC in (torch.empty(0, 100), torch.zeros(7, 100)):
        made = compensated(weight_RC, 4, x_NC)
        assert torch.equal(codes_of(made), codes_of(encode(weight_RC, 4)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_unencodable_weights_raise(value: float) -> None:
    weight_RC = torch.randn(300, 70)
    weight_RC[270, 66] = value
    with pytest.raises(CheckpointError, match=f"output 270 for input 66 is {value}"):
        compensated(weight_RC, 4, torch.randn(10, 70))


def test_wide_matrix_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_RC, x_NC = torch.randn(6, 150), correlated(300, 150)
    whole = compensated(weight_RC, 3, x_NC)
    monkeypatch.setattr("moefit.quant.moments.MAX_COLUMNS", 64)
    made = compensated(weight_RC, 3, x_NC)
    for first in (0, 64, 128):
        part_RI, x_NI = weight_RC[:, first : first + 64], x_NC[:, first : first + 64]
        expected = codes_of(compensated(part_RI, 3, x_NI))
        assert torch.equal(codes_of(made)[:, first : first + 64], expected)
    assert output_error(whole, weight_RC, x_NC) < output_error(made, weight_RC, x_NC)


@widths
def test_rows_are_rounded_some_at_a_time(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch, which needs several times the memory of the rows in float32."""
    monkeypatch.setattr(gptq, "kernels", lambda: None)
    rows, x_NC = ROWS_AT_ONCE + 40, correlated(80, 70)
    weight_RC = torch.randn(rows, 70, generator=torch.Generator().manual_seed(3))
    whole = compensated(weight_RC, bits, x_NC)
    parts = [compensated(part_RC, bits, x_NC) for part_RC in weight_RC.split(ROWS_AT_ONCE)]
    assert torch.equal(whole.dense(), torch.cat([one.dense() for one in parts]))


def test_column_without_input_keeps_weights() -> None:
    torch.manual_seed(0)
    weight_RC, x_NC = torch.randn(8, 64), correlated(500, 64)
    x_NC[:, 5] = 0
    made = compensated(weight_RC, 8, x_NC)
    assert torch.allclose(made.dense()[:, 5], weight_RC[:, 5], atol=0.03)
