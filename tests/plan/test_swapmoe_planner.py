"""The baseline planner of benchmarks/ still runs against the product's models."""

import pytest
from planned import profile, shapes

from benchmarks.swapmoe_planner import available, search
from moefit.plan.fitting import features_of
from moefit.plan.latency import fit_latency
from moefit.plan.quality import fit_quality
from moefit.plan.search import Models, policy_choices


@pytest.mark.skipif(not available(), reason="pymoo is optional")
def test_the_genetic_search_stays_within_the_slot_budget() -> None:
    done = profile(noise=0.05)
    features = features_of(done)
    quality = fit_quality(done, features)
    models = Models(quality, fit_latency(done, features), policy_choices())
    budget = sum(one.slot_bytes["native"] * one.num_experts for one in shapes().values()) // 5
    front = search(models, {"native": budget, "int8": budget}, quality.loss)
    assert front and all(point.nbytes <= budget for point in front)
    assert [one.loss for one in front] == sorted((one.loss for one in front), reverse=True)
    assert search(models, {"native": budget, "int8": budget}, quality.loss) == front  # one seed
    assert search(models, {"native": 1}, quality.loss) == []
