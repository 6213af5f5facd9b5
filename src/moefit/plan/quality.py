"""Predict the quality of a configuration: KL divergence per token and loss of perplexity.

A model that is additive over blocks, with fitted sensitivities; its form is chosen by
cross-validation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from moefit.plan.configuration import Configuration
from moefit.plan.experiments import DENSE_FORMATS, groups
from moefit.plan.fitting import (
    Features,
    HeldOutError,
    held_out,
    held_out_error,
    nonnegative_least_squares,
)
from moefit.plan.profile import Profile
from moefit.plan.reference import Sample, sample_from
from moefit.serve.config import BlockPlacement

FLOOR = 0.005  # nats; errors are relative to the measured value, but at least to this
POWERS = (1.0, 1.25, None)
_STRENGTH = 0.02
# Priors of substitution cost: the exponent, its weight, and nats when all weight is substituted.
_EXPONENTS = {"bounded": 1.0, "virtual": 1.5}
_EXPONENT_WEIGHT = 0.3
_COSTS = {"bounded": 0.3, "virtual": 2.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdditiveModel:
    """KL = S + curvature * S^2 + cost * substituted^exponent.

    S is the sum of sensitivity * error^power over blocks, plus the dense weights' term.

    Attributes:
        name: Name of this form of the model.
        features: Computes errors and substituted weight.
        powers: Exponent of the errors, by block.
        curvature: Factor of S^2.
        sensitivity: Factor of a block's error, by block.
        dense: Term of the dense weights, by their format, in nats.
        moved: (cost, exponent) of the mean share of substituted router weight, by mode.
        scales: Increase in loss per KL due to precision, and per KL due to substitution.
    """

    name: str
    features: Features
    powers: Mapping[str, float]
    curvature: float
    sensitivity: Mapping[str, float]
    dense: Mapping[str, float]
    moved: Mapping[str, tuple[float, float]]
    scales: tuple[float, float]

    def precision(self, configuration: Configuration) -> float:
        """Return the KL due to formats, in nats per token."""
        noises = self.features.noises(configuration, self.powers)
        pairs = zip(self.sensitivity.values(), noises, strict=True)
        total = sum(s * q for s, q in pairs) + self.dense[configuration.dense_precision]
        return total + self.curvature * total**2

    def substitution(self, configuration: Configuration) -> float:
        """Return the KL due to substituted router weight, in nats per token."""
        if configuration.mode == "exact":
            return 0.0
        cost, exponent = self.moved[configuration.mode]
        return cost * float(np.mean(self.features.moved(configuration))) ** exponent

    def divergence(self, configuration: Configuration) -> float:
        """Return KL(full || configuration) in nats per token."""
        return self.precision(configuration) + self.substitution(configuration)

    def nats(self, configuration: Configuration) -> float:
        """Return the increase of the loss on text, in nats per token."""
        a, b = self.scales
        return a * self.precision(configuration) + b * self.substitution(configuration)

    def block(self, name: str, placement: BlockPlacement, mode: str, moved: float) -> float:
        """Return one block's part of `nats` in a linear approximation, for the allocation.

        Args:
            name: The block.
            placement: Its slots and formats.
            mode: What happens when an expert is not resident.
            moved: Share of router weight that is substituted.
        """
        a, b = self.scales
        added = a * self.sensitivity[name] * self.features.noise(name, placement, self.powers[name])
        if mode == "exact":
            return added
        cost, _ = self.moved[mode]
        return added + b * cost * moved / len(self.sensitivity)


def fit_additive(
    samples: Sequence[Sample], features: Features, *, power: float | None, curved: bool
) -> AdditiveModel:
    """Fit sensitivities and curvature to exact samples, then substitution costs, then scales.

    Args:
        samples: Measured configurations.
        features: Computes errors and substituted weight.
        power: Exponent of errors; None to fit one per block, to samples that quantize it alone.
        curved: Whether to fit a curvature.
    """
    exact = [one for one in samples if one.configuration.mode == "exact"]
    non_exact = [one for one in samples if one.configuration.mode != "exact"]
    powers = {
        name: _fit_power(exact, features, name) if power is None else power
        for name in features.shapes
    }
    sensitivity, dense, curvature = _fit_sensitivities(exact, features, powers, curved=curved)
    model = AdditiveModel(
        name=additive_name(power, curved=curved),
        features=features,
        powers=powers,
        curvature=curvature,
        sensitivity=sensitivity,
        dense=dense,
        moved={},
        scales=(1.0, 1.0),
    )
    moved = {mode: _fit_substitution(samples, model, mode) for mode in _EXPONENTS}
    model = replace(model, moved=moved)
    return replace(model, scales=(_scale(exact, model), _scale(non_exact, model)))


def additive_name(power: float | None, *, curved: bool) -> str:
    """Return the name of a candidate."""
    exponent = "own powers" if power is None else f"error^{power:g}"
    return f"additive, {exponent}{', curved' if curved else ''}"


def _fit_power(samples: Sequence[Sample], features: Features, name: str) -> float:
    """Fit the slope of log KL over log error to samples that quantize this block alone."""
    points: dict[str, tuple[float, float]] = {}
    most = max(map(len, groups(features.shapes)))  # blocks that are probed together
    for one in samples:
        placement = one.configuration.placement
        quantized = [other for other, some in placement.items() if some.formats != ("native",)]
        if name in quantized and len(quantized) <= most and one.divergence > 0:
            noise = features.noise(name, placement[name])
            points[placement[name].formats[0]] = (np.log(noise), np.log(one.divergence))
    if len(points) < 2:
        return 1.0
    (x0, y0), (x1, y1) = min(points.values()), max(points.values())
    return float(np.clip((y1 - y0) / (x1 - x0), 1.0, 2.0)) if x1 > x0 else 1.0


def _fit_sensitivities(
    samples: Sequence[Sample], features: Features, powers: Mapping[str, float], *, curved: bool
) -> tuple[dict[str, float], dict[str, float], float]:
    """Fit sensitivities for each of several curvatures, keep the best."""
    names, encoded = list(features.shapes), DENSE_FORMATS[1:]
    x_NF = np.array(
        [
            [
                *features.noises(one.configuration, powers),
                *(float(one.configuration.dense_precision == name) for name in encoded),
            ]
            for one in samples
        ]
    )
    y_N = np.array([max(one.divergence, 0.0) for one in samples])
    trials = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0) if curved else (0.0,)
    found = [(_fit_weighted(x_NF, y_N, c, len(names)), c) for c in trials]
    (_, best), curvature = min(found, key=lambda one: one[0][0])
    sensitivity = dict(zip(names, best[: len(names)].tolist(), strict=True))
    dense = {DENSE_FORMATS[0]: 0.0, **dict(zip(encoded, best[len(names) :].tolist(), strict=True))}
    return sensitivity, dense, curvature


def _fit_weighted(
    x_NF: np.ndarray, y_N: np.ndarray, curvature: float, blocks: int
) -> tuple[float, np.ndarray]:
    """Return the mean squared relative error, and the coefficients."""
    inner_N = y_N if not curvature else (np.sqrt(1 + 4 * curvature * y_N) - 1) / (2 * curvature)
    weight_N = 1 / np.maximum(y_N, FLOOR)
    total = x_NF[:, :blocks].sum()
    mean = inner_N.sum() / total if total else 1.0
    prior_F = _single_feature_estimates(x_NF, inner_N, max(float(mean), 1e-9))
    prior_F[blocks:] = 1e-3
    c_F = nonnegative_least_squares(
        x_NF * weight_N[:, None], inner_N * weight_N, prior_F=prior_F, strength=_STRENGTH
    )
    inner = x_NF @ c_F
    errors = (inner + curvature * inner**2 - y_N) * weight_N
    return float((errors**2).mean()), c_F


def _single_feature_estimates(x_NF: np.ndarray, y_N: np.ndarray, default: float) -> np.ndarray:
    """Return the geometric mean of y / x over samples where only this feature is not zero."""
    prior_F = np.full(x_NF.shape[1], default)
    single_N = (x_NF > 0).sum(1) == 1
    for f in range(x_NF.shape[1]):
        here_N = single_N & (x_NF[:, f] > 0) & (y_N > 0)
        if here_N.any():
            prior_F[f] = np.exp(np.log(y_N[here_N] / x_NF[here_N, f]).mean())
    return prior_F


def _fit_substitution(
    samples: Sequence[Sample], model: AdditiveModel, mode: str
) -> tuple[float, float]:
    """Fit KL = cost * moved^exponent, a line in logarithms, with a prior on the exponent."""
    points: list[tuple[float, float]] = []
    for one in samples:
        if one.configuration.mode == mode:
            moved = float(np.mean(model.features.moved(one.configuration)))
            left = one.divergence - model.precision(one.configuration)
            if moved > 1e-4:
                points.append((np.log(moved), np.log(max(left, 1e-4))))
    exponent = _EXPONENTS[mode]
    if not points:
        return _COSTS[mode], exponent
    x_N, y_N = np.array(points).T
    around = x_N - x_N.mean()
    slope = (around @ (y_N - y_N.mean()) + _EXPONENT_WEIGHT * exponent) / (
        around @ around + _EXPONENT_WEIGHT
    )
    slope = float(np.clip(slope, 0.5, 3.0))
    return float(np.exp(y_N.mean() - slope * x_N.mean())), slope


def _scale(samples: Sequence[Sample], model: AdditiveModel) -> float:
    """Fit the increase of the loss on text per KL, with a prior of one."""
    kl = np.array([one.divergence for one in samples])
    nats = np.array([one.loss - one.full_loss for one in samples])
    pull = 0.25 * float((kl**2).sum()) + 1e-6
    return float(np.clip((kl @ nats + pull) / (kl @ kl + pull), 0.5, 2.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityModel:
    """The additive model that predicts best.

    Attributes:
        additive: The model, fitted to all samples.
        margin: Median absolute error of held-out predictions, in nats per token.
        comparison: Held-out errors of all candidates.
    """

    additive: AdditiveModel
    margin: float
    comparison: tuple[HeldOutError, ...]

    @property
    def name(self) -> str:
        """Name of the chosen candidate."""
        return self.additive.name

    def loss(self, configuration: Configuration) -> float:
        """Return the relative increase in perplexity over the full model."""
        return float(np.expm1(self.additive.nats(configuration)))


def compare_quality(profile: Profile, features: Features) -> dict[str, Any]:
    """Compare all candidates by cross-validation.

    This is slow, so a profile stores the result once all its samples are measured.
    """
    samples = quality_samples(profile)
    fits = candidates(features)
    predicted = {name: held_out(_divergence(fit), samples) for name, fit in fits.items()}
    measured = [sample.divergence for sample in samples]
    comparison = [
        held_out_error(name, some, measured, floor=FLOOR) for name, some in predicted.items()
    ]
    best = min(comparison, key=lambda error: error.mean).model
    errors = np.abs(np.array(predicted[best]) - np.array(measured))
    return {
        "additive": best,
        "margin": float(np.median(errors)),
        "comparison": [asdict(error) for error in comparison],
    }


def fit_quality(profile: Profile, features: Features) -> QualityModel:
    """Fit the candidate that `compare_quality` chose to all samples."""
    found = profile.items["models"]["quality"]
    fits = candidates(features)
    if found.get("judge", found["additive"]) not in fits:
        # Profiles written before may name a network, whose margin is not the additive model's.
        found = compare_quality(profile, features)
    return QualityModel(
        additive=fits[found["additive"]](quality_samples(profile)),
        margin=found["margin"],
        comparison=tuple(HeldOutError(**error) for error in found["comparison"]),
    )


_Fit = Callable[[Sequence[Sample]], AdditiveModel]


def candidates(features: Features) -> dict[str, _Fit]:
    """Return functions that fit a model to samples, by the model's name."""
    return {
        additive_name(power, curved=curved): partial(
            fit_additive, features=features, power=power, curved=curved
        )
        for power in POWERS
        for curved in (False, True)
    }


def _divergence(fit: _Fit) -> Callable[[Sequence[Sample]], Callable[[Sample], float]]:
    def fitted(samples: Sequence[Sample]) -> Callable[[Sample], float]:
        model = fit(samples)
        return lambda sample: model.divergence(sample.configuration)

    return fitted


def quality_samples(profile: Profile) -> list[Sample]:
    """Return all samples of quality: whole windows and step by step."""
    values = [*profile.those("quality/").values(), *profile.those("steps/").values()]
    return [sample_from(one) for one in values]
