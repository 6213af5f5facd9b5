"""Write a checkpoint of PyTorch's pickled files (`.bin`) as safetensors, shard by shard.

Pickles can run code, so moefit reads them nowhere else, and here with `weights_only`, which allows
tensors alone. Files are mapped into memory where their kind allows it, and tensors are written one
after another, so that little memory is needed. The result gets its name when it is complete.
"""

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefit.checkpoint.safetensors import DTYPES, INDEX, SINGLE, bytes_of, read_header, weight_map
from moefit.errors import CheckpointError, ConfigError, in_brief, printable
from moefit.folders import atomic_folder

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# What comes with a model: configuration, tokenizer, templates, card.
_BESIDE = ("*.json", "*.jinja", "*.model", "*.md", "*.tiktoken", "*.txt", "LICENSE*")
_METADATA = "__metadata__"  # in a header of safetensors, beside the tensors
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INSTEAD = (
    "load the model in the program that wrote it, and write it with save_pretrained, which makes "
    "safetensors"
)
Progress = Callable[[int, int], None]
"""Called with bytes of shards that are done, and of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written: the folder, and its numbers of tensors, files and bytes."""

    folder: Path
    tensors: int
    files: int
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "out": str(self.folder),
            "tensors": self.tensors,
            "files": self.files,
            "bytes": self.nbytes,
        }


def convert_pickled(
    folder: Path, out: Path, progress: Progress = lambda done, total: None
) -> Converted:
    """Write the weights of a folder as safetensors, and copy its other files.

    Args:
        folder: With `pytorch_model.bin`, or shards and their index.
        out: A new or empty folder.
        progress: Called as shards are written.

    Raises:
        ConfigError: There is nothing to convert, or `out` is in use.
        CheckpointError: A file is missing or damaged or holds more than tensors, or `out` cannot be
            written.
    """
    shards = _shards(folder)
    sizes = [(folder / shard).stat().st_size for shard in shards]
    out = out.resolve()
    _refuse_place(folder, out, sum(sizes))
    kept: dict[str, str] = {}
    with atomic_folder(out) as partial:
        for number, shard in enumerate(shards):
            tensors = _read(folder / shard)
            if twice := sorted(kept.keys() & tensors.keys()):
                raise CheckpointError(f"{folder} has {twice[0]} in two shards, the last {shard}")
            _refuse_full(partial, sum(one.nbytes for one in tensors.values()))
            name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            _write(partial / (name if len(shards) > 1 else SINGLE), tensors)
            kept |= dict.fromkeys(tensors, name)
            del tensors
            progress(sum(sizes[: number + 1]), sum(sizes))
        _refuse_lost(folder, kept)
        _copy_beside(folder, partial)
        nbytes = _finish(partial, kept)
    return Converted(folder=out, tensors=len(kept), files=len(shards), nbytes=nbytes)


def _shards(folder: Path) -> list[str]:
    """Return the names of the pickled files."""
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        raise ConfigError(
            f"{folder} has safetensors already; give it to the other commands as it is"
        )
    if (folder / PICKLED_INDEX).is_file():
        shards = sorted(set(weight_map(folder / PICKLED_INDEX).values()))
        if not shards:
            raise CheckpointError(
                f"{folder / PICKLED_INDEX} names no tensors; copy or download it again"
            )
    elif (folder / PICKLED).is_file():
        shards = [PICKLED]
    else:
        raise ConfigError(
            f"{folder} has neither {PICKLED} nor {PICKLED_INDEX}, and nothing else is converted; "
            f"{_INSTEAD}"
        )
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards ({', '.join(missing[:3])}); "
            "copy or download them again"
        )
    return shards


def _refuse_place(folder: Path, out: Path, needed: int) -> None:
    if out == folder.resolve() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"{out} is in use; give the name of a new folder, or of an empty one")
    _refuse_full(next(parent for parent in out.parents if parent.is_dir()), needed)


def _refuse_full(place: Path, needed: int) -> None:
    if (free := shutil.disk_usage(place).free) < needed:
        raise CheckpointError(
            f"the copy takes {needed:,} bytes, and {free:,} are free in {place}; free some space, "
            "or give a folder on another disk"
        )


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled file. Raises CheckpointError."""
    how: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        _check_sums(path)
        try:
            found = torch.load(path, mmap=True, **how)
        except RuntimeError:  # files of before PyTorch 1.6 cannot be mapped
            found = torch.load(path, **how)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged: {in_brief(error, 160)}. Its code is "
            f"never run; {_INSTEAD}"
        ) from error
    except Exception as error:  # a damaged file raises many types
        raise CheckpointError(
            f"{path} is damaged: {in_brief(error)}; copy or download it again"
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{path} holds no weights by name; {_INSTEAD}")
    return {str(name): _plain(path, name, value) for name, value in found.items()}


def _check_sums(path: Path) -> None:
    """Raise ValueError if the bytes of a file differ from its checksums, where it has some."""
    if not zipfile.is_zipfile(path):
        return  # of before PyTorch 1.6
    with zipfile.ZipFile(path) as archive:
        has_sums = any(entry.CRC for entry in archive.infolist())  # torch can leave them out
        if has_sums and (name := archive.testzip()) is not None:
            raise ValueError(f"the bytes of {name} differ from their checksum")


def _plain(path: Path, name: Any, value: Any) -> Tensor:
    if not isinstance(name, str) or printable(name) != name or name == _METADATA:
        raise CheckpointError(
            f"{path} has the name {name!r}, which no tensor can have in safetensors; {_INSTEAD}"
        )
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"{path} has {name!r}: {type(value).__name__} where a tensor belongs; {_INSTEAD}"
        )
    if value.layout != torch.strided or value.is_quantized or value.dtype not in _NAMES:
        raise CheckpointError(
            f"{path}: {name} is {value.dtype} in the layout {value.layout}, which safetensors do "
            f"not hold; {_INSTEAD}"
        )
    if value.is_meta or value.nbytes > value.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name} has {value.nbytes:,} bytes in its shape {list(value.shape)}, but not "
            f"in the file; {_INSTEAD}"
        )
    return value.detach()


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, one tensor in memory at a time."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, one in tensors.items():
        begin, end = end, end + one.nbytes
        header[name] = {
            "dtype": _NAMES[one.dtype],
            "shape": [*one.shape],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for one in tensors.values():
                if one.numel():
                    file.write(bytes_of(one.contiguous()))
    except (RuntimeError, MemoryError) as error:  # of a copy of a tensor that is not contiguous
        raise CheckpointError(
            f"{path.name} cannot be written: {in_brief(error)}; free some memory"
        ) from error


def _refuse_lost(folder: Path, kept: Mapping[str, str]) -> None:
    index = folder / PICKLED_INDEX
    if index.is_file() and (lost := sorted(weight_map(index).keys() - kept.keys())):
        raise CheckpointError(
            f"{index} names {len(lost)} tensors that its shards lack ({', '.join(lost[:3])}); copy "
            "or download them again"
        )


def _copy_beside(folder: Path, out: Path) -> None:
    for pattern in _BESIDE:
        for file in sorted(folder.glob(pattern)):
            if file.is_file() and file.name != PICKLED_INDEX:
                shutil.copyfile(file, out / file.name)
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, out / templates.name)


def _finish(out: Path, kept: Mapping[str, str]) -> int:
    """Write the index if there are several files, and return the bytes of all tensors."""
    files = sorted(out.glob("*.safetensors"))
    nbytes = sum(span.nbytes for file in files for span in read_header(file)[1])
    if len(files) > 1:
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(kept.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return nbytes
