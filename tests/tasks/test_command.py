"""`moefit eval --tasks` and lm-evaluation-harness's own command line."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval", reason="needs moefit[tasks]")
from typer.testing import CliRunner

from moefit.cli import app
from moefit.errors import CheckpointError, ConfigError, DataError
from moefit.tasks.lm import MoefitLM
from moefit.tasks.rows import read_rows

pytestmark = pytest.mark.filterwarnings("ignore")


def run(*options):
    return CliRunner().invoke(app, ["eval", *map(str, options)], env={"COLUMNS": "200"})


def test_a_row_per_rule_beside_the_paper(dsmoe_folder, task_data, tmp_path):
    options = ["--tasks", "hellaswag,winogrande", "--task-data", task_data, "--limit", 3]
    done = run(dsmoe_folder, *options, "--rule", "dense", "--rule", "top_k:2", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    lines = {line.strip().split("  ")[0]: line for line in done.output.splitlines()}
    assert "HellaSwag" in done.output and "ARC-e" not in done.output
    assert "±" in lines["top_k:2"] and "100%" in lines["dense"]
    assert lines["chance"].split()[1:] == ["25.0", "50.0", "37.5"]
    assert lines["paper: DS-MoE-3B"].split()[2:] == ["39.3", "57.9", "48.6", "934", "M", "34%"]
    dense, top_2 = read_rows(tmp_path)
    assert [dense.name, top_2.name] == ["dense", "top_k:2"]
    assert top_2.questions == {"hellaswag": 3, "winogrande": 3}
    assert top_2.active_parameters < dense.active_parameters
    again = run(dsmoe_folder, *options, "--rule", "dense", "--out", tmp_path, "--json")
    (result,) = json.loads(again.stdout)
    assert result["results"].keys() == {"hellaswag", "winogrande"}
    assert result["moefit"]["answers_known_before"] == 3 * (3 + 2)


def test_a_budget_is_a_row_of_its_own(dsmoe_folder, task_data, tmp_path):
    options = ["--tasks", "winogrande", "--task-data", task_data, "--limit", 2, "--context", 64]
    done = run(dsmoe_folder, *options, "--mode", "virtual", "--rule", "top_k:2", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    (row,) = read_rows(tmp_path)
    assert row.name == "top_k:2 mode=virtual context=64"


@pytest.mark.parametrize(
    ("given", "named"), [(64, " context=64"), (256, " context=256"), (None, "")]
)
def test_the_context_of_a_whole_model(dsmoe_folder, task_data, tmp_path, given, named):
    """Whatever number is given, also the default of texts; none leaves the model's own."""
    options = ["--tasks", "winogrande", "--task-data", task_data, "--limit", 1, "--out", tmp_path]
    options += [] if given is None else ["--context", given]
    done = run(dsmoe_folder, *options, "--rule", "dense")
    assert done.exit_code == 0, done.output
    (row,) = read_rows(tmp_path)
    assert row.name == f"dense{named}"


def test_a_served_models_context_is_what_is_given(dsmoe_folder, task_data, tmp_path):
    options = ["--tasks", "winogrande", "--task-data", task_data, "--limit", 1, "--out", tmp_path]
    done = run(dsmoe_folder, *options, "--mode", "virtual", "--context", 256)
    assert done.exit_code == 0, done.output
    (row,) = read_rows(tmp_path)
    assert row.name == "dense mode=virtual context=256"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            ["--tasks", "arc_easy", "--context", 1, "--task-data", "DATA"],
            ConfigError,
            "--context 1 leaves",
        ),
        (["--limit", 3], ConfigError, "--limit is for --tasks"),
        (["--tasks", "piqa", "--text", __file__], ConfigError, "--text is for scoring a text"),
        (["--tasks", ",", "--task-data", "."], ConfigError, "no tasks are given"),
        (["--tasks", "sciq", "--task-data", "."], DataError, "put them into sciq.jsonl"),
    ],
)
def test_wrong_options(dsmoe_folder, task_data, options, error, message):
    done = run(dsmoe_folder, *(task_data if one == "DATA" else one for one in options))
    assert isinstance(done.exception, error) and message in str(done.exception)


def test_a_model_without_tokenizer(dsmoe_folder, tmp_path):
    for file in dsmoe_folder.iterdir():
        if "tokenizer" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    done = run(tmp_path, "--tasks", "piqa")
    assert isinstance(done.exception, CheckpointError) and "no tokenizer" in str(done.exception)


def test_without_lm_eval_the_extra_is_named(dsmoe_folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("moefit.tasks.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval.utils", None)
    done = run(dsmoe_folder, "--tasks", "piqa")
    assert "run `pip install 'moefit[tasks]'`" in str(done.exception)


@pytest.mark.slow  # a process that imports torch
def test_the_module_without_lm_eval():
    code = "import runpy, sys; sys.modules['lm_eval'] = None; "
    code += "runpy.run_module('moefit.tasks', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "run `pip install 'moefit[tasks]'`" in done.stderr


def test_a_model_has_to_be_given():
    with pytest.raises(ConfigError, match="--model_args pretrained=FOLDER"):
        MoefitLM()


@pytest.mark.slow  # lm-eval reads all of its definitions
def test_lm_evals_own_command_line(dsmoe_folder, task_data, tmp_path):
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(task_data / "arc_easy.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "colours.yaml").write_text(json.dumps(task))
    command = [sys.executable, "-m", "moefit.tasks", "run", "--model", "moefit"]
    command += ["--model_args", f"pretrained={dsmoe_folder},rule=top_k:2", "--tasks", "colours"]
    made = subprocess.run(
        [*command, "--include_path", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    options = ["--tasks", "arc_easy", "--task-data", task_data, "--rule", "top_k:2", "--json"]
    (own,) = json.loads(run(dsmoe_folder, *options).stdout)
    row = next(line for line in made.stdout.splitlines() if "colours" in line)
    assert f"{own['results']['arc_easy']['acc,none']:g}" in row.replace(" ", "").split("|")
