import subprocess
import sys

import pytest
import yaml

from moefit import folders
from moefit.errors import CheckpointError, ConfigError
from moefit.train import run_folder
from moefit.train.config import make_config


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def pretend_checkpoint(out):
    (out / "step-00000004").mkdir(parents=True)
    (out / "step-00000004" / "manifest.json").write_text("{}")


OTHER = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_lock_is_released_when_process_dies(out):
    pytest.importorskip("fcntl")
    with run_folder.locked(out):
        pass
    command = [sys.executable, "-c", OTHER, str(out / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"another process is training in {out}"):
            run_folder.locked(out).__enter__()
        other.kill()
    with run_folder.locked(out), pytest.raises(ConfigError):  # ours now
        run_folder.locked(out).__enter__()


def test_training_works_without_file_locks(out, monkeypatch):
    monkeypatch.setattr(folders, "fcntl", None)
    with run_folder.locked(out), run_folder.locked(out):
        assert out.is_dir()


def test_changed_settings_raise_only_with_a_checkpoint(out, config):
    other = config.model_copy(update={"seed": 7})
    out.mkdir()
    run_folder.save_config(out, config)
    run_folder.check_same_config(out, other)
    pretend_checkpoint(out)
    run_folder.check_same_config(out, config)
    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        run_folder.check_same_config(out, other)


def test_output_and_logging_settings_may_change(tree, out):
    pretend_checkpoint(out)
    run_folder.save_config(out, make_config(tree))
    tree |= {"device": "cpu", "precision": "auto", "log": {"every": 3}, "checkpoint": {"keep": 9}}
    tree["data"]["cache_dir"] = "elsewhere"
    run_folder.check_same_config(out, make_config(tree))


def test_missing_setting_in_stored_config_has_default(config, out):
    pretend_checkpoint(out)
    tree = config.model_dump(mode="json")
    del tree["compile"]
    (out / "config.yaml").write_text(yaml.safe_dump(tree))
    run_folder.check_same_config(out, config)


@pytest.mark.parametrize("content", [b"", b"a: [1", b"- a\n", b"steps: never\n", b"\xff\xfe"])
def test_damaged_config_raises_or_is_overwritten(config, out, content):
    out.mkdir()
    (out / "config.yaml").write_bytes(content)
    run_folder.check_same_config(out, config)
    pretend_checkpoint(out)
    with pytest.raises(ConfigError, match=r"config\.yaml .*remove the file.*out=FOLDER"):
        run_folder.check_same_config(out, config)
    run_folder.save_config(out, config)
    run_folder.check_same_config(out, config)


def test_equal_config_is_not_rewritten(config, out):
    out.mkdir()
    run_folder.save_config(out, config)
    before = (out / "config.yaml").stat()
    run_folder.save_config(out, config)
    assert (out / "config.yaml").stat().st_ino == before.st_ino
    run_folder.save_config(out, config.model_copy(update={"seed": 7}))
    assert "seed: 7" in (out / "config.yaml").read_text()


def test_failed_write_keeps_previous_file(config, out, monkeypatch):
    out.mkdir()
    run_folder.save_config(out, config)
    before = (out / "config.yaml").read_text()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write into .*No space left"):
        run_folder.save_config(out, config.model_copy(update={"seed": 7}))
    assert (out / "config.yaml").read_text() == before
    assert [path.name for path in out.iterdir()] == ["config.yaml"]
