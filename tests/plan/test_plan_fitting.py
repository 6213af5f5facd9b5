import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.plan.fitting import (
    held_out,
    held_out_error,
    nonnegative_least_squares,
    rank_correlation,
)

NUMBERS = st.integers(-300, 300)


def loss(
    x_NF: np.ndarray, y_N: np.ndarray, prior_F: np.ndarray, s: float, c_F: np.ndarray
) -> float:
    scale_F = np.where(prior_F > 0, prior_F, prior_F.mean() or 1.0)
    return float(((x_NF @ c_F - y_N) ** 2).sum() + s * (((c_F - prior_F) / scale_F) ** 2).sum())


def by_descent(x_NF: np.ndarray, y_N: np.ndarray, prior_F: np.ndarray, s: float) -> np.ndarray:
    """Reference: projected gradient with many small steps."""
    scale_F = np.where(prior_F > 0, prior_F, prior_F.mean() or 1.0)
    gram_FF = x_NF.T @ x_NF + np.diag(s / scale_F**2)
    right_F = x_NF.T @ y_N + s * prior_F / scale_F**2
    c_F, step = prior_F.copy(), 1 / (np.linalg.eigvalsh(gram_FF).max() + 1e-9)
    for _ in range(20000):
        c_F = np.maximum(0, c_F - step * (gram_FF @ c_F - right_F))
    return c_F


@pytest.mark.parametrize("seed", range(6))
def test_nonnegative_least_squares(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x_NF, y_N = generator.normal(size=(9, 4)), generator.normal(size=9)
    prior_F = generator.random(4)
    found = nonnegative_least_squares(x_NF, y_N, prior_F=prior_F, strength=0.1)
    slow = by_descent(x_NF, y_N, prior_F, 0.1)
    assert (found >= 0).all()
    assert loss(x_NF, y_N, prior_F, 0.1, found) <= loss(x_NF, y_N, prior_F, 0.1, slow) + 1e-6


def test_fit_without_samples_is_prior() -> None:
    prior_F = np.array([0.5, 2.0])
    found = nonnegative_least_squares(np.zeros((0, 2)), np.zeros(0), prior_F=prior_F, strength=1.0)
    assert found == pytest.approx(prior_F)


@given(st.lists(NUMBERS, min_size=2, max_size=12, unique=True))
def test_rank_correlation_of_order_and_reverse(values: list[int]) -> None:
    assert rank_correlation(values, [3 * v for v in values]) == pytest.approx(1)
    assert rank_correlation(values, [-v for v in values]) == pytest.approx(-1)


def test_rank_correlation_with_ties() -> None:
    assert rank_correlation([1, 1, 2], [1, 1, 2]) == pytest.approx(1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_held_out_error_excludes_sample_from_fit() -> None:
    def fit(some):
        return lambda case: float(case in some)

    assert held_out(fit, list(range(7)), folds=3) == [0.0] * 7


def test_relative_errors_are_clamped() -> None:
    held = held_out_error("m", [1.1, 0.0], [1.0, 1e-6], floor=1e-3)
    assert held.median == pytest.approx((0.1 + 1e-3) / 2)
    assert held.worst == pytest.approx(0.1)
