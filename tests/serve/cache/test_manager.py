from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.serve.cache.manager import Swap, VirtualExpertManager

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
    """Residents, experts on their way, and how many slots are empty."""
    order = draw(st.permutations(range(NUM_EXPERTS)))
    residents = draw(st.integers(0, NUM_EXPERTS))
    filling = draw(st.integers(0, NUM_EXPERTS - residents))
    empty = draw(st.integers(0, NUM_EXPERTS - residents - filling))
    return list(order[:residents]), list(order[residents : residents + filling]), empty


def carried_out(residents: Sequence[int], swaps: Sequence[Swap]) -> set[int]:
    return set(residents) - {swap.evict for swap in swaps} | {swap.load for swap in swaps}


@given(managers, blocks(), scores)
def test_swaps_are_few_sound_and_gainful(manager, block, scores: list[float]) -> None:
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
def test_empty_slots_are_filled_before_anybody_leaves(manager, block, scores) -> None:
    residents, filling, empty = block
    swaps = manager.plan(residents, scores, empty=empty, filling=filling)
    fills = [swap for swap in swaps if swap.evict is None]
    absent = NUM_EXPERTS - len(residents) - len(filling)
    assert len(fills) == min(empty, manager.max_swaps, absent)
    assert list(swaps[: len(fills)]) == fills


@given(managers, blocks(), scores)
def test_the_best_absentees_come_and_the_weakest_go(manager, block, scores) -> None:
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
def test_swapping_comes_to_rest(manager, block, scores) -> None:
    """Under constant scores nobody who left comes back: each swap raises the sum of scores."""
    residents, _, _ = block
    gone: set[int] = set()
    for _ in range(NUM_EXPERTS**2):
        swaps = manager.plan(residents, scores)
        if not swaps:
            break
        assert not {swap.load for swap in swaps} & gone
        gone |= {swap.evict for swap in swaps if swap.evict is not None}
        residents = list(carried_out(residents, swaps))
    assert not manager.plan(residents, scores)


def test_hysteresis_by_hand() -> None:
    manager = VirtualExpertManager(margin=0.25)
    assert manager.plan([0], [1.0, 1.25]) == ()
    assert manager.plan([0], [1.0, 1.26]) == (Swap(load=1, evict=0),)
    assert manager.plan([0], [0.0, 0.0]) == ()
    assert manager.plan([0], [0.0, 1e-9]) == (Swap(load=1, evict=0),)


def test_a_plan_by_hand() -> None:
    manager = VirtualExpertManager(max_swaps=3)
    plan = manager.plan([0, 1, 2], [5.0, 0.1, 1.0, 9.0, 2.0, 0.0], empty=1)
    assert plan == (Swap(load=3, evict=None), Swap(load=4, evict=1))


@pytest.mark.parametrize(("every", "due"), [(1, [0, 1, 2, 3, 4, 5]), (3, [0, 3])])
def test_swaps_are_planned_every_so_many_steps(every: int, due: list[int]) -> None:
    manager = VirtualExpertManager(every=every)
    assert [step for step in range(6) if manager.due(step)] == due
