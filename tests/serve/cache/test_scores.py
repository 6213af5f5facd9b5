from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.serve.cache.scores import (
    DecayedCounter,
    ExpertImportanceEstimator,
    Swap,
    VirtualExpertManager,
)

steps = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 4), st.floats(0, 4), max_size=5), st.integers(1, 2000)
    ),
    max_size=20,
)


@given(steps, st.sampled_from([0.5, 1.0, 16.0, 256.0]))
def test_scores_halve_with_each_half_life(steps, half_life: float) -> None:
    estimator = ExpertImportanceEstimator(5, half_life_tokens=half_life)
    for weights, tokens in steps:
        estimator.observe(weights, tokens)
    expected, age = [0.0] * 5, 0
    for weights, tokens in reversed(steps):
        for expert, weight in weights.items():
            expected[expert] += weight * 0.5 ** (age / half_life)
        age += tokens
    assert estimator.scores() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_scores_are_zero_before_the_first_step() -> None:
    estimator = ExpertImportanceEstimator(3)
    assert estimator.scores() == [0.0] * 3


def test_scores_returns_a_copy() -> None:
    estimator = ExpertImportanceEstimator(2)
    estimator.scores()[0] = 9.0
    assert estimator.scores() == [0.0, 0.0]


def test_counter_survives_any_number_of_half_lives() -> None:
    counter = DecayedCounter[str](4.0)
    counter.add({"old": 3.0}, 1)
    counter.add({"new": 1.0}, 10_000)
    assert counter.value("old") == 0.0 and counter.value("new") == 1.0
    assert counter.value("absent") == 0.0


@pytest.mark.parametrize("half_life", [0, -1.0, float("nan")])
def test_counter_rejects_a_half_life_that_is_not_positive(half_life: float) -> None:
    with pytest.raises(ValueError, match="not above zero"):
        DecayedCounter[int](half_life)


NUM_EXPERTS = 8
scores = st.lists(
    st.floats(0, 10) | st.sampled_from([0.0, 1.0, 2.0]), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS
)
managers = st.builds(
    VirtualExpertManager,
    every=st.integers(1, 9),
    max_swaps=st.integers(0, 4),
    margin=st.sampled_from([0.0, 0.25, 1.0]),
)


@st.composite
def blocks(draw) -> tuple[list[int], list[int], int]:
    """Return residents, experts being loaded, and the number of empty slots."""
    order = draw(st.permutations(range(NUM_EXPERTS)))
    residents = draw(st.integers(0, NUM_EXPERTS))
    filling = draw(st.integers(0, NUM_EXPERTS - residents))
    empty = draw(st.integers(0, NUM_EXPERTS - residents - filling))
    return list(order[:residents]), list(order[residents : residents + filling]), empty


def carried_out(residents: Sequence[int], swaps: Sequence[Swap]) -> set[int]:
    return set(residents) - {swap.evict for swap in swaps} | {swap.load for swap in swaps}


@given(managers, blocks(), scores)
def test_plans_respect_limits_and_margin(manager, block, scores: list[float]) -> None:
    residents, filling, empty = block
    swaps = manager.plan(residents, scores, empty=empty, filling=filling)
    assert len(swaps) <= manager.max_swaps
    loads = [swap.load for swap in swaps]
    evicts = [swap.evict for swap in swaps if swap.evict is not None]
    assert len(set(loads)) == len(loads) and not set(loads) & {*residents, *filling}
    assert len(set(evicts)) == len(evicts) and set(evicts) <= set(residents)
    assert len(swaps) - len(evicts) <= empty
    assert len(carried_out(residents, swaps)) <= len(residents) + empty
    for swap in swaps:
        if swap.evict is not None:
            assert scores[swap.load] > scores[swap.evict] * (1 + manager.margin)


@given(managers, blocks(), scores)
def test_empty_slots_are_filled_before_evictions(manager, block, scores) -> None:
    residents, filling, empty = block
    swaps = manager.plan(residents, scores, empty=empty, filling=filling)
    fills = [swap for swap in swaps if swap.evict is None]
    absent = NUM_EXPERTS - len(residents) - len(filling)
    assert len(fills) == min(empty, manager.max_swaps, absent)
    assert list(swaps[: len(fills)]) == fills


@given(managers, blocks(), scores)
def test_best_absent_experts_replace_the_weakest_residents(manager, block, scores) -> None:
    residents, filling, empty = block
    swaps = manager.plan(residents, scores, empty=empty, filling=filling)
    absent = set(range(NUM_EXPERTS)) - set(residents) - set(filling)
    left_out = absent - {swap.load for swap in swaps}
    stayed = set(residents) - {swap.evict for swap in swaps}
    if swaps and left_out:
        assert min(scores[s.load] for s in swaps) >= max(scores[e] for e in left_out)
    evicts = [swap.evict for swap in swaps if swap.evict is not None]
    if evicts and stayed:
        assert max(scores[e] for e in evicts) <= min(scores[e] for e in stayed)


@given(managers, blocks(), scores)
def test_swaps_end_under_constant_scores(manager, block, scores) -> None:
    """No evicted expert is loaded again: each swap raises the sum of scores."""
    residents, _, _ = block
    evicted: set[int] = set()
    for _ in range(NUM_EXPERTS**2):
        swaps = manager.plan(residents, scores)
        if not swaps:
            break
        assert not {swap.load for swap in swaps} & evicted
        evicted |= {swap.evict for swap in swaps if swap.evict is not None}
        residents = list(carried_out(residents, swaps))
    assert not manager.plan(residents, scores)


def test_hysteresis() -> None:
    manager = VirtualExpertManager(margin=0.25)
    assert manager.plan([0], [1.0, 1.25]) == ()
    assert manager.plan([0], [1.0, 1.26]) == (Swap(load=1, evict=0),)
    assert manager.plan([0], [0.0, 0.0]) == ()
    assert manager.plan([0], [0.0, 1e-9]) == (Swap(load=1, evict=0),)


def test_plan_fills_empty_slots_then_evicts() -> None:
    manager = VirtualExpertManager(max_swaps=3)
    plan = manager.plan([0, 1, 2], [5.0, 0.1, 1.0, 9.0, 2.0, 0.0], empty=1)
    assert plan == (Swap(load=3, evict=None), Swap(load=4, evict=1))


@pytest.mark.parametrize(("every", "due"), [(1, [0, 1, 2, 3, 4, 5]), (3, [0, 3])])
def test_manager_is_due_at_intervals(every: int, due: list[int]) -> None:
    manager = VirtualExpertManager(every=every)
    assert [step for step in range(6) if manager.due(step)] == due
