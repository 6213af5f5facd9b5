"""Small models with metadata and tensors as llama.cpp's converters write them.

Of the families that `moefit export` does not write. `CONVERTED` has one maker for each form of
files; weights are random and the same in every call.
"""

from collections.abc import Callable
from typing import Any

import torch
from tiny_gguf import SIZES
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    MiniMaxM2Config,
    PreTrainedConfig,
)

from moefit.checkpoint.gguf.families import FAMILIES, name_in_file

Made = tuple[Any, dict[str, Any], dict[str, Any]]
"""A model, and metadata and tensors of its file."""
HEADS, ROTATED, PLAIN, VALUE, LATENT = 4, 8, 32, 16, 32
WIDTHS: dict[str, Any] = {
    "qk_rope_head_dim": ROTATED, "qk_nope_head_dim": PLAIN, "v_head_dim": VALUE,
    "kv_lora_rank": LATENT, "num_key_value_heads": HEADS, "first_k_dense_replace": 1,
    "n_routed_experts": 6, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 32,
}  # fmt: skip
NUMBERS = {
    "embedding_length": 64, "block_count": 2, "context_length": 128, "feed_forward_length": 32,
    "attention.head_count": HEADS, "attention.layer_norm_rms_epsilon": 1e-6, "expert_count": 6,
    "expert_used_count": 2, "rope.freq_base": 10000.0,
}  # fmt: skip


def made(config: PreTrainedConfig) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a random model and its weights."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    for name, value in model.state_dict().items():
        value.normal_(0.0, 0.2).add_(float(name.endswith("norm.weight")))
    return model, dict(model.state_dict())


def parts_of(stack: torch.Tensor, layer: str) -> dict[str, Any]:
    """Return gate and up of all experts."""
    gate, up = stack.chunk(2, dim=1)
    names = f"blk.{layer}.ffn_gate_exps.weight", f"blk.{layer}.ffn_up_exps.weight"
    return {names[0]: gate.numpy(), names[1]: up.numpy()}


def in_file(family: str, name: str, value: torch.Tensor) -> dict[str, Any]:
    """Return a tensor by its name in a file; experts in one stack as the file has them."""
    layer = f"{name}...".split(".")[2]
    if name.endswith("experts.gate_up_proj"):
        return parts_of(value, layer)
    if name.endswith("experts.down_proj"):
        return {f"blk.{layer}.ffn_down_exps.weight": value.numpy()}
    own = name_in_file(FAMILIES[family], name)
    assert own is not None, name
    return {own: value.numpy()}


def deepseek(kind: str, *, split: bool, layers: int = 2) -> Made:
    """Return a DeepSeek.

    Args:
        kind: `v2`, `v2-lite` (queries without a latent state) or `v3`.
        split: Whether keys and values of heads have tensors of their own, as since 2025.
        layers: Number of layers, by which llama.cpp recognises V2-Lite: it has 27.
    """
    groups = {"n_group": 2, "topk_group": 1}
    sizes = SIZES | WIDTHS | {"num_hidden_layers": layers}
    if kind == "v3":
        config: PreTrainedConfig = DeepseekV3Config(
            **sizes, **groups, q_lora_rank=32, norm_topk_prob=True, rope_parameters=YARN
        )
    else:
        more = {} if kind == "v2-lite" else groups | {"topk_method": "group_limited_greedy"}
        rank = None if kind == "v2-lite" else 32
        config = DeepseekV2Config(**sizes, **more, q_lora_rank=rank, rope_parameters=YARN)
    model, weights = made(config)
    tensors: dict[str, Any] = {}
    for name, value in weights.items():
        layer = f"{name}...".split(".")[2]
        if name.endswith("kv_b_proj.weight") and split:
            heads = value.view(HEADS, PLAIN + VALUE, LATENT)
            tensors[f"blk.{layer}.attn_k_b.weight"] = heads[:, :PLAIN].transpose(1, 2).numpy()
            tensors[f"blk.{layer}.attn_v_b.weight"] = heads[:, PLAIN:].numpy()
        else:
            tensors |= in_file("deepseek_v3", name, value)
    lengths = {"attention.key_length": PLAIN + ROTATED, "attention.value_length": VALUE}
    latent = {"attention.key_length": LATENT + ROTATED, "attention.value_length": LATENT}
    numbers = NUMBERS | {
        "attention.kv_lora_rank": LATENT, "expert_shared_count": 1, "expert_weights_scale": 1.5,
        "expert_feed_forward_length": 32, "leading_dense_block_count": 1,
        "rope.dimension_count": ROTATED, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32, "rope.scaling.yarn_log_multiplier": 0.0707,
        "attention.head_count_kv": 1 if split else HEADS, "block_count": layers,
    }  # fmt: skip
    numbers |= lengths if not split else latent | {f"{k}_mla": v for k, v in lengths.items()}
    if kind != "v2-lite":
        numbers |= {"expert_group_count": 2, "expert_group_used_count": 1}
        numbers["attention.q_lora_rank"] = 32
    if kind == "v3":
        numbers |= {"expert_gating_func": 2, "expert_weights_norm": True}
    metadata = {f"deepseek2.{key}": value for key, value in numbers.items()}
    return model, {"general.architecture": "deepseek2"} | metadata, tensors


def granite(*, shared: bool) -> Made:
    """Return a Granite, with shared experts or without."""
    scales = {
        "attention_multiplier": 0.125, "embedding_multiplier": 6.0, "logits_scaling": 3.0,
        "residual_multiplier": 0.5, "num_local_experts": 6, "tie_word_embeddings": True,
    }  # fmt: skip
    kind = GraniteMoeSharedConfig if shared else GraniteMoeConfig
    more = {"shared_intermediate_size": 64} if shared else {}
    model, weights = made(kind(**SIZES | scales | more))
    tensors: dict[str, Any] = {}
    for name, value in weights.items():
        layer = f"{name}...".split(".")[2]
        if name == "lm_head.weight":
            continue
        if name.endswith("shared_mlp.input_linear.weight"):
            for part, half in zip(("gate", "up"), value.chunk(2), strict=True):
                tensors[f"blk.{layer}.ffn_{part}_shexp.weight"] = half.numpy()
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs of rotated units
            value = value.view(-1, 2, 8, 64).transpose(1, 2).reshape(value.shape)
        tensors |= in_file("granitemoe", name, value)
    numbers = NUMBERS | {
        "attention.scale": 0.125, "embedding_scale": 6.0, "logit_scale": 3.0,
        "residual_scale": 0.5, "attention.head_count_kv": 2,
    }  # fmt: skip
    if shared:
        numbers["expert_shared_feed_forward_length"] = 64
    metadata = {f"granitemoe.{key}": value for key, value in numbers.items()}
    return model, {"general.architecture": "granitemoe"} | metadata, tensors


def glm4_moe(*, further: bool) -> Made:
    """Return a GLM-4.5 with a dense layer and biases.

    Args:
        further: Whether the file has some tensors of a layer for a further token.
    """
    config = Glm4MoeConfig(
        **SIZES, moe_intermediate_size=32, n_routed_experts=6, head_dim=16, use_qk_norm=True,
        attention_bias=True, routed_scaling_factor=1.5, first_k_dense_replace=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tensors: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        value.normal_(0.0, 0.2).add_(float(name.endswith("norm.weight")))
        if (own := name_in_file(FAMILIES["glm4_moe"], name)) is not None:
            tensors[own] = value.numpy()
        elif name.endswith("gate_up_proj"):
            tensors["blk.1.ffn_gate_exps.weight"] = value[:, :32].numpy()
            tensors["blk.1.ffn_up_exps.weight"] = value[:, 32:].numpy()
        else:
            tensors["blk.1.ffn_down_exps.weight"] = value.numpy()
    if further:
        tensors["blk.2.nextn.eh_proj.weight"] = tensors["blk.2.attn_q.weight"] = value[0].numpy()
    numbers = {
        "embedding_length": 64, "block_count": 2 + further, "context_length": 128,
        "feed_forward_length": 32, "expert_feed_forward_length": 32, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 16, "rope.dimension_count": 8,
        "attention.layer_norm_rms_epsilon": 1e-5, "expert_count": 6, "expert_used_count": 2,
        "expert_shared_count": 1, "leading_dense_block_count": 1, "expert_weights_scale": 1.5,
        "expert_weights_norm": True, "expert_gating_func": 2, "rope.freq_base": 10000.0,
        "nextn_predict_layers": int(further),
    }  # fmt: skip
    metadata = {f"glm4moe.{key}": value for key, value in numbers.items()}
    return model, {"general.architecture": "glm4moe"} | metadata, tensors


def minimax_m2() -> Made:
    """Return a MiniMax-M2: experts are chosen by a sigmoid, and half of a head is rotated."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = MiniMaxM2Config(**SIZES, num_local_experts=6, head_dim=32, rope_parameters=rotary)
    model, weights = made(config)
    tensors: dict[str, Any] = {}
    for name, value in weights.items():
        tensors |= in_file("minimax_m2", name, value)
    numbers = NUMBERS | {
        "attention.head_count_kv": 2, "attention.key_length": 32, "attention.value_length": 32,
        "expert_feed_forward_length": 32, "expert_gating_func": 2, "rope.dimension_count": 16,
    }  # fmt: skip
    metadata = {f"minimax-m2.{key}": value for key, value in numbers.items()}
    return model, {"general.architecture": "minimax-m2"} | metadata, tensors


def gpt_oss(*, scaled: bool = True) -> Made:
    """Return a gpt-oss, with YaRN's scaling of positions or without."""
    yarn = {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = GptOssConfig(
        **SIZES, num_local_experts=4, head_dim=16, sliding_window=6,
        rope_parameters=yarn if scaled else {"rope_type": "default", "rope_theta": 150000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    tensors: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if (own := name_in_file(FAMILIES["gpt_oss"], name)) is not None:
            tensors[own] = value.numpy()
            continue
        layer, short = name.split(".")[2], name.split(".")[-1]
        suffix = "bias" if short.endswith("_bias") else "weight"
        rows = value if suffix == "bias" else value.transpose(1, 2)
        parts = {"down": rows} if "down" in short else {"gate": rows[:, ::2], "up": rows[:, 1::2]}
        for part, data in parts.items():
            tensors[f"blk.{layer}.ffn_{part}_exps.{suffix}"] = data.numpy()
    numbers = {
        "embedding_length": 64, "block_count": 2, "feed_forward_length": 32, "context_length": 128,
        "expert_feed_forward_length": 32, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": 16, "attention.layer_norm_rms_epsilon": 1e-5, "expert_count": 4,
        "expert_used_count": 2, "attention.sliding_window": 6, "rope.freq_base": 150000.0,
    }  # fmt: skip
    if scaled:
        numbers |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        numbers["rope.scaling.original_context_length"] = 32
    metadata = {f"gpt-oss.{key}": value for key, value in numbers.items()}
    return model, {"general.architecture": "gpt-oss", **metadata}, tensors


CONVERTED: dict[str, Callable[[], Made]] = {
    "v2": lambda: deepseek("v2", split=True),
    "v2-lite, one tensor": lambda: deepseek("v2-lite", split=False),
    "v3": lambda: deepseek("v3", split=True),
    "minimax-m2": minimax_m2,
    "granite": lambda: granite(shared=False),
    "granite, shared": lambda: granite(shared=True),
}
