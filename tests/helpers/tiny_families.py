"""Tiny random models of every family behind transformers' experts interface, and some others.

Families are found by scanning transformers' sources for the interface's decorator, so that families
of new versions are tested. A model's configuration is the family's default, shrunk by field name;
`OVERRIDES` contains exceptions.
"""

import dataclasses
import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING

torch.set_num_threads(1)

VOCABULARY = 96
EXPERTS, TOP_K = 8, 2

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "block_size": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "rel_extent": 32,
    "router_hidden_size": 16,
    "out_hidden_size": 32,
    "projector_hidden_size": 32,
    "image_size": 28,
    "num_position_embeddings": 16,
    "moe_hidden_size": 32,
    "d_model": 32,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "encoder_layers": 2,
    "downsample_hidden_size": 8,
    "output_dim": 32,
    "output_channels": 32,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}
"""What a field of this name becomes, if the family's default is a number."""

REQUIRED = ("num_experts", "n_routed_experts", "num_experts_per_tok", "top_k_experts", "head_dim")
"""Set even where the family's default is None."""

SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
HALF = ["linear_attention", "full_attention"] * 2
OWN_EXPERTS = ("dbrx", "llama4", "longcat_flash", "step3p7")
"""Families with experts of their own kind, besides those that have tests of their own."""

MODEL_CLASSES = {"qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration"}
"""The part of a family that takes text, where it is not the one that a rule finds."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": HALF},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dbrx": {
        "n_layers": 3,
        "n_heads": 4,
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8, "kv_n_heads": 2},
        "ffn_config": {"moe_top_k": TOP_K, "ffn_hidden_size": 24},
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "diffusion_gemma": {
        "canvas_length": 9,
        "text_config": {"moe_intermediate_size": 16, "global_head_dim": 16},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 8,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_v_head_dim": 8,
        "swa_head_dim": 16,
    },
    "dots3_note_multimodal": {
        "vision_config": {
            "pyramid_num_routed": [-1, -1, 4, 8],
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [16, 16],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        }
    },
    "gemma4": {
        "enable_moe_block": True,
        "moe_intermediate_size": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 0],
            }
        }
    },
    "glm5_next": {
        "text_config": {
            "qk_rope_head_dim": 0,
            "qk_nope_head_dim": 16,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "layer_types": ["linear_attention", "indexed_attention"] * 2,
            "index_topk": 64,
            "index_kpool": 2,
        }
    },
    "granitemoehybrid": {"layer_types": HALF},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "hy_v4_vl": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            }
        }
    },
    "inkling2_loop": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_loop_multimodal": {"vision_config": {"text_hidden_size": 32}},
    "inkling2_multimodal": {"vision_config": {"text_hidden_size": 32}},
    "kimi_linear": {"layer_types": HALF},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "muse_spark": {"audio_config": {"hidden_sizes": [8, 8, 8, 8]}},
    "llama4": {"intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    "llama4_multimodal": {
        "vision_config": {
            **dict.fromkeys(("projector_input_dim", "projector_output_dim"), 32),
            "vision_output_dim": 32,
            "intermediate_size": 128,
        }
    },
    "longcat_flash": {
        "num_layers": 2,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "ffn_hidden_size": 24,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 4,
    },
    "step3p7": {"text_config": {"sliding_window": 8, "share_expert_dim": 16}},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "qwen4_exp": {
        "hc_lowrank": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""By family, what the names don't say, nested as configurations are."""


@cache
def families() -> dict[str, tuple[str, str]]:
    """Return (folder in transformers, model class) by name.

    A family with a text and a multimodal model has two entries: `gemma4`, and `gemma4_multimodal`
    for its checkpoints on the Hub.
    """
    models = Path(transformers.__file__).parent / "models"
    found = {}
    for file in sorted(models.glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        folder = file.parent.name
        interface = re.search(r"^@use_experts_implementation", source, re.M)
        if not interface and folder not in OWN_EXPERTS:
            continue
        texts, multimodal = _heads(source, "CausalLM"), _heads(source, "ConditionalGeneration")
        first = MODEL_CLASSES.get(folder) or [*texts, *multimodal, *_heads(source, r"\w+")][0]
        found[folder] = folder, first
        if texts and multimodal:
            found[f"{folder}_multimodal"] = folder, multimodal[-1]
    return found


def _heads(source: str, kind: str) -> list[str]:
    return re.findall(rf"^class (\w+For{kind})\(", source, re.M)


def tiny_family(name: str, *, seed: int = 0, **changed: Any) -> Any:
    """Return a random float32 model of the family whose routing differs by token.

    `changed` are fields of its configuration.
    """
    folder, class_name = families()[name]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    model_class = getattr(module, class_name)
    changes = OVERRIDES.get(folder, {})
    if name.endswith("_multimodal"):
        changes = {"text_config": changes} | OVERRIDES.get(name, {})
    config = tiny_family_config(model_class.config_class, changes | changed)
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    _randomise(model)
    return model


def tiny_family_config(config_class: Any, changes: dict[str, Any]) -> Any:
    """Return the family's default configuration, shrunk; `changes` may be nested."""
    return config_class(**_shrunk(config_class, changes))


def _shrunk(config_class: Any, changes: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.default is None and field.name in REQUIRED:
            values[field.name] = SIZES[field.name]
        elif _is_number(field.default):
            if field.name in SIZES:
                values[field.name] = SIZES[field.name]
            elif field.name in SPECIAL:
                values[field.name] = SPECIAL.index(field.name)
            elif field.name.endswith("intermediate_size") and field.default > 0:
                values[field.name] = 16
    if "kv_lora_rank" in values:  # latent attention has as many heads for keys and values
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    groups = [name for name in ("n_group", "topk_group") if _over_one(config_class, name)]
    values.update({name: {"n_group": 4, "topk_group": 2}[name] for name in groups})
    for name, sub_class in _sub_configs(config_class).items():
        values[name] = _shrunk(sub_class, changes.get(name, {}))
    return values | {k: v for k, v in changes.items() if k not in _sub_configs(config_class)}


def _over_one(config_class: Any, name: str) -> bool:
    default = getattr(config_class, name, None)
    return _is_number(default) and default > 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sub_configs(config_class: Any) -> dict[str, Any]:
    found = {}
    for name, spec in config_class.sub_configs_defaults.items():
        sub_class = spec.config_class
        if spec.model_type is not None:
            sub_class = CONFIG_MAPPING[spec.model_type]
        if dataclasses.is_dataclass(sub_class):
            found[name] = sub_class
    return found


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Set random weights: matrices that preserve norms, vectors near their initial values."""
    saved = model.state_dict()
    for name, parameter in model.named_parameters():
        if name in saved and parameter.dim() >= 2:
            parameter.normal_(std=max(1, min(parameter.shape[-2:])) ** -0.5)
        elif name in saved:
            parameter.add_(_noise(parameter))
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point() and buffer.numel() == EXPERTS:
            buffer.add_(_noise(buffer))


def _noise(tensor: Tensor) -> Tensor:
    if tensor.numel() == EXPERTS:  # a bias of the router's choice, or a factor of its weights
        return torch.rand_like(tensor)
    return torch.randn_like(tensor) * 0.1


def token_ids(*shape: int, seed: int = 1) -> Tensor:
    """Return random ids without the lowest, which are often special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(16, VOCABULARY, shape, generator=generator)
