"""Choose which resident expert to evict.

One instance per MoE block. Policies take expert ids and router weights, and return an expert id.

Time is counted in tokens along a sequence. A decoding step of many sequences is one token, because
each sequence changes its experts at its own pace, however many run beside it.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from moefit.serve.cache.scores import DecayedCounter


class EvictionPolicy(Protocol):
    """Rank one block's residents for eviction.

    In each step call `observe` once with all experts that the step needs, then `victim` for each
    missing expert. Scores cover absent experts too: an evicted expert retains its history.
    """

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """Record one step.

        Args:
            weights: By needed expert, its router weight summed over the step's tokens; weights may
                be multiplied by a factor per token, such as SwapMoE's |x|.
            tokens: How far the step advances its sequences: 1 in decoding at any batch size, the
                chunk's length in prefill.
        """
        ...

    def victim(self, residents: Collection[int], needed: Collection[int]) -> int:
        """Return the resident to evict.

        Args:
            residents: Experts in memory.
            needed: Experts that must not be evicted.

        Returns:
            The lowest-ranked resident that is not needed; the lowest id among equals.

        Raises:
            ValueError: Every resident is needed.
        """
        ...


class LeastRecentlyUsed:
    """Evict the expert whose last use is the longest ago."""

    def __init__(self) -> None:
        self._now = 0
        self._last_use: dict[int, int] = {}

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """Record the step's experts as used now."""
        self._now += 1
        self._last_use.update(dict.fromkeys(weights, self._now))

    def victim(self, residents: Collection[int], needed: Collection[int]) -> int:
        """Return the least recently used resident."""
        return _lowest(self._last_use, residents, needed)


class LeastFrequentlyUsed:
    """Evict the expert that the fewest steps used, with an exponential decay.

    A short half-life approaches least recently used, an infinite one plain counting.
    """

    def __init__(self, half_life_tokens: float = 24) -> None:
        self._counts = DecayedCounter[int](half_life_tokens)

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """Count one use of each of the step's experts."""
        self._counts.add(dict.fromkeys(weights, 1.0), tokens)

    def victim(self, residents: Collection[int], needed: Collection[int]) -> int:
        """Return the resident with the lowest count."""
        return _lowest(self._counts.scaled, residents, needed)


class LeastImportant:
    """Evict the expert with the least router weight, with an exponential decay.

    With weights multiplied by |x| this is SwapMoE's score without the expert's norm: |x| * G(x)_i.
    """

    def __init__(self, half_life_tokens: float = 24) -> None:
        self._sums = DecayedCounter[int](half_life_tokens)

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """Add the step's router weights."""
        self._sums.add(weights, tokens)

    def victim(self, residents: Collection[int], needed: Collection[int]) -> int:
        """Return the resident with the lowest sum."""
        return _lowest(self._sums.scaled, residents, needed)


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "importance": LeastImportant,
}
DEFAULT_POLICY = "lfu"


def _lowest(
    scores: Mapping[int, float], residents: Collection[int], needed: Collection[int]
) -> int:
    candidates = [(scores.get(one, 0.0), one) for one in residents if one not in needed]
    if not candidates:
        raise ValueError(f"all {len(residents)} resident experts are needed; none can be evicted")
    return min(candidates)[1]
