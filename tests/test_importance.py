import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.serve.importance import ExpertImportanceEstimator

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


@given(steps, st.lists(st.floats(0.1, 9), min_size=5, max_size=5))
def test_an_experts_norm_multiplies_its_score(steps, norms: list[float]) -> None:
    plain, scaled = ExpertImportanceEstimator(5), ExpertImportanceEstimator(5, norms=norms)
    for weights, tokens in steps:
        plain.observe(weights, tokens)
        scaled.observe(weights, tokens)
    expected = [score * norm for score, norm in zip(plain.scores(), norms, strict=True)]
    assert scaled.scores() == pytest.approx(expected)


@given(steps, st.integers(0, 7))
def test_the_best_are_the_highest_and_equals_go_by_id(steps, count: int) -> None:
    estimator = ExpertImportanceEstimator(5)
    for weights, tokens in steps:
        estimator.observe(weights, tokens)
    scores, best = estimator.scores(), estimator.best(count)
    assert len(best) == len(set(best)) == min(count, 5)
    assert best == sorted(best, key=lambda e: (-scores[e], e))
    assert all(scores[e] <= scores[best[-1]] for e in range(5) if best and e not in best)


def test_before_anything_is_seen_all_are_equal() -> None:
    estimator = ExpertImportanceEstimator(3)
    assert estimator.scores() == [0.0] * 3 and estimator.best(2) == [0, 1]


def test_what_is_returned_is_a_copy() -> None:
    estimator = ExpertImportanceEstimator(2)
    estimator.scores()[0] = 9.0
    assert estimator.scores() == [0.0, 0.0]
