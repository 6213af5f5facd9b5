import builtins
import json
import os
import sys
import types
from pathlib import Path

import pytest

from moefit.errors import CheckpointError, ConfigError
from moefit.train import run_folder
from moefit.train.config import make_config
from moefit.train.loop import train
from moefit.train.run_folder import RunLog, last_record, read_log


def test_resuming_drops_later_records(tmp_path):
    log = RunLog(tmp_path, resumed_step=0, tensorboard=False)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # cut short by a crash
    log = RunLog(tmp_path, resumed_step=2, tensorboard=False)
    log.write("train", 3, {"loss": 9.0})
    log.close()
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert all(json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())


def test_new_run_starts_empty_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 0}\n')
    RunLog(tmp_path, resumed_step=0, tensorboard=False).close()
    assert read_log(tmp_path) == []


def test_unchanged_log_is_not_rewritten(tmp_path):
    log = RunLog(tmp_path, resumed_step=0, tensorboard=False)
    log.write("train", 1, {"loss": 1.0})
    log.close()
    before = os.stat(tmp_path / "log.jsonl")
    RunLog(tmp_path, resumed_step=1, tensorboard=False).close()
    assert os.stat(tmp_path / "log.jsonl") == before


def test_failed_rewrite_keeps_log(tmp_path, monkeypatch):
    log = RunLog(tmp_path, resumed_step=0, tensorboard=False)
    log.write("train", 1, {"loss": 1.0})
    log.write("train", 2, {"loss": 0.5})
    log.close()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"log\.jsonl: No space left.*free disk space"):
        RunLog(tmp_path, resumed_step=1, tensorboard=False)
    assert len(read_log(tmp_path)) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is full")
def test_full_disk_raises(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = RunLog.__new__(RunLog)
    log._path, log._writers = tmp_path / "log.jsonl", []
    log._file = log._path.open("w", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot write the log .*log\.jsonl: No space left"):
        log.write("train", 1, {"loss": 1.0})
    with pytest.raises(CheckpointError, match="No space left"):
        log.close()


def test_last_record_of_kind(tmp_path):
    log = RunLog(tmp_path, resumed_step=0, tensorboard=False)
    for step in (1, 2):
        log.write("eval", step, {"loss": 1.0 / step})
        log.write("train", step, {"loss": 7.0})
    log.close()
    assert last_record(read_log(tmp_path), "eval") == {"kind": "eval", "step": 2, "loss": 0.5}
    assert last_record(read_log(tmp_path), "run") is None


def test_tensorboard_on_request(tmp_path):
    pytest.importorskip("tensorboard")
    log = RunLog(tmp_path, resumed_step=0, tensorboard=True)
    log.write("train", 1, {"loss": 1.0, "note": "text is left out"})
    log.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_missing_tensorboard_names_install_command(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'moefit\[tensorboard\]'"):
        RunLog(tmp_path, resumed_step=0, tensorboard=True)


class Run:
    """A stand-in for a run of Weights & Biases, which ignores steps before its last."""

    def __init__(self, **settings):
        self.settings, self.rows, self.finished = settings, {}, False

    def log(self, values, step):
        if step >= max(self.rows, default=0):
            self.rows.setdefault(step, {}).update(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the module; `runs` has what was started."""
    module = types.ModuleType("wandb")
    module.runs, module.fail, module.Error = [], None, type("Error", (Exception,), {})
    module.Settings = lambda **settings: settings

    def init(**settings):
        if module.fail is not None:
            raise module.Error(module.fail)
        module.runs.append(Run(**settings))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_weights_and_biases_has_tensorboards_scalars(tree, tmp_path, callback, wandb):
    event_files = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tree["log"] |= {"wandb": True, "tensorboard": True}
    config = make_config({**tree, "steps": 4})
    train(config, callback)
    (run,) = wandb.runs
    assert run.finished
    found = event_files.EventAccumulator(f"{config.out}/tensorboard").Reload()
    scalars = {
        (name, one.step): one.value
        for name in found.Tags()["scalars"]
        for one in found.Scalars(name)
    }
    sent = {(name, step): value for step, row in run.rows.items() for name, value in row.items()}
    assert sent == pytest.approx(scalars, rel=1e-5)
    assert {("train/loss", 4), ("eval/loss", 4), ("run/parameters", 0)} <= sent.keys()
    assert run.settings["config"]["seq_len"] == 16
    assert (run.settings["project"], run.settings["name"]) == ("moefit", "run")


def test_a_resumed_run_goes_on_as_the_same_run(tmp_path, wandb, monkeypatch):
    for resumed in (0, 2, 0):
        RunLog(tmp_path, resumed_step=resumed, tensorboard=False, wandb={}).close()
    first, resumed, new = (run.settings["id"] for run in wandb.runs)
    assert first == resumed != new
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    RunLog(tmp_path, resumed_step=2, tensorboard=False, wandb={}).close()
    assert wandb.runs[-1].settings["project"] == "mine"
    assert wandb.runs[-1].settings["resume"] == "allow"


def test_weights_and_biases_without_login_or_module_say_what_to_do(tmp_path, wandb, monkeypatch):
    wandb.fail = "No API key configured."
    with pytest.raises(ConfigError, match=r"No API key configured\.\); log in.*WANDB_MODE=offline"):
        RunLog(tmp_path, resumed_step=0, tensorboard=False, wandb={})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'moefit\[wandb\]'"):
        RunLog(tmp_path, resumed_step=0, tensorboard=False, wandb={})


def test_a_lost_connection_ends_the_sending_only(tmp_path, wandb, monkeypatch, caplog):
    log = RunLog(tmp_path, resumed_step=0, tensorboard=False, wandb={})

    def lost(*given, **named):
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(Run, "log", lost)
    monkeypatch.setattr(Run, "finish", lost)
    log.write("train", 1, {"loss": 1.0})
    log.write("train", 2, {"loss": 0.5})
    log.close()
    assert [record["loss"] for record in read_log(tmp_path)] == [1.0, 0.5]
    assert caplog.text.count("Connection lost") == 1


def test_a_resumed_run_goes_on_without_a_server(tmp_path, wandb, caplog):
    wandb.fail = "deadline exceeded"
    log = RunLog(tmp_path, resumed_step=2, tensorboard=False, wandb={})
    log.write("train", 3, {"loss": 1.0})
    log.close()
    assert "goes on without Weights & Biases" in caplog.text


def test_offline_runs_of_weights_and_biases(tree, callback, monkeypatch):
    """With the real module, if it is installed: nothing is sent."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tree["log"] |= {"wandb": True}
    config = make_config({**tree, "steps": 4})
    train(config, callback)
    (file,) = Path(config.out).glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"eval/loss" in content
