"""The commands profile and plan, and options that use a plan."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from planned import planned_model, profile
from tiny_served import saved
from typer.testing import CliRunner

import moefit
from moefit.cli import app
from moefit.cli.loading import _explain_plan, load_served
from moefit.cli.options import ServingOptions
from moefit.cli.planned import PlanProcess, forbid_with_plan, plan_for, target_of
from moefit.cli.serve import replanner
from moefit.engine.api import EngineSettings
from moefit.engine.engine import PROMPT_LOGITS_BYTES, Engine
from moefit.errors import BudgetTooSmallError, CheckpointError, ConfigError, DataError
from moefit.plan.plan_file import Plan, Target, read_plan
from moefit.plan.profile import folder_for, write_profile
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.packed.store import fingerprint
from moefit.server.client import Client, ServerError


@cache
def folder() -> Path:
    return saved(planned_model(), Path(mkdtemp()) / "model")


@pytest.fixture
def profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with a profile of the model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    skeleton = build_skeleton(folder())
    done = profile(noise=0.05)
    facts = replace(done.facts, fingerprint=fingerprint(skeleton))
    write_profile(replace(done, facts=facts), folder_for(skeleton) / "p.json")
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def test_plan_prints_json_and_saves(profiled: Path) -> None:
    file, picture = profiled / "plan.json", profiled / "front.png"
    done = run(
        "plan", str(folder()), "--memory", "4GiB", "--context", "64", "--budgets", "3",
        "--save", str(file), "--picture", str(picture), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["plan"] == read_plan(file).as_dict()
    assert len(said["budgets"]) == 3 and said["floor"] < said["everything"]
    assert {one["model"] for one in said["quality_models"]} >= {"additive, error^1"}
    assert picture.stat().st_size > 1000


def test_plan_prints_tables(profiled: Path) -> None:
    done = run("plan", str(folder()), "--memory", "4GiB", "--context", "64", "--budgets", "2")
    assert done.exit_code == 0, done.output
    for words in ("what budgets give", "smallest budget", "tokens/s", "rank correlation"):
        assert words in done.output


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (("--save", "x.json"), ConfigError, "--memory"),
        (("--max-loss", "3"), ConfigError, "give 3% if"),
        (("--min-speed", "1e9"), ConfigError, "no plan for"),
        (("--picture", "x.png"), ConfigError, "--budgets is 0"),
        (("--picture", "x.docx", "--budgets", "2"), ConfigError, "ends in .png"),
        (("--picture", "nowhere/x.png", "--budgets", "2"), ConfigError, "there is no folder"),
        (("--memory", "4GiB", "--max-loss", "much"), ConfigError, "such as 3%"),
        (("--memory", "4GiB", "--min-speed", "1e9"), ConfigError, "no plan for"),
        (("--memory", "1MiB"), Exception, "give at least"),
        (("--profile", "nowhere.json"), ConfigError, "no profile"),
    ],
)
def test_invalid_input_raises(
    profiled: Path, options: tuple[str, ...], error: type[Exception], says: str
) -> None:
    done = run("plan", str(folder()), "--context", "64", "--budgets", "0", *options)
    assert isinstance(done.exception, error)
    assert says in str(done.exception)


def test_plan_without_budget_uses_smallest_that_meets_target(
    profiled: Path,
) -> None:
    file = profiled / "plan.json"
    few = ("--context", "64", "--budgets", "0", "--process-bytes", str(1 << 29), "--json")
    done = run("plan", str(folder()), "--max-loss", "4%", "--save", str(file), *few)
    assert done.exit_code == 0, done.output
    plan = read_plan(file)
    said = json.loads(done.stdout)
    assert said["floor"] <= plan.memory < said["everything"] and plan.predicted.loss <= 0.04
    again = run("plan", str(folder()), "--max-loss", "4%", "--memory", str(plan.memory), *few)
    assert again.exit_code == 0, again.output
    less = str(plan.memory - (plan.memory - said["floor"]) // 8 - (16 << 20))
    if int(less) > said["floor"]:
        refused = run("plan", str(folder()), "--max-loss", "4%", "--memory", less, *few)
        assert "no plan for" in str(refused.exception)


def test_too_short_text_raises(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short")
    done = run("profile", "reference", "--text", str(text))
    assert isinstance(done.exception, DataError)
    assert "too few to calibrate on" in str(done.exception)


@pytest.mark.slow
def test_bench_uses_plan(profiled: Path) -> None:
    file = profiled / "plan.json"
    run("plan", str(folder()), "--memory", "4GiB", "--context", "64", "--save", str(file))
    done = run(
        "bench", str(folder()), "--plan", str(file), "--prompt-tokens", "4", "--new-tokens", "2",
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "plan: " in done.output
    refused = run("bench", str(folder()), "--plan", str(file), "--precision", "int4")
    assert "--precision" in str(refused.exception)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (ServingOptions(max_loss="3%"), "give --memory"),
        (ServingOptions(plan=Path("x"), min_speed=1.0), "one of the two"),
        (ServingOptions(plan=Path("nowhere.json")), "there is no plan"),
    ],
)
def test_contradictory_options_raise(options: ServingOptions, says: str) -> None:
    assert options.has_plan and not ServingOptions().has_plan
    with pytest.raises(ConfigError, match=says):
        plan_for(str(folder()), options)


def test_planned_options_match_command(profiled: Path) -> None:
    order = PlanProcess(
        model=str(folder()), memory="4GiB", context=64, device="cpu", process=1 << 30,
        target=Target(min_speed=0.1), concurrency=16, dtype="bfloat16",
        dense_precision="int8", kv_cache="int8",
    )  # fmt: skip
    file = profiled / "plan.json"
    done = run(*order.arguments(file))
    assert done.exit_code == 0, done.output
    plan = read_plan(file)
    assert (plan.sequences, plan.prompt_logits) == (16, PROMPT_LOGITS_BYTES)
    assert (plan.memory, plan.context, plan.dtype) == (4 << 30, 64, "bfloat16")
    assert plan.kv_cache == "int8"
    assert plan.step_tokens == EngineSettings(max_concurrency=16).step_tokens
    assert (plan.target, plan.configuration.dense_precision) == (order.target, "int8")
    floor = json.loads(done.stdout)["floor"]
    run(*replace(order, step_tokens=40).arguments(file))
    assert read_plan(file) == replace(plan, step_tokens=40)  # no longer than 64 are reserved as 64
    larger = run(*replace(order, process=2 << 30).arguments(file))
    assert json.loads(larger.stdout)["floor"] == floor + (1 << 30)
    bare = replace(order, concurrency=None, dtype=None, dense_precision=None, target=Target())
    assert not {
        "--dense-precision", "--dtype", "--max-loss", "--max-concurrency", "--prefetch",
    } & set(bare.arguments(file))  # fmt: skip
    with_probes = run(*replace(order, prefetch="on").arguments(file))
    assert json.loads(with_probes.stdout)["floor"] == floor, "the model has no probes"


def test_planning_error_is_passed_on(tmp_path: Path) -> None:
    order = PlanProcess(
        model=str(tmp_path / "nowhere"), memory="4GiB", context=64, device="cpu", process=1 << 30,
        target=Target(),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"^there is no folder .*nowhere"):
        order.run()


@pytest.mark.slow  # a process of its own
def test_planning_that_fails_otherwise_says_how(tmp_path: Path) -> None:
    order = PlanProcess(
        model=str(tmp_path), memory="4GiB", context="x", device="cpu", process=1 << 30,  # pyright: ignore[reportArgumentType]
        target=Target(),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"(?s)^planning ended with exit code 2: .*--context"):
        order.run()


def test_plan_for_fewer_requests_raises(profiled: Path) -> None:
    file = profiled / "plan.json"
    run("plan", str(folder()), "--memory", "4GiB", "--context", "64", "--save", str(file))
    plan = read_plan(file)
    with moefit.load(folder(), **{**plan.settings(), "memory": None}) as served:
        assert served.budget.planned is not None
        tight = served.budget.fixed + served.budget.planned.nbytes
    with pytest.raises(BudgetTooSmallError, match=r"for 1 requests .* runs 10000000: plan"):
        load_served(
            str(folder()),
            ServingOptions(memory=str(tight + (64 << 20)), context=64, plan=file),
            sequences=10_000_000,
            prompt_logits=PROMPT_LOGITS_BYTES,
        )


def saved_plan(file: Path, *options: str) -> Plan:
    given = ("plan", str(folder()), "--memory", "4GiB", "--context", "128", *options)
    done = run(*given, "--save", str(file), "--budgets", "0")
    assert done.exit_code == 0, done.output
    return read_plan(file)


def test_commands_reserve_what_they_compute(
    profiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server's plan is used by commands that compute prompts whole, and the other way round."""
    file = profiled / "plan.json"
    options = ServingOptions(context=128, plan=file)
    for given in ((), ("--step-tokens", "100"), ("--max-concurrency", "4")):
        plan = saved_plan(file, *given)
        assert plan.step_tokens == {"--step-tokens": 100, "--max-concurrency": 132}.get(
            next(iter(given), "")
        )
        for command, tokens in (({}, 128), ({"step_tokens": 100}, 100)):
            capsys.readouterr()
            with load_served(str(folder()), options, **command) as served:
                assert served.budget.step_tokens == tokens
            noted = "--step-tokens 100" in capsys.readouterr().err
            assert noted == (tokens == 100 and not given)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (None, "steps of 80 tokens, as servers compute, and here .* plan without"),
        (400, "steps of 80 tokens, and this server computes 400: plan with --step-tokens 400"),
    ],
)
def test_plan_for_shorter_steps_raises(profiled: Path, step: int | None, says: str) -> None:
    plan = saved_plan(profiled / "plan.json", "--step-tokens", "80")
    chosen = {"sequences": 1, "step_tokens": step}
    with pytest.raises(BudgetTooSmallError, match=says), _explain_plan(plan, chosen, 0):
        raise BudgetTooSmallError("too small")
    chosen["step_tokens"] = 80
    with pytest.raises(BudgetTooSmallError) as plain, _explain_plan(plan, chosen, 0):
        raise BudgetTooSmallError("too small")
    assert str(plain.value) == "too small"


def test_server_plans_again_for_its_steps(profiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = saved_plan(profiled / "plan.json", "--step-tokens", "80")
    asked: list[PlanProcess] = []
    monkeypatch.setattr(PlanProcess, "run", lambda self: asked.append(self))
    with moefit.load(folder(), **plan.settings()) as served:
        settings = EngineSettings(max_concurrency=4, prefill_chunk=100)
        engine = Engine(served, settings)  # which reserves longer steps than the plan
        replanner(str(folder()), plan, engine)(1 << 32)
        assert served.budget.step_tokens == settings.step_tokens == 104
    assert [one.step_tokens for one in asked] == [104]


@pytest.mark.slow
def test_server_plan_fits_minimum_budget(profiled: Path) -> None:
    settings = {"sequences": 16, "prompt_logits": PROMPT_LOGITS_BYTES}
    options = ServingOptions(memory="1MiB", context=64, min_speed=0.001)
    with pytest.raises(BudgetTooSmallError, match="give at least") as refused:
        load_served(str(folder()), options, **settings)
    floor = re.search(r"give at least (\d+) bytes", str(refused.value))
    assert floor is not None
    memory = int(floor[1]) + (1 << 20)  # this process grows while it asks
    enough = replace(options, memory=str(memory))
    with load_served(str(folder()), enough, **settings) as served:
        assert served.budget.planned is not None
        assert served.budget.fixed + served.budget.planned.nbytes <= memory
        more = replace(served.placement_budget.settings, sequences=1, prompt_logits=0)
        assert served.budget.workspace > memory_budget(build_skeleton(folder()), more).workspace
        served.check()


@pytest.mark.slow
def test_new_plan_meets_target_or_raises(profiled: Path) -> None:
    options = ServingOptions(memory="4GiB", context=64)
    plan = plan_for(str(folder()), replace(options, max_loss="3%"))
    assert plan.predicted.loss <= 0.03
    with pytest.raises(ConfigError, match="no plan for"):
        plan_for(str(folder()), replace(options, min_speed=1e9))


@pytest.mark.parametrize(("text", "share"), [("3%", 0.03), ("0.03", 0.03), ("0", 0.0)])
def test_loss_is_parsed_as_fraction(text: str, share: float) -> None:
    assert target_of(text, None).max_loss == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "x", "-1%", "nan", "inf"])
def test_invalid_loss_raises(text: str) -> None:
    with pytest.raises(ConfigError, match="max-loss"):
        target_of(text, None)


def test_options_decided_by_plan_raise() -> None:
    forbid_with_plan(mode=None, rest=None)
    with pytest.raises(ConfigError, match="--mode, --rest"):
        forbid_with_plan(mode="exact", rest="int8", prefill=None)


@pytest.mark.slow
def test_server_replans_after_budget_change(profiled: Path) -> None:
    serve = ("serve", str(folder()), "--memory", "4GiB", "--max-loss", "4%", "--context", "64")
    process = subprocess.Popen(
        [sys.executable, "-m", "moefit", *serve, "--port", "0", "--max-concurrency", "4"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("API at "):
                break
        assert any(line.startswith("plan: ") for line in lines), lines
        client = Client(lines[-1].split()[2])
        before = client.get("/v1/memory")
        assert before["plan"]["loss"] <= 0.04
        less = (before["floor"] + before["everything"]) // 2
        after = client.post("/v1/memory", {"bytes": less})
        assert after["budget"]["total"] == less and after["plan"]["loss"] <= 0.04
        assert after["slot_bytes"] < before["everything"] - before["floor"]
        with pytest.raises(ServerError, match="give at least") as refused:
            client.post("/v1/memory", {"bytes": before["floor"] - 1})
        assert refused.value.code == "budget_too_small" and str(before["floor"]) in str(refused)
        assert client.get("/v1/memory")["plan"] == after["plan"]
        done = client.post("/v1/memory", {"bytes": before["floor"] + (1 << 20), "mode": "exact"})
        assert done["plan"] is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
