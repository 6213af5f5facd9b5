"""Inputs and tools of the models that are fitted to a profile.

`Knowledge` turns a configuration into features per block: precision error, misses, substituted
weight. `nonnegative` is least squares with non-negative coefficients, and `held_out` tells what a
fit is worth on cases that it has not seen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moefit.plan.configuration import Configuration
from moefit.plan.experiments import Shapes
from moefit.plan.profile import Profile
from moefit.plan.trace import Curves, interpolated, policy_key, read_curves
from moefit.serve.config import BlockPlacement


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFeatures:
    """One block: each expert's share of router weight and of output, experts a token, curves.

    rule_known: whether its router's rule is, so that routes may be changed.
    """

    mass_E: Sequence[float]
    output_energy_E: Sequence[float]
    experts: float
    curves: Curves
    rule_known: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """All blocks of a profile, in order."""

    shapes: Shapes
    blocks: Mapping[str, BlockFeatures]

    def noise(self, name: str, placement: BlockPlacement, power: float = 1.0) -> float:
        """Squared error that a block's formats add, as a share of its output; errors to a power."""
        shape, known = self.shapes[name], self.blocks[name]
        if not placement.by_expert:
            errors = shape.errors[placement.formats[0]]
            return sum(
                share * error**power
                for share, error in zip(known.output_energy_E, errors, strict=True)
            )
        return sum(
            share * shape.errors[format][expert] ** power
            for expert, (share, format) in enumerate(
                zip(known.output_energy_E, placement.formats, strict=True)
            )
        )

    def noises(
        self, configuration: Configuration, powers: Mapping[str, float] | None = None
    ) -> list[float]:
        """Of all blocks, L; powers by block, one if not given."""
        placement = configuration.placement
        return [
            self.noise(name, placement[name], powers[name] if powers else 1.0)
            for name in self.shapes
        ]

    def misses(self, configuration: Configuration) -> list[float]:
        """Experts that a token waits for in each block, L."""
        key = policy_key(*configuration.policy)
        return [
            interpolated(self.blocks[name].curves, key, configuration.placement[name].slots).misses
            for name in self.shapes
        ]

    def swaps(self, configuration: Configuration) -> list[float]:
        """Experts that come in the background, a token, L."""
        key = policy_key(*configuration.policy)
        return [
            interpolated(self.blocks[name].curves, key, configuration.placement[name].slots).swaps
            for name in self.shapes
        ]

    def moved(self, configuration: Configuration) -> list[float]:
        """Share of a token's router weight that goes elsewhere in each block, L."""
        key = policy_key(*configuration.policy)
        return [
            interpolated(self.blocks[name].curves, key, configuration.placement[name].slots).moved
            for name in self.shapes
        ]


def features_of(profile: Profile) -> Features:
    """From a profile's items."""
    shapes = profile.facts.shapes
    blocks = {
        name: BlockFeatures(
            mass_E=one["mass"],
            output_energy_E=one["loudness"],
            experts=one["experts"],
            curves=read_curves(one["curves"], shapes[name].num_experts),
            rule_known=one["rule_known"],
        )
        for name, one in profile.items["routes"].items()
    }
    return Features(shapes=shapes, blocks=blocks)


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
class HeldOutError:
    """What a model's predictions of cases that it had not seen were worth: relative errors.

    In the mean an error counts as one at most.
    """

    model: str
    cases: int
    mean: float
    median: float
    worst: float
    correlation: float


def held_out_error(
    model: str, predicted: Sequence[float], measured: Sequence[float], *, floor: float = 0.0
) -> HeldOutError:
    """Errors as shares of what was measured, but of no less than `floor`."""
    errors = [abs(p - m) / max(abs(m), floor) for p, m in zip(predicted, measured, strict=True)]
    return HeldOutError(
        model=model,
        cases=len(errors),
        mean=float(np.mean(np.minimum(errors, 1.0))) if errors else 0.0,
        median=float(np.median(errors)) if errors else 0.0,
        worst=max(errors, default=0.0),
        correlation=rank_correlation(predicted, measured),
    )
