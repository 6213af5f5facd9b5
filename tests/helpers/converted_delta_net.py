"""Small Qwen3-Next and Qwen3.5 models with metadata and tensors as llama.cpp's converters write
them."""

from collections.abc import Callable
from typing import Any

import torch
from converted_gguf import NUMBERS, Made, made, parts_of
from tiny_gguf import SIZES
from transformers import Qwen3NextConfig
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

from moefit.checkpoint.gguf.families import FAMILIES, name_in_file

KEYS, VALUES, WIDTH, KERNEL = 2, 6, 32, 4  # heads, units of a key and of a value
WIDTHS: dict[str, Any] = {
    "num_hidden_layers": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    "num_experts": 6, "head_dim": 32, "linear_num_key_heads": KEYS,
    "linear_num_value_heads": VALUES, "linear_key_head_dim": WIDTH, "linear_value_head_dim": WIDTH,
    "linear_conv_kernel_dim": KERNEL, "full_attention_interval": 2,
}  # fmt: skip
SECTIONS = [3, 3, 2, 0]
NUMBERS_OF_BOTH = NUMBERS | {
    "block_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
    "attention.value_length": 32, "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 64, "rope.dimension_count": 16,
    "full_attention_interval": 2, "ssm.conv_kernel": KERNEL, "ssm.state_size": WIDTH,
    "ssm.group_count": KEYS, "ssm.time_step_rank": VALUES, "ssm.inner_size": VALUES * WIDTH,
}  # fmt: skip


def qwen3_next(*, joint: bool = False) -> Made:
    """Return a Qwen3-Next.

    Args:
        joint: Whether the input projection is one tensor as in transformers, as before 2026.
    """
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    sizes = SIZES | WIDTHS | {"rope_parameters": rotary}
    model, weights = made(Qwen3NextConfig(**sizes))
    tensors: dict[str, Any] = {}
    for name, value in weights.items():
        layer = f"{name}...".split(".")[2]
        if name.endswith("in_proj_qkvz.weight") and not joint:
            each = VALUES // KEYS * WIDTH
            q, k, v, z = value.view(KEYS, -1, 64).split([WIDTH, WIDTH, each, each], dim=1)
            qkv = torch.cat([part.flatten(0, 1) for part in (q, k, v)])
            tensors[f"blk.{layer}.attn_qkv.weight"] = qkv.numpy()
            tensors[f"blk.{layer}.attn_gate.weight"] = z.flatten(0, 1).numpy()
        else:
            tensors |= _converted("qwen3_next", name, value)
    metadata = {f"qwen3next.{key}": value for key, value in NUMBERS_OF_BOTH.items()}
    return model, {"general.architecture": "qwen3next"} | metadata, tensors


def qwen35_moe(*, keys: int = KEYS, further: bool = False) -> Made:
    """Return the text part of a Qwen3.5.

    Args:
        keys: Heads of keys in gated delta nets.
        further: Whether the file has some tensors of a layer for a further token.
    """
    rotary = {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "mrope_section": SECTIONS[:3], "mrope_interleaved": True,
    }  # fmt: skip
    sizes = SIZES | WIDTHS | {"rope_parameters": rotary, "linear_num_key_heads": keys}
    del sizes["intermediate_size"]
    model, weights = made(Qwen3_5MoeTextConfig(**sizes))
    tensors: dict[str, Any] = {}
    for name, value in weights.items():
        tensors |= _converted("qwen3_5_moe_text", name, _as_ggml_repeats(name, value, keys))
    numbers = NUMBERS_OF_BOTH | {"rope.dimension_sections": SECTIONS, "ssm.group_count": keys}
    del numbers["feed_forward_length"]  # as the model has no dense layers
    if further:
        numbers |= {"block_count": 5, "nextn_predict_layers": 1}
        tensors["blk.4.nextn.eh_proj.weight"] = tensors["blk.4.attn_q.weight"] = _unused()
    metadata = {f"qwen35moe.{key}": value for key, value in numbers.items()}
    return model, {"general.architecture": "qwen35moe"} | metadata, tensors


def _unused() -> Any:
    """Return a matrix that is not used."""
    return torch.ones(64, 64).numpy()


def _as_ggml_repeats(name: str, value: torch.Tensor, keys: int) -> torch.Tensor:
    """Put the first head of values of each head of keys first, then the second ones."""
    if name.endswith("out_proj.weight"):
        return _as_ggml_repeats("in_proj_z.weight", value.T.contiguous(), keys).T
    skipped = 2 * keys * WIDTH if name.endswith(("in_proj_qkv.weight", "conv1d.weight")) else 0
    per_head = ("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "dt_bias", "A_log")
    if not skipped and not name.endswith(per_head):
        return value
    first, heads = value[:skipped], value[skipped:]
    grouped = heads.unflatten(0, (keys, VALUES // keys, -1)).transpose(0, 1)
    return torch.cat([first, grouped.flatten(0, 2)])


def _converted(family: str, name: str, value: torch.Tensor) -> dict[str, Any]:
    """Return the tensors of a weight that is not the joint projection."""
    layer = f"{name}...".split(".")[2]
    if name.endswith("experts.gate_up_proj"):
        return parts_of(value, layer)
    if name.endswith("experts.down_proj"):
        return {f"blk.{layer}.ffn_down_exps.weight": value.numpy()}
    if name.endswith("A_log"):
        value = -value.exp()
    elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        value = value + 1
    own = name_in_file(FAMILIES[family], name)
    assert own is not None, name
    return {own: value.squeeze().numpy()}


DELTA_NETS: dict[str, Callable[[], Made]] = {
    "qwen3next": qwen3_next,
    "qwen3next, one tensor": lambda: qwen3_next(joint=True),
    "qwen35moe": qwen35_moe,
}
