"""Linear layers in a quantised checkpoint's own codes: values, models, budgets, exceptions."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
from levels import HERE
from tiny_served import logits, saved, tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM

import moefit
from moefit.checkpoint.formats.encoding import EncodedTensor
from moefit.errors import CheckpointError
from moefit.quant import cpu_kernels
from moefit.serve.config import LoadSettings
from moefit.serve.hf.quant_linear import EncodedLinear
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.memory.estimate import memory_budget

BF16 = torch.bfloat16
SMALLEST = 64 * 64  # matrices below are not worth their codes
CPU = torch.device("cpu")
WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
KINDS = {
    "w4a16": ("Qwen2Moe", {**WIDE, "shared_expert_intermediate_size": 64}),
    "int8-channels": ("Mixtral", WIDE),
    "gptq": ("Mixtral", WIDE),
    "fp8-channels": ("DeepseekV3", {"hidden_size": 128, "q_lora_rank": 64, "v_head_dim": 32}),
}
needs_kernels = pytest.mark.skipif(not HERE, reason="kernels are not compiled")


def written(folder: Path, kind: str, dtype: torch.dtype = BF16) -> tuple[Path, Path]:
    """Return folders of a model with the same values, plain and quantised."""
    family, changes = KINDS[kind]
    plain = saved(tiny(family, dtype=dtype, **changes), folder / "plain")
    store, config = quantised.KINDS[kind]
    config = config | ({"desc_act": False} if kind == "gptq" else {})
    return plain, quantised.quantise(plain, folder / "quantised", store, config)


def held(skeleton: Skeleton) -> dict[str, Any]:
    return skeleton.held_linears(CPU)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_codes_stand_for(tmp_path: Path, kind: str) -> None:
    folder = written(tmp_path, kind)[1]
    skeleton = build_skeleton(folder)
    stored = skeleton.map.dense_weights
    encoded = {name: one for name, one in stored.items() if isinstance(one, EncodedTensor)}
    expected = {name for name, one in encoded.items() if prod(one.shape) >= SMALLEST}
    with moefit.load(folder, context=64) as served:
        found = {
            f"{name}.weight": module
            for name, module in served.model.named_modules()
            if isinstance(module, EncodedLinear)
        }
        assert found.keys() == expected and expected
        for name, module in found.items():
            exact = skeleton.checkpoint.tensor(stored[name]).float()
            difference = (module.matrix.dense(BF16).float() - exact).abs()
            assert (difference <= (2.0**-7 if kind == "gptq" else 0) * exact.abs()).all(), name
            bias = name.replace(".weight", ".bias")
            assert (module.bias is not None) == (bias in stored)
            if module.bias is not None:
                assert torch.equal(module.bias, skeleton.checkpoint.tensor(stored[bias]))


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_values(tmp_path: Path, kind: str) -> None:
    with moefit.load(written(tmp_path, kind)[1], context=64) as served:
        modules = [one for one in served.model.modules() if isinstance(one, EncodedLinear)]
        for module in modules:
            x_TI = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
            x_TI = x_TI.to(BF16)
            y_TO = x_TI.float() @ module.matrix.dense().T
            y_TO = y_TO if module.float_bias is None else y_TO + module.float_bias
            assert torch.allclose(module(x_TI).float(), y_TO, rtol=2.0**-7, atol=2.0**-7)


@needs_kernels
@pytest.mark.parametrize("kind", ["int8-channels", "fp8-channels"])
def test_answers_are_as_near_as_those_of_decoded_weights(tmp_path: Path, kind: str) -> None:
    """Of these formats, transformers rounds no value, so that it has the same weights."""
    plain, folder = written(tmp_path, kind)
    ids = tokens(2, 9)
    exact = logits(AutoModelForCausalLM.from_pretrained(plain).eval().float(), ids).float()

    def error(**settings: Any) -> float:
        with moefit.load(folder, context=64, **settings) as served:
            return float((logits(served.model, ids).float() - exact).square().mean().sqrt())

    assert error() <= 1.5 * error(dense_precision="decoded")


@needs_kernels
def test_estimate_has_codes_and_what_reading_takes(tmp_path: Path) -> None:
    skeleton = build_skeleton(written(tmp_path, "w4a16")[1])
    linears = held(skeleton)
    codes = memory_budget(skeleton, LoadSettings(context=64))
    decoded = memory_budget(skeleton, LoadSettings(context=64, dense_precision="decoded"))
    weights = sum(one.weight.shape[0] * one.weight.shape[1] for one in linears.values())
    saved_bytes = 2 * weights - sum(one.nbytes for one in linears.values())
    assert decoded.weights - codes.weights == saved_bytes > 0
    assert decoded.encoding == 0
    assert codes.encoding == codes.weights + max(
        one.weight.working_bytes for one in linears.values()
    )


@needs_kernels
def test_memory_of_a_served_model_is_the_estimate(tmp_path: Path) -> None:
    folder = written(tmp_path, "int8-channels")[1]
    expected = sum(one.nbytes for one in held(build_skeleton(folder)).values())
    with moefit.load(folder, context=64) as served:
        modules = [one for one in served.model.modules() if isinstance(one, EncodedLinear)]
        buffers = [one.get_buffer(name) for one in modules for name in ("codes_RB", "meta_RMG")]
        memory = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in buffers}
        assert len(memory) == 1, "one mapping"
        assert sum(one.nbytes() for one in memory.values()) == pytest.approx(expected, abs=2 << 20)


@pytest.mark.parametrize("setting", ["float32", "decoded", "int8", "gpu", "torch"])
def test_other_settings_hold_values(tmp_path: Path, monkeypatch, setting: str) -> None:
    folder = written(tmp_path, "w4a16")[1]
    if setting == "gpu":
        assert not build_skeleton(folder).held_linears(torch.device("cuda"))
        return
    if setting == "torch":
        monkeypatch.setenv(cpu_kernels.SWITCH, "torch")
        cpu_kernels.kernels.cache_clear()
    how = {"float32": {"dtype": torch.float32}, "torch": {}}.get(
        setting, {"dense_precision": setting}
    )
    with moefit.load(folder, context=64, **how) as served:
        modules = [one for one in served.model.modules() if isinstance(one, EncodedLinear)]
        assert bool(modules) == (setting == "int8")
        assert all(one.matrix.kind == 8 for one in modules)
    monkeypatch.undo()
    cpu_kernels.kernels.cache_clear()


@needs_kernels
def test_tied_heads_and_routers_hold_values(tmp_path: Path) -> None:
    """Every matrix is stored in codes here, embedding and head too."""
    model = tiny("Mixtral", dtype=BF16, tie_word_embeddings=True, **WIDE)
    plain = saved(model, tmp_path / "plain")
    tensors = quantised.load_file(plain / quantised.SINGLE)
    stored = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if tensor.dim() == 2:
            parts, _ = quantised.w4a16(tensor.float())
            stored |= {f"{stem}.{part}": one.contiguous() for part, one in parts.items()}
        else:
            stored[name] = tensor
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "config.json").write_text((plain / "config.json").read_text())
    scheme = quantised.KINDS["w4a16"][1]
    quantised._write(folder, stored, {"quantization_config": scheme})
    names = held(build_skeleton(folder))
    # keys and values are too small to be worth it
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "o_proj"}
    with moefit.load(folder, context=64) as served:
        assert type(served.model.lm_head) is nn.Linear
        assert torch.isfinite(logits(served.model, tokens(1, 5))).all()


@needs_kernels
def test_damaged_weight_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path, "fp8-channels")[1]
    tensors = quantised.load_file(folder / quantised.SINGLE)
    name = next(one for one in tensors if one.endswith("o_proj.weight_scale"))
    tensors[name][3] = float("nan")
    quantised.save_file(tensors, folder / quantised.SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"o_proj\.weight \(fp8.*not finite"):
        moefit.load(folder, context=64)


@needs_kernels
@pytest.mark.parametrize("dense", [None, "decoded"])
def test_gptq_out_of_order_names_the_setting_that_reads_it(tmp_path: Path, dense) -> None:
    folder = written(tmp_path, "gptq")[1]
    tensors = quantised.load_file(folder / quantised.SINGLE)
    name = next(one for one in tensors if one.endswith("q_proj.g_idx"))
    tensors[name] = tensors[name].flip(0)
    quantised.save_file(tensors, folder / quantised.SINGLE, {"format": "pt"})
    if dense is None:
        with pytest.raises(CheckpointError, match=r"q_proj.*--dense-precision decoded"):
            moefit.load(folder, context=64)
    else:
        moefit.load(folder, context=64, dense_precision=dense).close()
