"""Model families as llama.cpp has them: architecture, tensor names and metadata.

`FAMILIES` is shared by reading and by writing (`moefit/gguf/families.py`), so that both have one
description. llama.cpp has a fixed graph for each architecture, which computes what the settings
here say. Knows nothing of files.

Shapes: E experts, F expert width, D model width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from moefit.checkpoint.gguf.delta_net import JOINT, SPLIT

_EXPERT_WIDTH = ("expert_feed_forward_length", "moe_intermediate_size")
_SHARED_WIDTH = ("expert_shared_feed_forward_length", "shared_expert_intermediate_size")
PARTS = ("gate", "up", "down")
_LLAMA = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
Joined = Literal["", "in_turn", "above"]
"""How a model holds gate and up of all experts in one tensor: not, rows in turn, gate above up."""
DeltaNet = Literal["", "joint", "split"]
_MLPS = {
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_LATENT = {
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
}
_GRANITE = {
    "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
    "shared_mlp.output_linear.weight": "ffn_down_shexp.weight",
}
_DEEPSEEK_FIELDS = (
    _EXPERT_WIDTH,
    ("leading_dense_block_count", "first_k_dense_replace"),
    ("expert_shared_count", "n_shared_experts"),
    ("attention.kv_lora_rank", "kv_lora_rank"),
    ("rope.dimension_count", "qk_rope_head_dim"),
)
_DEEPSEEK_READS = (
    "expert_gating_func",
    "expert_group_count",
    "expert_weights_scale",
    "rope.dimension_count",
    "rope.scaling.yarn_log_multiplier",
)
_DELTA_NET_READS = ("rope.dimension_count",)
_GRANITE_READS = ("attention.scale", "embedding_scale", "logit_scale", "residual_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family's graph in llama.cpp.

    Attributes:
        architecture: Its name there.
        renormalizes: Whether the weights of the chosen experts are scaled to a sum of 1.
        rotates_pairs: Whether rotary embeddings rotate neighbours, rather than the two halves of a
            head as transformers does. Rows of queries and keys are then stored in another order.
        groups_heads: Whether several heads of queries may share one of keys and values.
        fields: Settings that the graph reads besides those of all: key of the metadata, and name in
            config.json.
        count: Name of the number of experts in config.json.
        layer: Names of a layer's tensors that differ from those of most families.
        experts: Name of each part of an expert in checkpoints; empty if `joined`.
        joined: How the model holds gate and up in one tensor, if it does.
        block: Name of the module with router and experts in a layer.
        constants: Settings of config.json that the graph implies.
        reads: Settings of the metadata that most graphs do not have.
        writable: Whether `moefit export` writes it.
        omits: Settings of most models that config.json of this family does not have.
        delta_net: How projections of gated delta nets are stored, if most layers are such nets
            (`delta_net.py`): `joint` as one for each key and its values, `split` as several, with
            heads of values in ggml's order. Weights of norms are then stored plus one.
    """

    architecture: str
    renormalizes: bool
    rotates_pairs: bool = False
    groups_heads: bool = True
    fields: tuple[tuple[str, str], ...] = ()
    count: str = "num_experts"
    layer: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    joined: Joined = ""
    block: str = "mlp"
    constants: Mapping[str, object] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    writable: bool = True
    omits: tuple[str, ...] = ()
    delta_net: DeltaNet = ""


FAMILIES = {
    "olmoe": Family(
        architecture="olmoe",
        renormalizes=False,
        groups_heads=False,
        constants={"norm_topk_prob": False},
    ),
    "mixtral": Family(
        architecture="llama",
        renormalizes=True,
        rotates_pairs=True,
        count="num_local_experts",
        experts=_MIXTRAL,
        constants={"sliding_window": None},
    ),
    "qwen2_moe": Family(
        architecture="qwen2moe",
        renormalizes=False,
        fields=(_EXPERT_WIDTH, _SHARED_WIDTH),
        constants={"norm_topk_prob": False, "use_sliding_window": False},
    ),
    "qwen3_moe": Family(
        architecture="qwen3moe",
        renormalizes=True,
        fields=(_EXPERT_WIDTH,),
        constants={"norm_topk_prob": True, "use_sliding_window": False},
    ),
    "qwen3_next": Family(
        architecture="qwen3next",
        renormalizes=True,
        fields=(_EXPERT_WIDTH, _SHARED_WIDTH),
        layer=JOINT,
        constants={"norm_topk_prob": True, "attention_bias": False},
        reads=_DELTA_NET_READS,
        writable=False,
        omits=("intermediate_size",),
        delta_net="joint",
    ),
    "qwen3_5_moe_text": Family(
        architecture="qwen35moe",
        renormalizes=True,
        fields=(_EXPERT_WIDTH, _SHARED_WIDTH),
        layer=SPLIT,
        constants={"attention_bias": False},
        reads=_DELTA_NET_READS,
        writable=False,
        omits=("intermediate_size",),
        delta_net="split",
    ),
    "gpt_oss": Family(
        architecture="gpt-oss",
        renormalizes=True,
        fields=(
            ("expert_feed_forward_length", "intermediate_size"),
            ("attention.sliding_window", "sliding_window"),
        ),
        count="num_local_experts",
        layer={
            "self_attn.o_proj.bias": "attn_output.bias",
            "self_attn.sinks": "attn_sinks.weight",
            "post_attention_layernorm.weight": "post_attention_norm.weight",
            "mlp.router.weight": "ffn_gate_inp.weight",
            "mlp.router.bias": "ffn_gate_inp.bias",
        },
        experts={},
        joined="in_turn",
        writable=False,
    ),
    "glm4_moe": Family(
        architecture="glm4moe",
        renormalizes=True,
        fields=(
            _EXPERT_WIDTH,
            ("leading_dense_block_count", "first_k_dense_replace"),
            ("expert_shared_count", "n_shared_experts"),
        ),
        count="n_routed_experts",
        layer={
            "post_attention_layernorm.weight": "post_attention_norm.weight",
            "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
            **_MLPS,
        },
        reads=("expert_gating_func", "expert_weights_scale", "rope.dimension_count"),
        writable=False,
    ),
    "minimax_m2": Family(
        architecture="minimax-m2",
        renormalizes=True,
        fields=(("expert_feed_forward_length", "intermediate_size"),),
        count="num_local_experts",
        layer={"mlp.e_score_correction_bias": "exp_probs_b.bias"},
        experts=_MIXTRAL,
        reads=("expert_gating_func", "rope.dimension_count"),
        writable=False,
    ),
    "deepseek_v2": Family(
        architecture="deepseek2",
        renormalizes=False,
        fields=_DEEPSEEK_FIELDS,
        count="n_routed_experts",
        layer={**_MLPS, **_LATENT},
        reads=_DEEPSEEK_READS,
        writable=False,
    ),
    "deepseek_v3": Family(  # the same graph with a sigmoid
        architecture="deepseek2",
        renormalizes=True,
        fields=_DEEPSEEK_FIELDS,
        count="n_routed_experts",
        layer={"mlp.gate.e_score_correction_bias": "exp_probs_b.bias", **_MLPS, **_LATENT},
        reads=_DEEPSEEK_READS,
        writable=False,
    ),
    "granitemoe": Family(
        architecture="granitemoe",
        renormalizes=True,
        rotates_pairs=True,
        count="num_local_experts",
        layer=_GRANITE,
        experts={},
        joined="above",
        block="block_sparse_moe",
        reads=_GRANITE_READS,
        writable=False,
    ),
    "granitemoeshared": Family(  # the same graph with shared experts
        architecture="granitemoe",
        renormalizes=True,
        rotates_pairs=True,
        fields=(("expert_shared_feed_forward_length", "shared_intermediate_size"),),
        count="num_local_experts",
        layer=_GRANITE,
        experts={},
        joined="above",
        block="block_sparse_moe",
        reads=_GRANITE_READS,
        writable=False,
    ),
}
"""By transformers' `model_type`."""

# Parameter in the model, and name in the file.
_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
}
ROTATED = re.compile(r"\.attn_[qk]\.(weight|bias)$")
# Tensors that are parts of one in the model: heads' keys and values (after llama.cpp absorbed
# their projection into others), and gate and up of shared experts.
LATENT_PARTS = {"attn_k_b.weight": "keys", "attn_v_b.weight": "values"}
SHARED_PARTS = {"ffn_gate_shexp.weight": "gate", "ffn_up_shexp.weight": "up"}
SHARED_ROUTER = "ffn_gate_inp_shexp.weight"  # [D] in the file, [1, D] in the model


def of_architecture(architecture: str) -> tuple[str, Family] | None:
    """Return transformers' name of a family and the family, given llama.cpp's name.

    >>> of_architecture("llama")[0], of_architecture("mamba")
    ('mixtral', None)
    """
    found = (one for one in FAMILIES.items() if one[1].architecture == architecture)
    return next(found, None)


def name_in_file(family: Family, parameter: str) -> str | None:
    """Return the name in the file of a parameter outside the experts; None if it has none.

    >>> name_in_file(FAMILIES["olmoe"], "model.layers.3.mlp.gate.weight")
    'blk.3.ffn_gate_inp.weight'
    """
    if parameter in _MODEL:
        return _MODEL[parameter]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", parameter)
    names = {**_LAYER, **family.layer}
    return f"blk.{found[1]}.{names[found[2]]}" if found and found[2] in names else None


def name_in_model(family: Family, name: str) -> str | None:
    """Return the parameter that a tensor of a file is, outside the experts; None if it is none.

    >>> name_in_model(FAMILIES["olmoe"], "blk.3.ffn_gate_inp.weight")
    'model.layers.3.mlp.gate.weight'
    """
    for parameter, own in _MODEL.items():
        if own == name:
            return parameter
    found = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    names = {own: parameter for parameter, own in {**_LAYER, **family.layer}.items()}
    return f"model.layers.{found[1]}.{names[found[2]]}" if found and found[2] in names else None


def expert_name(layer: int, part: str) -> str:
    """Return the name of the tensor with one part of all experts, [E, F, D].

    The down projections are [E, D, F].
    """
    return f"blk.{layer}.ffn_{part}_exps.weight"


class ExpertTensor(NamedTuple):
    """What a tensor with experts holds.

    Attributes:
        layer: The layer.
        part: `gate`, `up`, `down`, or `gate_up` for both in one tensor.
        number: The expert, if the tensor has only one, as in files of early 2024.
        suffix: `weight` or `bias`.
    """

    layer: int
    part: str
    number: int | None
    suffix: str


def expert_of(name: str) -> ExpertTensor | None:
    """Split the name of a tensor with experts; None for other tensors.

    >>> tuple(expert_of("blk.2.ffn_up_exps.weight")), tuple(expert_of("blk.2.ffn_up.7.weight"))
    ((2, 'up', None, 'weight'), (2, 'up', 7, 'weight'))
    """
    found = re.fullmatch(
        r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)(?:_exps|\.(\d+))\.(weight|bias)", name
    )
    if found is None:
        return None
    number = None if found[3] is None else int(found[3])
    return ExpertTensor(int(found[1]), found[2], number, found[4])
