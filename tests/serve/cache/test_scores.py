import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.serve.cache.scores import ExpertImportanceEstimator

steps = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 4), st.floats(0, 4), max_size=5), st.integers(1, 2000)
    ),
    max_size=20,
)


@given(steps, st.sampled_from([0.5, 1.0, 16.0, 256.0]))
def test_scores_are_the_sum_of_what_was_observed_halved_by_age(steps, half_life: float) -> None:
    estimator = ExpertImportanceEstimator(5, half_life_tokens=half_life)
    for weights, tokens in steps:
        estimator.observe(weights, tokens)
    expected, age = [0.0] * 5, 0
    for weights, tokens in reversed(steps):
        for expert, weight in weights.items():
            expected[expert] += weight * 0.5 ** (age / half_life)
        age += tokens
    assert estimator.scores() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_before_anything_is_seen_all_are_equal() -> None:
    estimator = ExpertImportanceEstimator(3)
    assert estimator.scores() == [0.0] * 3


def test_what_is_returned_is_a_copy() -> None:
    estimator = ExpertImportanceEstimator(2)
    estimator.scores()[0] = 9.0
    assert estimator.scores() == [0.0, 0.0]
