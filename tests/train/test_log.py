import builtins
import json
import os

import pytest

from moefit.errors import CheckpointError, ConfigError
from moefit.train import run_folder
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
    log._path, log._writer = tmp_path / "log.jsonl", None
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
