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
from socket import gethostname
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefit.checkpoint.model_folder import save_tokenizer
from moefit.errors import CheckpointError

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
    try:
        building = begin(out, snapshot.step)
        try:
            _write(building, snapshot)
            return publish(out, building, snapshot.step, keep=keep)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise unwritable(out, snapshot.step, error) from error


def begin(out: Path, step: int) -> Path:
    """Create and return the folder in which a checkpoint is built; remove those of killed runs."""
    for leftover in out.glob(f".{PREFIX}*"):
        if leftover.suffix in (BUILDING, REMOVING):
            shutil.rmtree(leftover, ignore_errors=True)
    building = out / f".{PREFIX}{step:08d}{BUILDING}"
    building.mkdir(parents=True)
    return building


def not_shared(out: Path) -> CheckpointError:
    """Return the error of a process that does not see the run's folder of process 0."""
    return CheckpointError(
        f"the run's folder {out.absolute()} is another one for this process ({gethostname()}) than "
        "for process 0; give a folder that all machines share with out=FOLDER"
    )


def publish(out: Path, building: Path, step: int, *, keep: int) -> Path:
    """Add the manifest, rename a checkpoint to its final name and remove the oldest ones.

    Args:
        out: The run's folder.
        building: All other files of the checkpoint.
        step: Its step.
        keep: Number of checkpoints to keep.

    Returns:
        The checkpoint's folder.
    """
    _write_manifest(building, step)
    target = out / f"{PREFIX}{step:08d}"
    replaced = _hide(target) if target.exists() else None
    building.rename(target)
    _sync(out)
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


def _write_manifest(folder: Path, step: int) -> None:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "crc32": _crc32(path),
        }
        for path in paths
    }
    manifest = {"format": "moefit-checkpoint-1", "step": step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in folder.rglob("*"):
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


def unwritable(out: Path, step: int, error: BaseException) -> CheckpointError:
    """Return the error of a checkpoint that cannot be written."""
    reason = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        existing = next(path for path in (out, *out.absolute().parents) if path.exists())
        reason = f"no disk space ({shutil.disk_usage(existing).free:,} bytes free)"
    kept = checkpoints(out)
    last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    return CheckpointError(
        f"cannot write the checkpoint {out / f'{PREFIX}{step:08d}'}: {reason}; {last}; free disk "
        "space or give another folder with out=FOLDER, then run the same command again"
    )


def load_state(folder: Path, *, checked: bool = False) -> dict[str, Any]:
    """Verify a checkpoint, unless it is `checked`, and return its trainer state.

    Raises:
        CheckpointError: The folder is not a checkpoint of moefit, or a file is damaged.
    """
    if not checked:
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
