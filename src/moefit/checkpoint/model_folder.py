"""Check a model's folder: adapters, weights in unsupported formats, and JSON files.

Errors for weights in other formats (pickles, adapters) name the nearest thing that works.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moefit.errors import UnsupportedModelError
from moefit.folders import is_gguf

ADAPTER = "adapter_config.json"
LFS = b"version https://git-lfs"  # first bytes of a Git LFS pointer file
LFS_POINTER = "it is a Git LFS pointer in place of the file; run `git lfs pull` in its folder"
_CONVERT = (
    "load it once in transformers and write it with save_pretrained, which makes safetensors, or "
    "give a repository of the model that has safetensors"
)


def settings_file(path: Path) -> Path:
    """Return the file with a model's settings: config.json, or the GGUF file itself."""
    return path if is_gguf(path) else path / "config.json"


def refuse_adapter(folder: Path) -> None:
    """Raise UnsupportedModelError if a folder has an adapter, with or without a model."""
    if not (folder / ADAPTER).is_file():
        return
    base = read_json_or_empty(folder / ADAPTER).get("base_model_name_or_path") or "another model"
    whole = (folder / "config.json").is_file()
    what = (
        "has an adapter (LoRA) beside its model" if whole else f"is an adapter (LoRA) of {base!r}"
    )
    alone = f", or take {ADAPTER} out of the folder to use the model without it" if whole else ""
    raise UnsupportedModelError(
        f"{folder} {what}, as its {ADAPTER} says. Commands that load a model to use it "
        "(serve, generate, chat, eval, describe) apply it: give "
        f"{'the same folder' if whole else 'the model'} and --adapter {folder}. Or merge it with "
        "peft (merge_and_unload, then save_pretrained) and give "
        f"that folder{alone}"
    )


def other_weights(path: Path) -> str | None:
    """Describe weights that cannot be read.

    Args:
        path: A file, or a folder without a safetensors checkpoint.

    Returns:
        A sentence for an error: what they are, and the nearest thing that works. None if no file
        is recognised.
    """
    names = [path.name] if path.is_file() else _names(path)
    return named_weights(names, str(path))


def named_weights(names: Iterable[str], where: str) -> str | None:
    """Describe weights that cannot be read, given file names; see `other_weights`.

    Args:
        names: Names of all files.
        where: Folder or repository, for the message.
    """
    files = sorted(names)
    for endings, meaning in _KINDS:
        if found := [name for name in files if name.lower().endswith(endings)]:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"{where} has {found[0]}{more}: {meaning}"
    return None


_KINDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (".gguf",),
        "of GGUF files one is given by its own path (of a split one the first part); from the Hub, "
        "download it first (hf download REPOSITORY FILE)",
    ),
    (
        ("adapter_model.safetensors", "adapter_model.bin", ADAPTER),
        "an adapter (LoRA), no model; give its base as the model, and it as --adapter",
    ),
    (
        ("pytorch_model.bin", *(f"{number}.bin" for number in range(10))),
        "pickled weights of PyTorch, which can run code and are not read in place; write a local "
        "copy as safetensors once, with `moefit convert FOLDER OUT`",
    ),
    (
        (".bin", ".pt", ".pth", ".ckpt"),
        f"pickled weights of PyTorch, which can run code and are not read; {_CONVERT}",
    ),
    ((".h5", ".msgpack", ".onnx", ".tflite"), f"weights for another framework; {_CONVERT}"),
    (
        ("consolidated.safetensors", "consolidated-00001-of-00001.safetensors"),
        "weights under their makers' own names; give a repository of the model in transformers' "
        "form (config.json and model*.safetensors)",
    ),
    (
        (".safetensors",),
        "safetensors under names that no checkpoint has; it needs model.safetensors, or "
        "model.safetensors.index.json, which says which shard has what",
    ),
)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files into a folder; raises OSError if they cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise OSError(f"the tokenizer could not be saved: {error}") from error


def read_json(path: Path, *, limit: int = 8 << 20) -> dict[str, Any]:
    """Return the JSON object in a file that comes with a checkpoint.

    Args:
        path: The file.
        limit: The most bytes it may have. Configurations have a few KiB.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is larger than `limit`, no JSON, or another value than an object.
        RecursionError: Its values are nested without end.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, or no regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    if data.startswith(LFS):
        raise ValueError(LFS_POINTER)
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__} where an object belongs")
    return values


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()] if folder.is_dir() else []


def read_json_or_empty(file: Path) -> dict[str, Any]:
    """Return as `read_json`; empty if the file cannot be read, which is reported elsewhere."""
    try:
        return read_json(file)
    except (OSError, ValueError, RecursionError):
        return {}
