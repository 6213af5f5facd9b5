import os
import signal

import pytest
import torch
from quick import slow_but

from moefit.errors import CheckpointError, ConfigError, DataError, DivergenceError
from moefit.train import checkpoint
from moefit.train.config import make_config
from moefit.train.loop import train
from moefit.train.run_folder import RunLog, read_log
from moefit.train.step import Stepper


def losses(out, kind="train"):
    return [(r["step"], r["loss"]) for r in read_log(out) if r["kind"] == kind]


def weights(result):
    return {p.name: p.read_bytes() for p in result.checkpoint.glob("*.safetensors")}


@pytest.fixture
def during(monkeypatch):
    """Call a function in the middle of the n-th step of this process."""
    real, count = Stepper.step, 0

    def arrange(number, action):
        def step(self, micro_batches, accumulation, **rest):
            nonlocal count
            count += 1
            result = real(self, micro_batches, accumulation, **rest)
            if count == number:
                action(self)
            return result

        monkeypatch.setattr(Stepper, "step", step)

    return arrange


def ask_to_stop(_):
    os.kill(os.getpid(), signal.SIGTERM)


def spoil(stepper):
    with torch.no_grad():
        stepper.model.lm_head.weight[3, 3] = float("nan")


@pytest.mark.parametrize(
    "change",
    slow_but(
        [{"accumulation": 2}],
        [{"accumulation": 1}, {"accumulation": 2}, {"sparse": {"rule": "top_k:2"}}],
    ),
)
def test_resume_equals_uninterrupted_run(tree, callback, tmp_path, change):
    """Bitwise equality with dropout, which depends on the random state."""
    tree |= change
    whole = train(make_config(tree), callback)
    tree["out"] = str(tmp_path / "broken")
    config = make_config(tree)
    callback.after_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    stopped = train(config, callback)
    assert (stopped.step, stopped.stopped_by) == (3, "SIGTERM")
    callback.after_step = None
    torch.manual_seed(12345)  # whatever state the new process happens to have
    resumed = train(config, callback)
    assert any("resuming" in event for event in callback.messages)
    assert weights(resumed) == weights(whole)
    assert losses(tmp_path / "broken") == losses(tmp_path / "run")
    states = [checkpoint.load_state(result.checkpoint) for result in (whole, resumed)]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        for a, b in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
            assert torch.equal(a[name], b[name])


def test_interrupted_evaluation_runs_on_resume(tree, callback, tmp_path, during):
    whole = train(make_config(tree), callback)
    tree["out"] = str(tmp_path / "broken")
    during(4, ask_to_stop)
    stopped = train(make_config(tree), callback)
    assert (stopped.step, stopped.held_out_loss) == (4, None)
    assert losses(tmp_path / "broken", "eval") == []
    resumed = train(make_config(tree), callback)
    assert losses(tmp_path / "broken", "eval") == losses(tmp_path / "run", "eval")
    assert weights(resumed) == weights(whole)


def test_signal_in_last_step_finishes_run(config, callback, tmp_path, during):
    during(8, ask_to_stop)
    result = train(config, callback)
    assert (result.step, result.stopped_by) == (8, None)
    assert losses(tmp_path / "run", "eval")[-1] == (8, result.held_out_loss)


def test_missing_last_evaluation_runs_on_resume(config, callback, tmp_path):
    first = train(config, callback)
    path = tmp_path / "run" / "log.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert train(config, callback) == first
    assert losses(tmp_path / "run", "eval")[-1] == (8, first.held_out_loss)


def test_changed_text_raises_on_resume(tree, callback, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(5):
        (text / f"{number}.txt").write_text(f"some text {number} to learn by heart\n" * 60)
    tree["data"]["sources"] = [str(text)]
    callback.after_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    train(make_config(tree), callback)
    before = (text / "0.txt").read_text()
    (text / "0.txt").write_text(before + "and more of it\n")
    with pytest.raises(DataError, match=r"has changed since step 3.*restore.*out=FOLDER"):
        train(make_config(tree), callback)
    (text / "0.txt").write_text(before)
    callback.after_step = None
    assert train(make_config(tree), callback).step == 8


def test_changed_precision_raises_on_resume(tree, callback):
    callback.after_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    train(make_config(tree), callback)
    tree["precision"] = "bf16"
    with pytest.raises(ConfigError, match=r"trained in fp32, but .* bf16 on cpu; give precision="):
        train(make_config(tree), callback)


def test_activation_checkpointing_keeps_losses(tree, callback, tmp_path):
    tree["model"]["attention_dropout"] = 0.0
    tree["steps"] = 3
    train(make_config(tree), callback)
    tree["out"], tree["activation_checkpointing"] = str(tmp_path / "other"), True
    train(make_config(tree), callback)
    assert dict(losses(tmp_path / "other")) == pytest.approx(
        dict(losses(tmp_path / "run")), rel=1e-5
    )


def test_accumulation_averages_micro_batches(tree, callback, tmp_path):
    """Without router losses (MI is not a mean over micro-batches), two halves equal a whole."""
    tree["model"]["attention_dropout"] = 0.0
    tree["loss"], tree["steps"] = {}, 3
    train(make_config(tree), callback)
    tree |= {"out": str(tmp_path / "halves"), "batch_size": 2, "accumulation": 2}
    train(make_config(tree), callback)
    assert dict(losses(tmp_path / "halves")) == pytest.approx(
        dict(losses(tmp_path / "run")), rel=1e-5
    )


def test_sparse_steps_alternate(tree, callback, monkeypatch):
    rules, real = [], Stepper.step

    def step(self, micro_batches, count, *, rule, **rest):
        rules.append(rule)
        return real(self, micro_batches, count, rule=rule, **rest)

    monkeypatch.setattr(Stepper, "step", step)
    tree["sparse"] = {"rule": "threshold:0.5", "share": 0.5, "start": 0.5}
    train(make_config(tree), callback)
    assert rules == [None] * 5 + ["threshold:0.5", None, "threshold:0.5"]


def test_divergence_error_names_step_and_checkpoint(config, callback, during, tmp_path):
    during(5, spoil)
    words = r"step 6: loss nan.*step-00000004; try a lower optimizer\.lr .*with out=FOLDER"
    with pytest.raises(DivergenceError, match=words):
        train(config, callback)
    last = read_log(tmp_path / "run")[-1]
    assert (last["kind"], last["step"]) == ("diverged", 6) and "loss nan" in last["reason"]


@pytest.mark.parametrize(
    ("step", "good"), [(4, "there is no checkpoint yet"), (8, "the last good .*step-00000004")]
)
def test_nonfinite_weights_are_not_saved(config, callback, tmp_path, during, step, good):
    during(step, spoil)
    with pytest.raises(DivergenceError, match=rf"step {step}: .*weight .*not finite; {good}"):
        train(config, callback)
    assert len(checkpoint.checkpoints(tmp_path / "run")) == step // 4 - 1


def test_full_disk_for_log_raises(config, callback):
    """The log's file is replaced by /dev/full at the third step."""
    real = RunLog.write

    def write(self, kind, step, values):
        if step == 3:
            self._file.close()
            self._file = open("/dev/full", "w")  # noqa: SIM115
        real(self, kind, step, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", write)
        with pytest.raises(CheckpointError, match=r"the log .*log\.jsonl: No space left"):
            train(config, callback)
    assert train(config, callback).step == 8
