"""Replay a routing trace through an eviction policy, and the policy that knows the future.

`Belady` is the bound with which `eviction_policies.py` and the tests compare the shipped policies.
"""

import math
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from moefit.serve.cache.eviction import EvictionPolicy


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
        next_use = {e: uses[0] for e, uses in self._uses.items() if uses}
        evictable = sorted(set(residents) - set(needed))
        return max(evictable, key=lambda expert: next_use.get(expert, math.inf))


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
