"""Fit a form to training runs: Huber loss of log losses, L-BFGS from a grid of starts.

The method is Hoffmann et al.'s (arXiv 2203.15556, appendix D.3), as in Yun et al.: residuals are
differences of ln L. A large Huber threshold makes it least squares, a very small one least absolute
deviations. All starts of a grid are evaluated and L-BFGS runs from the best ones. Derivatives are
exact, by complex steps.

Shapes: R runs, P coefficients, S starts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from pydantic import ValidationError

from moefit.advise.forms import Form, Points
from moefit.advise.laws import Law
from moefit.advise.runs import Run, Runs, check_enough, points_of
from moefit.errors import ConfigError, DataError, in_brief

HUBER = 1e-3
_STEP = 1e-30  # of complex steps; errors are of its square
_STARTS = 12  # from which L-BFGS runs
_BEST = 3  # after a first, short run
_SHORT, _LONG = 200, 3000  # iterations
_SCALE = 1e-6  # of scores: brings them near one, where the tolerances of L-BFGS are meant
_WORST = 1e9  # objective of coefficients without a finite loss
_LARGEST = 0.15  # part of the runs that is held out by `largest`
_FOLDS = 8

Progress = Callable[[str, int, int], None]
"""Takes what is done, how many of it, and of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Errors on runs that a fit did not see.

    Attributes:
        names: Of the runs.
        relative: Predicted over measured loss, less one, of each.
        rms_log10: Root mean square of log10 of predicted over measured loss.
    """

    names: tuple[str, ...]
    relative: tuple[float, ...]
    rms_log10: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted form.

    Attributes:
        form: What was fitted.
        runs: To which.
        coefficients: By name.
        intervals: 95% bootstrap interval of each; empty if none was computed.
        objective: Sum of Huber losses.
        rms_log10: Root mean square of the residuals, in log10 L.
        left_out: Errors of leaving out an eighth of the runs at a time; None if not computed.
        extrapolated: Errors on the largest runs, by a fit to the others; None if not computed.
    """

    form: Form
    runs: Runs
    coefficients: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    objective: float
    rms_log10: float
    left_out: HeldOut | None
    extrapolated: HeldOut | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""

        def errors(one: HeldOut | None) -> dict[str, Any] | None:
            if one is None:
                return None
            return {
                "rms_log10": one.rms_log10,
                "relative": dict(zip(one.names, one.relative, strict=True)),
            }

        return {
            "form": self.form.name,
            "formula": self.form.formula,
            "counts": self.runs.counts.value,
            "runs": len(self.runs.used),
            "left_out_runs": dict(self.runs.left_out),
            "coefficients": dict(self.coefficients),
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "objective": self.objective,
            "rms_log10": self.rms_log10,
            "leave_out": errors(self.left_out),
            "largest": errors(self.extrapolated),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How to fit.

    Attributes:
        bootstrap: Resamplings for intervals; 0 for none.
        hold_out_largest: Also fit without the largest runs and report the error on them.
        huber: Residual of ln L from which it counts linearly.
        seed: Of resamplings and folds.
    """

    bootstrap: int = 200
    hold_out_largest: bool = False
    huber: float = HUBER
    seed: int = 0


def fit_law(
    runs: Runs,
    form: Form,
    settings: FitSettings | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Fit a form to runs.

    Args:
        runs: Usable runs.
        form: One that can be fitted.
        settings: None for the defaults.
        progress: Called after each part.

    Raises:
        DataError: There are too few runs, or a quantity does not vary.
        ConfigError: scipy is not installed.
    """
    check_enough(runs.used, form)
    settings = settings or FitSettings()
    if settings.hold_out_largest:  # before the minutes that a bootstrap takes
        _check_rest(runs.used, form)
    huber = settings.huber
    tell = progress or (lambda _name, _done, _total: None)
    data = _Data.of(form, runs.used, huber)
    tell("starts", 0, 1)
    theta_P, objective = data.from_grid()
    tell("starts", 1, 1)
    generator = np.random.default_rng(settings.seed)
    samples = []
    for number in range(settings.bootstrap):
        index_R = generator.integers(len(runs.used), size=len(runs.used))
        resampled = _Data.of(form, [runs.used[index] for index in index_R], huber)
        samples.append(resampled.minimise(theta_P, _SHORT)[0])
        tell("bootstrap", number + 1, settings.bootstrap)
    folds = _left_out(data, runs.used, theta_P, generator)
    largest = _extrapolated(form, runs.used, huber) if settings.hold_out_largest else None
    return Fit(
        form=form,
        runs=runs,
        coefficients=_as_floats(_named(form, theta_P)),
        intervals=_intervals(form, samples),
        objective=objective,
        rms_log10=_rms(data.residual_R(theta_P)),
        left_out=folds,
        extrapolated=largest,
    )


def _as_floats(named: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in named.items()}


def _rms(residual_R: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(residual_R))) / np.log(10.0))


def _named(form: Form, theta_P: np.ndarray) -> dict[str, Any]:
    """Return coefficients by name; those that are positive are fitted as logarithms."""
    return {
        name: np.exp(value) if name in form.logged else value
        for name, value in zip(form.coefficients, theta_P, strict=True)
    }


@dataclass(frozen=True, slots=True)
class _Data:
    """What is fitted: sizes and log losses of runs, and the Huber threshold."""

    form: Form
    points: Points
    log_loss_R: np.ndarray
    huber: float

    @classmethod
    def of(cls, form: Form, runs: Sequence[Run], huber: float) -> "_Data":
        """Return the data of runs."""
        return cls(form, points_of(runs), np.log([one.loss for one in runs]), huber)

    def residual_R(self, theta_P: np.ndarray) -> np.ndarray:
        """Return ln of predicted over measured losses; of coefficients [P, S, 1] as [S, R]."""
        return self.form.log_loss(_named(self.form, theta_P), self.points) - self.log_loss_R

    def score(self, residual_R: np.ndarray) -> float:
        """Return the sum of Huber losses."""
        size_R, limit = np.abs(residual_R), self.huber
        inside_R = 0.5 * size_R**2
        return float(np.where(size_R <= limit, inside_R, limit * (size_R - limit / 2)).sum())

    def objective(self, theta_P: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the score and its gradient [P], scaled for the tolerances of L-BFGS."""
        with np.errstate(all="ignore"):
            moved_PP = theta_P[:, None] + 1j * _STEP * np.eye(len(theta_P))
            moved_PR = self.residual_R(moved_PP[:, :, None])
        if not np.isfinite(moved_PR).all():
            return _WORST, np.zeros_like(theta_P)
        residual_R = np.real(moved_PR[0])
        slope_R = np.clip(residual_R, -self.huber, self.huber)
        gradient_P = np.imag(moved_PR) @ slope_R / _STEP
        return self.score(residual_R) / _SCALE, gradient_P / _SCALE

    def minimise(self, theta_P: np.ndarray, iterations: int) -> tuple[np.ndarray, float]:
        """Run L-BFGS from one start; return coefficients [P] and the score."""
        try:
            from scipy.optimize import minimize  # optional, and slow to import
        except ImportError as error:
            raise ConfigError(
                "fitting laws needs scipy; install it with: pip install 'moefit[laws]'"
            ) from error
        found = minimize(
            self.objective,
            theta_P,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": iterations, "maxfun": 4 * iterations, "ftol": 1e-12, "gtol": 1e-9},
        )
        return found.x, float(found.fun) * _SCALE

    def from_grid(self) -> tuple[np.ndarray, float]:
        """Run L-BFGS from the best starts of the form's grid."""
        form = self.form
        grid = product(*(form.starts[name] for name in form.coefficients))
        starts = [np.array(start, dtype=float) for start in grid]
        with np.errstate(all="ignore"):
            scores = [self.score(self.residual_R(theta_P)) for theta_P in starts]
        order = np.argsort(np.nan_to_num(scores, nan=np.inf))[:_STARTS]
        short = [self.minimise(starts[index], _SHORT) for index in order]
        short.sort(key=lambda one: one[1])
        long = [self.minimise(theta_P, _LONG) for theta_P, _ in short[:_BEST]]
        return min(long, key=lambda one: one[1])


def _intervals(form: Form, samples: Sequence[np.ndarray]) -> dict[str, tuple[float, float]]:
    if not samples:
        return {}
    low_P, high_P = np.percentile(np.array(samples), (2.5, 97.5), axis=0)
    low, high = _as_floats(_named(form, low_P)), _as_floats(_named(form, high_P))
    return {name: (low[name], high[name]) for name in form.coefficients}


def _held_out(form: Form, theta_P: np.ndarray, runs: Sequence[Run]) -> tuple[np.ndarray, HeldOut]:
    """Return residuals [R] on runs that a fit did not see, and their summary."""
    residual_R = _Data.of(form, runs, HUBER).residual_R(theta_P)
    errors = HeldOut(
        names=tuple(one.name for one in runs),
        relative=tuple(float(one) for one in np.expm1(residual_R)),
        rms_log10=_rms(residual_R),
    )
    return residual_R, errors


def _left_out(
    data: _Data, runs: Sequence[Run], theta_P: np.ndarray, generator: np.random.Generator
) -> HeldOut | None:
    """Leave out an eighth of the runs at a time; None if too few would be left to fit."""
    form = data.form
    folds = np.array_split(generator.permutation(len(runs)), min(_FOLDS, len(runs)))
    if len(runs) - len(folds[0]) <= len(form.coefficients):
        return None
    found: list[HeldOut] = []
    residuals: list[np.ndarray] = []
    for fold in folds:
        away = set(fold.tolist())
        kept = [one for index, one in enumerate(runs) if index not in away]
        refitted_P, _ = _Data.of(form, kept, data.huber).minimise(theta_P, _SHORT)
        residual_R, errors = _held_out(form, refitted_P, [runs[index] for index in fold])
        found.append(errors)
        residuals.append(residual_R)
    return HeldOut(
        names=tuple(name for one in found for name in one.names),
        relative=tuple(error for one in found for error in one.relative),
        rms_log10=_rms(np.concatenate(residuals)),
    )


def _without_largest(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Return runs without those of most compute, N * D, and those."""
    ordered = sorted(runs, key=lambda one: one.parameters * one.tokens)
    count = max(1, round(_LARGEST * len(runs)))
    return ordered[:-count], ordered[-count:]


def _check_rest(runs: Sequence[Run], form: Form) -> None:
    kept, largest = _without_largest(runs)
    try:
        check_enough(kept, form)
    except DataError as error:
        raise DataError(
            f"without the {len(largest)} largest of {len(runs)} runs, which are held out: {error}"
        ) from None


def _extrapolated(form: Form, runs: Sequence[Run], huber: float) -> HeldOut:
    """Fit without the runs of most compute, from the grid; return the errors on them."""
    kept, largest = _without_largest(runs)
    theta_P, _ = _Data.of(form, kept, huber).from_grid()
    return _held_out(form, theta_P, largest)[1]


def law_of(fit: Fit, name: str, source: str) -> Law:
    """Return a fit as a law, with the range of its runs.

    Args:
        fit: The fit.
        name: Of the law.
        source: Where the runs are from.

    Raises:
        DataError: The coefficients are outside what the form allows.
    """
    runs = fit.runs.used
    ranges: dict[str, tuple[float, float]] = {}
    for quantity in ("parameters", "tokens", "experts"):
        values = [getattr(one, quantity) for one in runs]
        ranges[quantity] = min(values), max(values)
    tokens = {one.tokens for one in runs}
    fields = {
        "name": name,
        "form": fit.form.name,
        "coefficients": dict(fit.coefficients),
        "source": source,
        "counts": fit.runs.counts,
        "tokens": "training tokens of the runs",
        "runs": f"{len(runs)} runs",
        "error": f"{fit.rms_log10:.2g} of log10 L on its runs (rms)",
        "ranges": ranges | {"granularity": (1.0, 1.0)},
        "fixed_tokens": None if "tokens" in fit.form.varying else max(tokens),
    }
    try:
        return Law.model_validate(fields)
    except ValidationError as error:
        raise DataError(
            f"the fitted coefficients do not make a law: {in_brief(error, 400)}; add runs that "
            "differ more, or fit another --form"
        ) from error
