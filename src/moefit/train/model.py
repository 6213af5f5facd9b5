"""Build the model of a training run from its configuration: a DS-MoE or an OLMoE."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN

from moefit.checkpoint.config import read_config
from moefit.checkpoint.quantisation import refuse_declared, refuse_integers
from moefit.checkpoint.safetensors import Checkpoint
from moefit.dsmoe.config import DsMoeConfig, nearest_multiple
from moefit.dsmoe.dense_experts import DENSE_EXPERTS, register_dense_experts
from moefit.dsmoe.losses import RouterLossWeights
from moefit.dsmoe.model import DsMoeForCausalLM, router_loss_weights
from moefit.dsmoe.presets import check_fields, field_names, preset
from moefit.errors import ConfigError
from moefit.moe.routing import Rule
from moefit.train.checkpoint import MANIFEST, checkpoints, verify
from moefit.train.config import TrainConfig
from moefit.train.memory.low_rank import add_low_rank


def initial_folder(source: str) -> Path:
    """Return the model folder that `start_from` names. Raises ConfigError if there is none."""
    folder = Path(source).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if not (found := checkpoints(folder)):
        raise ConfigError(
            f"start_from={source!r} is neither a model folder (config.json) nor a run with a "
            "finished checkpoint; leave it out to start from random weights"
        )
    return found[-1]


NEW_IN_ROUTERS = (
    *(f".mlp.gate.embedding_{name}" for name in ("up", "bias", "weight")),
    ".mlp.gate.e_score_correction_bias",
)
"""What a model to start from may lack: weights of `pregated: previous_token_and_embedding`, and
biases of `loss.balancing_bias`, which begin at 0."""


def load_initial_weights(model: PreTrainedModel, source: str) -> None:
    """Copy weights into a model by name.

    Args:
        model: A newly built model.
        source: A model folder, or a run's folder for its last checkpoint.

    Raises:
        ConfigError: There is no model at `source`, or its weights are of another model.
        CheckpointError: The weights cannot be read.
        UnsupportedModelError: The weights are quantised.
    """
    folder = initial_folder(source)
    if (folder / MANIFEST).is_file():
        verify(folder)
    refuse_declared(folder)
    with Checkpoint(folder) as stored:
        if isinstance(model, OlmoeForCausalLM):
            _load_olmoe(model, stored, source)
        else:
            _copy_weights(model, stored, source)


def _load_olmoe(model: OlmoeForCausalLM, stored: Checkpoint, source: str) -> None:
    """Load weights through transformers, which stacks the separate experts of the files."""
    for name, span in stored.spans.items():
        refuse_integers(span, name)
    loaded, found = OlmoeForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        stored.folder,
        config=copy.deepcopy(model.config),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below
    )
    mismatched = {name: shapes for name, *shapes in found["mismatched_keys"]}
    wrong = [f"lacks {name}" for name in sorted(set(found["missing_keys"]) - mismatched.keys())]
    wrong += [f"has {name}" for name in sorted(found["unexpected_keys"])]
    wrong += [
        f"has {name} {list(stored_shape)}, not {list(shape)}"
        for name, (stored_shape, shape) in sorted(mismatched.items())
    ]
    _refuse_differences(wrong, source)
    model.load_state_dict(loaded.state_dict())


@torch.no_grad()
def _copy_weights(model: PreTrainedModel, stored: Checkpoint, source: str) -> None:
    weights = model.state_dict()
    tied = set(model.all_tied_weights_keys)
    lacking = sorted(weights.keys() - stored.spans.keys() - tied)
    new = [name for name in lacking if name.endswith(NEW_IN_ROUTERS)]
    wrong = [f"lacks {name}" for name in lacking if name not in new]
    wrong += [f"has {name}" for name in sorted(stored.spans.keys() - weights.keys())]
    wrong += [
        f"has {name} {list(span.shape)}, not {list(weights[name].shape)}"
        for name, span in sorted(stored.spans.items())
        if name in weights and span.shape != tuple(weights[name].shape)
    ]
    before = read_config(stored.folder).get("router_type", "linear")
    if before != model.config.router_type:  # two kinds have no weights
        wrong.append(f"has router_type={before}, not {model.config.router_type}")
    _refuse_differences(wrong, source)
    for name in new:
        if name.endswith("_weight"):
            weights[name].zero_()  # routes as without them
    for name, span in stored.spans.items():
        if weights[name].is_floating_point():
            refuse_integers(span, name)
        weights[name].copy_(stored.tensor(span))


def _refuse_differences(wrong: list[str], source: str) -> None:
    if wrong:
        raise ConfigError(
            f"start_from={source!r} is of another model than this configuration describes: it "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}; give the model settings "
            "and the tokenizer that it was made with"
        )


# What transformers and torch raise for a configuration that cannot be built.
_CONSTRUCTION_ERRORS = (
    StrictDataclassError, RuntimeError, ValueError, TypeError, KeyError, AttributeError,
    ZeroDivisionError, AssertionError,
)  # fmt: skip
TOKENIZER_FIELDS = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")


def build_model(config: TrainConfig, *, vocab_size: int, eos_token_id: int) -> PreTrainedModel:
    """Return a randomly initialised model on the CPU in float32.

    Args:
        config: The run's configuration, whose seed is used.
        vocab_size: Of the tokenizer.
        eos_token_id: Of the tokenizer.

    Raises:
        ConfigError: Settings are unknown or contradict each other.
    """
    tokens = {"vocab_size": vocab_size, "eos_token_id": eos_token_id, "pad_token_id": None}
    _check_reserved(config.model.settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.model.architecture == "olmoe":
            return _olmoe(config, tokens)
        dsmoe = _dsmoe_config(config, tokens)
        _check_effects(config, dsmoe)
        return DsMoeForCausalLM(dsmoe)


def loss_weights(config: TrainConfig, model: PreTrainedModel) -> RouterLossWeights:
    """Return the weights of the router losses: a DS-MoE's configuration has them already."""
    if isinstance(model, DsMoeForCausalLM):
        return router_loss_weights(model.config)
    return RouterLossWeights(**config.loss.weights, k=model.config.num_experts_per_tok)


def select_trainable(model: PreTrainedModel, config: TrainConfig) -> None:
    """Freeze the weights that `config.trainable` leaves out, and add the changes of low rank.

    Raises:
        ConfigError: Nothing is left to train, or the rank is too large.
    """
    if config.trainable == "all":
        return
    if int(model.config.num_experts) < 2:
        raise ConfigError(
            f"trainable={config.trainable}, but model.num_experts=1 has no router; give "
            "trainable=all"
        )
    for name, parameter in model.named_parameters():
        modules = name.split(".")
        parameter.requires_grad = any(part == "gate" or "norm" in part for part in modules)
    if config.trainable == "low_rank":
        add_low_rank(model, config.rank, config.seed)


def attention_implementation(config: TrainConfig, device: torch.device) -> str:
    """Return the name of the transformers attention function to train with.

    On CPUs with AMX, eager attention is faster than torch's fused backward in bf16. Its score
    matrix needs too much memory for long sequences.
    """
    if config.attention != "auto":
        return config.attention
    bf16 = use_bf16(config, device) or config.parallel.mixed_precision is not None
    eager = device.type == "cpu" and bf16 and config.seq_len <= 512
    return "eager" if eager else "sdpa"


def use_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Return whether to autocast to bfloat16: by default on GPUs and on CPUs with AMX.

    Not where `parallel.mixed_precision` rounds weights instead.
    """
    if config.precision != "auto" or config.parallel.mixed_precision is not None:
        return config.precision == "bf16"
    return device.type == "cuda" or bool(torch.cpu._is_amx_tile_supported())


def _check_reserved(settings: dict[str, Any]) -> None:
    for name in TOKENIZER_FIELDS:
        if name in settings:
            raise ConfigError(
                f"model.{name} comes from the tokenizer; set data.vocab_size or data.tokenizer"
            )
    for name in field_names():
        if name.endswith("_loss_coef") and name in settings:
            raise ConfigError(f"model.{name} comes from the loss settings; set loss.* instead")


def _dsmoe_config(config: TrainConfig, tokens: dict[str, Any]) -> DsMoeConfig:
    loss = config.loss.weights
    settings: dict[str, Any] = {
        "max_position_embeddings": max(config.seq_len, 2048),
        **config.model.settings,
        **{f"{name}_loss_coef": value for name, value in loss.items()},
        **({"score_correction_bias": True} if config.loss.balancing_bias else {}),
        **tokens,
    }
    if config.model.preset is None:
        check_fields(settings)
        return DsMoeConfig(**settings)
    return preset(config.model.preset, **settings)


def _check_effects(config: TrainConfig, dsmoe: DsMoeConfig) -> None:
    """Raise ConfigError for given settings of routers that the model does not have."""
    given: dict[str, Any] = {
        f"loss.{name}": value for name, value in config.loss.weights.items() if value
    }
    if config.sparse.rule is not None:
        given["sparse.rule"] = config.sparse.rule
    factor = config.model.settings.get("routed_scaling_factor", 1)
    if factor != 1:
        given["model.routed_scaling_factor"] = factor
    for name, value in given.items():
        size = "num_attention_experts" if name == "loss.attention_mi" else "num_experts"
        if getattr(dsmoe, size) == 1:
            neutral = {"model": "1", "loss": "0", "sparse": "null"}[name.split(".")[0]]
            shown = value if isinstance(value, str) else f"{value:g}"
            raise ConfigError(
                f"{name}={shown} has no effect, because a model with model.{size}=1 has no "
                f"router; leave it out, give {neutral}, or give model.{size}=2 or more"
            )
    if config.sparse.rule is not None:
        Rule.parse(config.sparse.rule).check(dsmoe.num_experts)
    if dsmoe.router_type == "hash":
        _check_hash_effects(config, given)


def _check_hash_effects(config: TrainConfig, given: dict[str, Any]) -> None:
    """Raise ConfigError for settings that would change the choice of a router that has none.

    Args:
        config: The run's configuration.
        given: Settings of losses and rules that are not neutral.
    """
    wanted = {
        **{name: value for name, value in given.items() if name != "loss.attention_mi"},
        "loss.locality": config.loss.locality,
        "loss.routing_locality": config.loss.routing_locality,
        "parallel.node_bias": config.parallel.node_bias,
        "parallel.node_limit": config.parallel.node_limit,
        "expert_dropout": config.expert_dropout and config.expert_dropout.order,
        "budget_aware": config.budget_aware and config.budget_aware.weight,
        "trainable": config.trainable if config.trainable == "routers" else None,
    }
    wanted.pop("model.routed_scaling_factor", None)
    for name, value in wanted.items():
        if value:
            raise ConfigError(
                f"{name}={value} has no effect on model.router_type=hash, where a token's id alone "
                "decides its expert; leave it out, or give model.router_type=linear"
            )


def _olmoe(config: TrainConfig, tokens: Mapping[str, Any]) -> PreTrainedModel:
    settings = config.model.settings
    _check_olmoe_settings(config, settings)
    register_dense_experts()
    try:
        # A copy, as transformers writes into rope_parameters.
        olmoe = OlmoeConfig(**{**copy.deepcopy(settings), **tokens})
        _check_olmoe_shape(olmoe)
        if "num_experts_per_tok" not in settings:
            olmoe.num_experts_per_tok = olmoe.num_experts
        model = OlmoeForCausalLM(olmoe)
    except ConfigError:
        raise
    except _CONSTRUCTION_ERRORS as error:
        given = ", ".join(f"model.{name}={value!r}" for name, value in settings.items())
        raise ConfigError(
            f"OLMoE cannot be built with {given or 'its defaults'}: "
            f"{' '.join(str(error).split())}; change that setting, or leave it out for "
            "OlmoeConfig's default"
        ) from error
    model.set_experts_implementation(DENSE_EXPERTS)
    return model


def _check_olmoe_settings(config: TrainConfig, settings: Mapping[str, Any]) -> None:
    experts = settings.get("num_experts", OlmoeConfig().num_experts)
    if "num_experts_per_tok" in settings and type(experts) is int and experts >= 1:
        chosen = settings["num_experts_per_tok"]
        if type(chosen) is not int or not 1 <= chosen <= experts:
            raise ConfigError(
                f"model.num_experts_per_tok={chosen!r}, but with model.num_experts={experts} it is "
                f"a whole number from 1 to {experts}; leave it out to train all experts for every "
                "token"
            )
    if config.loss.balancing_bias:
        raise ConfigError(
            f"loss.balancing_bias={config.loss.balancing_bias:g} needs routers with a bias, which "
            "OLMoE's have not; use loss.load_balancing, or architecture: dsmoe"
        )
    if config.model.preset is not None or config.loss.attention_mi or config.sparse.rule:
        raise ConfigError(
            "architecture: olmoe does not support model.preset, loss.attention_mi and "
            "sparse.rule; give OlmoeConfig's fields, such as model.num_experts=16"
        )
    known = sorted(OlmoeConfig.__annotations__)
    for name in settings:
        if name not in known:
            raise ConfigError(f"model.{name} is not a field of OlmoeConfig; use one of {known}")
    for name in ("router_aux_loss_coef", "output_router_logits"):
        if name in settings:
            raise ConfigError(
                f"model.{name}={settings[name]!r} has no effect, because moefit computes the "
                "router losses; use loss.load_balancing"
            )


def _check_olmoe_shape(olmoe: OlmoeConfig) -> None:
    """Raise ConfigError for shapes that transformers accepts but cannot build or run."""
    if olmoe.num_experts < 2:
        raise ConfigError(
            f"model.num_experts={olmoe.num_experts}, but OLMoE's blocks have a router; the "
            "smallest that works is 2 (architecture: dsmoe supports 1)"
        )
    if olmoe.hidden_act not in ACT2FN:
        raise ConfigError(
            f"model.hidden_act={olmoe.hidden_act!r} is unknown; use one of {', '.join(ACT2FN)}"
        )
    heads, width = olmoe.num_attention_heads, olmoe.hidden_size
    if heads > 0 and width > 0 and width % (2 * heads):
        raise ConfigError(
            f"model.hidden_size={width} does not divide into model.num_attention_heads={heads} "
            "heads of even width, which rotary embeddings need; the nearest that works is "
            f"model.hidden_size={nearest_multiple(width, 2 * heads)}"
        )
    # Fields of the same name mean the same, so DsMoeConfig's checks apply.
    shared = OlmoeConfig.__annotations__.keys() & set(field_names())
    DsMoeConfig(**{name: copy.deepcopy(getattr(olmoe, name)) for name in shared})
