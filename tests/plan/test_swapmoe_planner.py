"""The baseline planner in benchmarks/ works with the planner's models."""

import pytest
from planned import profile, shapes

from benchmarks.swapmoe_planner import available, fit_network, network_error, search
from moefit.plan.experiments import policy_choices
from moefit.plan.fitting import features_of, rank_correlation
from moefit.plan.latency import fit_latency
from moefit.plan.quality import fit_quality, quality_samples
from moefit.plan.search import Models


def test_network_fits_samples() -> None:
    done = profile()
    features, samples = features_of(done), quality_samples(done)
    network = fit_network(samples, features)
    predicted = [network.divergence(sample.configuration) for sample in samples]
    assert rank_correlation(predicted, [sample.divergence for sample in samples]) > 0.9
    additive = fit_quality(done, features).comparison
    assert network_error(done, features).mean > min(error.mean for error in additive)


@pytest.mark.skipif(not available(), reason="pymoo is optional")
def test_genetic_search_stays_within_budget() -> None:
    done = profile(noise=0.05)
    features = features_of(done)
    models = Models(fit_quality(done, features), fit_latency(done, features), policy_choices())
    loss = fit_network(quality_samples(done), features).loss
    budget = sum(one.slot_bytes["native"] * one.num_experts for one in shapes().values()) // 5
    front = search(models, {"native": budget, "int8": budget}, loss)
    assert front and all(point.nbytes <= budget for point in front)
    assert [one.loss for one in front] == sorted((one.loss for one in front), reverse=True)
    assert search(models, {"native": budget, "int8": budget}, loss) == front  # one seed
    assert search(models, {"native": 1}, loss) == []
