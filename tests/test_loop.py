import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from moefit.errors import CheckpointError, ConfigError, DataError, DivergenceError
from moefit.train import checkpoint
from moefit.train.config import make_config
from moefit.train.log import read_log
from moefit.train.loop import train
from moefit.train.step import Stepper


def losses(out):
    return [record["loss"] for record in read_log(out) if record["kind"] == "train"]


def weights(result):
    return {p.name: p.read_bytes() for p in result.checkpoint.glob("*.safetensors")}


def test_it_learns_and_leaves_everything(config, listener, tmp_path):
    result = train(config, listener)
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
    assert listener.facts["parameters"] > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_equals_never_having_stopped(tree, listener, tmp_path, accumulation):
    """Bit for bit, with dropout on, so that the random state counts too."""
    tree["accumulation"] = accumulation
    whole = train(make_config(tree), listener)
    tree["out"] = str(tmp_path / "broken")
    config = make_config(tree)
    listener.on_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    stopped = train(config, listener)
    assert (stopped.step, stopped.stopped_by) == (3, "SIGTERM")
    listener.on_step = None
    torch.manual_seed(12345)  # whatever state the new process happens to have
    resumed = train(config, listener)
    assert any("resuming" in event for event in listener.events)
    assert weights(resumed) == weights(whole)
    assert losses(tmp_path / "broken") == losses(tmp_path / "run")
    states = [checkpoint.load_state(result.checkpoint) for result in (whole, resumed)]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        for a, b in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
            assert torch.equal(a[name], b[name])


def test_a_finished_run_is_left_as_it_is(config, listener):
    first = train(config, listener)
    count = len(listener.steps)
    again = train(config, listener)
    assert again.checkpoint == first.checkpoint
    assert again.step == first.step
    assert len(listener.steps) == count


def test_olmoe_trains_densely(tree, listener):
    tree["model"] = {
        "architecture": "olmoe",
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 4,
    }
    tree["loss"] = {"mlp_mi": 0.02}
    result = train(make_config(tree), listener)
    assert result.step == 8
    assert losses(make_config(tree).out and result.checkpoint.parent)[-1] < math.log(300)


def test_activation_checkpointing_changes_no_loss(tree, listener, tmp_path):
    tree["model"]["attention_dropout"] = 0.0
    tree["steps"] = 3
    train(make_config(tree), listener)
    tree["out"], tree["activation_checkpointing"] = str(tmp_path / "other"), True
    train(make_config(tree), listener)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)


def test_accumulation_is_the_mean_of_its_batches(tree, listener, tmp_path):
    """Without router losses (MI is no mean over micro-batches) two halves make a whole."""
    tree["model"]["attention_dropout"] = 0.0
    tree["loss"], tree["steps"] = {}, 3
    train(make_config(tree), listener)
    tree |= {"out": str(tmp_path / "halves"), "batch_size": 2, "accumulation": 2}
    train(make_config(tree), listener)
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)


def test_a_folder_with_another_run_is_refused(tree, listener):
    train(make_config(tree), listener)
    tree["optimizer"]["lr"] = 5e-4
    with pytest.raises(ConfigError, match=r"other settings \(optimizer\.lr\).*out=FOLDER"):
        train(make_config(tree), listener)


def test_rhythm_of_the_log_may_change_on_resume(tree, listener):
    train(make_config(tree), listener)
    tree["log"]["every"], tree["checkpoint"]["keep"] = 2, 1
    assert train(make_config(tree), listener).step == 8


def test_a_damaged_checkpoint_stops_the_resume(tree, listener):
    result = train(make_config(tree), listener)
    path = result.checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"damaged: model\.safetensors.*the one before it"):
        train(make_config(tree), listener)


def test_divergence_names_step_and_checkpoint(config, listener, monkeypatch):
    real = Stepper.step

    def poisoned(self, micro_batches, count):
        if len(listener.steps) == 5:
            with torch.no_grad():
                self.model.lm_head.weight.fill_(float("nan"))
        return real(self, micro_batches, count)

    monkeypatch.setattr(Stepper, "step", poisoned)
    with pytest.raises(DivergenceError, match=r"step 6: loss nan.*step-00000004.*optimizer\.lr"):
        train(config, listener)


def test_diverging_for_real(tree, listener):
    """A learning rate beyond reason ends in an error, not in a checkpoint of NaNs."""
    tree["optimizer"] |= {"lr": 1e20, "warmup_steps": 0, "clip": 1e20}
    with pytest.raises(DivergenceError, match="no checkpoint was reached"):
        train(make_config(tree), listener)


def test_an_unwritable_folder(tree, listener, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    tree["out"] = str(tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match=r"cannot write into .*out=FOLDER"):
        train(make_config(tree), listener)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": {"hidden_size": 30, "num_attention_heads": 4}}, ConfigError, "=30"),
        ({"model": {"experts": 4}}, ConfigError, "'experts' is not a field"),
        ({"model": {"vocab_size": 4}}, ConfigError, "comes from the tokenizer"),
        ({"model": {"mlp_mi_loss_coef": 4.0}}, ConfigError, "comes from the loss settings"),
        ({"model": {"training_rule": "top_k:99"}}, ConfigError, "the most that works is top_k:16"),
        ({"model": {"preset": "dsmoe-1"}}, ConfigError, "did you mean"),
        ({"model": {"architecture": "olmoe", "num_experts_per_tok": 2}}, ConfigError, "at export"),
        ({"seq_len": 10**7}, DataError, "seq_len"),
        ({"device": "cuda:99"}, ConfigError, "use auto or cpu"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained(tree, listener, change, error, words):
    with pytest.raises(error, match=words):
        train(make_config({**tree, **change}), listener)


def test_kill_9_leaves_the_last_checkpoint_whole(tree, tmp_path, listener):
    """Killed while it runs, the run has only whole checkpoints and goes on to its end."""
    tree |= {"steps": 100_000}
    tree["checkpoint"] = {"every": 1, "keep": 2}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(
        [sys.executable, "-m", "moefit", "train", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    out = tmp_path / "run"
    deadline = time.monotonic() + 120
    while len(checkpoint.checkpoints(out)) < 2:
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    found = checkpoint.checkpoints(out)
    for folder in found:
        checkpoint.verify(folder)
    reached = checkpoint.load_state(found[-1])["step"]
    listener.on_step = lambda step: os.kill(os.getpid(), signal.SIGTERM)
    assert train(make_config(tree), listener).step == reached + 1
