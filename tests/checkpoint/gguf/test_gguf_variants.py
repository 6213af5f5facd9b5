"""GGUF files of DeepSeek and Granite, whose tensors are split otherwise than transformers'."""

from pathlib import Path
from typing import Any

import pytest
import torch
from converted_gguf import CONVERTED, deepseek, granite, minimax_m2
from tiny_gguf import VOCABULARY

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


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def served_logits(path: Path, **settings: Any) -> torch.Tensor:
    with load_model(path, LoadSettings(**settings)) as served:
        return logits(served.model)


@pytest.mark.parametrize("kind", CONVERTED)
def test_logits_equal_transformers(tmp_path: Path, kind: str) -> None:
    """Also when quantised, with the tensors that the gguf package decodes."""
    model, metadata, tensors = CONVERTED[kind]()
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
    _, metadata, tensors = CONVERTED[kind]()
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


def test_width_of_minimaxs_experts_is_not_that_of_dense_layers(tmp_path: Path) -> None:
    """Files have both; transformers reads the second one."""
    model, metadata, tensors = minimax_m2()
    metadata["minimax-m2.feed_forward_length"] = 48
    path = write_file(tmp_path / "m.gguf", metadata, tensors)
    torch.testing.assert_close(served_logits(path), logits(model), atol=3e-5, rtol=1e-5)
    metadata["minimax-m2.expert_gating_func"] = 1
    with pytest.raises(UnsupportedModelError, match="other than sigmoid"):
        build_skeleton(write_file(tmp_path / "n.gguf", metadata, tensors))


def test_heads_that_differ_raise(tmp_path: Path) -> None:
    _, metadata, tensors = deepseek("v2", split=True)
    tensors["blk.0.attn_v_b.weight"] = tensors["blk.0.attn_v_b.weight"][:2]
    path = write_file(tmp_path / "bad.gguf", metadata, tensors)
    with pytest.raises(CheckpointError, match=r"keys are .* but values"):
        build_skeleton(path)
