"""Decide which guesses are worth a read, and whether prefetching pays at all.

`margins` and `Confidence` turn a predictor's scores into probabilities by counting how often such
guesses were right. `worth` is the expected time that one read saves, from the bandwidth and the
computation it may hide behind; `choose` takes the guesses that are worth something, and
`choose_nearest_first` those of several blocks, which share the bandwidth. `Trial`
compares the measured time of steps with and without prefetching, because no model knows what
reading costs the processor. Pure Python; times are in seconds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LEAST_CONFIDENCE = 0.4  # below, a wrong read costs more on busy devices than the right ones save
_BINS, _SPAN = 24, 3.0  # of margins, from -_SPAN to _SPAN
_PRIOR = 4.0  # guesses that the confidence of all blocks counts for in one block's
_FORGET = 2048.0  # guesses in a bin, after which both counts are halved
_PRIOR_SLOPE = 2.0  # of the confidence before anything is known


def margins(scores_TE: Sequence[Sequence[float]], chosen: int) -> dict[int, float]:
    """Return the margins of the experts that a router most probably chooses, by expert.

    A margin is a score above the middle between the last that is chosen and the first that is not,
    divided by the mean distance of a token's scores from it; of all tokens, the largest. Tokens
    with a score that is not finite are left out.

    Args:
        scores_TE: Scores by token and expert, of which the largest are chosen.
        chosen: Experts per token. Margins are returned of up to twice as many per token.

    >>> margins([[3.0, 1.0, 2.0, 1.0, 1.0]], 1)
    {0: 0.45454545454545453, 2: -0.45454545454545453}
    """
    out: dict[int, float] = {}
    for scores in scores_TE:
        ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        last = min(chosen, len(scores) - 1)
        middle = (scores[ranked[last - 1]] + scores[ranked[last]]) / 2
        spread = sum(abs(one - middle) for one in scores) / len(scores) or 1.0
        if not math.isfinite(spread):
            continue
        for expert in ranked[: max(2 * last, last + 1)]:
            margin = (scores[expert] - middle) / spread
            out[expert] = max(margin, out.get(expert, margin))
    return out


class Confidence:
    """How often experts with a given margin were chosen, by block.

    Args:
        blocks: Number of blocks.

    >>> confidence = Confidence(1)
    >>> confidence.of(0, 1.0) > 0.8 and confidence.of(0, -1.0) < 0.2
    True
    >>> for _ in range(50): confidence.observe(0, 1.0, False)
    >>> confidence.of(0, 1.0) < 0.1
    True
    """

    def __init__(self, blocks: int):
        prior = [1 / (1 + math.exp(-_PRIOR_SLOPE * _center(at))) for at in range(_BINS)]
        self._all = [[_PRIOR * one, _PRIOR] for one in prior]  # right and total
        self._by_block = [[[0.0, 0.0] for _ in range(_BINS)] for _ in range(blocks)]

    def of(self, block: int, margin: float) -> float:
        """Return the probability that the router chooses an expert with this margin."""
        at = _bin(margin)
        right, total = self._by_block[block][at]
        prior = self._all[at]
        return (right + _PRIOR * prior[0] / prior[1]) / (total + _PRIOR)

    def observe(self, block: int, margin: float, chosen: bool) -> None:
        """Count a guess, right or wrong."""
        at = _bin(margin)
        for counts in (self._by_block[block][at], self._all[at]):
            counts[0] += chosen
            counts[1] += 1
            if counts[1] > _FORGET:
                counts[0], counts[1] = counts[0] / 2, counts[1] / 2


def _bin(margin: float) -> int:
    return min(_BINS - 1, max(0, int((margin + _SPAN) / (2 * _SPAN) * _BINS)))


def _center(at: int) -> float:
    return (at + 0.5) / _BINS * 2 * _SPAN - _SPAN


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the device and the layer allow.

    Attributes:
        load: Time in which the device reads one expert.
        window: Time from the start of reading until the router of the block has chosen.
        queued: Experts that are being read already.
        most: Experts that may be read at most.
    """

    load: float
    window: float
    queued: int
    most: int


def worth(confidence: float, ahead: int, reading: Reading) -> float:
    """Return the expected time that reading a guess saves; negative if it costs some.

    A right guess saves as much of its read as fits into the window, after the reads before it. A
    wrong one delays the reads of the step by what does not fit.

    Args:
        confidence: Probability that the router chooses the guess.
        ahead: Reads before this one.
        reading: Of the device and the layer.

    >>> reading = Reading(load=2.0, window=3.0, queued=0, most=4)
    >>> worth(1.0, 0, reading), worth(1.0, 1, reading), worth(0.0, 1, reading)
    (2.0, 1.0, -1.0)
    """
    left = min(reading.load, max(0.0, reading.window - ahead * reading.load))
    late = reading.load - left
    return confidence * left - (1 - confidence) * late


def choose(absent: Mapping[int, float], reading: Reading) -> tuple[int, ...]:
    """Return the experts to read, most probable first.

    Args:
        absent: Probability by expert, of those that are not in memory.
        reading: Of the device and the layer.

    >>> reading = Reading(load=1.0, window=2.4, queued=0, most=4)
    >>> choose({7: 0.9, 3: 0.5, 1: 0.8, 2: 0.7}, reading), choose({5: 0.3}, reading)
    ((7, 1, 2), ())
    """
    chosen: list[int] = []
    for expert, confidence in sorted(absent.items(), key=lambda one: (-one[1], one[0])):
        if len(chosen) >= reading.most or confidence < LEAST_CONFIDENCE:
            break
        if worth(confidence, reading.queued + len(chosen), reading) <= 0:
            break
        chosen.append(expert)
    return tuple(chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The guesses for one block.

    Attributes:
        absent: Probability by expert, of those that are not in memory.
        window: Time until the router of the block has chosen, without the waits for other reads.
        most: Experts that may be read at most.
    """

    absent: Mapping[int, float]
    window: float
    most: int


def choose_nearest_first(
    blocks: Sequence[Candidates], *, load: float, queued: int
) -> list[tuple[int, ...]]:
    """Return the experts to read for each block, those of the nearest block first.

    A farther block's guesses have a longer window, but queue behind those of nearer blocks, so
    that they change nothing that is read for these.

    Args:
        blocks: Guesses, nearest block first.
        load: Time in which the device reads one expert.
        queued: Experts that are being read already.

    >>> near = Candidates(absent={1: 0.9, 2: 0.8}, window=2.0, most=4)
    >>> far = Candidates(absent={5: 0.9, 6: 0.8}, window=3.0, most=4)
    >>> choose_nearest_first([near, far], load=1.0, queued=0)
    [(1, 2), (5,)]
    """
    chosen: list[tuple[int, ...]] = []
    for one in blocks:
        reading = Reading(load=load, window=one.window, queued=queued, most=one.most)
        chosen.append(choose(one.absent, reading))
        queued += len(chosen[-1])
    return chosen


_WARM_UP, _PAIRS = 8, 12  # steps before a trial, and comparisons in it
TRIAL_STEPS = _WARM_UP + 2 * _PAIRS + 2
"""Steps after which a trial has decided."""
_PROBE, _RARE_PROBE = 16, 64  # one step of so many takes the other arm, with and without gain
_HALF_LIFE = 64.0  # comparisons
_MIN_GAIN = 0.02  # of the time of a step
_SURE = 2.0  # standard errors by which the gain must exceed that
_MIN_WAIT = 0.03  # share of a step spent waiting, below which nothing is to be gained
_JUMP = 1.5  # ratio of the times around a probe, above which nothing is compared
_OUTLIER = math.log(3.0)  # at which the logarithm of a ratio of times is cut


@dataclass(slots=True)
class _Mean:
    """A mean in which older values count less, and its standard error."""

    sum: float = 0.0
    squares: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        return self.sum / self.weight if self.weight else math.nan

    @property
    def error(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.weight - self.value**2) / self.weight)

    def add(self, value: float) -> None:
        keep = 0.5 ** (1 / _HALF_LIFE)
        self.sum, self.weight = self.sum * keep + value, self.weight * keep + 1
        self.squares = self.squares * keep + value**2


@dataclass(slots=True)
class _Arms:
    """Comparisons of steps with one number of tokens.

    Attributes:
        steps: Steps so far.
        pairs: Comparisons so far.
        ratio: Logarithm of the time with prefetching divided by the time without.
        waits: Share of the time without prefetching that was spent waiting for reads.
    """

    steps: int = 0
    pairs: int = 0
    ratio: _Mean = field(default_factory=_Mean)
    waits: _Mean = field(default_factory=_Mean)


class Trial:
    """Find out whether prefetching makes steps faster, by doing without it in some.

    A step is compared with the mean of the steps before and after it, which did the other, since
    times change as texts grow and requests come and go. Steps with different numbers of tokens are
    compared separately. After a warm-up both arms take turns; then the faster one is used, and the
    other is tried in one step of sixteen, or of 64 as long as it seems no faster, if steps wait for
    reads at all. Prefetching has to gain two percent and two standard errors, since a wrong
    decision for it costs more than one against it.

    >>> trial = Trial()
    >>> for _ in range(200):
    ...     prefetched = trial.use(1)
    ...     trial.measured(1, prefetched, 0.8 if prefetched else 1.0, waited=0.3)
    >>> trial.pays(1), sum(trial.use(1) for _ in range(16))
    (True, 15)
    """

    def __init__(self) -> None:
        self._by_tokens: dict[int, _Arms] = {}
        self._last: list[tuple[int, bool, float]] = []  # up to three: tokens, arm, seconds

    def forget(self) -> None:
        """Begin anew, such as with another budget."""
        self._by_tokens.clear()
        self._last.clear()

    def use(self, tokens: int) -> bool:
        """Begin a step, and return whether it should prefetch."""
        arms = self._by_tokens.setdefault(tokens, _Arms())
        arms.steps += 1
        if arms.steps <= _WARM_UP:
            return False
        if arms.pairs < _PAIRS:
            return arms.steps % 2 == 0 and self._waits(arms)
        best = self.pays(tokens)
        probe = _PROBE if arms.ratio.value < 0 else _RARE_PROBE
        if arms.steps % probe == 0 and (best or self._waits(arms)):
            return not best
        return best

    def measured(self, tokens: int, prefetched: bool, seconds: float, waited: float) -> None:
        """Record the time of a step, and how much of it was spent waiting for reads."""
        arms = self._by_tokens.setdefault(tokens, _Arms())
        if not prefetched and seconds > 0:
            arms.waits.add(min(1.0, waited / seconds))
        self._last = [*self._last[-2:], (tokens, prefetched, seconds)]
        if len(self._last) == 3 and arms.steps > _WARM_UP:
            self._compare(arms)

    def interrupted(self) -> None:
        """Compare no steps across this point, such as a step that is not measured."""
        self._last.clear()

    def _compare(self, arms: _Arms) -> None:
        """Compare the middle one of the last three steps with the two around it, if it is a probe.

        Around a jump, as when a request ends, nothing is compared: one such comparison would hide
        many others. While arms take turns, only steps with prefetching count as probes: comparisons
        that share two of three times would seem more certain than they are.
        """
        (before, arm, first), (tokens, probed, middle), (after, other, last) = self._last
        alike = before == tokens == after and arm == other != probed
        if not alike or probed == self.pays(tokens) or min(first, middle, last) <= 0:
            return
        if max(first, last) > _JUMP * min(first, last):
            return
        ratio = math.log(2 * middle / (first + last))
        ratio = max(-_OUTLIER, min(_OUTLIER, ratio))
        arms.ratio.add(ratio if probed else -ratio)
        arms.pairs += 1

    def pays(self, tokens: int) -> bool:
        """Return whether steps with prefetching were faster so far."""
        arms = self._by_tokens.get(tokens)
        if arms is None or arms.pairs < _PAIRS:
            return False
        return arms.ratio.value + _SURE * arms.ratio.error < math.log(1 - _MIN_GAIN)

    @staticmethod
    def _waits(arms: _Arms) -> bool:
        return arms.waits.value >= _MIN_WAIT
