"""Adapt an existing model to servers that hold only some of its experts.

A short training run with expert dropout that starts from the model's weights. The adapted model has
the class, settings and dtype of the original, so it works wherever the original does.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedConfig

from moefit.checkpoint.config import CONFIG, config_from, read_config
from moefit.checkpoint.safetensors import Checkpoint
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import register
from moefit.dsmoe.presets import field_names
from moefit.errors import CheckpointError, UnsupportedModelError
from moefit.moe.expert_dropout import CARD, KEY, dropout_record
from moefit.train.checkpoint import MANIFEST, STATE
from moefit.train.config import TrainConfig, make_config
from moefit.train.model import TOKENIZER_FIELDS

RUN = "run"
_UNFINISHED = ".unfinished"


def adapt_config(folder: Path, out: Path, settings: dict[str, Any]) -> TrainConfig:
    """Return the training run that adapts a model.

    Args:
        folder: The model, a DS-MoE or an OLMoE with its tokenizer.
        out: Folder of the adapted model; the run is in its subfolder `run`.
        settings: Of the run, by the names of `TrainConfig`; what is not given suits an adaptation.

    Raises:
        CheckpointError: config.json is missing or damaged.
        ConfigError: A setting is invalid.
        UnsupportedModelError: The model is of another family.
    """
    config = config_from(read_config(folder), folder)
    seq_len = settings.get("seq_len", min(256, config.max_position_embeddings))
    defaults = {
        "model": _architecture(config, folder),
        "loss": _losses(config),
        "start_from": str(folder),
        "seq_len": seq_len,
        "out": str(out / RUN),
    }
    data = {"tokenizer": str(folder), **settings.get("data", {})}
    return make_config({**defaults, **settings, "data": data})


def _architecture(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """Return the settings of a model of the same shape."""
    if isinstance(config, DsMoeConfig):
        names = [name for name in field_names() if not name.endswith("_loss_coef")]
        architecture = "dsmoe"
    elif isinstance(config, OlmoeConfig):
        own = ("router_aux_loss_coef", "output_router_logits")
        inherited = PreTrainedConfig.__annotations__
        names = [name for name in OlmoeConfig.__annotations__ if name not in own + tuple(inherited)]
        names.append("tie_word_embeddings")
        architecture = "olmoe"
    else:
        raise UnsupportedModelError(
            f"{folder} is a {config.model_type!r} model, which cannot be adapted; OLMoE and DS-MoE "
            "can"
        )
    values = {name: getattr(config, name) for name in names if name not in TOKENIZER_FIELDS}
    return {"architecture": architecture, **values}


def _losses(config: PreTrainedConfig) -> dict[str, float]:
    """Return the router losses of the model's own training; OLMoE's is a mean over layers."""
    if isinstance(config, OlmoeConfig):
        return {"load_balancing": config.router_aux_loss_coef / config.num_hidden_layers}
    assert isinstance(config, DsMoeConfig)
    names = ("mlp_mi", "attention_mi", "load_balancing", "z")
    return {name: weight for name in names if (weight := getattr(config, f"{name}_loss_coef"))}


def write_adapted(folder: Path, checkpoint: Path, out: Path) -> None:
    """Write the adapted model beside its run.

    Args:
        folder: The original, whose config.json and dtype are kept.
        checkpoint: The run's last.
        out: Where to write; config.json, which makes it a model, comes last.

    Raises:
        CheckpointError: The files cannot be written.
    """
    register()
    config = config_from(read_config(folder), folder)
    record = dropout_record(config_from(read_config(checkpoint), checkpoint))
    assert record is not None, "the run had expert dropout"
    setattr(config, KEY, record.as_dict())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=_dtype(folder))
    model.config = config
    unfinished = out / _UNFINISHED
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(
            checkpoint,
            unfinished,
            ignore=shutil.ignore_patterns(MANIFEST, STATE, CONFIG, "*.safetensors*"),
        )
        model.save_pretrained(unfinished)
        (unfinished / CARD).write_text(record.model_card(), encoding="utf-8")
        names = sorted((path.name for path in unfinished.iterdir()), key=lambda n: n == CONFIG)
        for name in names:
            (unfinished / name).replace(out / name)
        unfinished.rmdir()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the adapted model cannot be written to {out}: {error}; make room, then run the same "
            "command again"
        ) from error


def _dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the original's weights."""
    with Checkpoint(folder) as stored:
        name = next(name for name in sorted(stored.spans) if name.endswith("weight"))
        return stored.tensor(stored.spans[name]).dtype
