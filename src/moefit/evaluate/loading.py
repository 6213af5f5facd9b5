"""Find and load models by the MODEL argument of the command line.

MODEL is `reference` (the shipped model), a model folder, or a training run's folder, which stands
for its last checkpoint.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

import moefit
from moefit.checkpoint.config import (
    CONFIG,
    config_from,
    read_config,
    refuse_absurd_counts,
    refuse_other_size,
)
from moefit.checkpoint.formats.declared import declared
from moefit.checkpoint.gguf.header import first_part
from moefit.checkpoint.model_folder import other_weights, refuse_adapter
from moefit.checkpoint.pickled import PICKLED, PICKLED_INDEX
from moefit.checkpoint.quantisation import refuse_stored
from moefit.checkpoint.safetensors import INDEX, SINGLE, Checkpoint
from moefit.checkpoint.tokenizer import read_tokenizer
from moefit.device import parse_device
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM, register
from moefit.dsmoe.presets import preset, preset_names
from moefit.errors import CheckpointError, MoefitError, UnsupportedModelError, in_brief
from moefit.folders import is_gguf

REFERENCE = "reference"
ARCHITECTURES = ("dsmoe", "olmoe")


def reference_path() -> Path:
    """Return the folder of the model that ships with moefit."""
    return Path(moefit.__file__).parent / "reference_model"


def locate(model: str) -> Path:
    """Return the folder of a model, or its GGUF file.

    Args:
        model: `reference`, a model folder, a GGUF file or a training run's folder.

    Raises:
        CheckpointError: There is no such model, or its weights have an unsupported format.
        UnsupportedModelError: It is an adapter.
    """
    if model == REFERENCE:
        return reference_path()
    path = Path(model).expanduser()
    if is_gguf(path) and path.exists():
        return first_part(path)
    if (path / "config.json").is_file():
        return path
    refuse_adapter(path)
    from moefit.train import checkpoint  # not needed to serve a model folder

    found = checkpoint.checkpoints(path)
    if found:
        return found[-1]
    if len(ggufs := {first_part(file) for file in path.glob("*.gguf")}) == 1:
        return ggufs.pop()
    if not path.exists():
        raise CheckpointError(
            f"there is no folder {model!r}; give a model folder, a training run's folder, or "
            f"{REFERENCE!r} for the model that ships with moefit"
        )
    if path.suffix in (".safetensors", ".json") and (path.parent / "config.json").is_file():
        raise CheckpointError(
            f"{model!r} is one file of a model; give its folder, {str(path.parent)!r}"
        )
    _refuse_weights(model, path)
    raise CheckpointError(
        f"{model!r} contains neither a model (config.json) nor a finished checkpoint "
        f"({checkpoint.PREFIX}*/{checkpoint.MANIFEST})"
    )


def _refuse_weights(model: str, path: Path) -> None:
    """Raise CheckpointError if a path has weights, but no config.json beside them."""
    for name in (PICKLED, PICKLED_INDEX):
        if (path / name).is_file():
            raise CheckpointError(
                f"{model!r} is not a model folder: it has {name} (pickled weights) and no "
                "config.json; put the model's own config.json and tokenizer files there first, and "
                "then write it as safetensors with `moefit convert FOLDER OUT`"
            )
    if (found := other_weights(path)) is not None:
        raise CheckpointError(f"{model!r} is not a model folder (it has no config.json): {found}")


def computed_whole(folder: Path) -> bool:
    """Return whether `load_full_model` is for this model: a DS-MoE or OLMoE that is not encoded.

    A damaged configuration counts as one, so that it is reported there.
    """
    if is_gguf(folder):
        return False
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    if not isinstance(config, dict):
        return True
    return config.get("model_type") in ARCHITECTURES and declared(folder) is None


def load_full_model(
    model: str, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[DsMoeForCausalLM | OlmoeForCausalLM, PreTrainedTokenizerBase]:
    """Load a DS-MoE or OLMoE model as a whole.

    Args:
        model: As for `locate`.
        device: Where to load it.
        dtype: Data type of the weights; None for the checkpoint's own.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        CheckpointError: It is missing or damaged, or weights and configuration do not match.
        UnsupportedModelError: It is quantised or of another family.
        ConfigError: The device does not exist.
    """
    target = parse_device(device)
    path = locate(model)
    from moefit.train import checkpoint

    if (path / checkpoint.MANIFEST).is_file():
        checkpoint.verify(path)
    check_family(path)
    refuse_adapter(path)
    refuse_stored(path)
    loaded, tokenizer = _load_weights(path, dtype), read_tokenizer(path)
    sizes = loaded.config.hidden_size, loaded.config.intermediate_size
    if isinstance(loaded, OlmoeForCausalLM) and any(size % 8 for size in sizes):
        loaded.set_experts_implementation("eager")  # torch's grouped product needs multiples of 8
    loaded.to(target)  # pyright: ignore[reportArgumentType]
    return loaded.eval(), tokenizer


def config_of(model: str) -> DsMoeConfig:
    """Return the configuration of a preset or a DS-MoE model without reading weights.

    Args:
        model: A preset's name, or as for `locate`.

    Raises:
        ConfigError: It is neither; the message names the nearest preset.
        MoefitError: As `check_family` does.
    """
    if model in preset_names():
        return preset(model)
    if model != REFERENCE and not Path(model).expanduser().exists():
        preset(model)  # raises
    path = locate(model)
    _, config = _configuration(path, known=("dsmoe",))
    assert isinstance(config, DsMoeConfig)
    return config


def check_family(path: Path, known: Sequence[str] = ARCHITECTURES) -> str:
    """Check a model's configuration and return its family, one of `known`.

    Raises:
        CheckpointError: config.json cannot be read.
        ConfigError: It contradicts itself.
        UnsupportedModelError: The model is of another family.
    """
    return _configuration(path, known)[0]["model_type"]


def _configuration(
    path: Path, known: Sequence[str] = ARCHITECTURES
) -> tuple[dict[str, Any], PreTrainedConfig]:
    register()
    values = read_config(path)
    family = values.get("model_type")
    if family not in known:
        raise UnsupportedModelError(
            f"{path} is a {family!r} model; this command supports {' and '.join(known)}"
        )
    return values, config_from(values, path)


def _load_weights(path: Path, dtype: torch.dtype | None) -> DsMoeForCausalLM | OlmoeForCausalLM:
    values, config = _configuration(path)
    if any((path / name).is_file() for name in (SINGLE, INDEX)):
        with Checkpoint(path) as files:
            _check_sizes(values, config, files)
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            path,
            config=config,
            generation_config=_generation_config(path, config),
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            trust_remote_code=False,
        )
    except MoefitError:
        raise
    except Exception as error:  # transformers raises many types for damaged files
        raise CheckpointError(f"the model in {path} cannot be read: {in_brief(error)}") from error
    if differences := _differences(found):
        raise CheckpointError(
            f"the weights in {path} do not match its config.json: {'; '.join(differences)}. "
            "transformers would replace them by random numbers; give the config.json that was "
            "saved together with the weights"
        )
    assert isinstance(loaded, DsMoeForCausalLM | OlmoeForCausalLM), "check_family() ensures this"
    return loaded


def _generation_config(path: Path, config: PreTrainedConfig) -> GenerationConfig:
    """Return the model's generation settings; only its special tokens if the file is damaged.

    Commands that generate text report the damage with `use_generation_config`.
    """
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception:  # noqa: BLE001 - a damaged file raises many types
        return GenerationConfig.from_model_config(config)


def _check_sizes(values: dict[str, Any], config: PreTrainedConfig, files: Checkpoint) -> None:
    """Raise CheckpointError before weights are allocated that the files do not contain."""
    refuse_absurd_counts(values, files)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # models raise many types for unexpected numbers
        raise CheckpointError(
            f"no model can be built from {files.folder / CONFIG}: {in_brief(error)}"
        ) from error
    refuse_other_size(model, files)


def _differences(found: dict[str, Any]) -> list[str]:
    """Describe weights that are missing, unexpected or of other shapes."""
    shapes = [
        f"{name} is {list(stored)}, not {list(expected)}"
        for name, stored, expected in sorted(found["mismatched_keys"])
    ]
    mismatched = {name for name, *_ in found["mismatched_keys"]}
    kinds = {
        "missing": sorted(set(found["missing_keys"]) - mismatched),
        "unexpected": sorted(found["unexpected_keys"]),
        "of another shape": shapes,
    }
    return [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    ]
