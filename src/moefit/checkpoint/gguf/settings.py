"""Translate a GGUF file's metadata into the values that config.json would have.

What the metadata does not say, the architecture implies (`families.py`). Metadata that changes the
outputs in a way that is not computed here is refused. Reads no weights.
"""

from collections.abc import Callable
from math import isfinite
from typing import Any

import numpy as np

from moefit.checkpoint.gguf.families import FAMILIES, Family, expert_of, of_architecture
from moefit.checkpoint.gguf.header import GgufHeader
from moefit.errors import CheckpointError, UnsupportedModelError

# Key of the metadata after the architecture, name in config.json, and kind of value.
_COMMON: tuple[tuple[str, str, type], ...] = (
    ("embedding_length", "hidden_size", int),
    ("block_count", "num_hidden_layers", int),
    ("feed_forward_length", "intermediate_size", int),
    ("attention.head_count", "num_attention_heads", int),
    ("context_length", "max_position_embeddings", int),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
    ("expert_used_count", "num_experts_per_tok", int),
)
_SPECIAL = ("bos", "eos", "pad")
# Values with which a graph computes what transformers' model of the family does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "interleave_moe_layer_step": (0, 1),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "swiglu_clamp_exp": (0.0,),
    "swiglu_clamp_shexp": (0.0,),
    "swin_norm": (False,),
}
# The same of `rope.scaling.yarn_ext_factor`, by kind of scaling; a negative one is the default.
_EXT_FACTORS = {"none": (-1.0, 0.0, 1.0), "linear": (-1.0, 0.0), "yarn": (-1.0, 1.0)}
_SIGMOID = 2  # of `expert_gating_func`
_TOKENS_OF_END = ("eot", "eom")  # further ends of an answer


def settings_of(header: GgufHeader) -> dict[str, Any]:
    """Return the values of config.json.

    Raises:
        CheckpointError: The metadata lacks a value, or has one of the wrong kind.
        UnsupportedModelError: The architecture cannot be read, or has a setting that is not
            computed here.
    """
    found = of_architecture(header.architecture)
    if found is None:
        raise UnsupportedModelError(
            f"{header.path} has the architecture {header.architecture!r}; the GGUF files that can "
            f"be read are of {', '.join(dict.fromkeys(_architectures()))}. Give the "
            "model that it was made from, a folder with config.json and safetensors"
        )
    metadata = _Metadata(header)
    model_type = _variant(found[0], metadata, header)
    family = FAMILIES[model_type]
    if not metadata.get("expert_count", int, 0):
        raise UnsupportedModelError(
            f"{header.path} is a model ({header.architecture}) without experts "
            f"({header.architecture}.expert_count); give a mixture-of-experts model"
        )
    _refuse_settings(metadata, family)
    values: dict[str, Any] = {"model_type": model_type, **family.constants}
    for key, name, kind in _COMMON:
        if name not in family.omits:
            values[name] = metadata.get(key, kind)
    for key, name in family.fields:
        values[name] = metadata.get(key, int, _implied(key, header))
    values[family.count] = metadata.get("expert_count", int)
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = metadata.get("attention.head_count_kv", int, heads)
    own_width = values["hidden_size"] // max(1, heads)
    values["head_dim"] = metadata.get("attention.key_length", int, own_width)
    values["rope_parameters"] = _rotary(metadata, family, values["head_dim"])
    values["tie_word_embeddings"] = "output.weight" not in header.tensors
    values["dtype"] = _dtype(header)
    values["vocab_size"] = _vocabulary(header)
    values.update(_special_tokens(header))
    return values | (_ADDED[model_type](header, values) if model_type in _ADDED else {})


def _architectures() -> list[str]:
    return [one.architecture for one in FAMILIES.values()]


def _variant(model_type: str, metadata: "_Metadata", header: GgufHeader) -> str:
    """Return transformers' family, of the two that share some architectures."""
    if model_type == "deepseek_v2":
        biased = any(name.endswith(".exp_probs_b.bias") for name in header.tensors)
        sigmoid = metadata.get("expert_gating_func", int, _SIGMOID if biased else 0) == _SIGMOID
        return "deepseek_v3" if sigmoid else model_type
    if model_type == "granitemoe":
        shared = any(name.endswith(".ffn_up_shexp.weight") for name in header.tensors)
        if shared or metadata.get("expert_shared_feed_forward_length", int, 0):
            return "granitemoeshared"
    return model_type


def _implied(key: str, header: GgufHeader) -> int | None:
    """Return the width of experts, which older files show by their tensors only."""
    if key == "expert_feed_forward_length":
        shapes = (
            one.shape[-2]
            for name, one in header.tensors.items()
            if (expert := expert_of(name)) and expert.part == "up" and len(one.shape) > 1
        )
    elif key == "expert_shared_feed_forward_length":
        shapes = (
            one.shape[-2]
            for name, one in header.tensors.items()
            if name.endswith(".ffn_up_shexp.weight") and len(one.shape) > 1
        )
    else:
        return None
    return next(shapes, None)


class _Metadata:
    """Values of the architecture's own keys."""

    def __init__(self, header: GgufHeader):
        self._header = header

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a value. Raises CheckpointError if it is missing without a default, or odd."""
        name = f"{self._header.architecture}.{key}"
        value = _one_of_equals(self._header.metadata.get(name, default))
        if value is None:
            raise CheckpointError(
                f"{self._header.path} has no {name} in its metadata; convert the model again with "
                "a newer program, or give the model that it was made from"
            )
        if kind is float and type(value) in (int, float):
            value = float(str(np.float32(value)))  # 1e-5, not the nearest float32 in 17 digits
        if type(value) is not kind or (kind is int and value < 0):
            raise CheckpointError(
                f"{self._header.path} has {name}={value!r}, but it is one number"
                f"{' for all layers here' if isinstance(value, list) else ''}"
            )
        if not isfinite(value):
            raise CheckpointError(
                f"{self._header.path} has {name}={value}, which is not finite; copy or download "
                "the file again"
            )
        return value

    @property
    def path(self) -> Any:
        """The file."""
        return self._header.path

    def neutral(self, key: str, values: tuple[Any, ...]) -> bool:
        """Return whether a value is absent, or one of these."""
        name = f"{self._header.architecture}.{key}"
        return _one_of_equals(self._header.metadata.get(name, values[0])) in values

    def numbers(self, key: str) -> list[int]:
        """Return a list of numbers; empty if there is none. Raises CheckpointError if odd."""
        name = f"{self._header.architecture}.{key}"
        found = self._header.metadata.get(name, [])
        if not isinstance(found, list) or any(type(one) not in (int, bool) for one in found):
            raise CheckpointError(f"{self._header.path} has {name}={found!r}, which is no list")
        return [int(one) for one in found]

    def text(self, key: str, default: str) -> str:
        """Return a text."""
        return str(self._header.metadata.get(f"{self._header.architecture}.{key}", default))


def _one_of_equals(value: Any) -> Any:
    """Return the number that a list with one per layer has, if all are equal."""
    equal = isinstance(value, list) and value and len(set(value)) == 1
    return value[0] if equal else value


def _refuse_settings(metadata: _Metadata, family: Family) -> None:
    computed = {*family.reads, *(key for key, _ in family.fields)}
    odd = [
        key
        for key, values in _NEUTRAL.items()
        if key not in computed and not metadata.neutral(key, values)
    ]
    if "attention.sliding_window" not in computed:
        window = metadata.get("attention.sliding_window", int, 0)
        if 0 < window < metadata.get("context_length", int):
            odd.append("attention.sliding_window")
    if odd:
        raise _unsupported_setting(metadata, ", ".join(odd))


def _unsupported_setting(metadata: _Metadata, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{metadata.path} sets {what}, which models of this architecture do not have in "
        "transformers; give the model that it was made from"
    )


def _rotary(metadata: _Metadata, family: Family, width: int) -> dict[str, Any]:
    """Return transformers' `rope_parameters`."""
    rotated = metadata.get("rope.dimension_count", int, width)
    partial = "rope.dimension_count" in family.reads
    if rotated != width and not partial:
        raise UnsupportedModelError(
            f"{metadata.path} rotates {rotated} of the {width} units of a head "
            "(rope.dimension_count), which models of this architecture do not in transformers"
        )
    found: dict[str, Any] = {"rope_theta": metadata.get("rope.freq_base", float, 10000.0)}
    if partial:
        found["partial_rotary_factor"] = rotated / max(1, width)
    kind = metadata.text("rope.scaling.type", "none")
    if kind not in _EXT_FACTORS:
        raise UnsupportedModelError(
            f"{metadata.path} has rope.scaling.type {kind!r}; none, linear and yarn can be read"
        )
    if not metadata.neutral("rope.scaling.yarn_ext_factor", _EXT_FACTORS[kind]):
        raise _unsupported_setting(metadata, "rope.scaling.yarn_ext_factor")
    if found["rope_theta"] <= 0:
        raise CheckpointError(
            f"{metadata.path} has rope.freq_base={found['rope_theta']}, which is not above 0; copy "
            "or download the file again"
        )
    if kind == "none":
        return found | {"rope_type": "default"}
    return found | {"rope_type": kind} | _scaling(metadata, kind)


def _scaling(metadata: _Metadata, kind: str) -> dict[str, Any]:
    """Return by how much rotations are slower than the model was first trained with."""
    if kind == "linear":
        return {"factor": metadata.get("rope.scaling.factor", float, 0.0) or 1.0}
    found = {
        "factor": metadata.get("rope.scaling.factor", float),
        "original_max_position_embeddings": metadata.get(
            "rope.scaling.original_context_length", int
        ),
        "beta_fast": metadata.get("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": metadata.get("rope.scaling.yarn_beta_slow", float, 1.0),
    }
    if found["factor"] < 1 or found["original_max_position_embeddings"] < 1:
        raise CheckpointError(
            f"{metadata.path} scales {found['original_max_position_embeddings']} positions by "
            f"{found['factor']} (rope.scaling.factor), but both are at least 1 for YaRN; copy or "
            "download the file again"
        )
    return found


def _dtype(header: GgufHeader) -> str:
    """Return the dtype to compute in: the experts' own, or bfloat16 for quantised ones."""
    sizes: dict[str, int] = {}
    for name, one in header.tensors.items():
        if expert_of(name) is not None:
            own = str(one.type.dtype or "torch.bfloat16").removeprefix("torch.")
            sizes[own] = sizes.get(own, 0) + one.span.nbytes
    return max(sizes, key=lambda name: sizes[name], default="bfloat16")


def _vocabulary(header: GgufHeader) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{header.path} has no matrix token_embd.weight; copy or download it again"
        )
    return embedding.shape[0]


def _special_tokens(header: GgufHeader) -> dict[str, Any]:
    """Return the ids of special tokens; several where a text may end with one of several."""
    size = _vocabulary(header)

    def token(name: str) -> int | None:
        value = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < size else None

    values: dict[str, Any] = {f"{name}_token_id": token(name) for name in _SPECIAL}
    ends = {one for name in ("eos", *_TOKENS_OF_END) if (one := token(name)) is not None}
    if len(ends) > 1:
        values["eos_token_id"] = sorted(ends)
    return values


def _of_gpt_oss(header: GgufHeader, values: dict[str, Any]) -> dict[str, Any]:
    rotary = values["rope_parameters"]
    return {"rope_parameters": rotary | {"truncate": False}} if "factor" in rotary else {}


def _with_sigmoid(header: GgufHeader) -> _Metadata:
    """Return the metadata of a model that chooses experts by a sigmoid."""
    metadata = _Metadata(header)
    if not metadata.neutral("expert_gating_func", (_SIGMOID, 0)):
        raise UnsupportedModelError(
            f"{header.path} has expert_gating_func other than sigmoid (2), with which models of "
            "this architecture choose experts"
        )
    return metadata


def _of_minimax(header: GgufHeader, values: dict[str, Any]) -> dict[str, Any]:
    _with_sigmoid(header)
    return {}


def _of_glm4(header: GgufHeader, values: dict[str, Any]) -> dict[str, Any]:
    metadata = _with_sigmoid(header)
    predicts = metadata.get("nextn_predict_layers", int, 0)
    return {
        "num_hidden_layers": values["num_hidden_layers"] - predicts,
        "num_nextn_predict_layers": predicts,
        "norm_topk_prob": metadata.get("expert_weights_norm", bool, False),
        "routed_scaling_factor": metadata.get("expert_weights_scale", float, 0.0) or 1.0,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in header.tensors,
        "n_group": 1,
        "topk_group": 1,
    }


def _of_qwen2(header: GgufHeader, values: dict[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": "blk.0.attn_q.bias" in header.tensors}


def _of_deepseek(header: GgufHeader, values: dict[str, Any]) -> dict[str, Any]:
    """Return what latent attention (MLA) and groups of experts need.

    Older files have the widths of heads under the keys of other models, newer ones those of the
    latent state there and the heads' under keys of their own.
    """
    metadata, rotated = _Metadata(header), values["qk_rope_head_dim"]
    if not metadata.neutral("expert_gating_func", (0, 1, _SIGMOID)):
        raise UnsupportedModelError(
            f"{header.path} has expert_gating_func other than softmax (1) and sigmoid (2), with "
            "which models of this architecture choose experts"
        )
    keys = metadata.get("attention.key_length_mla", int, values["head_dim"])
    if keys <= rotated:
        raise CheckpointError(f"{header.path} rotates {rotated} of the {keys} units of a head")
    rotary = {k: v for k, v in values["rope_parameters"].items() if k != "partial_rotary_factor"}
    if rotary["rope_type"] == "yarn":
        slope = metadata.get("rope.scaling.yarn_log_multiplier", float, 0.0)
        rotary |= {"attention_factor": 1.0, "mscale_all_dim": round(10 * slope, 6)}
    values_width = metadata.get("attention.value_length", int, keys)
    predicts = metadata.get("nextn_predict_layers", int, 0)
    is_v2 = values["model_type"] == "deepseek_v2"
    normalizes = metadata.get("expert_weights_norm", bool, False)
    if is_v2 and normalizes:
        raise _unsupported_setting(metadata, "expert_weights_norm with a softmax over all experts")
    return _groups(metadata, values, is_v2=is_v2) | {
        "num_hidden_layers": values["num_hidden_layers"] - predicts,
        "num_nextn_predict_layers": predicts,
        "num_key_value_heads": values["num_attention_heads"],
        "head_dim": rotated,
        "qk_nope_head_dim": keys - rotated,
        "v_head_dim": metadata.get("attention.value_length_mla", int, values_width),
        "q_lora_rank": metadata.get("attention.q_lora_rank", int, 0) or None,
        "rope_parameters": rotary,
        "norm_topk_prob": normalizes,
        "routed_scaling_factor": metadata.get("expert_weights_scale", float, 0.0) or 1.0,
    }


def _groups(metadata: _Metadata, values: dict[str, Any], *, is_v2: bool) -> dict[str, Any]:
    """Return how experts are chosen from the best groups, which V3 ranks by two experts each."""
    groups = max(1, metadata.get("expert_group_count", int, 1))
    used = metadata.get("expert_group_used_count", int) if groups > 1 else 1
    experts, chosen = values["n_routed_experts"], values["num_experts_per_tok"]
    size, rest = divmod(experts, groups)
    if groups > 1 and (rest or size < (1 if is_v2 else 2) or not chosen / size <= used <= groups):
        raise CheckpointError(
            f"{metadata.path} chooses {chosen} of {experts} experts from {used} of {groups} groups "
            "(expert_group_count, expert_group_used_count), which cannot be; copy or download the "
            "file again"
        )
    method = {"topk_method": "group_limited_greedy" if groups > 1 else "greedy"} if is_v2 else {}
    return method | {"n_group": groups, "topk_group": used}


def _of_granite(header: GgufHeader, values: dict[str, Any]) -> dict[str, Any]:
    metadata = _Metadata(header)
    if not metadata.neutral("rope.scaling.finetuned", (True,)):  # llama.cpp: no rotation at all
        raise _unsupported_setting(metadata, "rope.scaling.finetuned to false")
    return {
        "attention_multiplier": metadata.get("attention.scale", float, 0.0)
        or values["head_dim"] ** -0.5,
        "embedding_multiplier": metadata.get("embedding_scale", float, 0.0) or 1.0,
        "logits_scaling": metadata.get("logit_scale", float, 0.0) or 1.0,
        "residual_multiplier": metadata.get("residual_scale", float, 0.0) or 1.0,
    }


def _of_delta_net(header: GgufHeader, values: dict[str, Any]) -> dict[str, Any]:
    """Return what gated delta nets need, and which layers have attention instead."""
    metadata = _Metadata(header)
    predicts = metadata.get("nextn_predict_layers", int, 0)
    keys, heads = metadata.get("ssm.group_count", int), metadata.get("ssm.time_step_rank", int)
    width = metadata.get("ssm.inner_size", int)
    found = {one.shape for name, one in header.tensors.items() if name.endswith(".ssm_a")}
    if not keys or not heads or heads % keys or width % heads or found != {(heads,)}:
        shapes = " and ".join(str([*shape]) for shape in sorted(found))
        raise CheckpointError(
            f"{header.path} divides {width} units of values into {heads} heads, for {keys} heads "
            "of keys (ssm.inner_size, ssm.time_step_rank, ssm.group_count), and has decays ssm_a "
            f"{shapes or 'for none'}; copy or download the file again"
        )
    rotated = metadata.get("rope.dimension_count", int, values["head_dim"])
    if rotated % 2 or not 0 < rotated <= values["head_dim"]:
        raise CheckpointError(
            f"{header.path} rotates {rotated} of the {values['head_dim']} units of a head "
            "(rope.dimension_count), which cannot be; copy or download the file again"
        )
    layers = values["num_hidden_layers"] - predicts
    return _sections(metadata, values, rotated // 2) | {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": predicts,
        "layer_types": _layer_types(metadata, layers, layers + predicts),
        "linear_conv_kernel_dim": metadata.get("ssm.conv_kernel", int),
        "linear_key_head_dim": metadata.get("ssm.state_size", int),
        "linear_value_head_dim": width // heads,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": heads,
    }


def _layer_types(metadata: _Metadata, layers: int, blocks: int) -> list[str]:
    """Return the kind of each layer: from a list, or from how often there is attention."""
    linear = metadata.numbers("attention.recurrent_layers")
    if not linear:
        interval = metadata.get("full_attention_interval", int, 4)
        linear = [interval > 0 and (layer + 1) % interval for layer in range(blocks)]
    if len(linear) != blocks:
        raise CheckpointError(
            f"{metadata.path} has {blocks} layers, but attention.recurrent_layers has "
            f"{len(linear)}; copy or download the file again"
        )
    return ["linear_attention" if one else "full_attention" for one in linear[:layers]]


def _sections(metadata: _Metadata, values: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Return how rotated units are shared between time, height and width, in turn.

    Positions of text are the same in all three; llama.cpp gives units that no section has another
    position.
    """
    found = metadata.numbers("rope.dimension_sections")
    if not found or values["model_type"] == "qwen3_next":
        return {}
    sections, rotary = [*found, 0, 0, 0][:3], values["rope_parameters"]
    if any(found[3:]) or any(pair >= 3 * sections[pair % 3] for pair in range(pairs)):
        raise _unsupported_setting(
            metadata, f"rope.dimension_sections to {found}, which do not cover {pairs} rotations,"
        )
    more = {"mrope_section": sections, "mrope_interleaved": True}
    return {"rope_parameters": rotary | more}


_ADDED: dict[str, Callable[[GgufHeader, dict[str, Any]], dict[str, Any]]] = {
    "deepseek_v2": _of_deepseek,
    "deepseek_v3": _of_deepseek,
    "glm4_moe": _of_glm4,
    "gpt_oss": _of_gpt_oss,
    "granitemoe": _of_granite,
    "granitemoeshared": _of_granite,
    "minimax_m2": _of_minimax,
    "qwen2_moe": _of_qwen2,
    "qwen3_5_moe_text": _of_delta_net,
    "qwen3_next": _of_delta_net,
}
