from collections.abc import Callable, Collection, Mapping
from functools import cache
from itertools import combinations
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cache_simulation import Belady, CacheCount, simulate
from moefit.serve.cache.eviction import (
    DEFAULT_POLICY,
    POLICIES,
    EvictionPolicy,
    LeastFrequentlyUsed,
    LeastImportant,
    LeastRecentlyUsed,
)

Event = Mapping[int, float]
NUM_EXPERTS = 6

factories = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
weights = st.floats(0.01, 4.0)


def traces(most: int, *, experts: int = NUM_EXPERTS, length: int = 40):
    """Steps that use one to `most` experts each."""
    ids = st.integers(0, experts - 1)
    return st.lists(st.dictionaries(ids, weights, min_size=1, max_size=most), max_size=length)


class Watched:
    """A policy that records and checks the calls of `simulate`."""

    def __init__(self, policy: EvictionPolicy, slots: int) -> None:
        self.policy, self.slots = policy, slots
        self.event: Event = {}
        self.events = self.evictions = 0

    def observe(self, weights: Event, tokens: int = 1) -> None:
        self.event, self.events = weights, self.events + 1
        self.policy.observe(weights, tokens)

    def victim(self, residents: Collection[int], needed: Collection[int]) -> int:
        victim = self.policy.victim(residents, needed)
        assert len(residents) == self.slots and len(needed) <= self.slots
        assert set(needed) <= self.event.keys()
        assert victim in residents and victim not in needed
        if len(self.event) <= self.slots:
            assert victim not in self.event
        self.evictions += 1
        return victim


def fewest_misses(events: list[Event], slots: int) -> int:
    """Reference: try every possible eviction."""

    @cache
    def best(time: int, residents: frozenset[int]) -> int:
        if time == len(events):
            return 0
        needed = frozenset(events[time])
        missing, spare = needed - residents, residents - needed
        surplus = max(0, len(residents | needed) - slots)
        return len(missing) + min(
            best(time + 1, (residents | needed).difference(evicted))
            for evicted in combinations(sorted(spare), surplus)
        )

    return best(0, frozenset())


@factories
@given(events=traces(most=NUM_EXPERTS), slots=st.integers(1, NUM_EXPERTS))
def test_waves_never_evict_their_own_experts(
    make: Callable[[], EvictionPolicy], events: list[Event], slots: int
) -> None:
    watched = Watched(make(), slots)
    count = simulate(events, slots, watched)
    assert count.hits + count.misses == sum(map(len, events))
    assert watched.events == len(events)
    filled = count.misses - watched.evictions
    assert filled == min(slots, len(set().union(*events)))


@factories
@given(events=traces(most=3))
def test_slot_for_each_expert_misses_only_first_use(
    make: Callable[[], EvictionPolicy], events: list[Event]
) -> None:
    assert simulate(events, NUM_EXPERTS, make()).misses == len(set().union(*events))


@factories
@given(events=traces(most=3), slots=st.integers(3, NUM_EXPERTS))
def test_belady_is_never_worse_if_events_fit(
    make: Callable[[], EvictionPolicy], events: list[Event], slots: int
) -> None:
    belady = simulate(events, slots, Belady(events))
    assert belady.misses <= simulate(events, slots, make()).misses


@given(events=traces(most=1, experts=4, length=9), slots=st.integers(1, 3))
def test_belady_is_optimal_on_single_experts(events: list[Event], slots: int) -> None:
    assert simulate(events, slots, Belady(events)).misses == fewest_misses(events, slots)


@given(events=traces(most=3, experts=5, length=8), slots=st.integers(3, 4))
def test_belady_is_optimal_on_events_that_fit_the_slots(events: list[Event], slots: int) -> None:
    assert simulate(events, slots, Belady(events)).misses == fewest_misses(events, slots)


def test_belady_by_hand() -> None:
    events = [{0: 1.0}, {1: 1.0}, {2: 1.0}, {0: 1.0}, {1: 1.0}, {2: 1.0}]
    assert simulate(events, 2, Belady(events)) == CacheCount(hits=2, misses=4)
    assert simulate(events, 2, LeastRecentlyUsed()) == CacheCount(hits=0, misses=6)


def test_belady_raises_for_another_trace() -> None:
    belady = Belady([{0: 1.0}, {1: 1.0}])
    with pytest.raises(ValueError, match="event 0 uses expert 1"):
        belady.observe({1: 1.0})
    with pytest.raises(ValueError, match="event 1 uses expert 7"):
        belady.observe({7: 1.0})


def test_lru_evicts_least_recently_used() -> None:
    policy = LeastRecentlyUsed()
    for event in ({0: 0.1, 1: 0.9}, {2: 0.5}, {0: 0.1}):
        policy.observe(event)
    assert policy.victim({0, 1, 2}, ()) == 1
    assert policy.victim({0, 1, 2}, {1}) == 2
    assert policy.victim({0, 1, 2, 5}, {1}) == 5  # never used is longest ago


def test_lfu_evicts_least_frequently_used() -> None:
    policy = LeastFrequentlyUsed(half_life_tokens=inf)
    for event in ({0: 0.1}, {0: 0.1}, {1: 9.0}):
        policy.observe(event)
    assert policy.victim({0, 1}, ()) == 1
    assert policy.victim({0, 1, 2}, ()) == 2


def test_importance_evicts_least_important() -> None:
    policy = LeastImportant(inf)
    for event in ({0: 0.2}, {0: 0.2}, {1: 0.5}):
        policy.observe(event)
    assert policy.victim({0, 1}, ()) == 0


def test_counts_halve_after_half_life() -> None:
    policy = LeastImportant(half_life_tokens=10)
    policy.observe({0: 1.0})
    policy.observe({1: 0.51}, tokens=10)
    assert policy.victim({0, 1}, ()) == 0
    policy.observe({0: 0.02})
    assert policy.victim({0, 1}, ()) == 1


@given(
    st.lists(st.tuples(st.dictionaries(st.integers(0, 4), weights), st.integers(1, 3000))),
    st.sampled_from([0.5, 1.0, 16.0, 300.0]),
)
def test_decayed_ranking_equals_plain_sum(
    steps: list[tuple[dict[int, float], int]], half_life: float
) -> None:
    policy, age = LeastImportant(half_life), 0
    for event, tokens in steps:
        policy.observe(event, tokens)
    sums = dict.fromkeys(range(5), 0.0)
    for event, tokens in reversed(steps):
        for expert, weight in event.items():
            sums[expert] += weight * 2.0 ** -(age / half_life)
        age += tokens
    victim = policy.victim(range(5), ())
    assert sums[victim] <= min(sums.values()) * (1 + 1e-9) + 1e-70


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_many_half_lives_keep_last_step(tokens: int) -> None:
    policy = LeastFrequentlyUsed(half_life_tokens=0.5)
    for step in range(3000):
        policy.observe({step % 3: 1.0}, tokens)
    assert policy.victim({0, 1, 2}, {0}) == 1
    assert policy.victim({0, 2}, ()) == 0


@factories
def test_ties_are_broken_by_id(make: Callable[[], EvictionPolicy]) -> None:
    policy = make()
    policy.observe({3: 0.5, 1: 0.5, 2: 0.5})
    assert policy.victim([3, 2, 1], ()) == policy.victim([1, 2, 3], ()) == 1
    assert policy.victim([9, 8, 1], ()) == 8


@factories
def test_no_evictable_resident_raises(make: Callable[[], EvictionPolicy]) -> None:
    with pytest.raises(ValueError, match="all 2 resident experts are needed"):
        make().victim({0, 1}, {0, 1, 2})


def test_event_larger_than_slots_runs_in_waves() -> None:
    events = [{0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0}, {2: 1.0}]
    # The first step loads 0 and 1, then 2 in place of 0; the second loads 0 in place of 1.
    assert simulate(events, 2, LeastRecentlyUsed()) == CacheCount(hits=1, misses=4)


def test_zero_slots_or_half_life_raise() -> None:
    with pytest.raises(ValueError, match="0 slots"):
        simulate([], 0, LeastRecentlyUsed())
    with pytest.raises(ValueError, match="half-life of 0"):
        LeastFrequentlyUsed(half_life_tokens=0)


def test_hit_rate_is_hits_per_access() -> None:
    assert CacheCount(hits=3, misses=1).hit_rate == 0.75
    assert simulate([], 2, LeastRecentlyUsed()).hit_rate == 1.0


def test_default_policy_has_name() -> None:
    assert DEFAULT_POLICY in POLICIES
