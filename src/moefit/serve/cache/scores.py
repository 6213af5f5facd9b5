"""Score experts by their recent use, and plan swaps from the scores.

`DecayedCounter` is the exponentially decayed sum behind importance, eviction and the host cache.
`ExpertImportanceEstimator` and `VirtualExpertManager` are SwapMoE's components of those names
(arXiv 2308.15030): the scores of one block's experts, and the swaps that the scores justify.
All of it is pure Python; `swaps.py` carries swaps out.
"""

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
_RESCALE = 256  # half-lives; 2**256 leaves room for sums within a float's range


class DecayedCounter(Generic[Key]):
    """Sums per key in which an amount counts half after each half-life.

    Instead of decaying all sums at each step, newer amounts are scaled up, and all sums are scaled
    down together before the scale overflows.

    Args:
        half_life: In any unit of time; `add` takes elapsed time in the same unit.

    Raises:
        ValueError: The half-life is not above zero.

    >>> counter = DecayedCounter(1.0)
    >>> counter.add({"a": 4.0}, 1); counter.add({"b": 1.0}, 1)
    >>> counter.value("a"), counter.value("b")
    (2.0, 1.0)
    """

    def __init__(self, half_life: float) -> None:
        if not half_life > 0:
            raise ValueError(f"a half-life of {half_life} is not above zero")
        self._half_life = half_life
        self._scaled: defaultdict[Key, float] = defaultdict(float)
        self._half_lives_passed = 0.0

    @property
    def scaled(self) -> Mapping[Key, float]:
        """Sums times a common factor: enough to compare keys. Absent keys are zero."""
        return self._scaled

    def value(self, key: Key) -> float:
        """Return the decayed sum of a key."""
        return self._scaled.get(key, 0.0) / 2.0**self._half_lives_passed

    def add(self, amounts: Mapping[Key, float], elapsed: float) -> None:
        """Let time pass, then add amounts.

        Args:
            amounts: By key; they count in full.
            elapsed: Time since the previous call.
        """
        self._half_lives_passed += elapsed / self._half_life
        if self._half_lives_passed > _RESCALE:
            for key in self._scaled:
                self._scaled[key] *= 2.0**-self._half_lives_passed
            self._half_lives_passed = 0.0
        scale = 2.0**self._half_lives_passed
        for key, amount in amounts.items():
            self._scaled[key] += amount * scale


class ExpertImportanceEstimator:
    """Estimate how much each expert of one block matters now: SwapMoE's equation 1, decayed.

    The score of expert i is the sum over tokens of |x| * G(x)_i, from the router's unmasked choice,
    so that absent experts get scores too. Two differences from the paper: the expert's norm |E_i|
    is left out, because it would have to be read from storage, and old tokens count less.

    Args:
        num_experts: Experts of the block.
        half_life_tokens: Tokens after which a token's contribution counts half.

    >>> estimator = ExpertImportanceEstimator(3, half_life_tokens=1)
    >>> estimator.observe({0: 4.0}); estimator.observe({2: 1.0})
    >>> estimator.scores()
    [2.0, 0.0, 1.0]
    """

    def __init__(self, num_experts: int, *, half_life_tokens: float = 24.0):
        self._num_experts = num_experts
        self._counter = DecayedCounter[int](half_life_tokens)

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """Add one step.

        Args:
            weights: By expert, the sum of |x| * weight over the step's tokens.
            tokens: How far the step advances each of its sequences.
        """
        self._counter.add(weights, tokens)

    @property
    def relative(self) -> Mapping[int, float]:
        """Scores times a common factor: enough to compare experts. Absent ones are zero."""
        return self._counter.scaled

    def scores(self) -> list[float]:
        """Return the scores, indexed by expert."""
        return [self._counter.value(expert) for expert in range(self._num_experts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """Load expert `load` in place of expert `evict`, or into an empty slot if `evict` is None."""

    load: int
    evict: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualExpertManager:
    """Decide when to swap experts, and which.

    Args:
        every: Steps of a block between two plans.
        max_swaps: Swaps in one plan at most, which spreads their cost over steps.
        margin: Hysteresis: the score of the expert to load must exceed that of the one to evict by
            the factor 1 + margin, so that experts of similar scores do not alternate.
    """

    every: int = 1
    max_swaps: int = 1
    margin: float = 0.25

    def due(self, step: int) -> bool:
        """Return whether swaps are planned at this step of a block."""
        return step % self.every == 0

    def plan(
        self,
        residents: Collection[int],
        scores: Sequence[float],
        *,
        empty: int = 0,
        filling: Collection[int] = (),
    ) -> tuple[Swap, ...]:
        """Return the swaps that raise the residents' scores most, best first.

        Args:
            residents: Experts that may be evicted.
            scores: By expert.
            empty: Number of empty slots; these are filled first, without an eviction.
            filling: Experts that are being loaded already.

        >>> VirtualExpertManager(max_swaps=1).plan([0, 1], [0.1, 0.5, 0.9])
        (Swap(load=2, evict=0),)
        """
        absent = set(range(len(scores))) - set(residents) - set(filling)
        wanted = sorted(absent, key=lambda e: (-scores[e], e))[: self.max_swaps]
        swaps = [Swap(load=expert, evict=None) for expert in wanted[:empty]]
        weakest = sorted(residents, key=lambda e: (scores[e], e))
        for expert, old in zip(wanted[empty:], weakest, strict=False):
            if scores[expert] <= scores[old] * (1 + self.margin):
                break
            swaps.append(Swap(load=expert, evict=old))
        return tuple(swaps)
