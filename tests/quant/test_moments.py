"""Second moments of inputs, compared with their definition in float64."""

import pytest
import torch
from torch import Tensor

from moefit.quant.grouped_int import GROUP
from moefit.quant.moments import DAMPING, SecondMoments, moments_of

SIZES = [1, 40, 64, 65, 150, 530]
sizes = pytest.mark.parametrize("cols", SIZES)


def whole(panels_GPI: Tensor) -> Tensor:
    """Return the padded square matrix of the panels."""
    return torch.cat(list(panels_GPI), dim=1).double()


def definition(x_NC: Tensor) -> Tensor:
    moments_CC = x_NC.double().T @ x_NC.double()
    moments_CC /= moments_CC.diagonal().mean()
    return moments_CC + DAMPING * torch.eye(x_NC.shape[1], dtype=torch.float64)


def some(cols: int) -> tuple[Tensor, Tensor, SecondMoments]:
    torch.manual_seed(cols)
    x_NC = torch.randn(300, cols) @ torch.randn(cols, cols)
    return x_NC, definition(x_NC), SecondMoments.of(x_NC)


@sizes
def test_moments_are_mean_products_damped(cols: int) -> None:
    _, expected_CC, known = some(cols)
    made_PP = whole(known.moments_GPI)
    assert known.cols == cols and len(made_PP) % GROUP == 0
    assert torch.allclose(made_PP[:cols, :cols], expected_CC, atol=1e-4)
    assert torch.allclose(made_PP, made_PP.T, atol=1e-5)  # x^T x is not symmetric to the bit
    assert not made_PP[cols:].any()


@sizes
def test_factor_is_upper_cholesky_of_inverse(cols: int) -> None:
    _, moments_CC, known = some(cols)
    factor_PP = whole(known.factor_GPI)
    assert not factor_PP[cols:].any() and not factor_PP[:, cols:].any()
    factor_CC = factor_PP[:cols, :cols]
    assert torch.equal(factor_CC, factor_CC.triu()) and bool((factor_CC.diagonal() > 0).all())
    white_CC = factor_CC.T @ factor_CC @ moments_CC
    assert torch.allclose(white_CC, torch.eye(cols).double(), atol=2e-3)


@pytest.mark.parametrize("cols", SIZES[:-1])
def test_importance_excludes_what_later_columns_compensate(cols: int) -> None:
    _, moments_CC, known = some(cols)
    left_C = torch.stack(
        [torch.linalg.inv(moments_CC[i:, i:])[0, 0].reciprocal() for i in range(cols)]
    )
    for first in range(0, cols, GROUP):
        part_I = left_C[first : first + GROUP]
        made_I = known.count_P[first : first + len(part_I)].double()
        assert torch.allclose(made_I, part_I / part_I.mean(), rtol=2e-3)
    assert not known.count_P[cols:].any()


@pytest.mark.parametrize("value", [0.0, 1e30, torch.inf, torch.nan])
def test_zero_inputs_equal_white_inputs(value: float) -> None:
    known = SecondMoments.of(torch.full((5, 70), value))
    assert torch.equal(whole(known.moments_GPI)[:70, :70], torch.eye(70).double())
    assert torch.equal(whole(known.factor_GPI)[:70, :70], torch.eye(70).double())
    assert torch.equal(known.count_P[:70], torch.ones(70))


def test_inputs_are_weighted() -> None:
    x_NC = torch.randn(30, 70)
    count_N = torch.ones(30).index_fill(0, torch.arange(10), 2.0)
    (one,), (other,) = (
        moments_of(x_NC, count_N),
        moments_of(torch.cat([x_NC, x_NC[:10]]), torch.ones(40)),
    )
    assert torch.allclose(one.moments_GPI, other.moments_GPI, atol=1e-6)


def test_widest_matrices_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moefit.quant.moments.MAX_COLUMNS", 64)
    x_NC = torch.randn(30, 150)
    parts = moments_of(x_NC, torch.ones(30))
    assert [one.cols for one in parts] == [64, 64, 22]
    assert torch.equal(parts[2].moments_GPI, SecondMoments.of(x_NC[:, 128:]).moments_GPI)
