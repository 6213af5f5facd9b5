"""GGUF files of DeepSeek and Granite, whose tensors are split otherwise than transformers'."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import SIZES, VOCABULARY
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    PreTrainedConfig,
)

from moefit.checkpoint.gguf.families import FAMILIES, name_in_file
from moefit.errors import CheckpointError, MoefitError, UnsupportedModelError
from moefit.quant.format import NATIVE
from moefit.quant.scaled.matrix import ScaledMatrix
from moefit.serve.cache.slot import allocate_slot
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.load import load_model

pytest.importorskip("gguf", reason="needs the package gguf (moefit[gguf])")
from gguf_files import read_file, write_file

IDS = torch.arange(24).view(2, 12) * 11 % (VOCABULARY - 1)
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


def deepseek(kind: str, *, split: bool) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return a model, and its metadata and tensors as llama.cpp's converters write them.

    Args:
        kind: `v2`, `v2-lite` (queries without a latent state) or `v3`.
        split: Whether keys and values of heads have tensors of their own, as since 2025.
    """
    groups = {"n_group": 2, "topk_group": 1}
    if kind == "v3":
        config: PreTrainedConfig = DeepseekV3Config(
            **SIZES | WIDTHS, **groups, q_lora_rank=32, norm_topk_prob=True, rope_parameters=YARN
        )
    else:
        more = {} if kind == "v2-lite" else groups | {"topk_method": "group_limited_greedy"}
        rank = None if kind == "v2-lite" else 32
        config = DeepseekV2Config(
            **SIZES | WIDTHS, **more, q_lora_rank=rank, rope_parameters=YARN
        )  # fmt: skip
    model, weights = made(config)
    tensors: dict[str, Any] = {}
    for name, value in weights.items():
        layer = f"{name}...".split(".")[2]
        if name.endswith("kv_b_proj.weight") and split:
            heads = value.view(HEADS, PLAIN + VALUE, LATENT)
            tensors[f"blk.{layer}.attn_k_b.weight"] = heads[:, :PLAIN].transpose(1, 2).numpy()
            tensors[f"blk.{layer}.attn_v_b.weight"] = heads[:, PLAIN:].numpy()
        elif name.endswith("experts.gate_up_proj"):
            tensors |= parts_of(value, layer)
        elif name.endswith("experts.down_proj"):
            tensors[f"blk.{layer}.ffn_down_exps.weight"] = value.numpy()
        else:
            own = name_in_file(FAMILIES["deepseek_v3"], name)
            assert own is not None, name
            tensors[own] = value.numpy()
    lengths = {"attention.key_length": PLAIN + ROTATED, "attention.value_length": VALUE}
    latent = {"attention.key_length": LATENT + ROTATED, "attention.value_length": LATENT}
    numbers = NUMBERS | {
        "attention.kv_lora_rank": LATENT, "expert_shared_count": 1, "expert_weights_scale": 1.5,
        "expert_feed_forward_length": 32, "leading_dense_block_count": 1,
        "rope.dimension_count": ROTATED, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32, "rope.scaling.yarn_log_multiplier": 0.0707,
        "attention.head_count_kv": 1 if split else HEADS,
    }  # fmt: skip
    numbers |= lengths if not split else latent | {f"{k}_mla": v for k, v in lengths.items()}
    if kind != "v2-lite":
        numbers |= {"expert_group_count": 2, "expert_group_used_count": 1}
        numbers["attention.q_lora_rank"] = 32
    if kind == "v3":
        numbers |= {"expert_gating_func": 2, "expert_weights_norm": True}
    metadata = {f"deepseek2.{key}": value for key, value in numbers.items()}
    return model, {"general.architecture": "deepseek2"} | metadata, tensors


def granite(*, shared: bool) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return a model, and its metadata and tensors as llama.cpp's converter writes them."""
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
        if name.endswith("experts.gate_up_proj"):
            tensors |= parts_of(value, layer)
        elif name.endswith("experts.down_proj"):
            tensors[f"blk.{layer}.ffn_down_exps.weight"] = value.numpy()
        elif name.endswith("shared_mlp.input_linear.weight"):
            for part, half in zip(("gate", "up"), value.chunk(2), strict=True):
                tensors[f"blk.{layer}.ffn_{part}_shexp.weight"] = half.numpy()
        else:
            if name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs of rotated units
                value = value.view(-1, 2, 8, 64).transpose(1, 2).reshape(value.shape)
            own = name_in_file(FAMILIES["granitemoe"], name)
            assert own is not None, name
            tensors[own] = value.numpy()
    numbers = NUMBERS | {
        "attention.scale": 0.125, "embedding_scale": 6.0, "logit_scale": 3.0,
        "residual_scale": 0.5, "attention.head_count_kv": 2,
    }  # fmt: skip
    if shared:
        numbers["expert_shared_feed_forward_length"] = 64
    metadata = {f"granitemoe.{key}": value for key, value in numbers.items()}
    return model, {"general.architecture": "granitemoe"} | metadata, tensors


MADE = {
    "v2": lambda: deepseek("v2", split=True),
    "v2-lite, one tensor": lambda: deepseek("v2-lite", split=False),
    "v3": lambda: deepseek("v3", split=True),
    "granite": lambda: granite(shared=False),
    "granite, shared": lambda: granite(shared=True),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def served_logits(path: Path, **settings: Any) -> torch.Tensor:
    with load_model(path, LoadSettings(**settings)) as served:
        return logits(served.model)


@pytest.mark.parametrize("kind", MADE)
def test_logits_equal_transformers(tmp_path: Path, kind: str) -> None:
    """Also when quantised, with the tensors that the gguf package decodes."""
    model, metadata, tensors = MADE[kind]()
    path = write_file(tmp_path / "m.gguf", metadata, tensors)
    expected = logits(model)
    torch.testing.assert_close(served_logits(path), expected, atol=3e-5, rtol=1e-5)
    types = {name: "q8_0" for name, one in tensors.items() if one.ndim > 1 and "gate_inp" not in
             name}  # fmt: skip
    path = write_file(tmp_path / "q.gguf", metadata, tensors, types)
    judge = served_logits(write_file(tmp_path / "judge.gguf", *read_file(path)))
    found = served_logits(path, dtype=torch.float32)
    torch.testing.assert_close(found, judge, atol=3e-5, rtol=1e-5)
    assert not torch.allclose(judge, expected, atol=1e-4)


def test_slots_hold_the_own_codes_of_gate_above_up(tmp_path: Path) -> None:
    _, metadata, tensors = granite(shared=False)
    types = {name: "q4_0" for name in tensors if name.endswith("_exps.weight")}
    skeleton = build_skeleton(write_file(tmp_path / "m.gguf", metadata, tensors, types))
    block = skeleton.blocks[0]
    store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, {block.name: block})
    slot = allocate_slot(NATIVE, block.layout.specs, torch.device("cpu"))
    store.read(block.name, 3, slot)
    decoded = NATIVE.decode(slot.tensors, block.layout.specs, torch.bfloat16)
    for short, value in store.native(block.name, 3).items():
        assert isinstance(slot.tensors[short], ScaledMatrix)
        assert torch.equal(decoded[short], value)


def test_width_of_experts_is_seen_in_their_tensors(tmp_path: Path) -> None:
    model, metadata, tensors = deepseek("v2-lite", split=True)
    del metadata["deepseek2.expert_feed_forward_length"]
    path = write_file(tmp_path / "m.gguf", metadata, tensors)
    torch.testing.assert_close(served_logits(path), logits(model), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "without", "match"),
    [
        ({"attention.kv_lora_rank": 24}, "", "another shape|cannot be"),
        ({"rope.dimension_count": 64}, "", "rotates 64 of the 40 units"),
        ({"attention.value_length_mla": 24}, "", "another shape"),
        ({"expert_gating_func": 4}, "", "expert_gating_func"),
        ({}, "blk.1.attn_v_b.weight", "kv_b_proj.weight has no values"),
        ({}, "blk.1.attn_kv_a_norm.weight", "lacks"),
        ({"attention.temperature_scale": 0.5}, "", "sets attention.temperature_scale"),
        ({"attention.sliding_window": 64}, "", "sets attention.sliding_window"),
        ({"swiglu_clamp_exp": [7.0, 7.0]}, "", "sets swiglu_clamp_exp"),
        ({"expert_weights_norm": True}, "", "sets expert_weights_norm with a softmax"),
        ({"rope.scaling.yarn_ext_factor": 0.0}, "", "sets rope.scaling.yarn_ext_factor"),
        ({"rope.scaling.factor": 0.5}, "", "by 0.5 .* at least 1 for YaRN"),
        ({"rope.freq_base": 0.0}, "", "freq_base=0.0"),
        ({"expert_weights_scale": float("nan")}, "", "expert_weights_scale=nan, which is not fin"),
        ({"expert_group_count": 4}, "", "2 of 6 experts from 1 of 4 groups"),
        ({"expert_group_used_count": 5}, "", "from 5 of 2 groups"),
        (
            {"expert_group_count": 6, "expert_group_used_count": 2, "expert_gating_func": 2},
            "",
            "from 2 of 6 groups",
        ),
    ],
)
def test_contradictions_raise(
    tmp_path: Path, changes: dict[str, Any], without: str, match: str
) -> None:
    _, metadata, tensors = deepseek("v2", split=True)
    metadata |= {f"deepseek2.{key}": value for key, value in changes.items()}
    tensors.pop(without, None)
    path = write_file(tmp_path / "bad.gguf", metadata, tensors)
    with pytest.raises(MoefitError, match=match):
        load_model(path, LoadSettings()).close()


def test_settings_that_change_nothing_are_read(tmp_path: Path) -> None:
    model, metadata, tensors = deepseek("v2", split=True)
    neutral = {
        "attention.sliding_window": 128, "attention.causal": True, "swiglu_clamp_exp": [0.0, 0.0],
        "attention.temperature_scale": 0.0, "rope.scaling.yarn_ext_factor": 1.0,
        "expert_weights_norm": False, "moe_every_n_layers": 1,
    }  # fmt: skip
    metadata |= {f"deepseek2.{key}": value for key, value in neutral.items()}
    path = write_file(tmp_path / "m.gguf", metadata, tensors)
    torch.testing.assert_close(served_logits(path), logits(model), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "copied"),
    [
        ("granite", "blk.1.attn_q_norm.weight", "blk.1.attn_norm.weight"),
        ("v3", "blk.1.attn_q.weight", "blk.1.attn_output.weight"),
        ("v3", "blk.1.ffn_gate.weight", "blk.0.ffn_gate.weight"),
        ("v3", "blk.0.ffn_gate_exps.weight", "blk.1.ffn_gate_exps.weight"),
    ],
)
def test_tensors_that_the_model_leaves_out_raise(
    tmp_path: Path, kind: str, name: str, copied: str
) -> None:
    _, metadata, tensors = MADE[kind]()
    path = write_file(tmp_path / "m.gguf", metadata, tensors | {name: tensors[copied]})
    with pytest.raises(UnsupportedModelError, match=r"tensors that .* models do not have here"):
        build_skeleton(path)


def test_granite_is_seen_in_its_tensors_and_switch(tmp_path: Path) -> None:
    model, metadata, tensors = granite(shared=True)
    del metadata["granitemoe.expert_shared_feed_forward_length"]
    path = write_file(tmp_path / "m.gguf", metadata, tensors)
    torch.testing.assert_close(served_logits(path), logits(model), atol=3e-5, rtol=1e-5)
    metadata["granitemoe.rope.scaling.finetuned"] = False
    with pytest.raises(UnsupportedModelError, match=r"sets rope.scaling.finetuned"):
        build_skeleton(write_file(tmp_path / "n.gguf", metadata, tensors))


def test_heads_that_differ_raise(tmp_path: Path) -> None:
    _, metadata, tensors = deepseek("v2", split=True)
    tensors["blk.0.attn_v_b.weight"] = tensors["blk.0.attn_v_b.weight"][:2]
    path = write_file(tmp_path / "bad.gguf", metadata, tensors)
    with pytest.raises(CheckpointError, match=r"keys are .* but values"):
        build_skeleton(path)
