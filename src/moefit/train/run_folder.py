"""The folder of a run: its lock, its configuration and its log.

One process at a time works in a folder, and only with the configuration that is stored there. The
log is JSON Lines, with TensorBoard files on request; resuming drops records after the checkpoint.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from moefit.errors import CheckpointError, ConfigError
from moefit.folders import try_lock
from moefit.train.checkpoint import checkpoints
from moefit.train.config import TrainConfig, make_config
from moefit.yaml_text import load_yaml

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


def check_same_config(out: Path, config: TrainConfig) -> None:
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
            write_atomically(path, text)
    except OSError as error:
        raise _unwritable(out, error) from error


def write_atomically(path: Path, text: str) -> None:
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


LOG = "log.jsonl"


class RunLog:
    """Appends records; each has a `kind` and a `step`. Raises CheckpointError if it can't."""

    def __init__(self, out: Path, *, resumed_step: int, tensorboard: bool):
        self._path = out / LOG
        self._writer = _tensorboard(out, resumed_step) if tensorboard else None
        records = read_log(out) if resumed_step else []
        kept = [record for record in records if record["step"] <= resumed_step]
        try:
            out.mkdir(parents=True, exist_ok=True)
            _rewrite(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one record and have it on its way to the disk."""
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Finish the files."""
        if self._writer is not None:
            self._writer.close()
        try:
            self._file.close()  # a record that found no room is tried once more here
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"cannot write the log {self._path}: {error.strerror or error}; make room, then run "
            "the same command again: it goes on from the last checkpoint"
        )


def read_log(out: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a line cut short by a crash is left out.

    Raises CheckpointError if the file cannot be read.
    """
    path = out / LOG
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(
            f"cannot read the log {path}: {error.strerror or error}; make it readable, or remove "
            "it to go on without what it holds"
        ) from error
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def last_record(records: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """The newest record of that kind, if there is one.

    >>> last_record([{"kind": "eval", "step": 4}, {"kind": "train", "step": 5}], "eval")
    {'kind': 'eval', 'step': 4}
    """
    return next((record for record in reversed(records) if record["kind"] == kind), None)


def _rewrite(path: Path, text: str) -> None:
    """Leave alone a file that holds `text` already: most resumed runs drop nothing."""
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomically(path, text)


def _tensorboard(out: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "log.tensorboard=true needs tensorboard; install it with: "
            "pip install 'moefit[tensorboard]'"
        ) from error
    return SummaryWriter(str(out / "tensorboard"), purge_step=resumed_step + 1)
