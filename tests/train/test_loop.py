import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_models import OLMOE

from moefit.errors import CheckpointError, ConfigError, DataError, DivergenceError
from moefit.train import checkpoint, loop
from moefit.train.config import make_config
from moefit.train.display import Figure
from moefit.train.loop import train
from moefit.train.run_folder import locked, read_log


def losses(out):
    return [record["loss"] for record in read_log(out) if record["kind"] == "train"]


def weights(result):
    return {p.name: p.read_bytes() for p in result.checkpoint.glob("*.safetensors")}


def test_run_trains_and_writes_outputs(config, callback, tmp_path):
    result = train(config, callback)
    out = tmp_path / "run"
    assert result.step == config.steps
    assert result.held_out_loss is not None
    assert losses(out)[-1] < losses(out)[0]
    assert {"config.yaml", "log.jsonl", "curve.png"} <= {path.name for path in out.iterdir()}
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step-00000004", "step-00000008"]
    record = [r for r in read_log(out) if r["kind"] == "train"][-1]
    for name in ("h_e", "h_e_given_x", "mi", "active", "dead"):
        assert 0 <= record[f"mlp_{name}"] <= 1 + 1e-6
        assert 0 <= record[f"attention_{name}"] <= 1 + 1e-6
    assert record["tokens_per_second"] > 0
    facts = next(r for r in read_log(out) if r["kind"] == "run")
    assert facts["parameters"] == callback.info["parameters"] > 0
    assert (facts["device"], facts["precision"], facts["attention"]) == ("cpu", "fp32", "sdpa")


def test_finished_run_is_not_changed(config, callback, tmp_path, monkeypatch):
    first = train(config, callback)
    out, count = tmp_path / "run", len(callback.steps)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    monkeypatch.delattr(loop, "Trainer")  # nothing is built
    monkeypatch.delattr(loop, "prepare")
    assert train(config, callback) == first
    assert first.held_out_loss is not None
    assert len(callback.steps) == count
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert after == before


def test_settings_of_many_processes_are_said_to_have_no_effect(tree, callback):
    train(make_config(tree | {"steps": 3, "parallel": {"replicate": 2}}), callback)
    assert any("settings of parallel have no effect" in one for one in callback.messages)


def test_olmoe_trains_densely(tree, callback):
    tree["model"] = OLMOE
    tree["loss"] = {"mlp_mi": 0.02}
    result = train(make_config(tree), callback)
    assert result.step == 8
    assert losses(result.checkpoint.parent)[-1] < math.log(300)


def test_folder_of_another_run_raises(tree, callback):
    train(make_config(tree), callback)
    tree["optimizer"]["lr"] = 5e-4
    with pytest.raises(ConfigError, match=r"other settings \(optimizer\.lr\).*out=FOLDER"):
        train(make_config(tree), callback)


def test_invalid_config_does_not_reserve_folder(tree, callback, tmp_path):
    sources = tree["data"]["sources"]
    tree["data"]["sources"] = ["no/such/folder"]
    with pytest.raises(DataError, match="does not exist"):
        train(make_config(tree), callback)
    assert not (tmp_path / "run" / "config.yaml").exists()
    tree["data"]["sources"], tree["model"]["hidden_size"] = sources, 30
    with pytest.raises(ConfigError):
        train(make_config(tree), callback)
    tree["model"]["hidden_size"] = 32
    assert train(make_config(tree), callback).step == 8


def test_run_without_checkpoint_does_not_reserve_folder(tree, callback):
    """An extreme learning rate raises instead of saving NaNs."""
    tree["optimizer"] = {"lr": 1e20, "warmup_steps": 0, "clip": 1e20}
    with pytest.raises(DivergenceError, match="there is no checkpoint yet"):
        train(make_config(tree), callback)
    tree["optimizer"] = {"lr": 1e-3, "warmup_steps": 2}
    assert train(make_config(tree), callback).step == 8


def test_log_interval_may_change_on_resume(tree, callback):
    train(make_config(tree), callback)
    tree["log"]["every"], tree["checkpoint"]["keep"] = 2, 1
    assert train(make_config(tree), callback).step == 8


def test_damaged_checkpoint_raises_on_resume(tree, callback):
    result = train(make_config(tree), callback)
    path = result.checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"damaged: model\.safetensors.*previous checkpoint"):
        train(make_config(tree), callback)


def test_second_process_raises(config, callback, tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(ConfigError, match=r"another process is training in .*run;.*out=FOLDER"),
    ):
        train(config, callback)
    assert train(config, callback).step == 8


def test_failed_curve_does_not_fail_run(config, callback, tmp_path, monkeypatch):
    def full(self, path, dpi):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", full)
        assert train(config, callback).step == 8
    assert "could not be drawn: No space left" in callback.messages[-1]
    assert not list((tmp_path / "run").glob("*curve.png"))
    train(config, callback)  # as the message says
    assert (tmp_path / "run" / "curve.png").is_file()


def test_home_folder_is_expanded(tree, callback, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree |= {"out": "~/mine", "steps": 3}
    assert train(make_config(tree), callback).checkpoint.parent == tmp_path / "mine"


def test_unwritable_folder_raises(tree, callback, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    tree["out"] = str(tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match=r"cannot write into .*out=FOLDER"):
        train(make_config(tree), callback)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": {"hidden_size": 30, "num_attention_heads": 4}}, ConfigError, "=30"),
        ({"model": {"experts": 4}}, ConfigError, "'experts' is not a field"),
        ({"model": {"vocab_size": 4}}, ConfigError, "comes from the tokenizer"),
        ({"model": {"mlp_mi_loss_coef": 4.0}}, ConfigError, "comes from the loss settings"),
        ({"model": {"training_rule": "top_k:99"}}, ConfigError, "the most that works is top_k:16"),
        ({"model": {"preset": "dsmoe-1"}}, ConfigError, "did you mean"),
        (
            {"model": {"architecture": "olmoe", "num_experts_per_tok": 99}, "loss": {}},
            ConfigError, "leave it out to train all",
        ),
        ({"seq_len": 10**7}, DataError, "seq_len"),
        ({"device": "cuda:99"}, ConfigError, "use auto or cpu|use auto, cpu"),
    ],
)  # fmt: skip
def test_invalid_runs_raise(tree, callback, change, error, words):
    with pytest.raises(error, match=words):
        train(make_config({**tree, **change}), callback)


def killed_after_two_checkpoints(path, out):
    process = subprocess.Popen(
        [sys.executable, "-m", "moefit", "train", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(checkpoint.checkpoints(out)) < 2:
        assert process.poll() in (None, 0), "the run failed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_killed_run_resumes_exactly(tree, tmp_path, callback):
    """A killed run has only complete checkpoints and resumes to the same result."""
    tree |= {"steps": 12, "checkpoint": {"every": 1, "keep": 2}}
    whole = train(make_config(tree), callback)
    out = tmp_path / "killed"
    tree["out"] = str(out)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    for _ in range(5):  # on a busy machine the run may be over before this process has its turn
        killed_after_two_checkpoints(path, out)
        found = checkpoint.checkpoints(out)
        for folder in found:
            checkpoint.verify(folder)
        if checkpoint.step_of(found[-1]) < 12:
            break
        shutil.rmtree(out)
    else:
        pytest.fail("always killed too late to show anything")
    assert weights(train(make_config(tree), callback)) == weights(whole)
    assert losses(out) == losses(tmp_path / "run")
    assert not list(out.glob(".step-*"))
