"""Training checkpoints: written atomically, verified by checksums, resumed exactly.

A checkpoint is a model folder that `from_pretrained` loads, plus the trainer's state (optimizer and
random generators) and a manifest. It is written under a temporary name and renamed, so a folder
with a checkpoint's name is complete.
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

from moefit.checkpoint.model_folder import save_tokenizer
from moefit.errors import CheckpointError, ConfigError, DataError
from moefit.moe.expert_dropout import KEY, dropout_record

MANIFEST = "manifest.json"
STATE = "trainer.pt"
PREFIX = "step-"
BUILDING, REMOVING = ".building", ".removing"  # suffixes of folders that are ignored


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Contents of a checkpoint; torch.save writes the state."""

    step: int
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    state: dict[str, Any]


def checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    if not out.is_dir():
        return []
    named = (path for path in out.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdecimal())
    return sorted(path for path in named if (path / MANIFEST).is_file())


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint from its folder's name.

    >>> step_of(Path("runs/default/step-00000200"))
    200
    """
    return int(folder.name.removeprefix(PREFIX))


def save(out: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write a checkpoint and remove the oldest ones.

    Args:
        out: The run's folder. Only one process may save into it at a time.
        snapshot: What to write.
        keep: Number of checkpoints to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It cannot be written. Earlier checkpoints have not changed.
    """
    target = out / f"{PREFIX}{snapshot.step:08d}"
    building = out / f".{target.name}{BUILDING}"
    for leftover in out.glob(f".{PREFIX}*"):  # of processes that were killed
        if leftover.suffix in (BUILDING, REMOVING):
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        _write(building, snapshot)
        replaced = _hide(target) if target.exists() else None
        building.rename(target)
        _sync(out)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(_cannot_write(out, target, error)) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    for old in checkpoints(out)[:-keep]:
        with contextlib.suppress(OSError):
            shutil.rmtree(_hide(old), ignore_errors=True)
    return target


def _hide(folder: Path) -> Path:
    """Rename a checkpoint before deleting it, so that a partly deleted one is never used."""
    hidden = folder.with_name(f".{folder.name}{REMOVING}")
    folder.rename(hidden)
    return hidden


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
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(out: Path, target: Path, error: Exception) -> str:
    reason = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        existing = next(path for path in (out, *out.absolute().parents) if path.exists())
        reason = f"no disk space ({shutil.disk_usage(existing).free:,} bytes free)"
    kept = checkpoints(out)
    last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    return (
        f"cannot write the checkpoint {target}: {reason}; {last}; free disk space or give another "
        "folder with out=FOLDER, then run the same command again"
    )


def load_state(folder: Path) -> dict[str, Any]:
    """Verify a checkpoint and return its trainer state.

    Raises:
        CheckpointError: The folder is not a checkpoint of moefit, or a file is damaged.
    """
    verify(folder)
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error}") from error


def verify(folder: Path) -> None:
    """Raise CheckpointError unless `folder` is a complete, undamaged checkpoint."""
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
                f"{expected[0]:,}, or its content has changed; remove the folder to resume from "
                "the previous checkpoint"
            )


def _manifest(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and checksum of each file by name."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {name: (int(file["bytes"]), int(file["crc32"])) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint of moefit: {MANIFEST} is missing, unreadable or damaged "
            f"({type(error).__name__}: {error}); if it belongs to a run, remove the folder to "
            "resume from the previous checkpoint"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The state of a run that checkpoints save and restore.

    Attributes:
        model: The model.
        optimizer: Its optimizer.
        device: Where it is trained.
        precision: `fp32` or `bf16`, not `auto`.
        fingerprint: Of text and tokenizer.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str
    fingerprint: str

    def state_dict(self, seconds: float) -> dict[str, Any]:
        """Return the state without the model's weights, after `seconds` of training."""
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
        """Restore a checkpoint after verifying its files.

        Returns:
            Its step, and the seconds of training until then.

        Raises:
            CheckpointError: A file is damaged, or of another model.
            DataError: Text or tokenizer have changed.
            ConfigError: The precision has changed.
        """
        state = load_state(folder)
        self._check_same_run(folder, state)
        self._load(folder, state)
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            if "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
            else:  # the run began on the CPU
                torch.cuda.manual_seed(torch.initial_seed())
        return state["step"], state["seconds"]

    def _check_same_run(self, folder: Path, state: dict[str, Any]) -> None:
        if state.get("data", self.fingerprint) != self.fingerprint:
            raise DataError(
                f"the text or the tokenizer has changed since step {state['step']} of this run "
                f"({folder}): its fingerprint was {state['data']} and is {self.fingerprint}; "
                "restore what data.sources, data.held_out and data.tokenizer name, or start a new "
                "run with out=FOLDER"
            )
        before = state.get("precision", self.precision)
        if before != self.precision:
            raise ConfigError(
                f"{folder} was trained in {before}, but would continue in {self.precision} on "
                f"{self.device}; give precision={before}, or start a new run with out=FOLDER"
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
                f"{folder} is undamaged, but is not of the model that these settings describe: "
                f"{error}; give the settings that it was trained with, or another folder with "
                "out=FOLDER"
            ) from error
