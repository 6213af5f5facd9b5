"""Describe a model to llama.cpp: which families can be written, and with which metadata.

llama.cpp has a fixed graph for each family (`checkpoint/gguf/families.py`), so that a setting which
the graph does not have is refused here: the file would load and compute another model. Knows
nothing of files.

Shapes: E experts, F expert width, D model width, R rows of queries or keys.
"""

import re
from typing import Any

from torch import Tensor

from moefit.checkpoint.gguf.families import (
    FAMILIES,
    ROTATED,
    SHARED_ROUTER,
    Family,
    name_in_file,
)
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.export import olmoe_incompatibilities
from moefit.errors import UnsupportedModelError
from moefit.moe.routing import Rule

WRITABLE = {name: family for name, family in FAMILIES.items() if family.writable}
_ROUTER = re.compile(r"\.ffn_gate_inp(_shexp)?\.weight$")


def dense_name(family: Family, parameter: str) -> str:
    """Return the name in the file of a parameter outside the experts.

    Raises:
        UnsupportedModelError: llama.cpp's graph has no such tensor.
    """
    if (found := name_in_file(family, parameter)) is None:
        raise UnsupportedModelError(
            f"llama.cpp's graph of this family has no tensor for {parameter}, so that a GGUF file "
            "would compute another model; serve the checkpoint itself with moefit"
        )
    return found


def expert_parts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split one expert's tensors, as transformers has them, into gate, up and down."""
    gate_FD, up_FD = tensors["gate_up_proj"].chunk(2)
    return {"gate": gate_FD, "up": up_FD, "down": tensors["down_proj"]}


def stays_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is stored in float32 in files of any type: norms, biases, routers."""
    return len(shape) == 1 or _ROUTER.search(name) is not None


def arranged(family: Family, config: Any, name: str, tensor: Tensor) -> Tensor:
    """Return a dense tensor with its elements in llama.cpp's order.

    Args:
        family: The model's family.
        config: The model's configuration.
        name: The tensor's name in the file.
        tensor: As transformers has it.
    """
    if name.endswith(SHARED_ROUTER):
        return tensor.reshape(-1)
    if family.rotates_pairs and ROTATED.search(name):
        is_query = ".attn_q." in name
        heads = config.num_attention_heads if is_query else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def family_of(config: Any) -> Family:
    """Return the family of a configuration, which llama.cpp computes as transformers does.

    Raises:
        UnsupportedModelError: It does not; the message names the nearest thing that works.
    """
    if isinstance(config, DsMoeConfig):
        refuse_dsmoe(config)
        raise UnsupportedModelError(
            "a DS-MoE is written in its form as OLMoE: moefit export MODEL OUT --format gguf "
            "--experts-per-token K"
        )
    if config.model_type not in WRITABLE:
        raise UnsupportedModelError(
            f"{config.model_type!r} models cannot be written as GGUF; {', '.join(WRITABLE)} can. "
            "llama.cpp's own convert_hf_to_gguf.py knows further families"
        )
    family = WRITABLE[config.model_type]
    if problems := _differences(config, family):
        raise UnsupportedModelError(
            f"llama.cpp's {family.architecture} graph computes another model than this one: "
            f"{'; '.join(problems)}. A GGUF file would be wrong; serve the checkpoint itself with "
            "moefit"
        )
    return family


def refuse_dsmoe(config: DsMoeConfig) -> None:
    """Raise UnsupportedModelError if llama.cpp computes no form of a DS-MoE.

    Its `olmoe` graph computes a DS-MoE with linear routers, SwiGLU experts and normalised queries
    and keys, without attention experts. No graph of llama.cpp has the other parts: weights of
    attention experts, routers of two layers, as many experts as a threshold chooses, or causal
    models with GELU experts of two matrices (only `nomic-bert-moe`, an encoder, has those).
    """
    problems = olmoe_incompatibilities(config, config.num_experts)
    if Rule.parse(config.inference_rule).renormalize:
        problems.append(
            f"inference_rule={config.inference_rule!r}, but its graph with normalised queries and "
            "keys does not renormalise: a rule without renormalize"
        )
    if problems:
        raise UnsupportedModelError(
            f"llama.cpp has no graph that computes this DS-MoE: {'; '.join(problems)}. Serve it "
            "with moefit, or in transformers and vLLM with moefit export --format dsmoe"
        )


def _differences(config: Any, family: Family) -> list[str]:
    """Return the settings that llama.cpp's graph ignores, each with the value that it assumes."""

    def value(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    rope = value("rope_parameters") or {}
    renormalizes = value("norm_topk_prob", family.renormalizes)
    sliding = value("use_sliding_window", value("sliding_window") is not None)
    only_mlp = [*(value("mlp_only_layers") or ()), *([0] * (value("decoder_sparse_step", 1) != 1))]
    heads, shared = value("num_attention_heads"), value("num_key_value_heads")
    problems = {
        f"num_key_value_heads={shared}: num_attention_heads={heads}": (
            heads != shared and not family.groups_heads
        ),
        f"norm_topk_prob={renormalizes}: {family.renormalizes}": (
            renormalizes != family.renormalizes
        ),
        f"hidden_act={value('hidden_act')!r}: 'silu'": value("hidden_act") != "silu",
        f"clip_qkv={value('clip_qkv')}: null": value("clip_qkv") is not None,
        f"attention_bias={value('attention_bias')}: false": bool(value("attention_bias")),
        f"sliding_window={value('sliding_window')}: null, which equals it for shorter contexts": (
            bool(sliding)
        ),
        f"rope_type={rope.get('rope_type')!r}: 'default'": (
            rope.get("rope_type", "default") != "default"
        ),
        f"partial_rotary_factor={rope.get('partial_rotary_factor')}: 1": (
            rope.get("partial_rotary_factor", 1) != 1
        ),
        "layers without experts (mlp_only_layers, decoder_sparse_step): none": bool(only_mlp),
    }
    return [problem for problem, applies in problems.items() if applies]


def describe(writer: Any, family: Family, config: Any, query_rows: int) -> None:
    """Write the metadata of the model's shape.

    Args:
        writer: A `gguf.GGUFWriter` of the family's architecture.
        family: The family.
        config: The model's configuration.
        query_rows: Rows R of the query projection: heads times head width.
    """
    width = query_rows // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(number_of_experts(config))
    writer.add_expert_used_count(config.num_experts_per_tok)
    for method, setting in family.fields:
        getattr(writer, f"add_{method}")(getattr(config, setting))


def number_of_experts(config: Any) -> int:
    """Return E, which families call num_experts or num_local_experts."""
    return int(getattr(config, "num_experts", None) or config.num_local_experts)
