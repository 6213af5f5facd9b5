"""Export a trained model as an OLMoE checkpoint (arXiv 2409.02060), which other engines can load.

Checks whether OLMoE can represent the model, converts the configuration and the weights, and
compares the logits of both before anything is left on disk.
"""

import copy
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerBase,
)

from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError
from moefit.moe.expert_dropout import KEY, dropout_record
from moefit.moe.routing import Rule

# Fields that mean the same in both configurations.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_experts", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "attention_dropout", "rope_parameters", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id",
)  # fmt: skip


def olmoe_config(config: DsMoeConfig | OlmoeConfig, experts_per_token: int) -> OlmoeConfig:
    """The configuration of the same model as an untied OLMoE with K = `experts_per_token`.

    K replaces the K of an inference rule `top_k`; a rule's `renormalize` becomes
    `norm_topk_prob`.

    Raises ConfigError if there are fewer than K experts, UnsupportedModelError if OLMoE cannot
    represent the model.
    """
    if not 1 <= experts_per_token <= config.num_experts:
        raise ConfigError(
            f"experts_per_token={experts_per_token}, but the model has {config.num_experts} "
            f"experts; 1 to {config.num_experts} work"
        )
    chosen = {"num_experts_per_tok": experts_per_token, "tie_word_embeddings": False}
    if isinstance(config, OlmoeConfig):
        return OlmoeConfig.from_dict(config.to_dict() | chosen)
    obstacles = olmoe_obstacles(config, experts_per_token)
    if obstacles:
        raise UnsupportedModelError(
            f"OLMoE cannot represent this model: {'; '.join(obstacles)}. "
            "What cannot be changed can still be kept with save_pretrained, as a dsmoe checkpoint"
        )
    record = dropout_record(config)
    trained = {} if record is None else {KEY: record.as_dict()}
    return OlmoeConfig(
        **{name: copy.deepcopy(getattr(config, name)) for name in _SHARED},
        **trained,
        **chosen,
        norm_topk_prob=Rule.parse(config.inference_rule).renormalize,
        router_aux_loss_coef=config.load_balancing_loss_coef,
    )


def olmoe_obstacles(config: DsMoeConfig, experts_per_token: int) -> list[str]:
    """All of `config` that OLMoE cannot represent, each with what it could; empty if it can."""
    head_dim = config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * (config.head_dim or head_dim)
    found = {
        f"num_attention_experts={config.num_attention_experts}, but it has no mixture of "
        "attention heads: 1": config.num_attention_experts > 1,
        f"mlp_type={config.mlp_type!r}, but its experts have three matrices: 'swiglu'": (
            config.mlp_type != "swiglu"
        ),
        f"router_hidden_size={config.router_hidden_size}, but its router is linear: null": (
            config.router_hidden_size is not None
        ),
        "qk_norm=False, but it always normalises queries and keys: True": not config.qk_norm,
        f"num_experts={config.num_experts}, but its blocks have a router: 2 or more": (
            config.num_experts < 2
        ),
        f"head_dim={config.head_dim} times num_attention_heads={config.num_attention_heads}, but "
        f"its heads divide hidden_size={config.hidden_size}: head_dim={head_dim}": (
            width != config.hidden_size
        ),
        f"inference_rule={config.inference_rule!r}, but it stores one K for all tokens, no "
        f"threshold: set_inference_rule('top_k:{experts_per_token}')": (
            Rule.parse(config.inference_rule).kind in ("threshold", "threshold_top_k")
        ),
    }
    return [obstacle for obstacle, is_there in found.items() if is_there]


def olmoe_caveats(config: OlmoeConfig) -> list[str]:
    """What of `config` others compute otherwise than transformers' eager code, or cannot compute.

    Read in vLLM 0.33's olmoe.py and llama.cpp's graph, which fix most of this whatever a
    checkpoint says, and in torch's grouped matrix product, transformers' default for experts.
    """
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    found = {
        f"rms_norm_eps={config.rms_norm_eps:g} (vLLM computes with 1e-05)": (
            config.rms_norm_eps != 1e-5
        ),
        "norm_topk_prob=True (vLLM and llama.cpp do not renormalise)": config.norm_topk_prob,
        f"clip_qkv={config.clip_qkv} (vLLM does not clip)": config.clip_qkv is not None,
        "attention_bias=True (vLLM has no such biases)": config.attention_bias,
        f"hidden_act={config.hidden_act!r} (others compute 'silu')": config.hidden_act != "silu",
    } | {
        f"{name}={size}, no multiple of 8 (transformers needs experts_implementation='eager')": (
            size % 8 != 0
        )
        for name, size in sizes.items()
    }
    return [caveat for caveat, is_there in found.items() if is_there]


def export_olmoe(
    model: DsMoeForCausalLM | OlmoeForCausalLM,
    out_dir: str | os.PathLike[str],
    *,
    experts_per_token: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `model` with K = `experts_per_token` as an OLMoE checkpoint, and give its folder.

    The model is left as it is. K replaces the K of an inference rule `top_k`; a rule's
    `renormalize` becomes `norm_topk_prob`. Tied embeddings are written twice, as some engines
    require. dtype: of the written weights; the model's own if None.

    What was written is loaded again by transformers alone: each weight must be the one that was
    meant, and the logits on random tokens those of the model under `top_k:K`, compared in
    float32 (in bfloat16 OLMoE's router rounds, ours does not). This needs memory for up to
    three more copies of the model. `out_dir` appears complete and checked, or not at all.

    Warns (UserWarning) of what vLLM or llama.cpp compute otherwise, such as an rms_norm_eps that
    is not 1e-5; see `olmoe_caveats`.

    Raises ConfigError if there are fewer than K experts or the tokenizer does not fit,
    UnsupportedModelError if OLMoE cannot represent the model, CheckpointError if `out_dir` is in
    use or cannot be written, or if the check fails.
    """
    out_dir = Path(out_dir).resolve()
    _require_model(model)
    config = olmoe_config(model.config, experts_per_token)
    _require_fitting(tokenizer, config)
    _require_unused(out_dir)
    if caveats := olmoe_caveats(config):
        message = f"not every engine will compute this model as it is: {'; '.join(caveats)}"
        warnings.warn(message, stacklevel=2)
    olmoe = _olmoe_model(model, config, dtype)
    with _whole_or_not_at_all(out_dir) as partial:
        olmoe.save_pretrained(partial)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, partial)
        _check_written(partial, olmoe, model)
    return out_dir


def _require_model(model: DsMoeForCausalLM | OlmoeForCausalLM) -> None:
    if not isinstance(model, DsMoeForCausalLM | OlmoeForCausalLM):
        raise UnsupportedModelError(
            f"a {type(model).__name__} cannot be written as OLMoE; a DsMoeForCausalLM and an "
            "OlmoeForCausalLM can (give the model itself, not a compiled or wrapped one)"
        )


def _require_fitting(tokenizer: PreTrainedTokenizerBase | None, config: OlmoeConfig) -> None:
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocab_size is "
            f"{config.vocab_size}; give the tokenizer that the model was trained with"
        )


def _require_unused(out_dir: Path) -> None:
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise CheckpointError(
            f"{out_dir} exists and is not an empty folder; give a new one, or remove it first"
        )


def _olmoe_model(
    model: DsMoeForCausalLM | OlmoeForCausalLM, config: OlmoeConfig, dtype: torch.dtype | None
) -> OlmoeForCausalLM:
    """transformers' own model object around the weights, which have the same names in both."""
    with torch.device("meta"):
        olmoe = OlmoeForCausalLM(config)
    state = {
        name: _rescaled(name, tensor.detach(), _scale(model)).to(
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
    """OLMoE has no factor on its experts' weights; theirs goes into the down projections."""
    return getattr(model.config, "routed_scaling_factor", 1.0)


def _rescaled(name: str, tensor: Tensor, factor: float) -> Tensor:
    return tensor * factor if name.endswith("experts.down_proj") and factor != 1.0 else tensor


@contextmanager
def _whole_or_not_at_all(out_dir: Path) -> Iterator[Path]:
    """A folder beside `out_dir` to write into; takes its name if the block ends well."""
    partial = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out_dir)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out_dir} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # all that the tokenizers library raises is bare Exception
        raise OSError(f"the tokenizer could not be saved ({error})") from error


def _check_written(
    folder: Path, olmoe: OlmoeForCausalLM, source: DsMoeForCausalLM | OlmoeForCausalLM
) -> None:
    """Raise CheckpointError unless `folder`, loaded by transformers alone, equals the source."""
    reloaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", trust_remote_code=False
    )
    state = {name: tensor.float() for name, tensor in olmoe.state_dict().items()}
    stored = reloaded.state_dict()
    changed = [name for name in state if not torch.equal(state[name], stored[name])]
    if changed:
        raise CheckpointError(
            f"writing and loading again changed {len(changed)} of {len(state)} weights, among "
            f"them {changed[0]}; nothing was kept. Are there NaNs in the model?"
        )
    twin = _twin(source, olmoe.config, state)
    ids = _random_tokens(olmoe.config)
    with torch.no_grad():
        error_B = _relative_error(reloaded(ids).logits, twin(ids).logits)
    # A near-tie between two experts may fall either way by rounding and change one sequence
    # visibly; a wrong norm, rule or layout changes them all by far more than 1e-4.
    if (error_B <= 1e-4).float().mean() < 0.75:
        raise CheckpointError(
            f"the written model's logits differ from the original's by {error_B.median():.2g} of "
            "the largest; nothing was kept. This is a fault of moefit with this version of "
            "transformers, please report it with config.json"
        )


def _twin(
    source: DsMoeForCausalLM | OlmoeForCausalLM, config: OlmoeConfig, state: dict[str, Tensor]
) -> DsMoeForCausalLM | OlmoeForCausalLM:
    """The source's own class with K experts per token, in float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):  # its initial weights must not cost the caller's seed
        if isinstance(source, OlmoeForCausalLM):
            twin = OlmoeForCausalLM(copy.deepcopy(config))
        else:
            k, renormalize = config.num_experts_per_tok, config.norm_topk_prob
            twin = DsMoeForCausalLM(copy.deepcopy(source.config))
            twin.set_inference_rule(Rule(kind="top_k", k=k, renormalize=renormalize))
    state = {name: _rescaled(name, tensor, 1 / _scale(source)) for name, tensor in state.items()}
    twin.set_experts_implementation("eager")
    twin.load_state_dict(state, assign=True)
    return twin.eval()


def _random_tokens(config: OlmoeConfig) -> Tensor:
    length = min(8, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (16, length), generator=generator)


def _relative_error(logits_BTV: Tensor, expected_BTV: Tensor) -> Tensor:
    """Of each sequence the largest difference, relative to the largest logit of all."""
    return (logits_BTV - expected_BTV).abs().amax((1, 2)) / expected_BTV.abs().max()
