import builtins
import json

import pytest

from moefit.errors import ConfigError
from moefit.train.log import RunLog, read_log


def test_resuming_drops_what_came_after(tmp_path):
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


def test_a_fresh_run_starts_an_empty_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 0}\n')
    RunLog(tmp_path, resumed_step=0, tensorboard=False).close()
    assert read_log(tmp_path) == []


def test_tensorboard_on_request(tmp_path):
    pytest.importorskip("tensorboard")
    log = RunLog(tmp_path, resumed_step=0, tensorboard=True)
    log.write("train", 1, {"loss": 1.0, "note": "text is left out"})
    log.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_without_tensorboard_the_command_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'moefit\[tensorboard\]'"):
        RunLog(tmp_path, resumed_step=0, tensorboard=True)
