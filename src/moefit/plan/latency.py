"""How long a token takes, from times of parts: everything else, experts' computation, misses.

Owns the parts of a configuration, and the few coefficients that fit their sum to measured runs:
what the parts leave out per token, how much of a load hides behind computation, and what changing
routes costs a block. Two candidates are compared by what they say of runs they have not seen.

Shapes: N runs, F parts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moefit.plan.configuration import Configuration
from moefit.plan.fitting import Features, HeldOutError, held_out, held_out_error, nonnegative
from moefit.plan.profile import Profile
from moefit.plan.reference import Sample, sample_from
from moefit.plan.timing import FormatTimes
from moefit.serve.config import BlockPlacement

PARTS = ("constant", "computed", "fetched", "rerouted", "swapped")
_STRENGTH = 0.02
_PRIORS = {
    "parts added": (0.0, 1.0, 1.0, 0.0, 0.0),
    "parts fitted": (2e-3, 1.0, 0.8, 1.0, 0.3),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTimes:
    """What a profile measured of parts. Seconds; load by format, warm or cold as it will be."""

    rest: Mapping[str, float]
    block: Mapping[str, float]
    load: Mapping[str, float]

    def computed(self, name: str, placement: BlockPlacement, features: Features) -> float:
        """Of one block's experts; where formats differ, by how much each is used."""
        if not placement.by_expert:
            return self.block[placement.formats[0]]
        mass_E = features.blocks[name].mass_E
        return sum(
            share * self.block[format]
            for share, format in zip(mass_E, placement.formats, strict=True)
        )

    def loaded(self, placement: BlockPlacement) -> float:
        """To fetch one expert; blocks with formats by expert fetch none."""
        return self.load[placement.formats[0]]


def part_times(profile: Profile, *, cold: bool) -> PartTimes:
    """cold: files are not in the page cache, so that each load comes from storage."""
    formats = {name: FormatTimes(**one) for name, one in profile.those("format/").items()}
    native = formats["native"]
    per_byte = (native.cold if cold else native.warm) / native.nbytes

    def load(one: FormatTimes) -> float:
        if one.packed:
            return one.cold if cold else one.warm
        return per_byte * one.nbytes  # once it is packed

    return PartTimes(
        rest={name: one["seconds"] for name, one in profile.those("rest/").items()},
        block={name: one.block["1"] for name, one in formats.items()},
        load={name: load(one) for name, one in formats.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """Seconds a token of a configuration."""

    name: str
    times: PartTimes
    features: Features
    coefficients: tuple[float, ...]
    comparison: tuple[HeldOutError, ...]

    def seconds(self, configuration: Configuration) -> float:
        """Of decoding one token."""
        parts = parts_of(configuration, self.times, self.features)
        return float(np.dot(parts, self.coefficients))

    def fixed(self, rest: str) -> float:
        """What a token takes beside its blocks."""
        constant, computed = self.coefficients[:2]
        return constant + computed * self.times.rest[rest]

    def block(
        self, name: str, placement: BlockPlacement, policy: str, misses: float, swaps: float
    ) -> float:
        """What one block adds; the sum over blocks and `fixed` is `seconds`."""
        _, computed, fetched, rerouted, swapped = self.coefficients
        load = self.times.loaded(placement)
        return (
            computed * self.times.computed(name, placement, self.features)
            + fetched * misses * load
            + swapped * swaps * load
            + rerouted * (0.0 if policy == "exact" else _REROUTING)
        )


_REROUTING = 3e-4  # seconds a block, the prior of what rerouting one token costs


def parts_of(
    configuration: Configuration, times: PartTimes, features: Features
) -> tuple[float, ...]:
    """Seconds of each of `PARTS`, before coefficients."""
    placement = configuration.placement
    load = [times.loaded(one) for one in placement.values()]
    misses, swaps = features.misses(configuration), features.swaps(configuration)
    computed = sum(times.computed(name, one, features) for name, one in placement.items())
    return (
        1.0,
        times.rest[configuration.rest] + computed,
        float(np.dot(misses, load)),
        0.0 if configuration.mode == "exact" else _REROUTING * len(placement),
        float(np.dot(swaps, load)),
    )


def fit_latency(profile: Profile, features: Features, *, cold: bool = False) -> LatencyModel:
    """The candidate that predicts best what it has not seen; runs are measured warm."""
    warm = part_times(profile, cold=False)
    runs = [sample_from(one) for one in profile.those("steps/").values()]
    fits = {
        "parts added": lambda _: np.asarray(_PRIORS["parts added"]),
        "parts fitted": lambda some: _fitted(some, warm, features),
    }
    comparison = [_compared(name, fit, runs, warm, features) for name, fit in fits.items()]
    best = min(comparison, key=lambda one: one.mean)
    return LatencyModel(
        name=best.model,
        times=part_times(profile, cold=cold),
        features=features,
        coefficients=tuple(float(c) for c in fits[best.model](runs)),
        comparison=tuple(comparison),
    )


_Fit = Callable[[Sequence[Sample]], np.ndarray]


def _fitted(runs: Sequence[Sample], times: PartTimes, features: Features) -> np.ndarray:
    """Least squares of relative errors."""
    x_NF = np.array([parts_of(one.configuration, times, features) for one in runs])
    y_N = np.array([one.seconds or 0.0 for one in runs])
    prior_F = np.array(_PRIORS["parts fitted"])
    return nonnegative(x_NF / y_N[:, None], np.ones_like(y_N), prior_F=prior_F, strength=_STRENGTH)


def _compared(
    name: str, fit: _Fit, runs: Sequence[Sample], times: PartTimes, features: Features
) -> HeldOutError:
    def fitted(some: Sequence[Sample]) -> Callable[[Sample], float]:
        c_F = fit(some)
        return lambda one: float(np.dot(parts_of(one.configuration, times, features), c_F))

    predicted = held_out(fitted, runs, folds=len(runs))
    return held_out_error(name, predicted, [one.seconds or 0.0 for one in runs])
