"""How many drafted tokens pay: the best of all choices, and measurements that settle it."""

from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.engine.speculation.cost import (
    GAIN,
    Acceptance,
    DraftingTimes,
    StepGrowth,
    StepTimes,
    choose_lengths,
)

chances = st.lists(st.floats(0, 1), max_size=3).map(
    lambda each: [prod(each[: n + 1]) for n in range(len(each))]
)


@given(
    st.dictionaries(st.sampled_from("abc"), chances),
    st.integers(1, 5),
    st.integers(0, 6),
    st.lists(st.floats(0, 2), min_size=16, max_size=16),
)
def test_no_other_choice_is_expected_to_be_faster(requests, tokens, most, more) -> None:
    times = [1 + sum(more[:number]) for number in range(16)]

    def rate(lengths: dict[str, int]) -> float:
        right = sum(sum(requests[name][:length]) for name, length in lengths.items())
        return (tokens + right) / times[tokens + sum(lengths.values())]

    chosen = choose_lengths(requests, tokens=tokens, most=most, seconds=times.__getitem__)
    assert all(0 < length <= len(requests[name]) for name, length in chosen.items())
    assert sum(chosen.values()) <= most
    names = list(requests)
    others = [
        dict(zip(names, lengths, strict=True))
        for lengths in product(*(range(len(requests[name]) + 1) for name in names))
        if sum(lengths) <= most
    ]
    best = max(map(rate, others))
    if chosen:
        assert rate(chosen) > GAIN * rate({})
        assert rate(chosen) == pytest.approx(best)
    else:
        assert best <= GAIN * rate({}) * (1 + 1e-9)


def test_nothing_is_drafted_before_anything_is_known() -> None:
    times = StepTimes(StepGrowth())
    assert choose_lengths({"a": [1.0]}, tokens=1, most=8, seconds=times.seconds) == {}


def test_drafts_are_switched_off_where_they_lose() -> None:
    """Steps of three tokens are measured to take three times as long, as where each is read."""
    times = StepTimes(StepGrowth())
    times.add(1, 1.0)
    right = {"a": [0.8, 0.64]}
    assert choose_lengths(right, tokens=1, most=8, seconds=times.seconds) == {"a": 2}
    times.add(3, 3.0)
    assert choose_lengths(right, tokens=1, most=8, seconds=times.seconds) == {}
    times = StepTimes(StepGrowth())
    times.add(1, 1.0)
    assert choose_lengths(right, tokens=1, most=8, seconds=times.seconds) == {"a": 2}


def test_experts_that_must_be_read_count_before_they_are_measured() -> None:
    """Where every expert is read, a second token needs nearly twice as many."""
    reading = StepGrowth(experts=64, chosen=8, share=1.0, per_token=0.0)
    assert reading(1) == 1
    assert reading(2) == pytest.approx(1.875)
    assert reading(1000) == pytest.approx(8.0)
    in_memory = StepGrowth(experts=64, chosen=8, share=0.3, per_token=0.0)
    one = {"a": [0.7]}
    assert choose_lengths(one, tokens=1, most=8, seconds=reading) == {}
    assert choose_lengths(one, tokens=1, most=8, seconds=in_memory) == {"a": 1}


@given(
    st.lists(st.tuples(st.integers(1, 200), st.floats(0.001, 5)), min_size=1, max_size=30),
    st.integers(1, 250),
)
def test_larger_steps_are_never_expected_to_be_faster(measured, tokens) -> None:
    times = StepTimes(StepGrowth(experts=8, chosen=2, share=0.5))
    for size, seconds in measured:
        times.add(size, seconds)
    expected, next_one = times.seconds(tokens), times.seconds(tokens + 1)
    assert expected is not None and next_one is not None
    assert 0 < expected <= next_one * (1 + 1e-12)


def expected_seconds(known: dict[int, float], growth: StepGrowth, size: int) -> float:
    """Return what `StepTimes.seconds` says, from all measurements anew."""
    most = {one: min(s for other, s in known.items() if other >= one) for one in known}
    below, above = [n for n in known if n <= size], [n for n in known if n > size]
    if not below:
        return most[min(above)] / growth(min(above)) * growth(size)
    near = max(below)
    if near == size or not above:
        return most[near] * growth(size) / growth(near)
    part = (size - near) / (min(above) - near)
    return most[near] + part * (most[min(above)] - most[near])


@given(st.dictionaries(st.integers(1, 32), st.floats(0.001, 5), min_size=1), st.integers(1, 32))
def test_expected_times_are_those_of_a_search(known, size) -> None:
    growth = StepGrowth(experts=8, chosen=2, share=0.5)
    times = StepTimes(growth)
    for number, (one, seconds) in enumerate(known.items()):
        times.add(one, seconds)
        so_far = dict(list(known.items())[: number + 1])
        assert times.seconds(size) == pytest.approx(expected_seconds(so_far, growth, size))


def test_drafts_that_keep_less_than_they_were_expected_to_are_expected_to_keep_less() -> None:
    acceptance = Acceptance()
    for name, sampled in (("a", True), ("b", True), ("c", False)):
        acceptance.open(name, sampled=sampled)
    before = {name: acceptance.chances(name, 5, 3) for name in "abc"}
    for _ in range(200):  # estimates stay as they are, and half of them comes true
        chances = acceptance.chances("a", 5, 3)
        acceptance.verified("a", chances, 1)
        acceptance.verified("a", chances, 0)
    kept = 0.5 / sum(before["a"])
    assert acceptance.chances("b", 5, 3) == pytest.approx([kept * p for p in before["b"]], rel=0.1)
    assert acceptance.chances("c", 5, 3) == before["c"], "greedy requests are counted apart"
    for _ in range(200):
        acceptance.verified("a", acceptance.chances("a", 5, 3), 3)
    assert acceptance.chances("b", 5, 3) == before["b"], "never more than expected"


def test_single_slow_steps_count_little() -> None:
    times = StepTimes(StepGrowth())
    for _ in range(20):
        times.add(4, 0.1)
    times.add(4, 60.0)
    assert times.seconds(4) == pytest.approx(0.13)


def test_one_slow_step_does_not_switch_drafts_off() -> None:
    """A size that no later step has, such as the end of a prompt read from a cold disk."""
    times = StepTimes(StepGrowth())
    times.add(2, 2.0)
    for _ in range(500):
        times.add(1, 0.010)
    for _ in range(50):
        times.add(4, 0.012)
    likely = {"a": [0.99, 0.98, 0.97]}
    assert choose_lengths(likely, tokens=1, most=8, seconds=times.seconds) == {"a": 3}


def test_acceptance_of_a_request_follows_its_own_text() -> None:
    acceptance = Acceptance()
    for name in ("copies", "writes"):
        acceptance.open(name, sampled=False)
    for _ in range(40):
        acceptance.add("copies", 5, accepted=True)
        acceptance.add("writes", 5, accepted=False)
    assert acceptance.probability("copies", 5) > 0.9
    assert acceptance.probability("writes", 5) < 0.12
    assert acceptance.probability("copies", 2) > 1.5 * acceptance.probability("writes", 2)
    acceptance.close("copies")
    acceptance.open("new", sampled=False)
    assert 0.4 < acceptance.probability("new", 5) < 0.6
    chances = acceptance.chances("new", 4, 3)
    assert chances == sorted(chances, reverse=True) and len(chances) == 3


def test_few_wrong_tokens_end_long_drafts_of_a_sampled_request() -> None:
    """However much other, greedy, requests repeat themselves."""
    acceptance = Acceptance()
    acceptance.open("greedy", sampled=False)
    for _ in range(200):
        acceptance.add("greedy", 13, accepted=True)
    acceptance.open("sampled", sampled=True)
    assert acceptance.probability("greedy", 13) > 0.97
    assert acceptance.probability("sampled", 13) == pytest.approx(0.65)
    for _ in range(4):
        acceptance.add("sampled", 13, accepted=False)
    assert acceptance.probability("sampled", 13) < 0.3
    assert acceptance.probability("sampled", 3) < 0.25


def test_time_of_drafting_counts() -> None:
    """A draft that would gain does not if a token takes as long to draft as to compute."""
    chances, seconds = {"a": [0.9, 0.8, 0.7]}, {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3}.__getitem__
    given = {"tokens": 1, "most": 8, "seconds": seconds}
    assert choose_lengths(chances, **given) == {"a": 3}
    assert choose_lengths(chances, **given, drafting=lambda longest: 0.5 * longest) == {"a": 2}
    assert choose_lengths(chances, **given, drafting=lambda longest: 0.9 * longest) == {}


def test_drafts_of_several_requests_are_computed_together() -> None:
    chances, seconds = {"a": [0.9], "b": [0.9]}, {2: 1.0, 3: 1.0, 4: 1.0}.__getitem__
    drafting = {1: 0.6, 2: 9.0}.__getitem__
    given = {"tokens": 2, "most": 8, "seconds": seconds, "drafting": drafting}
    assert choose_lengths(chances, **given) == {"a": 1, "b": 1}


def test_seconds_of_drafting_are_a_mean_in_which_slow_ones_count_little() -> None:
    times = DraftingTimes()
    assert times.seconds(5) == 0
    for _ in range(10):
        times.add(4, 4.0)
    assert times.seconds(3) == pytest.approx(3)
    times.add(1, 100.0)
    assert times.seconds(1) < 1.5
