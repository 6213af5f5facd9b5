import itertools

from hypothesis import given
from hypothesis import strategies as st

from moefit.serve.precision.allocate import FormatChoice, allocate, ladder, smoothed, weighted_error

errors = st.integers(0, 10_000).map(lambda number: number / 1000)  # whose differences do not vanish


@st.composite
def choices(draw) -> list[FormatChoice]:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True))
    return [FormatChoice(format=str(size), nbytes=size, error=draw(errors)) for size in sizes]


cases = st.lists(choices(), min_size=1, max_size=4)


@given(choices())
def test_choices_increase_in_bytes_and_decrease_in_error(options) -> None:
    steps = ladder(options)
    assert steps[0].nbytes == min(one.nbytes for one in options)
    gains = [
        (low.error - high.error) / (high.nbytes - low.nbytes)
        for low, high in itertools.pairwise(steps)
    ]
    assert all(gain > 0 for gain in gains)
    assert gains == sorted(gains, reverse=True)
    assert steps[-1].error == min(one.error for one in options)


@given(cases, st.integers(0, 160), st.data())
def test_allocation_fits_and_is_near_optimum(options, room, data) -> None:
    ladders = dict(enumerate(map(ladder, options)))
    sensitivity = {key: data.draw(st.floats(0.1, 10)) for key in ladders}
    chosen = allocate(ladders, sensitivity, room)
    least = sum(steps[0].nbytes for steps in ladders.values())
    assert sum(one.nbytes for one in chosen.values()) <= max(room, least)
    if room < least:
        assert all(chosen[key] == ladders[key][0] for key in ladders)
        return
    best = min(
        weighted_error(dict(zip(ladders, combination, strict=True)), sensitivity)
        for combination in itertools.product(*options)
        if sum(one.nbytes for one in combination) <= room
    )
    largest_step = max(
        sensitivity[key] * (low.error - high.error)
        for key, steps in ladders.items()
        for low, high in itertools.pairwise([steps[0], *steps])
    )
    assert weighted_error(chosen, sensitivity) <= best + largest_step + 1e-9


def test_sensitive_experts_get_more_bytes() -> None:
    steps = ladder(
        [FormatChoice(format="a", nbytes=1, error=4), FormatChoice(format="b", nbytes=2, error=0)]
    )
    chosen = allocate({"cold": steps, "hot": steps}, {"cold": 1.0, "hot": 2.0}, nbytes=3)
    assert {key: one.format for key, one in chosen.items()} == {"cold": "a", "hot": "b"}


def test_every_expert_has_weight() -> None:
    assert smoothed([0.0, 0.0], 0.05) == [0.05, 0.05]
    assert min(smoothed([0.0, 8.0, 1.0], 0.05)) > 0
