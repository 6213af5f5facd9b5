"""Which quality model predicts best what it has not seen, and how well.

Owns the comparison, and the choice by held-out error.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moefit.plan.configuration import Configuration
from moefit.plan.features import Knowledge
from moefit.plan.fitting import Held, held_out, worth
from moefit.plan.network import NetworkModel, fit_network
from moefit.plan.profile import Profile
from moefit.plan.quality import FLOOR, POWERS, AdditiveModel, additive_name, fit_additive
from moefit.plan.samples import Sample, sample_from

Model = AdditiveModel | NetworkModel


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityModel:
    """The best additive model for allocating, and the best of all for judging.

    margin: by how much the loss of perplexity may be more than predicted; half of the held-out
    samples were nearer.
    """

    additive: AdditiveModel
    judge: Model
    margin: float
    comparison: tuple[Held, ...]

    @property
    def name(self) -> str:
        """The judge's."""
        return self.judge.name

    def loss(self, configuration: Configuration) -> float:
        """Perplexity over that of the full model, less one."""
        if isinstance(self.judge, AdditiveModel):
            return float(np.expm1(self.judge.nats(configuration)))
        return float(np.expm1(self.judge.divergence(configuration)))


def compare_quality(profile: Profile, knowledge: Knowledge) -> dict[str, Any]:
    """All candidates, judged by samples that they were not fitted to; plain values for the profile.

    Takes a while, so it is done once, when everything is measured.
    """
    samples = quality_samples(profile)
    fits = candidates(knowledge)
    predicted = {name: held_out(_divergence(fit), samples) for name, fit in fits.items()}
    measured = [one.divergence for one in samples]
    comparison = [worth(name, some, measured, floor=FLOOR) for name, some in predicted.items()]
    best = min(comparison, key=lambda one: one.mean).model
    additive = min(comparison[:-1], key=lambda one: one.mean).model  # the last is the network
    errors = np.abs(np.array(predicted[best]) - np.array(measured))
    return {
        "judge": best,
        "additive": additive,
        "margin": float(np.median(errors)),
        "comparison": [asdict(one) for one in comparison],
    }


def fit_quality(profile: Profile, knowledge: Knowledge) -> QualityModel:
    """Those that `compare_quality` chose, fitted to all samples."""
    found = profile.items["models"]["quality"]
    fits, samples = candidates(knowledge), quality_samples(profile)
    additive = fits[found["additive"]](samples)
    assert isinstance(additive, AdditiveModel)
    same = found["judge"] == found["additive"]
    return QualityModel(
        additive=additive,
        judge=additive if same else fits[found["judge"]](samples),
        margin=found["margin"],
        comparison=tuple(Held(**one) for one in found["comparison"]),
    )


def candidates(knowledge: Knowledge) -> dict[str, Callable[[Sequence[Sample]], Model]]:
    """By name; the last is the network."""
    fits: dict[str, Callable[[Sequence[Sample]], Model]] = {
        additive_name(power, curved=curved): _additive(knowledge, power, curved=curved)
        for power in POWERS
        for curved in (False, True)
    }
    fits["network of two layers"] = lambda some: fit_network(some, knowledge)
    return fits


def _additive(
    knowledge: Knowledge, power: float | None, *, curved: bool
) -> Callable[[Sequence[Sample]], Model]:
    return lambda some: fit_additive(some, knowledge, power=power, curved=curved)


def _divergence(
    fit: Callable[[Sequence[Sample]], Model],
) -> Callable[[Sequence[Sample]], Callable[[Sample], float]]:
    def fitted(some: Sequence[Sample]) -> Callable[[Sample], float]:
        model = fit(some)
        return lambda one: model.divergence(one.configuration)

    return fitted


def quality_samples(profile: Profile) -> list[Sample]:
    """All that was measured, window by window and step by step."""
    values = [*profile.those("quality/").values(), *profile.those("steps/").values()]
    return [sample_from(one) for one in values]
