"""Whether drafts pay: how likely they are accepted, and how long steps of more tokens take.

A step of several tokens chooses more experts than one of a single token, and in a small budget each
of them may have to be read. So drafts can be slower than plain decoding, and how many tokens a step
verifies follows from measurements: `Acceptance` counts how often drafts are right, also those that
are not verified, since the text shows it later; `StepTimes` knows the seconds of steps by their
number of tokens; `choose_lengths` maximises tokens per second. No tensors.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import accumulate
from operator import mul

_EVIDENCE = (2, 3, 4, 5, 7, 9, 13)  # least evidence of each class
# Probability that a token is accepted, by class of evidence, before anything is known.
LOOKUP_PRIOR = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85)
SAMPLED_PRIOR = (0.15, 0.2, 0.25, 0.35, 0.45, 0.55, 0.65)  # the same for sampled requests
COMPUTED_PRIOR = (0.6,) * len(_EVIDENCE)
_PRIOR_TRIALS = 8.0  # how many trials it counts as, in the engine's counts
_SHARED_TRIALS = 6.0  # how many trials the engine's counts count as, in those of a request
_FACTOR_TRIALS = 3.0  # how many trials a request's factor of 1 counts as
_OWN_MEMORY, _SHARED_MEMORY = 0.97, 0.995  # weight of what was known, at each trial
_FACTOR_MEMORY = 0.9  # the same for a request's factor
_VERIFIED_TRIALS = 3.0  # accepted tokens that a correction of 1 counts as
_VERIFIED_MEMORY = 0.95  # weight of what was known, at each verified draft
_MOST = 0.99
GAIN = 1.08  # least gain for which drafts are verified: expectations are not that exact


def evidence_class(evidence: int) -> int:
    """Return the class of an evidence: drafts of one class are counted together.

    >>> evidence_class(2), evidence_class(6), evidence_class(99)
    (0, 3, 6)
    """
    return max(0, sum(evidence >= least for least in _EVIDENCE) - 1)


class Counts:
    """Accepted draft tokens and trials by class of evidence, with old ones forgotten."""

    def __init__(self, memory: float, prior: Sequence[float] = LOOKUP_PRIOR):
        self._memory, self._prior = memory, prior
        self.accepted, self.trials = [0.0] * len(_EVIDENCE), [0.0] * len(_EVIDENCE)

    def add(self, number: int, *, accepted: bool) -> None:
        """Count a token of the class `number`."""
        self.accepted[number] = self._memory * self.accepted[number] + accepted
        self.trials[number] = self._memory * self.trials[number] + 1

    def rate(self, number: int) -> float:
        """Return the share of tokens of a class that were accepted, beginning from the prior."""
        accepted = self.accepted[number] + _PRIOR_TRIALS * self._prior[number]
        return accepted / (self.trials[number] + _PRIOR_TRIALS)


class Correction:
    """Accepted tokens of verified drafts over those that were expected of them.

    Drafts are verified where most is expected, so among estimates that are right on average those
    that are too high are chosen more often.
    """

    def __init__(self):
        self._accepted = self._expected = 0.0

    @property
    def factor(self) -> float:
        """What expectations are multiplied by, at most 1."""
        return min(1.0, (self._accepted + _VERIFIED_TRIALS) / (self._expected + _VERIFIED_TRIALS))

    def add(self, expected: float, accepted: int) -> None:
        """Count a verified draft."""
        self._accepted = _VERIFIED_MEMORY * self._accepted + accepted
        self._expected = _VERIFIED_MEMORY * self._expected + expected


class _Own:
    """What is known of one request: counts, and how its drafts do beside those of all requests."""

    def __init__(self, shared: Counts, correction: Correction):
        self.shared, self.counts = shared, Counts(_OWN_MEMORY)
        self.correction = correction  # that of all requests of its kind
        self._accepted = self._expected = 0.0

    @property
    def factor(self) -> float:
        """Accepted tokens over those that were expected from the counts of all requests."""
        return (self._accepted + _FACTOR_TRIALS) / (self._expected + _FACTOR_TRIALS)

    def add(self, number: int, *, accepted: bool) -> None:
        """Count a token of the class `number`."""
        self._accepted = _FACTOR_MEMORY * self._accepted + accepted
        self._expected = _FACTOR_MEMORY * self._expected + self.shared.rate(number)
        self.counts.add(number, accepted=accepted)
        self.shared.add(number, accepted=accepted)


class Acceptance:
    """How likely drafts of requests are right.

    Counts of all requests give an expectation by evidence, greedy ones and others apart.
    A request is more or less like them at any evidence, so a few of its tokens say much.

    Args:
        prior: How likely tokens are accepted before anything is known, by class of evidence.
        sampled: The same for sampled requests.
    """

    def __init__(
        self, prior: Sequence[float] = LOOKUP_PRIOR, sampled: Sequence[float] = SAMPLED_PRIOR
    ):
        self._shared = {
            False: Counts(_SHARED_MEMORY, prior),
            True: Counts(_SHARED_MEMORY, sampled),
        }
        self._corrections = {False: Correction(), True: Correction()}
        self._own: dict[str, _Own] = {}

    def open(self, request: str, *, sampled: bool) -> None:
        """Begin a request; `sampled` if it is not greedy."""
        self._own[request] = _Own(self._shared[sampled], self._corrections[sampled])

    def close(self, request: str) -> None:
        """Forget a request."""
        self._own.pop(request, None)

    def add(self, request: str, evidence: int, *, accepted: bool) -> None:
        """Count a draft's token whose predecessors were right."""
        self._own[request].add(evidence_class(evidence), accepted=accepted)

    def probability(self, request: str, evidence: int) -> float:
        """Return how likely a token is right if its predecessors in the draft are."""
        number, own = evidence_class(evidence), self._own[request]
        expected = min(_MOST, own.factor * own.shared.rate(number))
        accepted = own.counts.accepted[number] + _SHARED_TRIALS * expected
        return accepted / (own.counts.trials[number] + _SHARED_TRIALS)

    def chances(self, request: str, evidence: int, tokens: int) -> list[float]:
        """Return how likely each token of a draft is reached and right."""
        by_class: dict[int, float] = {}
        each: list[float] = []
        for place in range(tokens):
            number = evidence_class(evidence + place)
            if number not in by_class:
                by_class[number] = self.probability(request, evidence + place)
            each.append(by_class[number])
        return list(accumulate(each, mul, initial=self._own[request].correction.factor))[1:]

    def verified(self, request: str, chances: Sequence[float], accepted: int) -> None:
        """Count a verified draft.

        Args:
            request: Request id.
            chances: Of its tokens, as `chances` returned them.
            accepted: How many of them were right.
        """
        correction = self._own[request].correction
        correction.add(sum(chances) / correction.factor, accepted)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGrowth:
    """How the time of a step may grow with its tokens, before it is measured.

    Attributes:
        experts: E of a MoE layer.
        chosen: K.
        share: Of a one-token step's time that grows with the number of different experts: 1 where
            experts have to be read, else their share of the bytes that a token needs.
        per_token: What else each further token adds, as a share of a one-token step.
    """

    experts: int = 1
    chosen: int = 1
    share: float = 0.0
    per_token: float = 0.05

    def __call__(self, tokens: int) -> float:
        """Return the time of a step relative to one of a single token.

        Tokens that choose independently and evenly need E (1 - (1 - K/E)^T) different experts.
        Those of one text have more in common, so this is an upper bound.
        """
        absent = 1 - self.chosen / self.experts
        union = self.experts * (1 - absent**tokens) / self.chosen
        return 1 + self.share * (union - 1) + self.per_token * (tokens - 1)


_EXACT_SIZES = 32  # tokens up to which each number has its own measurements
_WEIGHT = 0.1  # least weight of a new measurement
_SLOW = 4.0  # times the known time: what a measurement counts as at most


class StepTimes:
    """Seconds of steps by their number of tokens.

    Args:
        growth: Of steps that were not measured, relative to the nearest smaller one that was.
    """

    def __init__(self, growth: Callable[[int], float]):
        self._growth = growth
        self._known: dict[int, tuple[float, int]] = {}  # mean seconds, measurements
        self._sorted: tuple[list[int], list[float]] | None = None

    def add(self, tokens: int, seconds: float) -> None:
        """Add a measurement; single slow ones, such as of a busy machine, count little."""
        size = _size(tokens)
        mean, number = self._known.get(size, (seconds, 0))
        weight = max(1 / (number + 1), _WEIGHT)
        seconds = min(seconds, _SLOW * mean)
        self._known[size] = (mean + weight * (seconds - mean), number + 1)
        self._sorted = None

    def seconds(self, tokens: int) -> float | None:
        """Return the expected seconds of a step; None before the first measurement.

        Between two measured sizes it is interpolated. Steps of a size take at most as long as
        larger ones were measured to take, so that one slow step does not outweigh later ones.
        """
        size, (sizes, seconds) = _size(tokens), self._table()
        if not sizes:
            return None
        above = bisect_right(sizes, size)
        if not above:
            return seconds[0] / self._growth(sizes[0]) * self._growth(size)
        nearest, slowest = sizes[above - 1], seconds[above - 1]
        if nearest == size:
            return slowest
        if above == len(sizes):
            return slowest * self._growth(size) / self._growth(nearest)
        part = (size - nearest) / (sizes[above] - nearest)
        return slowest + part * (seconds[above] - slowest)

    def _table(self) -> tuple[list[int], list[float]]:
        """Return the measured sizes and the seconds of each, at most those of any larger one."""
        if self._sorted is None:
            sizes = sorted(self._known)
            falling = accumulate((self._known[size][0] for size in reversed(sizes)), min)
            self._sorted = sizes, list(falling)[::-1]
        return self._sorted


class DraftingTimes:
    """Seconds of drafting, for each token of the longest draft, which are computed in turn."""

    def __init__(self):
        self._mean, self._number = 0.0, 0

    def add(self, longest: int, seconds: float) -> None:
        """Add a measurement."""
        each = seconds / longest
        if self._number:
            each = min(each, _SLOW * self._mean)
        self._number += 1
        self._mean += max(1 / self._number, _WEIGHT) * (each - self._mean)

    def seconds(self, longest: int) -> float:
        """Return the expected seconds; 0 before the first measurement, which is then made."""
        return longest * self._mean


def _size(tokens: int) -> int:
    """Return the number of tokens that a step is measured as: above 32 a multiple of 16."""
    return tokens if tokens <= _EXACT_SIZES else -(-tokens // 16) * 16


def choose_lengths(
    chances: Mapping[str, Sequence[float]],
    *,
    tokens: int,
    most: int,
    seconds: Callable[[int], float | None],
    drafting: Callable[[int], float] = lambda longest: 0.0,
) -> dict[str, int]:
    """Return how many tokens of each draft to verify, so that most tokens per second are expected.

    Tokens of prompts in the same step count as much as generated ones.

    Args:
        chances: How likely each token of a draft is accepted, by request; these never increase.
        tokens: Of the step without drafts.
        most: Drafted tokens of the step.
        seconds: Expected seconds of a step by its tokens; None where nothing is known.
        drafting: Expected seconds of drafting, by the tokens of the longest draft.

    Returns:
        Lengths of the drafts that are verified; none if that gains less than `GAIN`.

    >>> choose_lengths({"a": [0.9, 0.8], "b": [0.1]}, tokens=2, most=8, seconds=lambda n: 10 + n)
    {'a': 2}
    """
    plain = seconds(tokens)
    if plain is None:
        return {}
    best_rate, best, longest = GAIN * tokens / plain, 0, 0
    order = [name for _, name in zip(range(most), _likeliest_first(chances), strict=False)]
    expected, taken = float(tokens), dict[str, int]()
    for number, name in enumerate(order, start=1):
        expected += chances[name][taken.get(name, 0)]
        taken[name] = taken.get(name, 0) + 1
        longest = max(longest, taken[name])
        time = seconds(tokens + number)
        if time is not None and expected / (time + drafting(longest)) > best_rate:
            best_rate, best = expected / (time + drafting(longest)), number
    chosen = dict[str, int]()
    for name in order[:best]:
        chosen[name] = chosen.get(name, 0) + 1
    return chosen


def _likeliest_first(chances: Mapping[str, Sequence[float]]):
    """Yield the names of requests, once for each token of their drafts, likeliest token first."""
    waiting = [(-one[0], name, 0) for name, one in chances.items() if one]
    heapify(waiting)
    while waiting:
        _, name, place = heappop(waiting)
        yield name
        if place + 1 < len(chances[name]):
            heappush(waiting, (-chances[name][place + 1], name, place + 1))
