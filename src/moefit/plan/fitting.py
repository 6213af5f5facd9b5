"""Features and tools of the models that are fitted to a profile.

`Features` computes the precision error, misses and substituted router weight of each block in a
configuration. `nonnegative_least_squares` fits, and `held_out` cross-validates.

Shapes: N samples, F coefficients, E experts, L blocks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moefit.plan.configuration import Configuration, Lengths
from moefit.plan.experiments import BlockShape, Shapes
from moefit.plan.profile import Profile
from moefit.plan.trace import (
    Curves,
    ReplayResult,
    interpolated,
    read_curves,
    read_source_curves,
)
from moefit.serve.config import BlockPlacement


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFeatures:
    """Measured properties of one block.

    Attributes:
        mass_E: Each expert's share of router weight.
        output_energy_E: Each expert's share of the output energy.
        experts: Experts that a token uses on average.
        curves: Misses, swaps and substituted weight by policy and slots.
        rule_known: Whether the router's scoring rule is known, which substitution needs.
    """

    mass_E: Sequence[float]
    output_energy_E: Sequence[float]
    experts: float
    curves: Curves
    rule_known: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Computes features of configurations; blocks are in the order of the model.

    Attributes:
        shapes: The blocks.
        blocks: Their measured properties.
        lengths: Of an encoder-decoder's requests; None for decoders.
    """

    shapes: Shapes
    blocks: Mapping[str, BlockFeatures]
    lengths: Lengths | None = None

    def steps(self, name: str) -> float:
        """Return how often a block computes per token of the output."""
        if self.lengths is None or not self.shapes[name].in_encoder:
            return 1.0
        return 1 / self.lengths.target

    def noise(self, name: str, placement: BlockPlacement, power: float = 1.0) -> float:
        """Return the squared error of a block's output, relative to its energy."""
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
        """Return `noise` of all blocks, L; powers are by block, and 1 if not given."""
        placement = configuration.placement
        return [
            self.noise(name, placement[name], powers[name] if powers else 1.0)
            for name in self.shapes
        ]

    def misses(self, configuration: Configuration) -> list[float]:
        """Return the experts that a token waits for in each block, L."""
        return [one.misses for one in self._replayed(configuration)]

    def swaps(self, configuration: Configuration) -> list[float]:
        """Return the experts loaded in the background per token, L."""
        return [one.swaps for one in self._replayed(configuration)]

    def moved(self, configuration: Configuration) -> list[float]:
        """Return the share of a token's router weight that is substituted in each block, L."""
        return [one.moved for one in self._replayed(configuration)]

    def _replayed(self, configuration: Configuration) -> Iterator[ReplayResult]:
        key = configuration.policy.key
        for name in self.shapes:
            slots = configuration.placement[name].slots
            yield interpolated(self.blocks[name].curves, key, slots)


def features_of(profile: Profile, lengths: Lengths | None = None) -> Features:
    """Return the features of a profile.

    Args:
        profile: With routes.
        lengths: Of an encoder-decoder's requests; by default those of the profile's pairs.
    """
    shapes = profile.facts.shapes
    lengths = lengths or profile.facts.lengths
    blocks = {
        name: BlockFeatures(
            mass_E=one["mass"],
            output_energy_E=one["loudness"],
            experts=one["experts"],
            curves=_curves(one["curves"], shapes[name], lengths),
            rule_known=one["rule_known"],
        )
        for name, one in profile.items["routes"].items()
    }
    return Features(shapes=shapes, blocks=blocks, lengths=lengths)


def _curves(values: Mapping[str, Any], shape: BlockShape, lengths: Lengths | None) -> Curves:
    if not shape.in_encoder:
        return read_curves(values, shape.num_experts)
    assert lengths is not None, "a profile of an encoder has lengths"
    return read_source_curves(values, shape.num_experts, lengths)


Case = TypeVar("Case")


def nonnegative_least_squares(
    x_NF: np.ndarray, y_N: np.ndarray, *, prior_F: np.ndarray, strength: float
) -> np.ndarray:
    """Minimize |x c - y|^2 + strength * |(c - prior) / prior|^2 over coefficients c >= 0.

    Uses the active set method of Lawson and Hanson (Solving Least Squares Problems, 1974) on the
    normal equations.

    Args:
        x_NF: Inputs.
        y_N: Outputs.
        prior_F: Prior of the coefficients. The deviation from a prior of zero is measured relative
            to the mean prior.
        strength: Weight of the prior.
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
        c_F = _solve_active_set(gram_FF, right_F, c_F, free_F)
    return c_F


def _solve_active_set(
    gram_FF: np.ndarray, right_F: np.ndarray, c_F: np.ndarray, free_F: np.ndarray
) -> np.ndarray:
    """Solve for the free coefficients; fix those at zero that would become negative."""
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
    """Predict each case by cross-validation.

    Args:
        fit: Fits a model to cases and returns its prediction function.
        cases: All cases.
        folds: Number of parts that the cases are divided into.

    Returns:
        For each case the prediction of a model that was fitted to the other parts.
    """
    predictions = [0.0] * len(cases)
    folds = min(folds, len(cases))
    for fold in range(folds):
        others = [case for number, case in enumerate(cases) if number % folds != fold]
        predict = fit(others)
        for number in range(fold, len(cases), folds):
            predictions[number] = predict(cases[number])
    return predictions


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 if either sequence is constant.

    >>> round(rank_correlation([1, 2, 3], [10, 30, 20]), 3)
    0.5
    """
    ranks = [_ranks(values) for values in (a, b)]
    if len(a) < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Return ranks; equal values get the mean of their ranks."""
    array = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutError:
    """Relative errors of a model's predictions in cross-validation.

    Attributes:
        model: Name of the model.
        cases: Number of predictions.
        mean: Mean error, where an error counts as at most 1.
        median: Median error.
        worst: Largest error.
        correlation: Rank correlation of predicted and measured values.
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
    """Summarize errors relative to the measured values, or to `floor` where those are smaller."""
    errors = [abs(p - m) / max(abs(m), floor) for p, m in zip(predicted, measured, strict=True)]
    return HeldOutError(
        model=model,
        cases=len(errors),
        mean=float(np.mean(np.minimum(errors, 1.0))) if errors else 0.0,
        median=float(np.median(errors)) if errors else 0.0,
        worst=max(errors, default=0.0),
        correlation=rank_correlation(predicted, measured),
    )
