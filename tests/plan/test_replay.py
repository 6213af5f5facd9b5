import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import EXPERTS, K, walk

from benchmarks.cache_simulation import simulate
from moefit.plan.trace import (
    Step,
    replaceable,
    replay_bounded,
    replay_exact,
    replay_virtual,
    substitutes,
)
from moefit.serve.cache.eviction import LeastFrequentlyUsed
from moefit.serve.cache.scores import VirtualExpertManager

SLOTS = st.integers(1, EXPERTS)
SEEDS = st.integers(0, 50)


@settings(deadline=None)
@given(st.integers(K, EXPERTS), SEEDS)
def test_exact_misses_equal_cache_simulation(slots: int, seed: int) -> None:
    steps = walk(tokens=60, seed=seed)
    events = [dict(zip(step.chosen, step.weights, strict=True)) for step in steps]
    count = simulate(events, slots, LeastFrequentlyUsed())
    assert replay_exact(steps, EXPERTS, slots).misses * len(steps) == pytest.approx(count.misses)


@settings(deadline=None)
@given(SLOTS, SEEDS, st.floats(0, 1))
def test_bounded_substitutes_within_bound_and_reads_at_most_exact(
    slots: int, seed: int, bound: float
) -> None:
    steps = walk(tokens=60, seed=seed)
    found = replay_bounded(steps, EXPERTS, slots, bound=bound)
    assert 0 <= found.moved <= bound + 1e-5
    if bound == 0:
        assert found == replay_exact(steps, EXPERTS, slots)


@settings(deadline=None)
@given(SEEDS)
def test_all_experts_read_once_without_substitution(seed: int) -> None:
    steps = walk(tokens=60, seed=seed)
    used = len({expert for step in steps for expert in step.chosen})
    for found in (
        replay_exact(steps, EXPERTS, EXPERTS),
        replay_bounded(steps, EXPERTS, EXPERTS, bound=0.0),
    ):
        assert found.misses * len(steps) == pytest.approx(used)


@settings(deadline=None)
@given(SLOTS, SEEDS)
def test_virtual_waits_only_for_empty_slots(slots: int, seed: int) -> None:
    steps = walk(tokens=60, seed=seed)
    found = replay_virtual(steps, EXPERTS, slots, VirtualExpertManager())
    assert found.misses * len(steps) <= slots + K
    assert 0 <= found.moved <= 1


def test_rarer_updates_swap_less() -> None:
    steps = walk(tokens=300)
    often = replay_virtual(steps, EXPERTS, 4, VirtualExpertManager(every=1))
    rarely = replay_virtual(steps, EXPERTS, 4, VirtualExpertManager(every=16))
    assert rarely.swaps < often.swaps


STEP = Step(chosen=[3, 0, 2], weights=[0.2, 0.5, 0.3], scores=[0.9, 0.1, 0.5, 0.4, 0.8])


@pytest.mark.parametrize(
    ("residents", "bound", "protected", "lost"),
    [
        ({1, 4}, 1.0, 0, [3, 0, 2]),
        ({1, 4}, 1.0, 1, [3, 2]),
        ({1, 4}, 0.25, 1, [3]),
        ({1, 4}, 0.1, 1, []),
        ({3, 1}, 0.35, 1, [2]),
        ({0, 2, 3}, 1.0, 0, []),
    ],
)
def test_lightest_absent_experts_are_substituted_first(
    residents: set[int], bound: float, protected: int, lost: list[int]
) -> None:
    assert replaceable(STEP, residents, bound, protected) == lost


def test_substitutes_are_best_unchosen_residents() -> None:
    assert substitutes(STEP, {0, 1, 4}, 2) == [4, 1]
    assert substitutes(STEP, {0, 4}, 2) == [4]
