"""The model of a training run, from its configuration.

Owns the choice of architecture and the strictness of its settings. Every architecture trains
densely in the same way: all experts active, computed as one wide MLP.
"""

from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM, router_loss_weights
from moefit.dsmoe.objective import RouterLossWeights
from moefit.dsmoe.presets import check_fields, field_names, preset
from moefit.dsmoe.stock import DENSE_EXPERTS, register_dense_experts
from moefit.errors import ConfigError
from moefit.train.config import TrainConfig

OWNED = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")


def build_model(config: TrainConfig, *, vocab_size: int, eos_token_id: int) -> PreTrainedModel:
    """A freshly initialised model, seeded by `config.seed`, on the CPU in float32.

    Raises ConfigError for unknown or contradictory settings.
    """
    tokens = {"vocab_size": vocab_size, "eos_token_id": eos_token_id, "pad_token_id": None}
    _check_owned(config.model.settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.model.architecture == "olmoe":
            return _olmoe(config, tokens)
        return DsMoeForCausalLM(_dsmoe_config(config, tokens))


def loss_weights(config: TrainConfig, model: PreTrainedModel) -> RouterLossWeights:
    """The router losses of this run: our own model carries them, OLMoE's come from `loss`."""
    if isinstance(model, DsMoeForCausalLM):
        return router_loss_weights(model.config)
    given = {name: value or 0.0 for name, value in config.loss.model_dump().items()}
    return RouterLossWeights(**given, k=model.config.num_experts_per_tok)


def attention_implementation(config: TrainConfig, device: torch.device) -> str:
    """Which of transformers' attention functions to train with.

    On a CPU with bf16 matrix units torch's fused backward is the slower one for short sequences;
    for long ones the score matrix of the eager one costs too much memory.
    """
    if config.attention != "auto":
        return config.attention
    eager = device.type == "cpu" and use_bf16(config, device) and config.seq_len <= 512
    return "eager" if eager else "sdpa"


def use_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether to autocast to bfloat16; by default only where it has matrix units."""
    if config.precision != "auto":
        return config.precision == "bf16"
    return device.type == "cuda" or bool(torch.cpu._is_amx_tile_supported())


def _check_owned(settings: dict[str, Any]) -> None:
    for name in OWNED:
        if name in settings:
            raise ConfigError(
                f"model.{name} comes from the tokenizer; set data.vocab_size or data.tokenizer"
            )
    for name in field_names():
        if name.endswith("_loss_coef") and name in settings:
            raise ConfigError(f"model.{name} comes from the loss settings; set loss.* instead")


def _dsmoe_config(config: TrainConfig, tokens: dict[str, Any]) -> DsMoeConfig:
    loss = config.loss.model_dump(exclude_none=True)
    settings = {
        "max_position_embeddings": max(config.seq_len, 2048),
        **config.model.settings,
        **{f"{name}_loss_coef": value for name, value in loss.items()},
        **tokens,
    }
    if config.model.preset is None:
        check_fields(settings)
        return DsMoeConfig(**settings)
    return preset(config.model.preset, **settings)


def _olmoe(config: TrainConfig, tokens: dict[str, Any]) -> PreTrainedModel:
    settings = config.model.settings
    if config.model.preset is not None or config.loss.attention_mi:
        raise ConfigError(
            "architecture: olmoe takes neither model.preset nor loss.attention_mi; "
            "give OlmoeConfig's fields, such as model.num_experts=16"
        )
    known = set(OlmoeConfig.__annotations__)
    for name in settings:
        if name not in known:
            raise ConfigError(f"model.{name} is no field of OlmoeConfig; known: {sorted(known)}")
    experts = settings.get("num_experts", OlmoeConfig().num_experts)
    if settings.get("num_experts_per_tok", experts) != experts:
        raise ConfigError(
            "dense training activates all experts, so model.num_experts_per_tok is not set "
            "here; choose K at export: moefit export RUN OUT --experts-per-token K"
        )
    register_dense_experts()
    olmoe = OlmoeConfig(**{**settings, **tokens, "num_experts_per_tok": experts})
    model = OlmoeForCausalLM(olmoe)
    model.set_experts_implementation(DENSE_EXPERTS)
    return model
