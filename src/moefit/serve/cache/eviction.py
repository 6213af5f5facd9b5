"""Which resident expert makes room for a missing one.

Owns the eviction policies, one instance per block, and `simulate`, which replays a trace of routing
through one. Takes expert ids and router weights; gives an expert id. Knows nothing of tensors,
slots' contents, transfers, or how many blocks there are.

Time is counted in tokens along a sequence: a decoding step of many sequences is one token of time,
for each sequence changes its experts at its own pace, however many run beside it.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


class EvictionPolicy(Protocol):
    """Remembers what one layer's steps used, and names the resident that is missed least.

    The order within a step: `observe` once, with all that the step needs, then `victim` for each
    missing expert. Scores outlive residence: an expert that returns is judged by all its past.
    """

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """One step: each needed expert's router weight, summed over all of the step's tokens.

        Weights may have been multiplied by something of each token's (SwapMoE's |x|). `tokens` is
        how far the step moves its sequences: 1 in decoding at any batch size, a chunk's length in
        prefill.
        """
        ...

    def victim(self, residents: Collection[int], needed: Collection[int]) -> int:
        """The resident to evict, never one of `needed`; of equals the lowest id.

        Raises ValueError if every resident is needed.
        """
        ...


class LeastRecentlyUsed:
    """Evicts what has waited longest since its last step."""

    def __init__(self) -> None:
        self._now = 0
        self._last_use: dict[int, int] = {}

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """Mark the step's experts as used now."""
        self._now += 1
        self._last_use.update(dict.fromkeys(weights, self._now))

    def victim(self, residents: Collection[int], needed: Collection[int]) -> int:
        """The resident with the oldest last use."""
        return _lowest(self._last_use, residents, needed)


class LeastFrequentlyUsed:
    """Evicts what the fewest steps used, old steps counting less.

    A short half-life makes it behave as least recently used, an infinite one as plain counting.
    """

    def __init__(self, half_life_tokens: float = 24) -> None:
        self._counts = _DecayingSums(half_life_tokens)

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """Count the step once for each of its experts."""
        self._counts.add(dict.fromkeys(weights, 1.0), tokens)

    def victim(self, residents: Collection[int], needed: Collection[int]) -> int:
        """The resident with the lowest count."""
        return _lowest(self._counts.scaled, residents, needed)


class LeastImportant:
    """Evicts what had the least router weight; old steps count less.

    With weights that carry |x| this is SwapMoE's score but for the expert's norm, |x| * G(x)_i.
    """

    def __init__(self, half_life_tokens: float = 24) -> None:
        self._sums = _DecayingSums(half_life_tokens)

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """Add the step's weights."""
        self._sums.add(weights, tokens)

    def victim(self, residents: Collection[int], needed: Collection[int]) -> int:
        """The resident with the lowest sum."""
        return _lowest(self._sums.scaled, residents, needed)


class Belady:
    """Evicts what is needed again last. Knows the whole trace, so it is a bound, not a policy.

    No policy misses less on the same events, as long as each event fits the slots: an event of
    several experts is the same as its experts in turn, over and over, and there Belady's rule
    never evicts one of them. Events that need several waves are outside that argument.
    """

    def __init__(self, events: Iterable[Collection[int]]) -> None:
        self._now = -1
        self._uses: defaultdict[int, deque[int]] = defaultdict(deque)
        for time, event in enumerate(events):
            for expert in event:
                self._uses[expert].append(time)

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """Step forward. Raises ValueError if the trace has another event here."""
        self._now += 1
        for expert in weights:
            if not self._uses[expert] or self._uses[expert].popleft() != self._now:
                raise ValueError(f"event {self._now} uses expert {expert}, but the trace doesn't")

    def victim(self, residents: Collection[int], needed: Collection[int]) -> int:
        """The resident whose next use is furthest away or never comes."""
        nearness = {e: -uses[0] for e, uses in self._uses.items() if uses}
        return _lowest(nearness, residents, needed, default=float("-inf"))


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "importance": LeastImportant,
}
DEFAULT_POLICY = "lfu"


class _DecayingSums:
    """A sum per key in which what was added `half_life` tokens ago counts half.

    Nothing is decayed: newer additions are scaled up instead, and all is scaled down together
    before the scale would overflow. `scaled` therefore tells the order, not the values.
    """

    def __init__(self, half_life: float) -> None:
        if not half_life > 0:
            raise ValueError(f"a half-life of {half_life} tokens; it must be above zero")
        self.scaled: defaultdict[int, float] = defaultdict(float)
        self._half_life = half_life
        self._half_lives_passed = 0.0

    def add(self, amounts: Mapping[int, float], tokens: int) -> None:
        self._half_lives_passed += tokens / self._half_life
        if self._half_lives_passed > 256:
            for key in self.scaled:
                self.scaled[key] *= 2.0**-self._half_lives_passed
            self._half_lives_passed = 0.0
        scale = 2.0**self._half_lives_passed
        for key, amount in amounts.items():
            self.scaled[key] += amount * scale


def _lowest(
    scores: Mapping[int, float],
    residents: Collection[int],
    needed: Collection[int],
    default: float = 0.0,
) -> int:
    spare = [(scores.get(expert, default), expert) for expert in residents if expert not in needed]
    if not spare:
        raise ValueError(f"all {len(residents)} resident experts are needed; none can be evicted")
    return min(spare)[1]


@dataclass(frozen=True, slots=True)
class CacheCount:
    """How many of a trace's accesses found their expert resident, and how many had to load it."""

    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """Hits per access; 1 if there was no access, for nothing was waited for."""
        return self.hits / accesses if (accesses := self.hits + self.misses) else 1.0


def simulate(
    events: Iterable[Mapping[int, float]], slots: int, policy: EvictionPolicy
) -> CacheCount:
    """Replay one block's decoding steps through `slots` slots, empty at first.

    An event holds what one step needs, at once: its hits are counted against
    the residents before the step, and it evicts nothing that it needs. An event of more experts
    than slots runs in waves, residents first, then the missing by id; no wave evicts its own.
    Raises ValueError for fewer slots than one.

    >>> simulate([{0: 0.9}, {1: 0.8}, {0: 0.7}, {2: 0.6}, {0: 0.9}], 2, LeastRecentlyUsed())
    CacheCount(hits=2, misses=3)
    """
    if slots < 1:
        raise ValueError(f"{slots} slots; at least 1 is needed")
    residents: set[int] = set()
    hits = misses = 0
    for weights in events:
        policy.observe(weights)
        present, missing = residents & weights.keys(), sorted(weights.keys() - residents)
        hits, misses = hits + len(present), misses + len(missing)
        room = slots - len(present)
        waves = [present.union(missing[:room])]
        waves += [set(missing[i : i + slots]) for i in range(room, len(missing), slots)]
        for wave in waves:
            for expert in sorted(wave - residents):
                if len(residents) == slots:
                    residents.remove(policy.victim(residents, wave))
                residents.add(expert)
    return CacheCount(hits, misses)
