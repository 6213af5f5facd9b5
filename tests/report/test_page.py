"""The page about a run: what it shows, its metadata, and damaged files."""

import base64
import json
import re
import shutil
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from moefit.cli import app
from moefit.errors import ConfigError, DataError
from moefit.evaluate.loading import load_full_model
from moefit.evaluate.passage import text_of_file
from moefit.evaluate.perplexity import score
from moefit.moe.routing import Rule
from moefit.report import facts
from moefit.report.facts import PLAN, SCORES, Measurements, gather, labels_of, name_of
from moefit.report.write import write_page

RULES = ("dense", "top_k:2", "threshold:0.8")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("a page about a model and its run\n" * 60)
    return path


@pytest.fixture(scope="module")
def known(run_folder, text):
    rules = [Rule.parse(one) for one in RULES]
    measured = Measurements(text=text, max_tokens=256, rules=rules)
    return gather(str(run_folder), measured)


def table(page: str, heading: str) -> dict[str, list[str]]:
    """Return a section's table by its first column."""
    section = page.split(f"### {heading}\n")[1].split("###")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines]
    return {row[0].strip(): [one.strip() for one in row[1:]] for row in cells}


def test_the_page_has_what_is_known(known, run_folder, text, tmp_path):
    page = write_page([known], tmp_path, "apache-2.0").read_text()
    assert table(page, "Training")["tokens"] == ["2,000"]
    assert table(page, "Training")["last held-out loss, nats per token"] == ["4.5000"]
    assert ["0.125"] in table(page, "Training").values()
    model, tokenizer = load_full_model(str(run_folder))
    windows = text_of_file(text, tokenizer, 256, 256)
    shown = table(page, "Perplexity by inference rule")
    for one in score(model, windows, [Rule.parse(rule) for rule in RULES]):
        assert shown[one.rule][1] == f"{one.active_parameters:,}"
        assert float(shown[one.rule][3]) == pytest.approx(one.perplexity, rel=1e-3)
    assert table(page, "Tasks")["top_k:2"] == ["52.0 ±9.8", "75.0 ±7.8", "1.50 M"]
    assert "At chance within the intervals, by every rule: piqa." in page
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert pictures == ["training.png", "rules.png", "plan.png"]
    assert all((tmp_path / one).read_bytes().startswith(b"\x89PNG") for one in pictures)
    assert "Serving in a memory budget" not in page
    html = (tmp_path / "index.html").read_text()
    assert "<title>mine|1</title>" in html and "52.0 ±9.8" in html
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert base64.b64decode(inside[0]) == (tmp_path / "training.png").read_bytes()


def test_the_metadata_are_the_hubs(known, tmp_path):
    data = ModelCard.load(write_page([known], tmp_path, "apache-2.0")).data
    assert (data.license, data.library_name) == ("apache-2.0", "transformers")
    assert data.tags == ["moe", "dsmoe", "moefit"]
    found = {one.metric_name: one for one in data.eval_results}
    assert found["accuracy, top_k:2"].metric_value in (0.52, 0.75)
    assert found["perplexity, dense"].metric_value == pytest.approx(
        known.by_rule[0].perplexity, rel=1e-3
    )


def test_several_runs_are_compared(known, tmp_path):
    page = write_page([known, known], tmp_path).read_text()
    first, second = f"{known.given} (1)", f"{known.given} (2)"
    assert f"# {first} and {second}" in page and "(losses.png)" in page
    assert "(0-training.png)" in page and "(1-training.png)" in page


def test_runs_of_one_name_are_told_apart(known, tmp_path):
    runs = [replace(known, given=given) for given in ("a/run", "b/run")]
    page = write_page(runs, tmp_path).read_text()
    assert "# a/run and b/run" in page and "## b/run" in page
    assert labels_of([known, replace(known, name="other")]) == [known.name, "other"]


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "train", "step": 30, "loss": "x"},
        {"kind": "eval", "step": 30},
        {"kind": "eval", "loss": 3.0},
        {"kind": "train", "step": 30, "loss": 1.0, "mlp_mi": 0.5},
        {"kind": "run", "step": 0, "tokens_per_step": "many"},
    ],
)
def test_damaged_records_are_named(run_folder, tmp_path, line):
    shutil.copytree(run_folder, tmp_path / "run")
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write("3\n[]\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"log\.jsonl has a record .* is no number"):
        gather(str(tmp_path / "run"), Measurements(max_tokens=0))


def test_serving_is_measured_in_other_processes(run_folder, monkeypatch, tmp_path):
    asked = []

    def measure(command, *arguments):
        asked.append((command, *arguments))
        speed = {"tokens_per_second": 7.0, "prefill_tokens_per_second": 9.0, "hit_rate": 0.5}
        return {**speed, "peak_process_bytes": 1 << 30, "stepwise": 8.0, "loss": 0.25}

    monkeypatch.setattr(facts, "_measure", measure)
    measured = Measurements(max_tokens=0, budgets=["1GiB", "2GiB"])
    page = write_page([gather(str(run_folder), measured)], tmp_path).read_text()
    shown = table(page, "Serving in a memory budget")
    assert shown["1GiB, exact"] == ["7.00", "9.0", "50.0%", "1.00 GiB", ""]
    assert shown["2GiB, virtual"][-1] == "+25.0%"
    assert [one[0] for one in asked] == ["bench", "bench", "eval"] * 2
    assert asked[2][1:6] == (str(run_folder), "--memory", "1GiB", "--mode", "virtual")


def test_damaged_files_are_named(run_folder, tmp_path):
    for file in run_folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / PLAN).write_text('{"front": 3}')
    with pytest.raises(DataError, match="not what moefit plan MODEL --json prints"):
        gather(str(tmp_path), Measurements(max_tokens=0))
    (tmp_path / PLAN).unlink()
    (tmp_path / SCORES).mkdir()
    (tmp_path / SCORES / "a.tasks.json").write_text(json.dumps({"results": {}}))
    with pytest.raises(DataError, match="not a result of moefit eval --tasks"):
        gather(str(tmp_path), Measurements(max_tokens=0))
    own = {"name": 5, "seconds": 1.0}
    found = {"results": {}, "n-samples": {}, "moefit": own}
    (tmp_path / SCORES / "a.tasks.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match="not a result of moefit eval --tasks"):
        gather(str(tmp_path), Measurements(max_tokens=0))


def test_models_on_the_hub_keep_their_name(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(run_folder)
    assert [name_of(one) for one in ("org/model", "reference")] == ["org/model", "reference"]
    assert name_of(".") == name_of(str(run_folder)) == "mine|1"


@pytest.mark.parametrize("options", [["--max-tokens", "1"], ["--max-tokens", "0", "--text", "no"]])
def test_wrong_options(run_folder, options):
    done = CliRunner().invoke(app, ["report", str(run_folder), *options])
    assert isinstance(done.exception, ConfigError)


def test_the_command(run_folder, text, tmp_path):
    options = ["--text", text, "--max-tokens", 64, "--rule", "dense", "--out", tmp_path / "page"]
    done = CliRunner().invoke(app, ["report", str(run_folder), *map(str, options)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page" / "README.md").read_text()
    assert table(page, "Perplexity by inference rule").keys() == {"rule", "dense"}


@pytest.mark.slow
def test_a_budget_is_measured(run_folder):
    measured = Measurements(max_tokens=0, budgets=["2GiB"])
    exact, virtual = gather(str(run_folder), measured).serving
    assert exact.tokens_per_second > 0 and exact.loss is None
    assert virtual.perplexity > 1 and abs(virtual.loss) < 1e-3
