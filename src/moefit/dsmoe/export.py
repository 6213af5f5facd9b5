"""Export a trained model as an OLMoE checkpoint (arXiv 2409.02060), which other engines can load.

The written checkpoint is loaded by transformers and its logits are compared with the model's before
it gets its final name.
"""

import copy
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerBase,
)

from moefit.checkpoint.model_folder import save_tokenizer
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError
from moefit.folders import atomic_folder
from moefit.moe.expert_dropout import CARD, KEY, dropout_record
from moefit.moe.routing import Rule

# Fields that mean the same in both configurations.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_experts", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "attention_dropout", "rope_parameters", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id",
)  # fmt: skip
_OF_KEYS_OR_VALUES = re.compile(r"\.self_attn\.(k_proj\.weight|v_proj\.weight|k_norm\.weight)$")


def olmoe_config(
    config: DsMoeConfig | OlmoeConfig, experts_per_token: int, *, grouped: bool = True
) -> OlmoeConfig:
    """Return the configuration of a model as an OLMoE without tied embeddings.

    Args:
        config: The model's configuration. `renormalize` of its inference rule becomes
            `norm_topk_prob`.
        experts_per_token: K, which replaces that of the inference rule.
        grouped: False gives each query head keys and values of its own.

    Raises:
        ConfigError: There are fewer than K experts.
        UnsupportedModelError: OLMoE cannot represent the model.
    """
    if not 1 <= experts_per_token <= config.num_experts:
        raise ConfigError(
            f"experts_per_token={experts_per_token}, but the model has {config.num_experts} "
            f"experts; 1 to {config.num_experts} work"
        )
    chosen: dict[str, Any] = {
        "num_experts_per_tok": experts_per_token,
        "tie_word_embeddings": False,
    }
    if not grouped:
        chosen["num_key_value_heads"] = config.num_attention_heads
    if isinstance(config, OlmoeConfig):
        return OlmoeConfig.from_dict(config.to_dict() | chosen)
    if problems := olmoe_incompatibilities(config, experts_per_token):
        raise UnsupportedModelError(
            f"OLMoE cannot represent this model: {'; '.join(problems)}. "
            "save_pretrained saves it as a dsmoe checkpoint instead"
        )
    record = dropout_record(config)
    trained: dict[str, Any] = {} if record is None else {KEY: record.as_dict()}
    shared: dict[str, Any] = {name: copy.deepcopy(getattr(config, name)) for name in _SHARED}
    return OlmoeConfig(
        **(shared | trained | chosen),
        norm_topk_prob=Rule.parse(config.inference_rule).renormalize,
        router_aux_loss_coef=config.load_balancing_loss_coef,
    )


def olmoe_incompatibilities(config: DsMoeConfig, experts_per_token: int) -> list[str]:
    """Return the settings that OLMoE cannot represent, each with the nearest one that it can."""
    head_dim = config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * (config.head_dim or head_dim)
    problems = {
        f"num_attention_experts={config.num_attention_experts}, but it has no mixture of "
        "attention heads: 1": config.num_attention_experts > 1,
        f"mlp_type={config.mlp_type!r}, but its experts have three matrices: 'swiglu'": (
            config.mlp_type != "swiglu"
        ),
        f"router_hidden_size={config.router_hidden_size}, but its router is linear: null": (
            config.router_hidden_size is not None
        ),
        f"router_type={config.router_type!r}, but its router is linear: 'linear'": (
            config.router_type != "linear"
        ),
        f"score_correction_bias={config.score_correction_bias}, but its routers choose by scores "
        "alone: false": config.score_correction_bias,
        f"pregated={config.pregated!r}, but its routers are given the inputs of the token that "
        "they route in their own block: false": bool(config.pregated),
        "qk_norm=False, but it always normalises queries and keys: True": not config.qk_norm,
        f"num_experts={config.num_experts}, but its blocks have a router: 2 or more": (
            config.num_experts < 2
        ),
        f"head_dim={config.head_dim} times num_attention_heads={config.num_attention_heads}, but "
        f"its heads divide hidden_size={config.hidden_size}: head_dim={head_dim}": (
            width != config.hidden_size
        ),
        f"inference_rule={config.inference_rule!r}, but it has one K for all tokens and no "
        f"threshold: set_inference_rule('top_k:{experts_per_token}')": (
            Rule.parse(config.inference_rule).kind in ("threshold", "threshold_top_k")
        ),
    }
    return [problem for problem, applies in problems.items() if applies]


def olmoe_warnings(config: OlmoeConfig) -> list[str]:
    """Return the settings that other engines ignore or that need transformers' eager experts.

    According to vLLM 0.33's olmoe.py, llama.cpp's graph, and torch's grouped matrix product, which
    transformers uses by default.
    """
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    problems = {
        f"rms_norm_eps={config.rms_norm_eps:g} (vLLM computes with 1e-05)": (
            config.rms_norm_eps != 1e-5
        ),
        "norm_topk_prob=True (vLLM and llama.cpp do not renormalise)": config.norm_topk_prob,
        f"clip_qkv={config.clip_qkv} (vLLM does not clip)": config.clip_qkv is not None,
        "attention_bias=True (vLLM does not add biases)": config.attention_bias,
        f"hidden_act={config.hidden_act!r} (other engines use 'silu')": config.hidden_act != "silu",
    } | {
        f"{name}={size}, not a multiple of 8 (transformers needs experts_implementation='eager')": (
            size % 8 != 0
        )
        for name, size in sizes.items()
    }
    return [problem for problem, applies in problems.items() if applies]


def export_olmoe(
    model: DsMoeForCausalLM | OlmoeForCausalLM,
    out_dir: str | os.PathLike[str],
    *,
    experts_per_token: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    grouped: bool = True,
) -> Path:
    """Write a model as an OLMoE checkpoint; the model does not change.

    The checkpoint is loaded by transformers, its weights are compared, and its logits on random
    tokens are compared in float32 with those of the model under `top_k:K`. This needs memory for
    up to three more copies of the model. `out_dir` gets its name only if these checks pass. Tied
    embeddings are written twice, as some engines require.

    Args:
        model: The model. `renormalize` of its inference rule becomes `norm_topk_prob`.
        out_dir: A new or empty folder.
        experts_per_token: K, which replaces that of the inference rule.
        tokenizer: Written with the model.
        dtype: Of the written weights; None for the model's own.
        grouped: False repeats keys and values that query heads share, for engines without grouped
            heads: the same function with a larger KV cache.

    Returns:
        The folder.

    Raises:
        ConfigError: There are fewer than K experts, or the tokenizer is too large.
        UnsupportedModelError: OLMoE cannot represent the model.
        CheckpointError: `out_dir` is in use or cannot be written, or a check failed.

    Warns:
        UserWarning: Another engine computes the model differently; see `olmoe_warnings`.
    """
    out_dir = Path(out_dir).resolve()
    config = _checked_config(model, out_dir, experts_per_token, tokenizer, grouped=grouped)
    olmoe = _olmoe_model(model, config, dtype)
    with atomic_folder(out_dir) as partial:
        olmoe.save_pretrained(partial)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
        if (record := dropout_record(config)) is not None:
            (partial / CARD).write_text(record.model_card(), encoding="utf-8")
        _check_written(partial, olmoe, model)
    return out_dir


def _checked_config(
    model: DsMoeForCausalLM | OlmoeForCausalLM,
    out_dir: Path,
    experts_per_token: int,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    grouped: bool,
) -> OlmoeConfig:
    """Return the configuration to write; raise and warn as `export_olmoe` does."""
    if not isinstance(model, DsMoeForCausalLM | OlmoeForCausalLM):
        raise UnsupportedModelError(
            f"a {type(model).__name__} cannot be written as OLMoE; a DsMoeForCausalLM and an "
            "OlmoeForCausalLM can (give the model itself, not a compiled or wrapped one)"
        )
    config = olmoe_config(model.config, experts_per_token, grouped=grouped)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocab_size is "
            f"{config.vocab_size}; give the tokenizer that the model was trained with"
        )
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise CheckpointError(
            f"{out_dir} exists and is not an empty folder; give a new one, or remove it first"
        )
    if problems := olmoe_warnings(config):
        message = f"not every engine computes this model correctly: {'; '.join(problems)}"
        warnings.warn(message, stacklevel=3)
    return config


def _olmoe_model(
    model: DsMoeForCausalLM | OlmoeForCausalLM, config: OlmoeConfig, dtype: torch.dtype | None
) -> OlmoeForCausalLM:
    """Return transformers' model with the weights, which have the same names in both."""
    with torch.device("meta"):
        olmoe = OlmoeForCausalLM(config)
    heads, groups = config.num_key_value_heads, model.config.num_key_value_heads
    state = {
        name: _with_heads(name, _rescaled(name, tensor.detach(), _scale(model)), groups, heads).to(
            device="cpu", dtype=dtype or tensor.dtype
        )
        for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["lm_head.weight"].clone()
    olmoe.load_state_dict(state, assign=True)
    olmoe.generation_config = copy.deepcopy(model.generation_config)
    return olmoe


def _scale(model: DsMoeForCausalLM | OlmoeForCausalLM) -> float:
    """Return the factor on the experts' weights; for OLMoE it goes into the down projections."""
    return getattr(model.config, "routed_scaling_factor", 1.0)


def _rescaled(name: str, tensor: Tensor, factor: float) -> Tensor:
    return tensor * factor if name.endswith("experts.down_proj") and factor != 1.0 else tensor


def _with_heads(name: str, tensor: Tensor, heads: int | None, wanted: int | None) -> Tensor:
    """Return keys' or values' weights of `heads` heads for another number, by repeating heads.

    A norm over all keys is the same, since each of its squares is repeated as often as others.
    """
    assert heads is not None
    assert wanted is not None
    if heads == wanted or not _OF_KEYS_OR_VALUES.search(name):
        return tensor
    split = tensor.unflatten(0, (heads, -1))
    if wanted > heads:
        return split.repeat_interleave(wanted // heads, 0).flatten(0, 1)
    return split[:: heads // wanted].flatten(0, 1)


def _check_written(
    folder: Path, olmoe: OlmoeForCausalLM, source: DsMoeForCausalLM | OlmoeForCausalLM
) -> None:
    """Raise CheckpointError unless transformers loads the same model from `folder`."""
    reloaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", trust_remote_code=False
    )
    state = {name: tensor.float() for name, tensor in olmoe.state_dict().items()}
    stored = reloaded.state_dict()
    changed = [name for name in state if not torch.equal(state[name], stored[name])]
    if changed:
        raise CheckpointError(
            f"writing and loading changed {len(changed)} of {len(state)} weights, among them "
            f"{changed[0]}; nothing was written. Does the model contain NaNs?"
        )
    reference = _reference_model(source, olmoe.config, state)
    length = min(8, olmoe.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(olmoe.config.vocab_size, (16, length), generator=generator)
    with torch.no_grad():
        logits_BTV, expected_BTV = reloaded(ids_BT).logits, reference(ids_BT).logits
    error_B = (logits_BTV - expected_BTV).abs().amax((1, 2)) / expected_BTV.abs().max()
    # Rounding may decide between two experts with nearly equal scores and change a sequence
    # visibly; a wrong norm, rule or layout changes all of them by far more than 1e-4.
    if (error_B <= 1e-4).float().mean() < 0.75:
        raise CheckpointError(
            f"the written model's logits differ from the original's by {error_B.median():.2g} of "
            "the largest; nothing was written. This is a bug of moefit with this version of "
            "transformers; please report it with config.json"
        )


def _reference_model(
    source: DsMoeForCausalLM | OlmoeForCausalLM, config: OlmoeConfig, state: dict[str, Tensor]
) -> DsMoeForCausalLM | OlmoeForCausalLM:
    """Return a model of the source's class with K experts per token, in float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):  # keep the caller's random state
        if isinstance(source, OlmoeForCausalLM):
            own = copy.deepcopy(config)
            own.num_key_value_heads = source.config.num_key_value_heads
            reference = OlmoeForCausalLM(own)
        else:
            k, renormalize = config.num_experts_per_tok, config.norm_topk_prob
            reference = DsMoeForCausalLM(copy.deepcopy(source.config))
            reference.set_inference_rule(Rule(kind="top_k", k=k, renormalize=renormalize))
    heads, groups = config.num_key_value_heads, source.config.num_key_value_heads
    state = {
        name: _with_heads(name, _rescaled(name, tensor, 1 / _scale(source)), heads, groups)
        for name, tensor in state.items()
    }
    reference.set_experts_implementation("eager")
    reference.load_state_dict(state, assign=True)
    return reference.eval()
