"""Decisions about prefetching, with simulated times."""

import random
from collections.abc import Callable

import pytest

from moefit.serve.prediction.guesses import TRIAL_STEPS, Confidence, Reading, Trial, choose, margins


def simulated(
    gain: float,
    *,
    waited: float = 0.4,
    steps: int = 400,
    seed: int = 0,
    noise: float = 0.15,
    drift: Callable[[int], float] = lambda step: 1.0,
):
    """Return time relative to never prefetching, and the share of steps that prefetched.

    Args:
        gain: Share of a step's time that prefetching saves.
        waited: Share of a step's time that it waits for reads.
        steps: Number of steps.
        seed: Of the noise.
        noise: Its standard deviation, relative to a step's time.
        drift: Time without prefetching, by step.
    """
    trial, source, spent, used = Trial(), random.Random(seed), 0.0, 0
    for step in range(steps):
        prefetched = trial.use(1)
        seconds = (1 - gain if prefetched else 1.0) * drift(step)
        trial.measured(1, prefetched, seconds * source.gauss(1, noise), waited * seconds)
        spent, used = spent + seconds, used + prefetched
    return spent / sum(map(drift, range(steps))), used / steps


@pytest.mark.parametrize("gain", [-0.3, -0.1, 0.0])
def test_a_trial_loses_little_where_prefetching_does_not_pay(gain: float) -> None:
    results = [simulated(gain, seed=seed) for seed in range(20)]
    assert sum(time for time, _ in results) / 20 < 1.02
    assert sum(used for _, used in results) / 20 < 0.15


def test_a_trial_finds_a_gain_in_noise() -> None:
    results = [simulated(0.25, seed=seed) for seed in range(20)]
    assert sum(time for time, _ in results) / 20 < 0.85


DRIFTS = {
    "a text that grows": lambda step: 1 + step / 200,
    "requests that come and go": lambda step: 1 + step // 50 % 2,
    "faster, then slower": lambda step: 0.5 if step < 400 else 2.0,
}


@pytest.mark.parametrize("drift", DRIFTS.values(), ids=DRIFTS)
def test_times_that_change_decide_nothing(drift: Callable[[int], float]) -> None:
    def found(gain: float) -> list[tuple[float, float]]:
        return [
            simulated(gain, steps=800, noise=0.05, drift=drift, seed=seed) for seed in range(10)
        ]

    for gain in (-0.1, 0.0):
        assert max(time for time, _ in found(gain)) < 1.01
        assert max(used for _, used in found(gain)) < 0.08
    assert min(used for _, used in found(0.1)) > 0.8  # and a gain is found and kept


def test_another_budget_is_tried_anew_and_other_steps_between_are_not_compared() -> None:
    trial = Trial()
    for _ in range(100):
        trial.measured(1, prefetched := trial.use(1), 0.7 if prefetched else 1.0, 0.4)
    assert trial.pays(1)
    trial.forget()
    assert not trial.pays(1) and not any(trial.use(1) for _ in range(8))
    trial = Trial()
    for _ in range(100):
        trial.measured(1, prefetched := trial.use(1), 0.7 if prefetched else 1.0, 0.4)
        trial.interrupted()
    assert not trial.pays(1)


def test_trial_steps_decide() -> None:
    trial = Trial()
    for _ in range(TRIAL_STEPS):
        trial.measured(1, prefetched := trial.use(1), 0.7 if prefetched else 1.0, 0.4)
    assert trial.pays(1)


def test_no_trial_where_steps_do_not_wait() -> None:
    assert simulated(0.25, waited=0.01)[1] == 0
    assert not any(Trial().use(tokens) for tokens in range(1, TRIAL_STEPS))  # of other sizes


def test_reads_stop_at_what_fits_in_the_window() -> None:
    sure = dict.fromkeys(range(9), 1.0)
    for window in (0.5, 1.0, 2.5):
        reading = Reading(load=1.0, window=window, queued=0, most=9)
        assert len(choose(sure, reading)) == -(-window // 1)
        queued = Reading(load=1.0, window=window, queued=9, most=9)
        assert choose(sure, queued) == ()
    assert choose(sure, Reading(load=1.0, window=9.0, queued=0, most=2)) == (0, 1)


def test_unlikely_guesses_are_not_read() -> None:
    slow = Reading(load=10.0, window=1.0, queued=0, most=4)
    assert choose({1: 0.85}, slow) == ()  # delays the step by 0.15 * 9 to save 0.85
    assert choose({1: 0.95}, slow) == (1,)


def test_margins_of_many_tokens_and_of_all_experts() -> None:
    found = margins([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]], 1)
    assert found[0] == found[3] > 0 > found[1] == found[2]
    assert margins([[1.0, 2.0]], 5).keys() == {0, 1}
    assert margins([[2.0, 2.0, 2.0]], 1) == {0: 0.0, 1: 0.0}
    for number in (float("nan"), float("inf"), float("-inf")):
        assert margins([[number, 1.0, 0.0]], 1) == {}
        assert margins([[0.0, 1.0], [number, 0.0]], 1) == margins([[0.0, 1.0]], 1)
    confidence = Confidence(2)
    for _ in range(100):
        confidence.observe(1, found[0], True)
    assert confidence.of(1, found[0]) > confidence.of(0, found[0]) > confidence.of(0, found[1])
