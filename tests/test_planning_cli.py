"""The commands profile and plan, and the options that serve as planned."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from planned import planned_model, profile
from tiny_served import saved
from typer.testing import CliRunner

import moefit.cli.planned
from moefit.cli import app
from moefit.cli.options import Room
from moefit.cli.planned import Planned, promise_of, refuse_beside_plan
from moefit.errors import ConfigError, DataError
from moefit.plan.plan_file import read_plan
from moefit.plan.profile import folder_for, write_profile
from moefit.serve.packed import fingerprint
from moefit.serve.skeleton import build


@cache
def folder() -> Path:
    return saved(planned_model(), Path(mkdtemp()) / "model")


@pytest.fixture
def profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with a profile of the model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    skeleton = build(folder())
    done = profile(noise=0.05)
    facts = replace(done.facts, fingerprint=fingerprint(skeleton))
    write_profile(replace(done, facts=facts), folder_for(skeleton) / "p.json")
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def test_plan_prints_everything_as_json_and_saves_what_it_chose(profiled: Path) -> None:
    file, picture = profiled / "plan.json", profiled / "front.png"
    done = run(
        "plan", str(folder()), "--memory", "4GiB", "--context", "64", "--budgets", "3",
        "--save", str(file), "--picture", str(picture), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["plan"] == read_plan(file).as_dict()
    assert len(said["budgets"]) == 3 and said["floor"] < said["everything"]
    assert {one["model"] for one in said["quality_models"]} >= {"network of two layers"}
    assert picture.stat().st_size > 1000


def test_plan_prints_tables_for_people(profiled: Path) -> None:
    done = run("plan", str(folder()), "--memory", "4GiB", "--context", "64", "--budgets", "2")
    assert done.exit_code == 0, done.output
    for words in ("what budgets give", "smallest budget", "tokens/s", "rank correlation"):
        assert words in done.output


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (("--save", "x.json"), ConfigError, "--memory"),
        (("--memory", "4GiB", "--max-loss", "much"), ConfigError, "such as 3%"),
        (("--memory", "4GiB", "--min-speed", "1e9"), ConfigError, "cannot be promised"),
        (("--memory", "1MiB"), Exception, "give at least"),
        (("--profile", "nowhere.json"), ConfigError, "no profile"),
    ],
)
def test_bad_input_is_answered(
    profiled: Path, options: tuple[str, ...], error: type[Exception], says: str
) -> None:
    done = run("plan", str(folder()), "--context", "64", "--budgets", "0", *options)
    assert isinstance(done.exception, error)
    assert says in str(done.exception)


def test_a_text_too_short_to_profile_on_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short")
    done = run("profile", "reference", "--text", str(text))
    assert isinstance(done.exception, DataError)
    assert "too few to calibrate on" in str(done.exception)


def test_bench_serves_as_a_plan_says(profiled: Path) -> None:
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
    ("planned", "memory", "says"),
    [
        (Planned(max_loss="3%"), None, "give --memory"),
        (Planned(plan=Path("x"), min_speed=1.0), None, "one of the two"),
        (Planned(plan=Path("nowhere.json")), None, "there is no plan"),
    ],
)
def test_options_that_contradict_are_refused(
    planned: Planned, memory: str | None, says: str
) -> None:
    assert planned.wanted and not Planned().wanted
    with pytest.raises(ConfigError, match=says):
        planned.plan_for(str(folder()), Room(memory=memory, context=64))


@pytest.mark.slow
def test_a_plan_made_now_keeps_its_promise_or_says_what_can_be(profiled: Path) -> None:
    plan = Planned(max_loss="3%").plan_for(str(folder()), Room(memory="4GiB", context=64))
    assert plan.predicted.loss <= 0.03
    with pytest.raises(ConfigError, match="cannot be promised"):
        Planned(min_speed=1e9).plan_for(str(folder()), Room(memory="4GiB", context=64))


@pytest.mark.parametrize(("text", "share"), [("3%", 0.03), ("0.03", 0.03), ("0", 0.0)])
def test_losses_are_shares(text: str, share: float) -> None:
    assert promise_of(text, None).max_loss == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "x", "-1%", "nan", "inf"])
def test_what_is_no_loss_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="max-loss"):
        promise_of(text, None)


def test_only_what_a_plan_decides_is_refused_beside_it() -> None:
    refuse_beside_plan(mode=None, rest=None)
    with pytest.raises(ConfigError, match="--mode, --rest"):
        refuse_beside_plan(mode="exact", rest="int8", prefill=None)
    assert Planned() == moefit.cli.planned.NOTHING_PLANNED
