import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from moefit import demo, demo_serving
from moefit.errors import CheckpointError
from moefit.evaluate.loading import reference_path
from moefit.evaluate.perplexity import Score
from moefit.evaluate.stepwise import StepScore
from moefit.train.loop import TrainResult


def made_up(rule, share, perplexity):
    return Score(
        rule=rule, loss=1.0, perplexity=perplexity, bits_per_byte=1.0, tokens=10, mlp_experts=2.0,
        attention_experts=1.0, active_parameters=10, active_share=share, tokens_per_second=1.0,
    )  # fmt: skip


def served(memory, mode, slots, stepwise):
    score = StepScore(
        mode=mode, prefill="exact", slots=slots, experts=12, full=10.0, wide=10.0,
        stepwise=stepwise, divergence=0.0, agreement=1.0, substituted_mass=0.0, hit_rate=1.0,
        bytes_per_token=0.0, tokens=10, tokens_per_second=1.0,
    )  # fmt: skip
    return demo_serving.Row(memory=memory, expert_bytes=slots * 100, score=score)


ROWS = [
    served("all", "exact", 12, 10.0),
    served("1/2", "exact", 6, 9.999),
    served("1/2", "virtual", 6, 30.0),
]


def test_figure_is_drawn(tmp_path):
    scores = [made_up("dense", 1.0, 10.0), made_up("top_k:2", 0.3, 11.0)]
    demo.draw(scores, scores, ROWS, tmp_path / "demo.png")
    assert imread(tmp_path / "demo.png").shape[0] > 400


def test_modes_agree_with_all_experts():
    assert demo_serving._lines(ROWS) == {
        "exact": {100.0: 0.0, 50.0: pytest.approx(-0.01)},
        "bounded": {100.0: 0.0},
        "virtual": {100.0: 0.0, 50.0: pytest.approx(200.0)},
        "auto": {100.0: 0.0},
    }


def test_only_demo_folders_are_deleted(tmp_path):
    folder = tmp_path / "run"
    demo._recreate(folder)
    (folder / "step-1").mkdir()
    demo._recreate(folder)
    assert [path.name for path in folder.iterdir()] == [demo.MARK]
    (folder / demo.MARK).unlink()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"has no \.moefit-demo.*another folder with --out"):
        demo._recreate(folder)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_existing_file_is_kept(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(CheckpointError, match="not created by a demo"):
        demo._recreate(tmp_path / "run")
    with pytest.raises(CheckpointError, match="cannot write into"):
        demo._recreate(tmp_path / "run" / "below")


def test_signal_ends_demo(tmp_path, monkeypatch):
    def stopped(config, watcher):
        return TrainResult(
            step=3, checkpoint=Path(config.out), held_out_loss=None, stopped_by="SIGINT"
        )

    monkeypatch.setattr(demo, "train", stopped)
    monkeypatch.setattr(demo, "_steps_in", lambda config, seconds, watcher: 30)
    monkeypatch.setattr(demo, "_scores", None)
    console = Console(file=io.StringIO(), width=120)
    result = demo.run(tmp_path / "demo", seconds=5, console=console)
    assert result["training"]["stopped_by"] == "SIGINT"
    assert result["training"]["tokens"] == 3 * 8 * demo._config(tmp_path, 30).seq_len
    assert result.keys() == {"training"}


needs_reference = pytest.mark.skipif(
    not (reference_path() / "model.safetensors").is_file(), reason="no reference model yet"
)


@pytest.mark.slow
@needs_reference
def test_shipped_model_with_less_memory():
    console = Console(file=io.StringIO(), width=120)
    rows = demo_serving.run(console, max_tokens=128)
    precisions = ["1/2 auto", "1/3 auto", "1/5 auto"]
    assert [row.name for row in rows] == ["all exact", *precisions] + [
        f"{memory} {mode}" for memory in ("1/2", "1/3") for mode in ("exact", "bounded", "virtual")
    ]
    full = rows[0].expert_bytes
    for row, share in zip(rows[1:4], (1 / 2, 1 / 3, 1 / 5), strict=True):
        assert 0.95 * share * full <= row.expert_bytes <= share * full
        assert row.score.full == pytest.approx(rows[0].score.full, rel=1e-3)
        assert row.score.slots == row.score.experts
        assert abs(row.score.loss) < 0.1
    for row in [rows[0], *rows[4:]]:
        score = row.score
        assert row.expert_bytes == pytest.approx(full * score.slots / score.experts)
        assert score.full == pytest.approx(rows[0].score.full, rel=1e-3)
        if score.mode == "exact":
            assert abs(score.loss) < 0.005
            assert score.substituted_mass == 0
        else:
            assert score.substituted_mass > 0
        if score.mode != "virtual":  # which reads only if importance shifts
            assert (score.bytes_per_token > 0) == (row.memory != "all")
    assert "MB/tok" in console.file.getvalue()


@pytest.mark.slow
@needs_reference
def test_stdout_is_json(tmp_path):
    command = [sys.executable, "-m", "moefit", "demo", "--seconds", "5", "--json", "--out", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout).keys() == {
        "training", "reference", "trained", "answer", "serving", "picture",
    }  # fmt: skip
    assert "perplexity" in done.stderr  # the tables are there


@pytest.mark.slow
@needs_reference
def test_full_demo(tmp_path):
    console = Console(file=io.StringIO(), width=120)
    result = demo.run(tmp_path / "demo", seconds=5, console=console)
    assert result["training"]["steps"] >= 30
    assert {score["rule"] for score in result["reference"]} >= {"dense", "top_k:4"}
    assert result["answer"]["text"].startswith(demo.PROMPT)
    assert 0.2 < result["answer"]["active_share"] < 0.4
    assert [row["mode"] for row in result["serving"][:2]] == ["exact", "auto"]
    assert (tmp_path / "demo" / "demo.png").is_file()
    again = demo.run(tmp_path / "demo", seconds=5, console=console)  # a second visit works too
    assert again["training"]["steps"] >= 30
