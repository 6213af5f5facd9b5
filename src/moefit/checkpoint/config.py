"""Read and validate a checkpoint's config.json, and convert it for transformers.

The file is untrusted: keys that select code or kernels are dropped, and its numbers are compared
with the headers of the safetensors files before a model is built from them.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from moefit.checkpoint.gguf.header import read_gguf
from moefit.checkpoint.gguf.settings import settings_of
from moefit.checkpoint.model_folder import read_json, settings_file
from moefit.checkpoint.safetensors import Checkpoint
from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError, in_brief, printable
from moefit.folders import is_gguf

CONFIG = "config.json"
SUPPORTED_TRANSFORMERS = ("5.23", "5.24")  # as in pyproject.toml
_MAX_DEPTH = 32  # real ones have four levels
# Families with the architecture of another one. Kimi K2 is DeepSeek-V3 with other sizes
# (architectures: DeepseekV3ForCausalLM).
_SAME_AS = {"kimi_k2": "deepseek_v3"}
# Keys that select code or kernels, which only the user may choose: some values load kernels from
# the Hub.
_DROPPED_KEYS = (
    "auto_map",
    "quantization_config",  # `formats/` reads it; transformers would look for its own libraries
    "compression_config",
    "custom_pipelines",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "use_kernels",
    "configuration_files",
)
_DTYPES = ("dtype", "torch_dtype")
_FLOATS = ("Infinity", "-Infinity", "NaN")  # as transformers writes {"__float__": "Infinity"}
_LAYERS = re.compile(r"(layers|depths?|blocks|codebooks)$|^(n|num)_layer$")
_EXPERTS = re.compile(r"experts(_[a-z]+)?$")
_MIN_COUNT = 256  # unused sections of a small checkpoint may have larger defaults
# A model may exceed its (quantised) files by this factor and these bytes.
_MAX_RATIO, _MAX_EXTRA_BYTES = 16, 256 << 20


def read_config(folder: Path) -> dict[str, Any]:
    """Return the values of a checkpoint's config.json, without keys that select code or kernels.

    Those of a GGUF file are made from its metadata.

    Raises:
        CheckpointError: The file is missing, damaged, too large or too deeply nested, or has
            control characters in its names.
        UnsupportedModelError: The model has code of its own, or is of another family than can be
            read from GGUF files.
    """
    if is_gguf(folder):
        return settings_of(read_gguf(folder))
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; give a folder that save_pretrained wrote"
        )
    try:
        values = read_json(file)
        for where, value in _walk(values):
            _refuse_control_characters(where, value)
            if "_token_id." in f"{where}.":
                _refuse_no_token(where, value)
            if where.rpartition(".")[2] in _DTYPES and "quantization_config" not in where:
                _refuse_unknown_dtype(where, value)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {in_brief(error)}") from error
    custom_code, values = "auto_map" in values, _followed(values)
    if custom_code and _family(values) not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{folder} is a {_family(values)!r} model, which comes with code of its own (auto_map "
            "in config.json). That is never run, and transformers has no family of this name; "
            "look for a conversion of the model to a family that transformers has"
        )
    return values


def check_transformers() -> None:
    """Refuse versions of transformers with which a model might be computed wrongly.

    A new version may name an argument of the forward pass otherwise, as 5.24 did with the KV cache,
    and a model goes on without what it does not know.

    Raises:
        ConfigError: The installed version is not among `SUPPORTED_TRANSFORMERS`.
    """
    found = transformers.__version__
    if ".".join(found.split(".")[:2]) not in SUPPORTED_TRANSFORMERS:
        raise ConfigError(
            f"transformers {found} is installed, but moefit supports "
            f"{' and '.join(SUPPORTED_TRANSFORMERS)}; run pip install "
            f"'transformers=={SUPPORTED_TRANSFORMERS[-1]}.*'"
        )


def config_from(values: dict[str, Any], folder: Path) -> PreTrainedConfig:
    """Return transformers' configuration for the values of `read_config`.

    Raises:
        CheckpointError: transformers does not know the family, or rejects the values.
        ConfigError: The values of a DS-MoE model contradict each other, or the installed version of
            transformers is not supported.
    """
    check_transformers()
    family = _family(values)
    try:
        if family not in CONFIG_MAPPING:
            raise ValueError("transformers has no such family; a newer version may")
        kind: Any = CONFIG_MAPPING[family]
        config = kind.from_dict(deepcopy(values), name_or_path=str(folder))
        text = config.get_text_config(decoder=True)
        _refuse_impossible_choice(text)
        _refuse_no_window(text)
        return config
    except ConfigError:
        raise
    except Exception as error:  # values of the wrong kind lead a family's code to any of them
        raise CheckpointError(
            f"{settings_file(folder)} (model_type {family!r}) cannot be read: {in_brief(error)}"
        ) from error


def _refuse_impossible_choice(config: Any) -> None:
    """Check the number of experts per token, which cannot be derived from any weight's shape."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")  # or two names of one number
    there = [number for name in names if type(number := getattr(config, name, None)) is int]
    without_weights = getattr(config, "zero_expert_num", None) or 0
    most = max(there, default=0) + without_weights
    if type(chosen) is int and most > 0 and not 1 <= chosen <= most:
        raise ValueError(
            f"num_experts_per_tok is {chosen}, but a token has at least one expert and at most "
            f"the {most} that there are"
        )


def _refuse_no_window(config: Any) -> None:
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and (
        type(window) is not int or window < 1
    ):
        raise ValueError(
            f"sliding_window is {window!r}, but layers with sliding_attention need at least 1"
        )


def refuse_absurd_counts(values: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for negative counts of layers or experts, or more than files can hold.

    A model with a million layers takes minutes and gigabytes to build even without memory for its
    weights, so this is checked against the headers first.
    """
    tensors = len(checkpoint.spans)
    largest = max((max(span.shape, default=0) for span in checkpoint.spans.values()), default=0)
    layers, experts = max(_MIN_COUNT, tensors), max(_MIN_COUNT, tensors, largest)
    for where, value in _walk(values):
        key = where.rpartition(".")[2]
        most = layers if _LAYERS.search(key) else experts if _EXPERTS.search(key) else None
        if most is not None and isinstance(value, int | float) and not 0 <= value <= most:
            raise CheckpointError(
                f"{settings_file(checkpoint.folder)} has {where}={value!r}, but the checkpoint's "
                f"files hold {tensors:,} tensors, the largest dimension being {largest:,}; give "
                "the settings that belong to them"
            )


def refuse_other_size(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the model (on the meta device) is far larger than the files.

    Loading would allocate missing weights, and weights of another shape, before reporting them.
    """
    model_bytes = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    stored = sum(span.nbytes for span in checkpoint.spans.values())
    if model_bytes > _MAX_RATIO * stored + _MAX_EXTRA_BYTES:
        raise CheckpointError(
            f"{settings_file(checkpoint.folder)} describes {model_bytes:,} bytes of weights, but "
            f"the checkpoint's files hold {stored:,}; give the settings that belong to them"
        )


def _family(values: dict[str, Any]) -> str:
    return str(values.get("model_type"))


def _walk(values: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield each value that is not a non-empty container, with the keys that lead to it."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"its values are nested more than {_MAX_DEPTH} levels deep")
    if isinstance(values, dict | list) and not values:
        yield where, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _walk(value, f"{where}.{key}" if where else key, depth + 1)
    elif isinstance(values, list):
        for value in values:
            yield from _walk(value, where, depth + 1)
    else:
        yield where, values


def _refuse_control_characters(where: str, value: Any) -> None:
    """Reject control characters, because names from this file appear in messages."""
    if printable(where) != where or "\n" in where:
        raise ValueError(f"the key {where!r} has control characters")
    if isinstance(value, str) and "\x1b" in value:
        raise ValueError(f"{where} has control characters: {value[:80]!r}")


def _refuse_no_token(where: str, value: Any) -> None:
    """Accept ids from 0, null, and -1, which some families use for none."""
    if value is not None and (type(value) is not int or not -1 <= value < 1 << 31):
        raise ValueError(f"{where} is {value!r}, but a token's id is a whole number, or null")


def _refuse_unknown_dtype(where: str, value: Any) -> None:
    if value is None or value == "auto":
        return
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(
            f"{where} is {value!r}, in which no model is computed; float32, bfloat16 and float16 "
            "are known"
        )


def _followed(values: Any) -> Any:
    """Return a copy without dropped keys, with families and special floats replaced."""
    if isinstance(values, dict):
        if len(values) == 1 and str(values.get("__float__")) in _FLOATS:
            return float(values["__float__"])
        kept = {key: _followed(one) for key, one in values.items() if key not in _DROPPED_KEYS}
        family = kept.get("model_type")
        if isinstance(family, str) and family in _SAME_AS:
            kept["model_type"] = _SAME_AS[family]
        return kept
    return [_followed(one) for one in values] if isinstance(values, list) else values
