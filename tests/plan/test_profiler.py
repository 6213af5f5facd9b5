"""Profile, fit, plan and load a model."""

import math
from pathlib import Path

import pytest
import torch
from tiny_served import saved, tiny, tokens

import moefit
from moefit.plan.measure import MeasuredModel
from moefit.plan.planner import Planner
from moefit.plan.profile import Profile, find_profile
from moefit.plan.profiler import Profiler
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.windows import Windows

IDS_BT = tokens(5, 33)
WINDOWS = Windows(IDS_BT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny("Mixtral", initializer_range=0.1), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        profiler = Profiler(MeasuredModel(folder=model), WINDOWS, text="random")
        done = profiler.run()
        assert find_profile(build_skeleton(model), model="m") == done
        return done


@pytest.mark.slow
def test_profile_is_complete_and_plausible(profile: Profile) -> None:
    assert not profile.missing
    for name, one in {**profile.those("quality/"), **profile.those("steps/")}.items():
        assert math.isfinite(one["divergence"]), name
        assert one["divergence"] > -1e-6, name
    uniform = {name: one["divergence"] for name, one in profile.those("quality/uniform/").items()}
    assert uniform["int2"] > uniform["int4"] > uniform["int8"]
    exact = profile.items["steps/0-exact-native-1"]
    assert exact["divergence"] < 1e-6 and exact["misses"] == 0


@pytest.mark.slow
def test_plan_from_profile_matches_prediction(profile: Profile, model: Path) -> None:
    planner = Planner(build_skeleton(model), profile, context=64)
    plan, front = planner.plan(planner.slot_budgets.all_resident_bytes)
    assert front and plan.predicted.loss < 0.05
    with moefit.load(model, **{**plan.settings(), "memory": None}) as served, torch.no_grad():
        ours = served.model(IDS_BT).logits.log_softmax(-1)
        full = tiny("Mixtral", initializer_range=0.1)(IDS_BT).logits.log_softmax(-1)
        divergence = float((full.exp() * (full - ours)).sum(-1).mean())
    assert divergence < math.log1p(plan.predicted.loss) + 0.05
