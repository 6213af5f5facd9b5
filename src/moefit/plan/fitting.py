"""Least squares with coefficients that cannot be negative, and what a fit is worth on new cases.

Owns the arithmetic that both models share. Pure numpy.

Shapes: N samples, F features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Case = TypeVar("Case")


def nonnegative(
    x_NF: np.ndarray, y_N: np.ndarray, *, prior_F: np.ndarray, strength: float
) -> np.ndarray:
    """Coefficients c >= 0 that minimise |x c - y|^2 + strength * |(c - prior) / prior|^2.

    Lawson and Hanson's active set method on the normal equations. A prior of zero pulls as one of
    the mean prior does.
    """
    scale_F = np.where(prior_F > 0, prior_F, prior_F.mean() or 1.0)
    pull_F = strength / scale_F**2
    gram_FF = x_NF.T @ x_NF + np.diag(pull_F + 1e-12)
    right_F = x_NF.T @ y_N + pull_F * prior_F
    free_F = np.zeros(len(right_F), dtype=bool)
    c_F = np.zeros(len(right_F))
    for _ in range(3 * len(right_F)):
        gradient_F = np.where(free_F, -np.inf, right_F - gram_FF @ c_F)
        if gradient_F.max(initial=-np.inf) <= 1e-10 * np.abs(right_F).max(initial=0.0):
            break
        free_F[int(gradient_F.argmax())] = True
        c_F = _backed_off(gram_FF, right_F, c_F, free_F)
    return c_F


def _backed_off(
    gram_FF: np.ndarray, right_F: np.ndarray, c_F: np.ndarray, free_F: np.ndarray
) -> np.ndarray:
    """The solution over free coefficients; those that would be negative are freed no longer."""
    while True:
        new_F = np.zeros_like(c_F)
        new_F[free_F] = np.linalg.solve(gram_FF[np.ix_(free_F, free_F)], right_F[free_F])
        below_F = free_F & (new_F <= 0)
        if not below_F.any():
            return new_F
        share = (c_F[below_F] / np.maximum(c_F[below_F] - new_F[below_F], 1e-300)).min()
        c_F = c_F + share * (new_F - c_F)
        free_F &= c_F > 1e-15
        c_F = np.where(free_F, c_F, 0.0)


def held_out(
    fit: Callable[[Sequence[Case]], Callable[[Case], float]], cases: Sequence[Case], folds: int = 5
) -> list[float]:
    """A prediction for each case by a fit that has not seen it."""
    predictions = [0.0] * len(cases)
    folds = min(folds, len(cases))
    for fold in range(folds):
        rest = [case for number, case in enumerate(cases) if number % folds != fold]
        predict = fit(rest)
        for number in range(fold, len(cases), folds):
            predictions[number] = predict(cases[number])
    return predictions


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: 1 if both order alike, 0 if one says nothing of the other.

    >>> round(rank_correlation([1, 2, 3], [10, 30, 20]), 3)
    0.5
    """
    ranks = [_ranks(values) for values in (a, b)]
    if len(a) < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Places in order; equals share the mean of theirs."""
    array = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a model's predictions of cases that it had not seen were worth: relative errors.

    In the mean an error counts as one at most.
    """

    model: str
    cases: int
    mean: float
    median: float
    worst: float
    correlation: float


def worth(
    model: str, predicted: Sequence[float], measured: Sequence[float], *, floor: float = 0.0
) -> Held:
    """Errors as shares of what was measured, but of no less than `floor`."""
    errors = [abs(p - m) / max(abs(m), floor) for p, m in zip(predicted, measured, strict=True)]
    return Held(
        model=model,
        cases=len(errors),
        mean=float(np.mean(np.minimum(errors, 1.0))) if errors else 0.0,
        median=float(np.median(errors)) if errors else 0.0,
        worst=max(errors, default=0.0),
        correlation=rank_correlation(predicted, measured),
    )
