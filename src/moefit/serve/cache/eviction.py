"""Choose which resident expert to evict.

The eviction policies, one instance per MoE block, and `simulate`, which replays a routing trace
through one. Policies take expert ids and router weights, and return an expert id.

Time is counted in tokens along a sequence. A decoding step of many sequences is one token, because
each sequence changes its experts at its own pace, however many run beside it.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
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


class Belady:
    """Evict the expert whose next use is furthest away; a bound, since it needs the whole trace.

    No policy has fewer misses on the same events, provided that each event fits in the slots: an
    event of several experts is equivalent to its experts in turn, repeated, and there Belady's rule
    never evicts one of them. The argument does not cover events that need several waves.
    """

    def __init__(self, events: Iterable[Collection[int]]) -> None:
        self._now = -1
        self._uses: defaultdict[int, deque[int]] = defaultdict(deque)
        for time, event in enumerate(events):
            for expert in event:
                self._uses[expert].append(time)

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """Advance to the next event. Raises ValueError if the trace has another event here."""
        self._now += 1
        for expert in weights:
            if not self._uses[expert] or self._uses[expert].popleft() != self._now:
                raise ValueError(f"event {self._now} uses expert {expert}, but the trace does not")

    def victim(self, residents: Collection[int], needed: Collection[int]) -> int:
        """Return the resident whose next use is furthest away, or that is not used again."""
        priority = {e: -uses[0] for e, uses in self._uses.items() if uses}
        return _lowest(priority, residents, needed, default=float("-inf"))


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "importance": LeastImportant,
}
DEFAULT_POLICY = "lfu"


def _lowest(
    scores: Mapping[int, float],
    residents: Collection[int],
    needed: Collection[int],
    default: float = 0.0,
) -> int:
    candidates = [(scores.get(one, default), one) for one in residents if one not in needed]
    if not candidates:
        raise ValueError(f"all {len(residents)} resident experts are needed; none can be evicted")
    return min(candidates)[1]


@dataclass(frozen=True, slots=True)
class CacheCount:
    """Hits and misses of a trace: accesses of resident experts, and of experts to be loaded."""

    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """Hits per access; 1 without accesses."""
        return self.hits / accesses if (accesses := self.hits + self.misses) else 1.0


def simulate(
    events: Iterable[Mapping[int, float]], slots: int, policy: EvictionPolicy
) -> CacheCount:
    """Replay one block's decoding steps through initially empty slots.

    A step needs all its experts at once: hits are counted against the residents before the step,
    and no needed expert is evicted. A step of more experts than slots runs in waves, residents
    first, then missing experts by id.

    Args:
        events: By step, the router weight of each needed expert.
        slots: How many experts fit in memory.
        policy: Chooses the experts to evict.

    Raises:
        ValueError: There are fewer than one slots.

    >>> simulate([{0: 0.9}, {1: 0.8}, {0: 0.7}, {2: 0.6}, {0: 0.9}], 2, LeastRecentlyUsed())
    CacheCount(hits=2, misses=3)
    """
    if slots < 1:
        raise ValueError(f"cannot simulate {slots} slots; give at least 1")
    residents: set[int] = set()
    hits = misses = 0
    for weights in events:
        policy.observe(weights)
        present, missing = residents & weights.keys(), sorted(weights.keys() - residents)
        hits, misses = hits + len(present), misses + len(missing)
        free = slots - len(present)
        waves = [present.union(missing[:free])]
        waves += [set(missing[i : i + slots]) for i in range(free, len(missing), slots)]
        for wave in waves:
            for expert in sorted(wave - residents):
                if len(residents) == slots:
                    residents.remove(policy.victim(residents, wave))
                residents.add(expert)
    return CacheCount(hits, misses)
