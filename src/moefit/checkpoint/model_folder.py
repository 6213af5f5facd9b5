"""Check a model's folder: adapters, weights in unsupported formats, tokenizer and JSON files.

Errors for weights in other formats (GGUF, pickles, adapters) name the nearest thing that works.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moefit.errors import CheckpointError, UnsupportedModelError, in_brief

ADAPTER = "adapter_config.json"
LFS = b"version https://git-lfs"  # first bytes of a Git LFS pointer file
LFS_POINTER = "it is a Git LFS pointer in place of the file; run `git lfs pull` in its folder"
# Files with a vocabulary, by name or suffix; any one of them is enough for a tokenizer.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "byte_maps.json",
)
_ENDINGS = (".tiktoken", ".spm", ".vocab", ".model")
_CONVERT = (
    "load it once in transformers and write it with save_pretrained, which makes safetensors, or "
    "give a repository of the model that has safetensors"
)


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
        f"{folder} {what}, as its {ADAPTER} says, and adapters are not applied. Merge it with peft "
        f"(PeftModel.from_pretrained(base, {str(folder)!r}).merge_and_unload(), then "
        f"save_pretrained) and give that folder{alone}"
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
        "GGUF files are llama.cpp's, and cannot be read here; give the Hugging Face model that "
        "they were made from (a folder with config.json and safetensors)",
    ),
    (
        ("adapter_model.safetensors", "adapter_model.bin", ADAPTER),
        "an adapter (LoRA), no model; merge it into its base with peft (merge_and_unload, then "
        "save_pretrained) and give that folder",
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


def refuse_without_tokenizer(folder: Path) -> None:
    """Raise CheckpointError if a folder has no vocabulary, or Git LFS pointers; reads none."""
    for name in (*_vocabularies(folder), "tokenizer_config.json"):
        if _is_pointer(folder / name):
            raise CheckpointError(
                f"{folder / name} is a Git LFS pointer in place of the file; run `git lfs pull` in "
                "its folder, or download the file again"
            )
    if not _vocabularies(folder) and not _needs_none(folder):
        raise CheckpointError(
            f"{folder} has no tokenizer (none of {', '.join(_VOCABULARIES[:4])}, ...), so that it "
            "can neither read nor write text; copy the tokenizer's files there from where the "
            "model was made. The model itself takes token ids (moefit.load in Python)"
        )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer without running code from it. Raises CheckpointError."""
    refuse_without_tokenizer(folder)
    try:
        tokenizer = _tokenizer(folder)
        size = len(tokenizer)
    except Exception as error:  # a damaged file gives KeyError, TypeError, bare Exception, ...
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read: {in_brief(error)}; copy the "
            "tokenizer files there again from where the model was made"
        ) from error
    if not size:
        raise CheckpointError(
            f"the tokenizer in {folder} has an empty vocabulary; copy the tokenizer files there "
            "again from where the model was made"
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files into a folder; raises OSError if they cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise OSError(f"the tokenizer could not be saved: {error}") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load with transformers; if the tokenizer has custom code, from tokenizer.json where present.

    transformers would require the custom code for a family that it does not know either.
    """
    own_code = "auto_map" in read_json_or_empty(folder / "tokenizer_config.json")
    if own_code and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


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


def _vocabularies(folder: Path) -> list[str]:
    return [name for name in _names(folder) if name in _VOCABULARIES or name.endswith(_ENDINGS)]


def _needs_none(folder: Path) -> bool:
    """Whether the tokenizer is of bytes, as ByT5's and Perceiver's are."""
    kind = read_json_or_empty(folder / "tokenizer_config.json").get("tokenizer_class")
    return kind in ("ByT5Tokenizer", "PerceiverTokenizer", "CanineTokenizer")


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(LFS)) == LFS
    except OSError:
        return False  # not a pointer; errors are reported when the file is read


def read_json_or_empty(file: Path) -> dict[str, Any]:
    """Return as `read_json`; empty if the file cannot be read, which is reported elsewhere."""
    try:
        return read_json(file)
    except (OSError, ValueError, RecursionError):
        return {}
