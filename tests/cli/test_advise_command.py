"""The commands advise, law list and law fit, from options to a run that trains."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import moefit.cli.advise.advise
import moefit.cli.advise.law  # noqa: F401 -- registers the command
from moefit.advise.laws import find_law
from moefit.advise.runs import read_runs
from moefit.advise.shapes import Shape
from moefit.cli import app
from moefit.errors import ConfigError, DataError, MoefitError
from moefit.train.config import read_config

LAPTOP = "memory: 1.6e+10\nbandwidth: 2.0e+10\nflops: 2.0e+11\nsource: a test\nis_gpu: false\n"


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hardware file, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("laptop.yaml").write_text(LAPTOP)
    return "laptop.yaml"


def run(*arguments: str):
    done = CliRunner().invoke(app, list(arguments))
    if isinstance(done.exception, MoefitError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


def test_recommendation_trains_and_its_run_can_be_read(
    laptop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a budget to a configuration, a run of it, and the run as data for a fit."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    Path("book.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(4000)))
    done = run(
        "advise", "--flops", "4e14", "--hardware", laptop, "--vocab-size", "300", "--text",
        "book.txt", "--write", "config.yaml", "--picture", "front.png", "--precision", "int8",
    )  # fmt: skip
    assert "moefit train config.yaml" in done.stderr
    assert "what other laws choose" in done.stdout
    assert Path("front.png").read_bytes()[:4] == b"\x89PNG"
    text = Path("config.yaml").read_text()
    assert text.startswith("# Recommended by `moefit advise` for 4e+14 FLOPs")
    run("train", "config.yaml", "steps=2", "batch_size=1", "accumulation=1", "seq_len=16",
        "out=run", "log.eval_tokens=64")  # fmt: skip
    runs = read_runs([Path("run")])
    (one,) = runs.used
    assert one.tokens == 32
    model = read_config(Path("config.yaml"), []).model.settings
    width, layers = model["hidden_size"], model["num_hidden_layers"]
    shape = Shape(width=width, layers=layers, experts=model["num_experts"], vocabulary=300)
    assert one.experts == shape.experts > 1
    assert one.parameters == pytest.approx(shape.active, rel=0.1)
    assert 4 < one.loss < 7
    with pytest.raises(DataError, match="1 usable runs are too few"):
        run("law", "fit", "run", "--form", "clark")
    check_other_runs(Path("run"))
    with pytest.raises(ConfigError, match=r"config\.yaml exists"):
        run("advise", "--flops", "4e14", "--hardware", laptop, "--write", "config.yaml")


def check_other_runs(finished: Path) -> None:
    """Runs of other texts are refused; diverged and unfinished ones are left out by name."""
    for name, file, old, new in (
        ("other", "config.yaml", "book.txt", "poems.txt"),
        ("stopped", "config.yaml", "steps: 2", "steps: 9"),
    ):
        shutil.copytree(finished, name)
        path = Path(name, file)
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    shutil.copytree(finished, "diverged")
    log = Path("diverged", "log.jsonl")
    log.write_text(f'{log.read_text()}{{"kind": "eval", "step": 2, "loss": 9.0}}\n')
    with pytest.raises(DataError, match=r"differ in data: .*book\.txt.*poems\.txt"):
        read_runs([finished, Path("other")])
    runs = read_runs([finished, Path("stopped"), Path("diverged")])
    assert [one.name for one in runs.used] == ["run"]
    assert runs.left_out["stopped"] == "it stopped at step 2 of 9"
    assert runs.left_out["diverged"].startswith("it diverged: its loss rose from")


def test_json_has_the_answer_and_the_run(laptop: str) -> None:
    done = run(
        "advise", "--flops", "1e20", "--memory", "4GiB", "--min-speed", "10", "--hardware", laptop,
        "--json",
    )  # fmt: skip
    said = json.loads(done.stdout)
    chosen = said["recommended"]
    assert chosen["resident_bytes"] <= 4 << 30
    assert chosen["tokens_per_second"] >= 10
    assert said["hardware"]["basis"] == "roofline, an upper bound: a test"
    assert said["law"]["source"].startswith("Ludziejewski")
    assert said["config"]["model"]["hidden_size"] == chosen["width"]
    assert [one["experts"] for one in said["by_experts"]] == [1, 2, 4, 8, 16, 32]
    assert said["over_training"]["compute_share"] <= 1
    assert {one["law"] for one in said["opinions"]} >= {"krajewski", "clark-hash", "besiroglu"}


def test_context_holds_prompt_and_answer(laptop: str) -> None:
    """The trained model has its positions, and the printed command its KV cache."""
    done = run(
        "advise", "--flops", "1e16", "--hardware", laptop, "--precision", "int8",
        "--prompt-tokens", "3e3", "--answer-tokens", "1e3", "--write", "long.yaml",
    )  # fmt: skip
    assert "--precision int8 --dense-precision int8 --context 4000" in done.stderr
    config = read_config(Path("long.yaml"), [])
    assert config.model.settings["max_position_embeddings"] == 4000
    assert config.seq_len < 4000
    refused = CliRunner().invoke(app, ["advise", "--flops", "1e16", "--answer-tokens", "nan"])
    assert refused.exit_code == 2
    assert "Invalid value for '--answer-tokens'" in refused.output


def test_traffic_and_gpu_hours(laptop: str) -> None:
    done = run(
        "advise", "--gpu-hours", "100", "--gpu", "h100", "--mfu", "0.5", "--hardware", "a100-80gb",
        "--requests", "5", "--devices", "2", "--max-loss", "2.6", "--precision", "native", "--json",
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said["training_flops"] == pytest.approx(100 * 3600 * 989e12 * 0.5)
    assert said["algorithm"] == "least-cost"
    assert said["recommended"]["loss"] <= 2.6
    assert said["recommended"]["capacity_tokens_per_second"] >= 5 * 256
    assert said["recommended"]["device_seconds_per_token"] > 0


def runs_file(path: Path) -> Path:
    law = find_law("clark-rlr")
    rows = ["N,experts,tokens,loss,name"]
    for layers in (4, 6, 8, 12, 16):
        for experts in (1, 4, 16, 64):
            shape = Shape(width=64 * layers, layers=layers, experts=experts)
            loss = law.loss(shape, 1.3e11) * float(np.exp(0.002 * np.sin(7 * layers + experts)))
            n = 13 * layers * shape.width**2
            rows.append(f"{n},{experts},1.3e11,{loss},run-{layers}-{experts}")
    rows.append("1e8,4,1.3e11,nan,burnt")
    path.write_text("\n".join(rows))
    return path


def test_a_fitted_law_advises(laptop: str) -> None:
    file = runs_file(Path("runs.csv"))
    done = run(
        "law", "fit", str(file), "--form", "clark", "--column", "parameters=N", "--counts",
        "active without embeddings", "--bootstrap", "5", "--hold-out", "largest", "--save",
        "mine.yaml", "--picture", "fit.svg",
    )  # fmt: skip
    assert "left out: burnt: its loss is nan" in done.stderr
    assert "largest runs, fitted to the others" in done.stderr
    assert "95% interval" in done.stdout
    assert "<svg" in Path("fit.svg").read_text()
    law = find_law("mine.yaml")
    assert law.coefficients["a"] == pytest.approx(-0.083, rel=0.1)
    said = json.loads(
        run(
            "advise", "--flops", "1e20", "--hardware", laptop, "--law", "mine.yaml", "--json"
        ).stdout
    )
    assert said["law"]["name"] == "mine"
    assert said["recommended"]["tokens"] == 1.3e11
    assert said["over_training"] is None


def test_law_list_names_sources(laptop: str) -> None:
    assert "2502.05172" in run("law", "list").stdout
    said = json.loads(run("law", "list", "--json").stdout)
    assert said["clark-hash"]["laws"]["clark-hash"]["coefficients"]["b"] == -0.136


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "neither of --flops and --gpu-hours"),
        (["--flops", "1e21", "--gpu-hours", "3"], "both of --flops and --gpu-hours"),
        (["--flops", "much"], "'much' is not a positive number, such as 1e21"),
        (["--flops", "1e21", "--min-speed", "-1"], "--min-speed -1 is not positive"),
        (["--flops", "1e21", "--devices", "2"], "give --requests"),
        (["--flops", "1e21", "--precision", "int7"], "precision 'int7' is unknown here"),
        (["--flops", "1e21", "--picture", "a.txt"], "a picture cannot be written as 'a.txt'"),
        (
            ["--flops", "1e21", "--max-loss", "2", "--algorithm", "best-quality"],
            "looks for the lowest",
        ),
        (
            ["--flops", "1e21", "--match-experts", "4"],
            "no --max-loss, or leave --match-experts out",
        ),
        (["--gpu-hours", "3", "--gpu", "h1"], "'h1' is not known hardware"),
        (
            ["--flops", "1e21", "--prompt-tokens", "4e3", "--context", "4000"],
            "does not hold a prompt of 4000 tokens .* give at least --context 4256",
        ),
        (
            ["--flops", "1e21", "--requests", "1", "--storage-bandwidth", "3GB"],
            "--storage-bandwidth is for one sequence at a time",
        ),
        (["--flops", "1e21", "--gpu", "h100"], "--gpu h100 turns --gpu-hours into FLOPs"),
        (["--flops", "1e21", "--mfu", "0.5"], "--mfu 0.5 turns --gpu-hours into FLOPs"),
        (["--gpu-hours", "1e300"], "--gpu-hours 1e.300 of h100 are more FLOPs than a number"),
        (["--flops", "1e21", "--write", "none/run.yaml"], "there is no folder .*none to write"),
    ],
)
def test_bad_options(laptop: str, arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run("advise", "--hardware", laptop, *arguments)


def test_columns_and_the_law_file_are_checked_first(laptop: str) -> None:
    runs_file(Path("runs.csv"))
    for save, words in (
        ("law.txt", r"from a \.yaml file only; give --save law\.yaml"),
        ("none/law.yaml", "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            run("law", "fit", "runs.csv", "--form", "clark", "--save", save)
    with pytest.raises(ConfigError, match="write NAME=COLUMN, with NAME one of parameters"):
        run("law", "fit", "runs.csv", "--form", "clark", "--column", "size=N")
    with pytest.raises(DataError, match="no column 'parameters' for parameters; it has N, experts"):
        run("law", "fit", "runs.csv", "--form", "clark")
