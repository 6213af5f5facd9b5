"""Training checkpoints: whole, atomic, verifiable.

Owns the folder `OUT/step-00000200`: a model folder that `from_pretrained` loads, with its
tokenizer, the trainer's state, and a manifest of every file's size and checksum. A checkpoint is
written beside its place and renamed into it, so one that has its name is whole. Knows nothing of
how the state came about.
"""

import errno
import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefit.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "trainer.pt"
PREFIX = "step-"


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
    return sorted(path for path in out.glob(f"{PREFIX}*") if (path / MANIFEST).is_file())


def save(out: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write a checkpoint, then remove the oldest ones beyond `keep`; gives its folder.

    Raises CheckpointError if it cannot be written; earlier checkpoints are then untouched.
    """
    place = out / f"{PREFIX}{snapshot.step:08d}"
    building = out / f".{place.name}.building"
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        _write(building, snapshot)
        if place.exists():
            shutil.rmtree(place)
        building.rename(place)
        _sync(out)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(_cannot_write(out, place, error)) from error
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def _write(folder: Path, snapshot: Snapshot) -> None:
    snapshot.model.save_pretrained(folder)
    snapshot.tokenizer.save_pretrained(folder)
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
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error}") from error


def verify(folder: Path) -> None:
    """Raise CheckpointError unless `folder` is a whole checkpoint of this trainer."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no checkpoint of moefit: {MANIFEST} is missing or unreadable ({error})"
        ) from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        size = path.stat().st_size
        if size != expected["bytes"] or _crc32(path) != expected["crc32"]:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} has {size:,} bytes of "
                f"{expected['bytes']:,} or other content than was written; remove the folder "
                "and the run resumes from the one before it"
            )
