import numpy as np
import pytest
from planned import FIRST, LAST, MIDDLE, SENSITIVITY, law_of_loss, law_of_time, profile, unseen

from moefit.plan.fitting import features_of, rank_correlation
from moefit.plan.latency import fit_latency
from moefit.plan.profile import Profile
from moefit.plan.quality import fit_quality

measured = profile


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_unmeasured_quality_is_predicted(noise: float) -> None:
    done = measured(noise=noise)
    known = features_of(done)
    model = fit_quality(done, known)
    truth = [law_of_loss(one, known) for one in unseen(40)]
    predicted = [model.loss(one) for one in unseen(40)]
    errors = [abs(np.log1p(p) - t) for p, t in zip(predicted, truth, strict=True)]
    assert np.median(errors) < 0.01
    assert rank_correlation(predicted, truth) > 0.9


def test_sensitive_blocks_are_found() -> None:
    done = measured()
    found = fit_quality(done, features_of(done)).additive.sensitivity
    assert sorted(found, key=lambda name: found[name]) == [MIDDLE, LAST, FIRST]
    assert found[FIRST] == pytest.approx(SENSITIVITY[FIRST], rel=0.2)


def test_best_candidate_model_is_chosen() -> None:
    done = measured(noise=0.1)
    models = done.items["models"]["quality"]
    names = [one["model"] for one in models["comparison"]]
    assert len(names) == len(set(names)) == 6
    best = min(models["comparison"], key=lambda one: one["mean"])
    assert models["additive"] == best["model"]


def test_old_profile_with_network_is_compared_again() -> None:
    done = measured(noise=0.1)
    features = features_of(done)
    found = done.items["models"]["quality"]
    network = {**found["comparison"][0], "model": "network of two layers", "mean": 0.0}
    old = {
        "judge": "network of two layers",
        "additive": found["additive"],
        "margin": 0.0,
        "comparison": [*found["comparison"], network],
    }
    again = fit_quality(done.with_item("models", {"quality": old}), features)
    assert again == fit_quality(done, features)
    assert again.margin == found["margin"] > 0


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_unmeasured_speed_is_predicted(noise: float) -> None:
    done = measured(noise=noise)
    known = features_of(done)
    model = fit_latency(done, known)
    truth = [law_of_time(one, done, known) for one in unseen(40)]
    predicted = [model.seconds(one) for one in unseen(40)]
    errors = [abs(p / t - 1) for p, t in zip(predicted, truth, strict=True)]
    assert np.median(errors) < (0.02 if noise == 0 else 0.15)
    assert rank_correlation(predicted, truth) > 0.9


def test_latency_is_sum_of_parts() -> None:
    done = measured()
    known = features_of(done)
    model = fit_latency(done, known)
    for one in unseen(10):
        policy = "exact" if one.mode == "exact" else one.mode
        parts = [
            model.block(name, placement, policy, misses, swaps)
            for (name, placement), misses, swaps in zip(
                one.placement.items(), known.misses(one), known.swaps(one), strict=True
            )
        ]
        assert model.fixed(one.dense_precision) + sum(parts) == pytest.approx(model.seconds(one))


def test_cold_files_slow_only_fetching() -> None:
    done: Profile = measured()
    known = features_of(done)
    warm, cold = fit_latency(done, known), fit_latency(done, known, cold=True)
    fully_resident = [
        one for one in unseen(40) if sum(known.misses(one)) == 0 and one.mode == "exact"
    ]
    fetching = [one for one in unseen(40) if sum(known.misses(one)) > 0.5]
    assert all(cold.seconds(one) == pytest.approx(warm.seconds(one)) for one in fully_resident)
    assert fetching and all(cold.seconds(one) > warm.seconds(one) for one in fetching)
