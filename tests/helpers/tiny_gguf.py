"""Configurations of small models of the families that are written as GGUF files."""

from typing import Any

from transformers import (
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
OLMOE = SIZES | {"num_key_value_heads": 4, "num_experts": 6}
NARROW: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 6}


def configs(**changes: Any) -> dict[str, PreTrainedConfig]:
    """Return a configuration of each family, by llama.cpp's name."""
    sizes = SIZES | changes
    return {
        "olmoe": OlmoeConfig(**OLMOE | changes),
        "mixtral": MixtralConfig(**sizes, num_local_experts=3, head_dim=16),
        "qwen2moe": Qwen2MoeConfig(**sizes, **NARROW, shared_expert_intermediate_size=64),
        "qwen3moe": Qwen3MoeConfig(**sizes, **NARROW, norm_topk_prob=True, head_dim=32),
    }
