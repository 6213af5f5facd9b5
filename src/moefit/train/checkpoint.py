"""Training checkpoints: written atomically, verified by checksums, resumed exactly.

A checkpoint is a model folder that `from_pretrained` loads, plus the trainer's state (optimizer,
random generators, position in the data) and a manifest. It is built beside its final place and
renamed, so a folder with a checkpoint's name is complete.
"""

import contextlib
import errno
import json
import os
import pickle
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefit.errors import CheckpointError, ConfigError, DataError
from moefit.moe.expert_dropout import KEY, dropout_record
from moefit.train.data.tokenizer import save_tokenizer

MANIFEST = "manifest.json"
STATE = "trainer.pt"
PREFIX = "step-"
BUILDING, REMOVING = ".building", ".removing"  # endings of hidden folders that don't count


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds: the model as it is, and a state that torch.save can write."""

    step: int
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    state: dict[str, Any]


def checkpoints(out: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    if not out.is_dir():
        return []
    named = (path for path in out.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdecimal())
    return sorted(path for path in named if (path / MANIFEST).is_file())


def step_of(folder: Path) -> int:
    """The step after which the checkpoint in `folder` was taken.

    >>> step_of(Path("runs/default/step-00000200"))
    200
    """
    return int(folder.name.removeprefix(PREFIX))


def save(out: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write a checkpoint, then remove the oldest ones beyond `keep`; gives its folder.

    Only one process may save into `out` at a time. Raises CheckpointError if it cannot be
    written; earlier checkpoints are then untouched.
    """
    place = out / f"{PREFIX}{snapshot.step:08d}"
    building = out / f".{place.name}{BUILDING}"
    _sweep(out)
    try:
        building.mkdir(parents=True)
        _write(building, snapshot)
        replaced = _set_aside(place) if place.exists() else None
        building.rename(place)
        _sync(out)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(_cannot_write(out, place, error)) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    for old in checkpoints(out)[:-keep]:
        with contextlib.suppress(OSError):
            shutil.rmtree(_set_aside(old), ignore_errors=True)
    return place


def _set_aside(folder: Path) -> Path:
    """Take away the name that makes `folder` count, before any of its files goes."""
    doomed = folder.with_name(f".{folder.name}{REMOVING}")
    folder.rename(doomed)
    return doomed


def _sweep(out: Path) -> None:
    """Remove what earlier processes were killed over: half built, or half removed."""
    for leftover in out.glob(f".{PREFIX}*"):
        if leftover.suffix in (BUILDING, REMOVING):
            shutil.rmtree(leftover, ignore_errors=True)


def _write(folder: Path, snapshot: Snapshot) -> None:
    snapshot.model.save_pretrained(folder)
    save_tokenizer(snapshot.tokenizer, folder)
    torch.save({**snapshot.state, "step": snapshot.step}, folder / STATE)
    files = {
        path.name: {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"format": "moefit-checkpoint-1", "step": snapshot.step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    """Have the operating system put a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(out: Path, place: Path, error: Exception) -> str:
    reason = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(_existing(out)).free
        reason = f"no room ({free:,} bytes free)"
    kept = checkpoints(out)
    last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    return (
        f"cannot write the checkpoint {place}: {reason}; {last}; make room or give another "
        "folder with out=FOLDER, then run the same command again"
    )


def _existing(path: Path) -> Path:
    return path if path.exists() or path == path.parent else _existing(path.parent)


def load_state(folder: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint, after checking every file against the manifest.

    Raises CheckpointError if the folder is no checkpoint of ours or a file is damaged.
    """
    verify(folder)
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error}") from error


def verify(folder: Path) -> None:
    """Raise CheckpointError unless `folder` is a whole checkpoint of this trainer."""
    for name, expected in _manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        try:
            found = path.stat().st_size, _crc32(path)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {folder} cannot be checked: {name} cannot be read "
                f"({error.strerror or error})"
            ) from error
        if found != expected:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} has {found[0]:,} bytes of "
                f"{expected[0]:,} or other content than was written; remove the folder "
                "and the run resumes from the one before it"
            )


def _manifest(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and checksum of each file, by its name."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {name: (int(file["bytes"]), int(file["crc32"])) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is no checkpoint of moefit: {MANIFEST} is missing, unreadable or damaged "
            f"({type(error).__name__}: {error}); if it is one of a run's, remove it and the run "
            "resumes from the one before it"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """All that steps change, with what it rests on. `precision` is what was come to, not `auto`."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str
    fingerprint: str

    def pack(self, seconds: float) -> dict[str, Any]:
        """The state as torch.save can write it, after `seconds` of training."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "seconds": seconds,
            "precision": self.precision,
            "data": self.fingerprint,
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, folder: Path) -> tuple[int, float]:
        """Take up the checkpoint in `folder`; gives its step and the seconds that led to it.

        Every file is verified first. Raises CheckpointError if one is damaged or of another
        model, DataError or ConfigError if going on would make it another run.
        """
        state = load_state(folder)
        self._check_data(folder, state)
        self._check_precision(folder, state)
        self._load(folder, state)
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            _set_cuda_rng(state.get("cuda_rng"), self.device)
        return state["step"], state["seconds"]

    def _check_data(self, folder: Path, state: dict[str, Any]) -> None:
        if state.get("data", self.fingerprint) == self.fingerprint:
            return
        raise DataError(
            f"the text or the tokenizer has changed since step {state['step']} of this run "
            f"({folder}): its fingerprint was {state['data']} and is {self.fingerprint}; restore "
            "what data.sources, data.held_out and data.tokenizer name, or start a new run with "
            "out=FOLDER"
        )

    def _check_precision(self, folder: Path, state: dict[str, Any]) -> None:
        before = state.get("precision", self.precision)
        if before == self.precision:
            return
        raise ConfigError(
            f"{folder} was trained in {before}, but would go on in {self.precision} on "
            f"{self.device}; give precision={before} to go on as it began, or start a new run "
            "with out=FOLDER"
        )

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        try:
            saved = type(self.model).from_pretrained(folder, dtype=torch.float32)
            self.model.load_state_dict(saved.state_dict())
            if (record := dropout_record(saved.config)) is not None:
                setattr(self.model.config, KEY, record.as_dict())
            self.optimizer.load_state_dict(state["optimizer"])
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{folder} is whole, but not of the model that these settings describe: {error}; "
                "give the settings that it was trained with, or another folder with out=FOLDER"
            ) from error


def _set_cuda_rng(saved: torch.Tensor | None, device: torch.device) -> None:
    """Take up the device's generator; a run that began on the CPU has none, so seed one alike."""
    if saved is None:
        torch.cuda.manual_seed(torch.initial_seed())
    else:
        torch.cuda.set_rng_state(saved, device)
