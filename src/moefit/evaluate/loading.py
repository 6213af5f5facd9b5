"""From what a person calls a model to the model itself.

Owns the meaning of MODEL on the command line: the word `reference` (the shipped model), a model
folder, or a training run's folder (its last checkpoint). Knows nothing of what is done with it.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import moefit
from moefit.dsmoe.model import register
from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError
from moefit.train import checkpoint

REFERENCE = "reference"
ARCHITECTURES = ("dsmoe", "olmoe")


def reference_path() -> Path:
    """The folder of the model that ships with moefit."""
    return Path(moefit.__file__).parent / "reference_model"


def locate(model: str) -> Path:
    """The model folder that `model` means.

    Raises CheckpointError if there is none.
    """
    if model == REFERENCE:
        return reference_path()
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    found = checkpoint.checkpoints(path)
    if found:
        return found[-1]
    if not path.exists():
        raise CheckpointError(
            f"there is no folder {model!r}; give a model folder, a training run's folder, or "
            f"{REFERENCE!r} for the model that ships with moefit"
        )
    raise CheckpointError(
        f"{model!r} holds neither a model (config.json) nor a finished checkpoint "
        f"({checkpoint.PREFIX}*/{checkpoint.MANIFEST})"
    )


def load(
    model: str, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode and its tokenizer; dtype None is the checkpoint's own.

    Raises CheckpointError if it is missing or damaged, UnsupportedModelError if it is of a family
    that this half of moefit doesn't know.
    """
    path = locate(model)
    if (path / checkpoint.MANIFEST).is_file():
        checkpoint.verify(path)
    register()
    _check_family(path)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto")
        tokenizer = AutoTokenizer.from_pretrained(path)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the model in {path} cannot be read: {error}") from error
    loaded.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    return loaded.eval(), tokenizer


def _check_family(path: Path) -> None:
    try:
        family = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        AutoConfig.from_pretrained(path)
    except ConfigError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be read: {error}") from error
    if family not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path} is a {family!r} model; this command knows {' and '.join(ARCHITECTURES)}"
        )
