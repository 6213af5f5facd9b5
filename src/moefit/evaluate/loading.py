"""From what a person calls a model to the model itself.

Owns the meaning of MODEL on the command line: the word `reference` (the shipped model), a model
folder, or a training run's folder (its last checkpoint). Knows nothing of what is done with it.
"""

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
from moefit.checkpoint.model_folder import other_weights, read_tokenizer, refuse_adapter
from moefit.checkpoint.quantisation import refuse_stored
from moefit.checkpoint.safetensors import INDEX, SINGLE, Checkpoint
from moefit.device import parse_device
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM, register
from moefit.dsmoe.presets import preset, preset_names
from moefit.errors import CheckpointError, MoefitError, UnsupportedModelError, in_brief

REFERENCE = "reference"
ARCHITECTURES = ("dsmoe", "olmoe")


def reference_path() -> Path:
    """The folder of the model that ships with moefit."""
    return Path(moefit.__file__).parent / "reference_model"


def locate(model: str) -> Path:
    """The model folder that `model` means.

    Raises CheckpointError if there is none, or weights of another kind; UnsupportedModelError if
    it is an adapter.
    """
    if model == REFERENCE:
        return reference_path()
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    refuse_adapter(path)
    from moefit.train import checkpoint  # a process that serves a model folder needs none of it

    found = checkpoint.checkpoints(path)
    if found:
        return found[-1]
    if not path.exists():
        raise CheckpointError(
            f"there is no folder {model!r}; give a model folder, a training run's folder, or "
            f"{REFERENCE!r} for the model that ships with moefit"
        )
    if path.suffix in (".safetensors", ".json") and (path.parent / "config.json").is_file():
        raise CheckpointError(
            f"{model!r} is one file of a model; give the folder that it is in, {str(path.parent)!r}"
        )
    if (found := other_weights(path)) is not None:
        raise CheckpointError(f"{model!r} is no model folder (it has no config.json): {found}")
    raise CheckpointError(
        f"{model!r} holds neither a model (config.json) nor a finished checkpoint "
        f"({checkpoint.PREFIX}*/{checkpoint.MANIFEST})"
    )


def load_full_model(
    model: str, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[DsMoeForCausalLM | OlmoeForCausalLM, PreTrainedTokenizerBase]:
    """The model in eval mode and its tokenizer; dtype None is the checkpoint's own.

    Raises CheckpointError if it is missing or damaged, or its weights are others than those that
    its configuration describes; UnsupportedModelError if it is quantised, or of a family that this
    half of moefit doesn't know; ConfigError if there is no such device.
    """
    place = parse_device(device)
    path = locate(model)
    _verify(path)
    check_family(path)
    refuse_adapter(path)
    refuse_stored(path)
    loaded, tokenizer = _weights(path, dtype), read_tokenizer(path)
    if isinstance(loaded, OlmoeForCausalLM) and not _grouped_mm_fits(loaded):
        loaded.set_experts_implementation("eager")
    loaded.to(place)  # pyright: ignore[reportArgumentType]
    return loaded.eval(), tokenizer


def _verify(path: Path) -> None:
    """Compare a training run's checkpoint with its checksums; other folders have none."""
    from moefit.train import checkpoint

    if (path / checkpoint.MANIFEST).is_file():
        checkpoint.verify(path)


def config_of(model: str) -> DsMoeConfig:
    """The configuration of a preset or of what `model` means; no weights are read.

    Raises ConfigError, naming the nearest preset, if it is neither; otherwise as `check_family`.
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
    """The family of the model in `path`, which is one of `known`; its configuration is sound.

    Raises CheckpointError if config.json cannot be read, ConfigError if it contradicts itself,
    UnsupportedModelError for another family.
    """
    values, _ = _configuration(path, known)
    return values["model_type"]


def _configuration(
    path: Path, known: Sequence[str] = ARCHITECTURES
) -> tuple[dict[str, Any], PreTrainedConfig]:
    register()
    values = read_config(path)
    family = values.get("model_type")
    if family not in known:
        raise UnsupportedModelError(
            f"{path} is a {family!r} model; this command knows {' and '.join(known)}"
        )
    return values, config_from(values, path)


def _weights(path: Path, dtype: torch.dtype | None) -> DsMoeForCausalLM | OlmoeForCausalLM:
    values, config = _configuration(path)
    if any((path / name).is_file() for name in (SINGLE, INDEX)):
        with Checkpoint(path) as files:
            _refuse_other_numbers(values, config, files)
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            path,
            config=config,
            generation_config=_generation_config(path, config),
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            trust_remote_code=False,
        )
    except MoefitError:
        raise
    except Exception as error:  # whatever a damaged file leads transformers to
        raise CheckpointError(f"the model in {path} cannot be read: {in_brief(error)}") from error
    if differences := _differences(found):
        raise CheckpointError(
            f"the weights in {path} are not those of its config.json: {'; '.join(differences)}. "
            "Without them it would compute with random numbers; give the config.json that was "
            "saved together with the weights"
        )
    assert isinstance(loaded, DsMoeForCausalLM | OlmoeForCausalLM), "check_family() saw to this"
    return loaded


def _generation_config(path: Path, config: PreTrainedConfig) -> GenerationConfig:
    """Return the model's generation settings; its special tokens if the file cannot be used.

    Measurements generate nothing; for commands that do, `use_generation_config` names the damage.
    """
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception:  # noqa: BLE001 - a damaged file raises many types
        return GenerationConfig.from_model_config(config)


def _refuse_other_numbers(
    values: dict[str, Any], config: PreTrainedConfig, files: Checkpoint
) -> None:
    """Raise CheckpointError before weights are allocated that the files don't have."""
    refuse_absurd_counts(values, files)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a family's code meets numbers that it does not expect
        raise CheckpointError(
            f"{files.folder / CONFIG} describes no model that can be built: {in_brief(error)}"
        ) from error
    refuse_other_size(model, files)


def _differences(found: dict[str, Any]) -> list[str]:
    """What transformers passes over in silence: too few weights, too many, of other shapes."""
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


def _grouped_mm_fits(model: OlmoeForCausalLM) -> bool:
    """Whether transformers' default for experts can compute these widths."""
    return model.config.hidden_size % 8 == 0 and model.config.intermediate_size % 8 == 0
