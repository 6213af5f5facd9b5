"""The folder of one run: who may work in it, and the configuration that stands there.

Owns OUT/.lock and OUT/config.yaml, and the rule that a folder with checkpoints belongs to the
settings that made them. Knows nothing of data, models or steps.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from moefit.errors import CheckpointError, ConfigError
from moefit.folders import try_lock
from moefit.train.checkpoint import checkpoints
from moefit.train.config import TrainConfig, load_yaml, make_config

CONFIG, LOCK = "config.yaml", ".lock"

# What may change when a run goes on: where and how often it writes, and where it computes. A
# precision that would differ in effect is refused by state.py, which knows what `auto` came to.
FREE = ("log", "checkpoint", "out", "data.cache_dir", "device", "precision")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder and be the only process that trains in it; the lock ends with the process.

    Raises ConfigError if another process has it, CheckpointError if it can't be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("ab")
    except OSError as error:
        raise _unwritable(out, error) from error
    with file:
        if not try_lock(file.fileno()):
            raise ConfigError(
                f"another process is training in {out}; wait for it or stop it, or give another "
                "folder with out=FOLDER"
            )
        yield


def refuse_another_run(out: Path, config: TrainConfig) -> None:
    """Raise ConfigError if the checkpoints in `out` were made with other settings.

    Without a checkpoint there is nothing to protect, whatever an earlier attempt left there.
    """
    path = out / CONFIG
    if not path.is_file() or not checkpoints(out):
        return
    before = _read(path).model_dump(mode="json")
    differing = sorted(_differences(before, config.model_dump(mode="json")))
    if differing:
        raise ConfigError(
            f"{out} holds a run with other settings ({', '.join(differing)}); resume it with "
            "the same ones, or give another folder with out=FOLDER"
        )


def _read(path: Path) -> TrainConfig:
    """Through the model and not as it stands, so that a setting added since has its default."""
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ConfigError(f"it holds {'nothing' if tree is None else type(tree).__name__}")
        return make_config(tree)
    except (OSError, ValueError) as error:  # ConfigError is a ValueError
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} should hold the settings of the checkpoints beside it but cannot be read "
            f"({reason}); if they were made with the settings given now, remove the file; else "
            "give another folder with out=FOLDER"
        ) from error


def _differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    if where in FREE:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            inner = f"{where}.{key}" if where else key
            yield from _differences(before.get(key), after.get(key), inner)
    elif before != after:
        yield where


def save_config(out: Path, config: TrainConfig) -> None:
    """Have the resolved configuration stand in the folder; one that does is left alone."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    path = out / CONFIG
    try:
        if not path.is_file() or path.read_bytes() != text.encode():
            write_whole(path, text)
    except OSError as error:
        raise _unwritable(out, error) from error


def write_whole(path: Path, text: str) -> None:
    """Have `path` hold `text`, or still what it held before: never a part, whatever happens."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write into {out}: {error.strerror or error}; make room or give another folder "
        "with out=FOLDER"
    )
