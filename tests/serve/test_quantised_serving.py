"""Quantised checkpoints served inside a budget: transformers' own output of the dequantised model.

`quantise` writes each model twice, quantised and with the values that the formats stand for;
tests/checkpoint/formats compares those values with transformers'.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
import transformers
from tiny_served import logits, saved, settled, tiny, tokens, with_slots

import moefit
from moefit.errors import CheckpointError
from moefit.quant.format import parse_format
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.packed.build import pack

# Families as they are found in each format; widths that its groups divide.
WIDE = {"hidden_size": 64, "head_dim": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8-blocks": ("DeepseekV3", {"hidden_size": 48}),
    "fp8-tensor": ("Mixtral", {}),
    "fp8-channels": ("Mixtral", {}),
    "int8-channels": ("Olmoe", {}),
    "w4a16": ("Mixtral", {**WIDE, "intermediate_size": 96}),
    "w4a16-asymmetric": ("Mixtral", {**WIDE, "intermediate_size": 96}),
    "nvfp4": ("Mixtral", {**WIDE, "intermediate_size": 48}),
    "nvfp4-modelopt": ("Olmoe", {"hidden_size": 64, "intermediate_size": 48}),
    "gptq": ("Mixtral", {**WIDE, "intermediate_size": 96}),
    "awq": ("Mixtral", {**WIDE, "intermediate_size": 96}),
    "mxfp4": ("GptOss", {"hidden_size": 64, "intermediate_size": 64}),
}


def written(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, declared: bool = True
) -> tuple[Path, Path]:
    """Return folders of a model with the same values, plain and quantised."""
    family, changes = CASES[kind]
    plain = saved(tiny(family, dtype=dtype, **changes), folder / "plain")
    store, config = quantised.KINDS.get(kind, (quantised.mxfp4, {"quant_method": "mxfp4"}))
    chosen = config if declared else None
    return plain, quantised.quantise(plain, folder / "quantised", store, chosen)


def of_transformers(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(params=CASES)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    yield written(tmp_path, request.param)


def test_served_model_equals_transformers(both: tuple[Path, Path]) -> None:
    plain, folder = both
    model, ids = of_transformers(plain), tokens(2, 9)
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected, new = logits(model, ids), model.generate(ids, **how)
    with moefit.load(folder, mode="exact", context=64) as served:
        least = with_slots(served, 1)
        for memory in (None, least):
            if memory is not None:
                served.set_memory(memory)
                settled(served)
                assert {one.slot_table.num_slots for one in served.blocks.values()} == {1}
            assert torch.allclose(logits(served.model, ids), expected, atol=2e-4, rtol=1e-4)
            assert torch.equal(served.model.generate(ids, **how), new)


def test_experts_are_those_of_the_plain_model_bit_for_bit(both: tuple[Path, Path]) -> None:
    plain, folder = (build_skeleton(one) for one in both)
    stores = [
        ExpertStore(one.checkpoint, one.map.experts, {b.name: b for b in one.blocks})
        for one in (plain, folder)
    ]
    for block in plain.blocks:
        for expert in range(block.num_experts):
            expected, found = (store.native(block.name, expert) for store in stores)
            assert found.keys() == expected.keys()
            for short, tensor in expected.items():
                assert torch.equal(found[short], tensor), (block.name, expert, short)
            at_rest = folder.map.experts[block.name][expert].nbytes
            assert at_rest < plain.map.experts[block.name][expert].nbytes


@pytest.mark.parametrize("kind", ["fp8-blocks", "w4a16", "mxfp4"])
def test_packed_experts_are_those_of_the_plain_model(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ids, found = tokens(1, 7), []
    for folder in written(tmp_path, kind, torch.bfloat16):
        packed = pack(build_skeleton(folder), [parse_format("int4-nearest")])
        assert packed.files > 0
        how = {"precision": "int4-nearest", "dense_precision": "decoded"}
        with moefit.load(folder, mode="exact", context=64, **how) as served:
            assert "packed" in served.report()["experts_from"]
            found.append(logits(served.model, ids))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["fp8-tensor", "mxfp4", "gptq", "awq", "w4a16", "nvfp4"])
def test_formats_need_not_be_declared(tmp_path: Path, kind: str) -> None:
    found = []
    for name, declared in (("declared", True), ("bare", False)):
        (tmp_path / name).mkdir()
        skeleton = build_skeleton(written(tmp_path / name, kind, declared=declared)[1])
        source = skeleton.map.experts[skeleton.blocks[0].name][1]
        found.append(list(source.values(skeleton.checkpoint)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_formats_may_be_mixed_within_a_layer(tmp_path: Path) -> None:
    """One expert in FP8, one in int4, one plain, attention in int8: as in the plain model."""
    plain = saved(tiny("Olmoe", hidden_size=64, intermediate_size=96), tmp_path / "plain")
    kinds = [quantised.fp8_tensor, quantised.w4a16, quantised.int8_channels, None]
    calls = iter(range(1000))

    def store(matrix: torch.Tensor) -> quantised.Stored:
        kind = kinds[next(calls) % len(kinds)]
        return kind(matrix) if kind else ({"weight": matrix}, matrix)

    folder = quantised.quantise(plain, tmp_path / "mixed", store, quantised.CT)
    ids = tokens(2, 9)
    with moefit.load(folder, mode="exact", context=64) as served:
        found = logits(served.model, ids)
    assert torch.allclose(found, logits(of_transformers(plain), ids), atol=2e-4, rtol=1e-4)


def test_damaged_scales_of_one_expert_raise_and_leave_the_model_usable(tmp_path: Path) -> None:
    _, folder = written(tmp_path, "fp8-blocks")
    file = folder / quantised.SINGLE
    tensors = quantised.load_file(file)
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    tensors[name][0, 0] = torch.nan
    quantised.save_file(tensors, file, {"format": "pt"})
    skeleton = build_skeleton(folder)
    block = skeleton.blocks[0]
    store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, {block.name: block})
    with pytest.raises(CheckpointError, match=r"experts.3.up_proj.weight .*not finite"):
        store.native(block.name, 3)
    assert store.native(block.name, 2)["down_proj"].isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_that_the_model_has_not_must_be_zero(tmp_path: Path, value: float) -> None:
    _, folder = written(tmp_path, "gptq")
    file = folder / quantised.SINGLE
    tensors = quantised.load_file(file)
    for name in [name for name in tensors if name.endswith("w1.qweight")]:
        size = tensors[name].shape[1]
        tensors[name.replace("qweight", "bias")] = torch.full((size,), value).half()
    quantised.save_file(tensors, file, {"format": "pt"})
    if value:
        with pytest.raises(CheckpointError, match=r"config.json leaves out.*w1.bias"):
            build_skeleton(folder)
    else:
        build_skeleton(folder)


def test_quantised_router_is_read(tmp_path: Path) -> None:
    plain, folder = written(tmp_path, "fp8-tensor")
    tensors = {one: quantised.load_file(one / quantised.SINGLE) for one in (plain, folder)}
    for name in [name for name in tensors[plain] if name.endswith("gate.weight")]:
        stored, values = quantised.fp8_tensor(tensors[plain][name])
        tensors[plain][name] = values
        stem = name.removesuffix("weight")
        del tensors[folder][name]
        tensors[folder] |= {f"{stem}{part}": one for part, one in stored.items()}
    for one, found in tensors.items():
        quantised.save_file(found, one / quantised.SINGLE, {"format": "pt"})
    ids = tokens(2, 9)
    with moefit.load(folder, mode="exact", context=64) as served:
        found = logits(served.model, ids)
    assert torch.allclose(found, logits(of_transformers(plain), ids), atol=2e-4, rtol=1e-4)
