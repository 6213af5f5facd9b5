"""GGUF files of Qwen3-Next and Qwen3.5, whose converters change and move the weights of most
layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from converted_delta_net import DELTA_NETS, VALUES, qwen3_next, qwen35_moe
from tiny_gguf import VOCABULARY

from moefit.checkpoint.gguf.delta_net import Heads
from moefit.errors import CheckpointError, MoefitError, UnsupportedModelError
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.load import load_model

pytest.importorskip("gguf", reason="needs the package gguf (moefit[gguf])")
from gguf_files import read_file, write_file

IDS = torch.arange(24).view(2, 12) * 11 % (VOCABULARY - 1)
TOLERANCE = {"atol": 1e-3, "rtol": 1e-5}  # logits are up to 13


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def steps(model: Any) -> torch.Tensor:
    """Return the logits after a prompt, and after each of some further tokens."""
    found, cache = [], None
    with torch.no_grad():
        for ids in (IDS[:, :9], IDS[:, 9:10], IDS[:, 10:11], IDS[:, 11:]):
            out = model(ids, past_key_values=cache, use_cache=True)
            found.append(out.logits[:, -1])
            cache = out.past_key_values
    return torch.stack(found)


def served_logits(path: Path, **settings: Any) -> torch.Tensor:
    with load_model(path, LoadSettings(**settings)) as served:
        return logits(served.model)


def dense_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: one for name, one in model.state_dict().items() if ".experts." not in name}


@pytest.mark.parametrize("kind", DELTA_NETS)
def test_prompts_and_steps_equal_transformers(tmp_path: Path, kind: str) -> None:
    model, metadata, tensors = DELTA_NETS[kind]()
    path = write_file(tmp_path / "m.gguf", metadata, tensors)
    with load_model(path, LoadSettings()) as served:
        torch.testing.assert_close(logits(served.model), logits(model), **TOLERANCE)
        torch.testing.assert_close(steps(served.model), steps(model), **TOLERANCE)


@pytest.mark.parametrize("keys", [1, 2, 3, VALUES])
def test_weights_equal_the_models(tmp_path: Path, keys: int) -> None:
    """However many heads of values belong to one of keys; also with a layer for a further token."""
    model, metadata, tensors = qwen35_moe(keys=keys, further=True)
    path = write_file(tmp_path / "m.gguf", metadata, tensors)
    check_weights(path, model)
    assert build_skeleton(path).left_out()["mtp"][0] == 2


@pytest.mark.parametrize("joint", [False, True])
def test_weights_of_joint_projections_equal_the_models(tmp_path: Path, joint: bool) -> None:
    model, metadata, tensors = qwen3_next(joint=joint)
    check_weights(write_file(tmp_path / "m.gguf", metadata, tensors), model)


def check_weights(path: Path, model: Any) -> None:
    expected = dense_weights(model)
    with load_model(path, LoadSettings()) as served:
        found = dense_weights(served.model)
        assert expected.keys() <= found.keys()
        for name, one in expected.items():
            changed = "norm.weight" in name or name.endswith("A_log")
            rounding = 1e-6 if changed else 0.0  # w + 1 and exp(w) are rounded
            torch.testing.assert_close(found[name], one, atol=rounding, rtol=rounding)


@pytest.mark.parametrize("kind", DELTA_NETS)
def test_quantised_tensors_are_decoded_before_they_are_moved(tmp_path: Path, kind: str) -> None:
    """The parts of one projection may be of several types."""
    model, metadata, tensors = DELTA_NETS[kind]()
    types = {
        name: "q4_0" if "attn_gate" in name else "q8_0"
        for name, one in tensors.items()
        if one.ndim > 1 and "gate_inp" not in name and "conv1d" not in name
    }
    path = write_file(tmp_path / "q.gguf", metadata, tensors, types)
    judge = served_logits(write_file(tmp_path / "judge.gguf", *read_file(path)))
    found = served_logits(path, dtype=torch.float32)
    torch.testing.assert_close(found, judge, **TOLERANCE)
    assert not torch.allclose(judge, logits(model), atol=1e-2)


def test_layers_with_attention_may_be_listed(tmp_path: Path) -> None:
    model, metadata, tensors = qwen35_moe()
    del metadata["qwen35moe.full_attention_interval"]
    metadata["qwen35moe.attention.recurrent_layers"] = [True, False, True, False]
    path = write_file(tmp_path / "m.gguf", metadata, tensors)
    torch.testing.assert_close(served_logits(path), logits(model), **TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("qwen35moe", {"ssm.inner_size": 190}, "190 units of values into 6 heads"),
        ("qwen35moe", {"ssm.group_count": 4}, "6 heads, for 4 heads of keys"),
        ("qwen35moe", {"ssm.group_count": 0}, "for 0 heads of keys"),
        ("qwen35moe", {"ssm.time_step_rank": 1 << 31}, r"2147483648 heads.* ssm_a \[6\]"),
        ("qwen35moe", {"ssm.group_count": 3}, "its heads have"),
        ("qwen3next", {"ssm.group_count": 3}, "its heads have"),
        ("qwen35moe", {"ssm.state_size": 64}, "its heads have"),
        ("qwen3next", {"ssm.state_size": 64}, "its heads have"),
        ("qwen35moe", {"ssm.conv_kernel": 3}, "another shape"),
        ("qwen3next", {"full_attention_interval": 4}, "lacks|do not have here"),
        ("qwen35moe", {"attention.recurrent_layers": [True, False]}, "recurrent_layers has 2"),
        ("qwen35moe", {"attention.recurrent_layers": "all"}, "recurrent_layers='all'"),
        ("qwen35moe", {"rope.dimension_count": 64}, "rotates 64 of the 32 units"),
        ("qwen3next", {"rope.dimension_count": 9}, "rotates 9 of the 32 units"),
        ("qwen35moe", {"rope.dimension_sections": [3, 2, 2, 0]}, "do not cover 8 rotations"),
        ("qwen35moe", {"rope.dimension_sections": [2, 2, 2, 2]}, "do not cover 8 rotations"),
        ("qwen3next", {"expert_gating_func": 2}, "sets expert_gating_func"),
    ],
)
def test_contradictions_raise(
    tmp_path: Path, kind: str, changes: dict[str, Any], match: str
) -> None:
    _, metadata, tensors = DELTA_NETS[kind]()
    metadata |= {f"{kind}.{key}": value for key, value in changes.items()}
    path = write_file(tmp_path / "bad.gguf", metadata, tensors)
    with pytest.raises(MoefitError, match=match):
        load_model(path, LoadSettings()).close()


@pytest.mark.parametrize(
    ("kind", "renamed", "match"),
    [
        ("qwen3next", {"blk.0.attn_gate.weight": ""}, "in_proj_qkvz.weight has no z"),
        ("qwen3next", {"blk.0.ssm_ba.weight": "blk.0.ssm_beta.weight"}, "blk.0.ssm_beta.weight"),
        ("qwen3next", {"blk.1.attn_q.weight": "blk.1.attn_qkv.weight"}, "blk.1.attn_qkv.weight"),
        ("qwen35moe", {"blk.1.attn_q.weight": "blk.1.attn_qkv.weight"}, "in_proj_qkv.weight"),
        ("qwen35moe", {"blk.0.ssm_a": "blk.0.ssm_a.weight"}, "blk.0.ssm_a.weight"),
        ("qwen35moe", {"blk.0.ssm_alpha.weight": "blk.0.ssm_ba.weight"}, "blk.0.ssm_ba.weight"),
        ("qwen35moe", {"blk.2.ssm_out.weight": ""}, "lacks"),
    ],
)
def test_other_converters_are_refused_by_the_names_of_their_tensors(
    tmp_path: Path, kind: str, renamed: dict[str, str], match: str
) -> None:
    _, metadata, tensors = DELTA_NETS[kind]()
    for old, new in renamed.items():
        one = tensors.pop(old)
        tensors |= {new: one} if new else {}
    path = write_file(tmp_path / "bad.gguf", metadata, tensors)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=match):
        load_model(path, LoadSettings()).close()


@pytest.mark.parametrize("decay", [0.5, float("nan"), float("-inf")])
def test_decays_that_cannot_be_raise(tmp_path: Path, decay: float) -> None:
    _, metadata, tensors = qwen35_moe()
    decays = tensors["blk.2.ssm_a"].copy()
    decays[3] = decay
    path = write_file(tmp_path / "bad.gguf", metadata, tensors | {"blk.2.ssm_a": decays})
    with pytest.raises(CheckpointError, match=r"layers\.2\.linear_attn\.A_log .*decays above 0"):
        load_model(path, LoadSettings()).close()


def test_heads_of_values_are_moved_if_a_key_has_several_and_there_are_several_keys() -> None:
    def order(keys: int, values: int) -> list[int]:
        heads = Heads(keys=keys, values=values, key_width=1, value_width=1)
        found = [run.first for run in heads.in_model_order("weight", 0, 1)]
        assert heads.are_moved == (found != list(range(values)))
        return found

    assert order(2, 6) == [0, 2, 4, 1, 3, 5]
    assert order(3, 6) == [0, 3, 1, 4, 2, 5]
    assert order(1, 6) == order(6, 6) == [*range(6)]
