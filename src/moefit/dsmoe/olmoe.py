"""Which models OLMoE (arXiv 2409.02060) can represent, and with what configuration.

Owns the translation of a configuration and the list of what stands in its way, so that it can be
asked before training as well as at export. Decides from configurations alone: knows nothing of
weights or files.
"""

import copy

from transformers import OlmoeConfig

from moefit.dsmoe.config import DsMoeConfig
from moefit.errors import ConfigError, UnsupportedModelError
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
    return OlmoeConfig(
        **{name: copy.deepcopy(getattr(config, name)) for name in _SHARED},
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
