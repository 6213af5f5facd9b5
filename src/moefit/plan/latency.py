"""Predict the decoding time per token of a configuration.

The prediction is a weighted sum of measured parts: dense weights, experts' computation, loads and
rerouting. The coefficients are fitted to measured runs: a constant per token, the share of a load
that computation does not hide, and the cost of rerouting. Cross-validation decides between fitted
and fixed coefficients.

Shapes: N runs, F parts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moefit.plan.configuration import Configuration, Lengths
from moefit.plan.fitting import (
    Features,
    HeldOutError,
    features_of,
    held_out,
    held_out_error,
    nonnegative_least_squares,
)
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
    """Measured times of parts, in seconds.

    Attributes:
        dense: Everything except experts, per token, by format of the dense weights. With an
            encoder, it includes the token's share of the source.
        block: The experts of one block, per token, by format.
        encoder_block: The same of an encoder's block, whose sources are shared by their tokens.
        load: Loading one expert, by format, from the page cache or from storage.
    """

    dense: Mapping[str, float]
    block: Mapping[str, float]
    encoder_block: Mapping[str, float]
    load: Mapping[str, float]

    def computed(self, name: str, placement: BlockPlacement, features: Features) -> float:
        """Return the time of one block's experts, weighted by use where formats differ."""
        block = self.encoder_block if features.shapes[name].in_encoder else self.block
        if not placement.by_expert:
            return block[placement.formats[0]]
        mass_E = features.blocks[name].mass_E
        return sum(
            share * block[format] for share, format in zip(mass_E, placement.formats, strict=True)
        )

    def loaded(self, placement: BlockPlacement) -> float:
        """Return the time to load one expert; blocks with formats by expert are fully resident."""
        return self.load[placement.formats[0]]


def part_times(profile: Profile, *, cold: bool, lengths: Lengths | None = None) -> PartTimes:
    """Return the times of a profile.

    Args:
        profile: A finished profile.
        cold: Whether loads come from storage instead of the page cache.
        lengths: Of an encoder-decoder's requests; by default those of the profile's pairs.
    """
    lengths = lengths or profile.facts.lengths
    share = 0.0 if lengths is None else lengths.source / lengths.target
    formats = {name: FormatTimes(**one) for name, one in profile.those("format/").items()}
    native = formats["native"]
    per_byte = (native.cold if cold else native.warm) / native.nbytes

    def load(one: FormatTimes) -> float:
        if one.packed:
            return one.cold if cold else one.warm
        return per_byte * one.nbytes  # predicts the time once it is packed

    return PartTimes(
        dense={
            name: one["seconds"] + share * one.get("source_token_seconds", 0.0)
            for name, one in profile.those("rest/").items()
        },
        block={name: one.block["1"] for name, one in formats.items()},
        encoder_block={name: _of_source(one, lengths) for name, one in formats.items()},
        load={name: load(one) for name, one in formats.items()},
    )


def _of_source(one: FormatTimes, lengths: Lengths | None) -> float:
    """Return the seconds of one block's experts for a source, per token of the output.

    Beyond the longest measured pass they grow in proportion.
    """
    if lengths is None:
        return 0.0
    known = {int(tokens): seconds for tokens, seconds in one.block.items()}
    longest = max(known)
    seconds = float(np.interp(lengths.source, list(known), list(known.values())))
    return seconds * max(1.0, lengths.source / longest) / lengths.target


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """Predicts the time per token.

    Attributes:
        name: Name of the candidate.
        times: Measured times of parts.
        features: Computes misses and swaps.
        coefficients: Factors of `PARTS`.
        comparison: Held-out errors of all candidates.
    """

    name: str
    times: PartTimes
    features: Features
    coefficients: tuple[float, ...]
    comparison: tuple[HeldOutError, ...]

    def seconds(self, configuration: Configuration) -> float:
        """Return the seconds to decode one token."""
        parts = parts_of(configuration, self.times, self.features)
        return float(np.dot(parts, self.coefficients))

    def fixed(self, dense_precision: str) -> float:
        """Return the seconds per token outside the blocks' experts."""
        constant, computed = self.coefficients[:2]
        return constant + computed * self.times.dense[dense_precision]

    def block(
        self, name: str, placement: BlockPlacement, policy: str, misses: float, swaps: float
    ) -> float:
        """Return one block's part of `seconds`, which is `fixed` plus the sum over blocks.

        Args:
            name: The block.
            placement: Its slots and formats.
            policy: Name of the policy's curves.
            misses: Experts that a token waits for.
            swaps: Experts loaded in the background per token.
        """
        _, computed, fetched, rerouted, swapped = self.coefficients
        load = self.times.loaded(placement)
        return (
            computed * self.times.computed(name, placement, self.features)
            + fetched * misses * load
            + swapped * swaps * load
            + rerouted * (0.0 if policy == "exact" else _REROUTING * self.features.steps(name))
        )


_REROUTING = 3e-4  # seconds per block to reroute one token, before its coefficient


def parts_of(
    configuration: Configuration, times: PartTimes, features: Features
) -> tuple[float, ...]:
    """Return the seconds of each of `PARTS`, before coefficients."""
    placement = configuration.placement
    load = [times.loaded(one) for one in placement.values()]
    misses, swaps = features.misses(configuration), features.swaps(configuration)
    computed = sum(times.computed(name, one, features) for name, one in placement.items())
    return (
        1.0,
        times.dense[configuration.dense_precision] + computed,
        float(np.dot(misses, load)),
        0.0 if configuration.mode == "exact" else _REROUTING * sum(map(features.steps, placement)),
        float(np.dot(swaps, load)),
    )


def fit_latency(
    profile: Profile, features: Features, *, cold: bool = False, lengths: Lengths | None = None
) -> LatencyModel:
    """Fit the candidate with the smallest held-out error to all runs, which are measured warm.

    Args:
        profile: A finished profile.
        features: Computes misses and swaps.
        cold: Whether the model predicts loads from storage instead of the page cache.
        lengths: Of the requests that are predicted for an encoder-decoder; by default those of the
            profile's pairs.
    """
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
        times=part_times(profile, cold=cold, lengths=lengths),
        features=features if lengths is None else features_of(profile, lengths),
        coefficients=tuple(float(c) for c in fits[best.model](runs)),
        comparison=tuple(comparison),
    )


_Fit = Callable[[Sequence[Sample]], np.ndarray]


def _fitted(runs: Sequence[Sample], times: PartTimes, features: Features) -> np.ndarray:
    """Minimize squared relative errors."""
    x_NF = np.array([parts_of(one.configuration, times, features) for one in runs])
    y_N = np.array([one.seconds or 0.0 for one in runs])
    prior_F = np.array(_PRIORS["parts fitted"])
    return nonnegative_least_squares(
        x_NF / y_N[:, None], np.ones_like(y_N), prior_F=prior_F, strength=_STRENGTH
    )


def _compared(
    name: str, fit: _Fit, runs: Sequence[Sample], times: PartTimes, features: Features
) -> HeldOutError:
    def fitted(some: Sequence[Sample]) -> Callable[[Sample], float]:
        c_F = fit(some)
        return lambda one: float(np.dot(parts_of(one.configuration, times, features), c_F))

    predicted = held_out(fitted, runs, folds=len(runs))
    return held_out_error(name, predicted, [one.seconds or 0.0 for one in runs])
