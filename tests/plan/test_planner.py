import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from planned import EXPERTS, planned_model, profile
from tiny_served import saved, tokens

import moefit
from benchmarks.swapmoe_planner import front_for_slots
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.plan.configuration import uniform
from moefit.plan.plan_file import Plan, Target, check_checkpoint, read_plan, write_plan
from moefit.plan.planner import Planner
from moefit.plan.search import PlanConstraints, Point
from moefit.quant.kv_int8 import INT8_CACHE, MODEL_CACHE
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.memory.activations import kv_bytes_per_token
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.packed.store import fingerprint
from moefit.serve.prediction.next_router import LinearMap
from moefit.serve.prediction.probes import ProbeLocation, find_probes

CONTEXT = 64
_LOADING = LoadSettings.__slots__


@cache
def folder() -> Path:
    return saved(planned_model(), Path(mkdtemp()) / "model")


@cache
def planner() -> Planner:
    return Planner(build_skeleton(folder()), profile(noise=0.05), context=CONTEXT)


def budgets(count: int = 5) -> list[int]:
    low, high = planner().slot_budgets.min_bytes, planner().slot_budgets.all_resident_bytes
    return [low + (high - low) * number // (count - 1) for number in range(count)]


def test_plans_fit_serving_estimate() -> None:
    for memory in budgets():
        for point in planner().front(memory):
            assert planner().slot_budgets.estimate(point.configuration).planned_bytes <= memory


@pytest.mark.parametrize("rest", ["native", "int8"])
def test_server_plan_fits_with_overhead(rest: str) -> None:
    """Estimate as `load` does, for a process of another size."""
    process = 3 << 30
    served = PlanConstraints(
        sequences=16, prompt_logits=1 << 20, process=process, dense_formats=(rest,)
    )
    planner = server_planner(served)
    skeleton = build_skeleton(folder())
    for memory in (
        planner.slot_budgets.min_bytes,
        (planner.slot_budgets.min_bytes + planner.slot_budgets.all_resident_bytes) // 2,
    ):
        plan, _ = planner.plan(memory, Target(min_speed=0.1))
        known = plan.settings()
        settings = LoadSettings(**{one: known[one] for one in known if one in _LOADING})
        assert (settings.sequences, settings.prompt_logits, settings.dense_precision) == (
            16,
            1 << 20,
            rest,
        )
        # As if this process had given back its libraries' pages, which are more than the model.
        reckoned = replace(memory_budget(skeleton, settings), process=process, unused=0)
        assert reckoned.slots() == tuple(one.slots for one in plan.configuration.placement.values())
        alone = memory_budget(skeleton, replace(settings, sequences=1, prompt_logits=0))
        assert reckoned.workspace > alone.workspace
    with pytest.raises(BudgetTooSmallError, match=str(planner.slot_budgets.min_bytes)):
        planner.plan(planner.slot_budgets.min_bytes - 1)


def server_planner(constraints: PlanConstraints) -> Planner:
    return Planner(
        build_skeleton(folder()), profile(noise=0.05), context=CONTEXT,
        constraints=constraints,
    )  # fmt: skip


def test_fixed_options_are_kept() -> None:
    planner = server_planner(PlanConstraints(dense_formats=("int8",)))
    memory = planner.slot_budgets.all_resident_bytes
    assert {one.configuration.dense_precision for one in planner.front(memory)} == {"int8"}


def test_sequences_include_logits() -> None:
    process = 1 << 30
    one = server_planner(PlanConstraints(process=process))
    many = server_planner(PlanConstraints(process=process, sequences=64))
    memory = many.slot_budgets.all_resident_bytes + (32 << 20)
    plan = many.plan(memory)[0]
    fits = many.sequences(plan, (16, 64))
    assert fits == one.sequences(plan, (16, 64)) and fits[16] > 0
    per_token = many._per_token(plan.configuration)
    row = planned_model().config.vocab_size * (4 + 2)
    taken = (
        many.slot_budgets.estimate(plan.configuration).planned_bytes
        - CONTEXT * per_token
        - 64 * row
    )
    assert taken + fits[16] * (16 * per_token + row) <= memory
    assert taken + (fits[16] + 1) * (16 * per_token + row) > memory


def test_probes_that_are_served_with_are_counted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    skeleton = build_skeleton(folder())
    location = ProbeLocation(skeleton)
    metadata = location.metadata(text="a", digest="b", tokens=9, recalls={"0.1": (0.9, 0.8)})
    weight_ED = torch.zeros(EXPERTS, 128, dtype=skeleton.dtype)
    location.write(metadata, {(0, 1): LinearMap(weight_ED, weight_ED[:, 0].clone())})
    found = find_probes(skeleton, LoadSettings(prefetch="on", dtype=skeleton.dtype)).nbytes
    without, auto, on = (
        server_planner(PlanConstraints(process=1 << 30, prefetch=name)).slot_budgets
        for name in ("off", "auto", "on")
    )
    assert on.min_bytes - without.min_bytes == found > 0
    assert auto.min_bytes == on.min_bytes and on.fixed - without.fixed == found
    with pytest.raises(ConfigError, match="prefetch_horizon=2, but prefetch is off"):
        server_planner(PlanConstraints(process=1 << 30, prefetch_horizon=2))
    planner = server_planner(PlanConstraints(process=1 << 30, prefetch="on"))
    plan, _ = planner.plan((on.min_bytes + on.all_resident_bytes) // 2)
    known = plan.settings()
    settings = LoadSettings(**{one: known[one] for one in known if one in _LOADING}, prefetch="on")
    budget = replace(memory_budget(skeleton, settings), process=1 << 30)
    assert budget.probes == found and budget.planned_bytes <= plan.memory


def test_int8_kv_cache_leaves_more_for_experts(tmp_path: Path) -> None:
    own, rounded = (
        server_planner(PlanConstraints(process=1 << 30, kv_cache=name))
        for name in (MODEL_CACHE, INT8_CACHE)
    )
    config, dtype = planned_model().config, planned_model().dtype
    less = CONTEXT * (
        kv_bytes_per_token(config, dtype) - kv_bytes_per_token(config, dtype, int8=True)
    )
    assert own.slot_budgets.min_bytes - rounded.slot_budgets.min_bytes == less > 0
    plan = rounded.plan(rounded.slot_budgets.all_resident_bytes)[0]
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    with moefit.load(folder(), **{**plan.settings(), "memory": None}) as served:
        assert served.budget.kv_dtype == INT8_CACHE


@pytest.mark.parametrize("context", [64, 512])
def test_a_step_leaves_more_for_experts(context: int, tmp_path: Path) -> None:
    """By what its activations are less than those of a prompt as long as the context."""
    skeleton, process = build_skeleton(folder()), 1 << 30
    whole, steps = (
        Planner(
            skeleton, profile(noise=0.05), context=context,
            constraints=PlanConstraints(process=process, step_tokens=number),
        )
        for number in (None, 80)
    )  # fmt: skip
    plan = steps.plan(steps.slot_budgets.all_resident_bytes)[0]
    known = {**plan.settings(), "memory": None}
    settings = LoadSettings(**{one: known[one] for one in known if one in _LOADING})
    alike = (memory_budget(skeleton, replace(settings, step_tokens=n)) for n in (None, 80))
    less = -sum(sign * one.workspace for sign, one in zip((-1, 1), alike, strict=True))
    assert whole.slot_budgets.min_bytes - steps.slot_budgets.min_bytes == less
    assert (less > 0) == (context > 80) and plan.step_tokens == settings.step_tokens == 80
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    with moefit.load(folder(), **known) as served:
        assert served.budget.step_tokens == min(80, context)


def test_sequences_of_plans_that_reserve_a_step() -> None:
    """Longer contexts add keys and values alone."""
    steps = server_planner(PlanConstraints(process=1 << 30, step_tokens=64))
    plan = steps.plan(steps.slot_budgets.all_resident_bytes + (64 << 20))[0]
    assert plan.memory is not None
    fits = steps.sequences(plan, (64,))[64]
    config, dtype = planned_model().config, planned_model().dtype
    token = kv_bytes_per_token(config, dtype)
    assert steps._per_token(plan.configuration) == token

    def taken(number: int) -> int:
        budget = steps.slot_budgets.estimate(plan.configuration, context=128, sequences=number)
        return budget.planned_bytes + 64 * (number - 2) * token

    assert fits > 2 and taken(fits) <= plan.memory < taken(fits + 1)


def test_sequences_of_models_without_a_longest_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may be longer than the planned context, and is reserved for longer ones."""
    steps = server_planner(PlanConstraints(process=1 << 30, step_tokens=512))
    monkeypatch.setattr(steps._skeleton.model.config, "max_position_embeddings", 1 << 20)
    monkeypatch.setattr(Planner, "_longest", None)
    plan = steps.plan(steps.slot_budgets.all_resident_bytes)[0]
    three = steps.slot_budgets.estimate(plan.configuration, context=3 * 512, sequences=3)
    for missing, fits in ((0, 3), (1, 2)):
        known = replace(plan, memory=three.planned_bytes - missing)
        assert steps.sequences(known, (512,)) == {512: fits}


def test_more_memory_never_increases_loss() -> None:
    found = dict(planner().fronts_by_budget(6))
    assert list(found) == sorted(found)
    fronts = list(found.values())
    losses = [min(one.loss for one in front) for front in fronts]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-3)


def test_plan_without_fetching_has_no_waits() -> None:
    known = planner().features
    room = sum(one.slot_bytes["int4"] * one.num_experts for one in known.shapes.values())
    still = front_for_slots(planner(), room, fetching=False)
    exact = [one.configuration for one in still if one.configuration.mode != "virtual"]
    assert exact and all(sum(known.misses(one)) < 0.05 for one in exact)
    best = min(one.loss for one in still)
    assert best <= planner().quality.loss(uniform(planner().profile.experts, "int4")) + 1e-6


def test_loads_are_cold_without_page_cache() -> None:
    machine = {**planner().profile.facts.machine, "memory": 0}
    done = replace(planner().profile, facts=replace(planner().profile.facts, machine=machine))
    tight = Planner(planner()._skeleton, done, context=CONTEXT)
    floor = planner().slot_budgets.min_bytes
    warm, cold = planner().front(floor)[0], tight.front(tight.slot_budgets.min_bytes)[0]
    assert cold.seconds > warm.seconds


def test_targets_are_met_by_predictions() -> None:
    memory = budgets()[1]
    front = planner().front(memory)
    for one in front[:: max(1, len(front) // 5)]:
        bound = one.loss + planner().quality.margin
        plan, _ = planner().plan(memory, Target(max_loss=bound))
        assert plan.predicted.loss <= bound
        plan, _ = planner().plan(memory, Target(min_speed=one.speed))
        assert plan.predicted.speed >= one.speed
        assert plan.predicted.loss <= one.loss


@pytest.mark.parametrize("target", [Target(max_loss=0.0), Target(min_speed=1e6)])
def test_unreachable_target_names_nearest(target: Target) -> None:
    memory = planner().slot_budgets.min_bytes
    with pytest.raises(ConfigError, match="satisfies") as refused:
        planner().plan(memory, target)
    loss, speed = (
        float(re.search(pattern, str(refused.value))[1])  # pyright: ignore
        for pattern in (r"has a loss of ([0-9.]+)%", r"makes ([0-9.]+) tokens/s")
    )
    planner().plan(memory, Target(max_loss=loss / 100 + 1e-4))
    planner().plan(memory, Target(min_speed=speed - 0.01))


@pytest.mark.parametrize(
    "target",
    [Target(max_loss=-0.1), Target(max_loss=float("nan")), Target(min_speed=0.0)],
)
def test_invalid_targets_raise(target: Target) -> None:
    with pytest.raises(ConfigError, match="but it must be"):
        planner().plan(budgets()[1], target)


def test_below_minimum_names_minimum() -> None:
    floor = planner().slot_budgets.min_bytes
    with pytest.raises(BudgetTooSmallError, match=str(floor)):
        planner().front(floor - 1)
    assert planner().front(floor)


def test_smallest_budget_meets_loss() -> None:
    for loss in (0.001, 0.03):
        size = planner().smallest_budget(Target(max_loss=loss))
        assert size is not None
        assert planner().plan(size, Target(max_loss=loss))[0].predicted.loss <= loss
    assert planner().smallest_budget(Target(min_speed=1e9)) is None
    with pytest.raises(ConfigError, match="but it must be"):
        planner().smallest_budget(Target(max_loss=-1.0))


def test_profile_of_another_machine_warns() -> None:
    done = profile(noise=0.05)
    machine = {**done.facts.machine, "cpu": "Z80"}
    done = replace(done, facts=replace(done.facts, machine=machine))
    warned = Planner(build_skeleton(folder()), done, context=CONTEXT).warnings()
    assert "cpu was Z80" in warned[0]
    assert not any("another machine" in one for one in planner().warnings())


@pytest.mark.parametrize("busy", [False, True])
def test_times_of_busy_machine_warn(busy: bool) -> None:
    done = profile(noise=0.05)
    for number, (name, one) in enumerate(done.those("steps/").items()):
        longer = 10 ** (number % 3) if busy else 1
        done = done.with_item(f"steps/{name}", {**one, "seconds": one["seconds"] * longer})
    planner = Planner(build_skeleton(folder()), done, context=CONTEXT)
    said = [one for one in planner.warnings() if "are unreliable" in one]
    assert len(said) == busy
    if busy:
        assert "moefit profile --again" in said[0]


def test_longer_sequences_fit_fewer() -> None:
    plan, _ = planner().plan(planner().slot_budgets.all_resident_bytes + (64 << 20))
    counts = planner().sequences(plan, (32, 64, 128))
    assert counts[32] >= counts[64] >= counts[128] > 0


def test_expensive_modes_warn() -> None:
    done = profile(noise=0.05)
    for name, one in done.those("steps/").items():
        dear = 0.3 if "virtual" in name else 1e-3 if "bounded" in name else one["divergence"]
        done = done.with_item(f"steps/{name}", {**one, "divergence": dear})
    warned = Planner(build_skeleton(folder()), done, context=CONTEXT).warnings()
    assert len(warned) == 1
    assert "virtual is expensive" in warned[0] and "35.0%" in warned[0]


def test_plan_round_trips_and_loads(tmp_path: Path) -> None:
    plan = some_plan()
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    settings = {**plan.settings(), "memory": None}
    with moefit.load(folder(), **settings) as served:
        report = served.report()
        assert served.model.dtype == torch.bfloat16
        for name, one in plan.configuration.placement.items():
            assert report["slots"][name] == one.slots
            assert set(report["formats"][name]) == set(one.formats)
        served.model(tokens(1, 8))
        served.check()


def some_plan() -> Plan:
    return planner().plan(budgets()[2])[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not a plan"),
        ("[]", "version None"),
        ('{"version": 99}', "version 99"),
        ('{"version": 1}', "damaged"),
    ],
)
def test_invalid_plan_raises(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_plan(file)
    with pytest.raises(ConfigError, match="there is no plan"):
        read_plan(tmp_path / "none.json")


def test_old_plan_is_for_one_request(tmp_path: Path) -> None:
    values = some_plan().as_dict()
    for name in ("sequences", "prompt_logits", "promise", "kv_cache", "step_tokens"):
        del values[name]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(values))
    assert read_plan(file) == replace(some_plan(), target=Target())


@pytest.mark.parametrize("field", ["dtype", "kv_cache", "step_tokens"])
def test_damaged_names_raise(tmp_path: Path, field: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**some_plan().as_dict(), field: "load"}))
    with pytest.raises(ConfigError, match="damaged"):
        read_plan(file)


def test_plan_for_another_checkpoint_raises(tmp_path: Path) -> None:
    skeleton = build_skeleton(folder())
    with pytest.raises(ConfigError, match="another checkpoint"):
        check_checkpoint(some_plan(), skeleton, tmp_path / "plan.json")
    check_checkpoint(replace(some_plan(), fingerprint=fingerprint(skeleton)), skeleton, tmp_path)


def test_points_describe_speed() -> None:
    point = planner().front(budgets()[0])[0]
    assert isinstance(point, Point) and point.speed == pytest.approx(1 / point.seconds)
