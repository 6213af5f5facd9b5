"""Quantised weights of unknown formats raise; models with unrelated scales do not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_served import FAMILIES, saved, tiny
from torch import Tensor
from typer.testing import CliRunner

from moefit.checkpoint.quantisation import refuse_declared, sign_of
from moefit.checkpoint.safetensors import SINGLE
from moefit.cli import app
from moefit.errors import UnsupportedModelError
from moefit.evaluate.loading import load_full_model as load_whole
from moefit.evaluate.loading import reference_path
from moefit.serve.hf.skeleton import build_skeleton, refuse_unservable

EXPERT = "experts.0.up_proj.weight"
# What each kind writes in place of, or beside, a weight.
KINDS = {
    "weight_scale_inv": ("8-bit floats in blocks", {"weight_scale_inv": torch.ones(1, 1)}),
    "absmax": ("bitsandbytes", {"weight.absmax": torch.ones(12)}),
    "weight_scale_2": ("modelopt", {"weight_scale_2": torch.ones(())}),
    "input_scale": ("8-bit floats or integers", {"input_scale": torch.ones(())}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny("Olmoe"), tmp_path)


def change_tensors(folder: Path, change: Any) -> str:
    """Change the first expert's up projection and return its module's name."""
    tensors = load_file(folder / SINGLE)
    name = next(name for name in tensors if name.endswith(EXPERT))
    module = name.removesuffix(".weight")
    weight = tensors.pop(name)
    save_file(tensors | change(module, weight), folder / SINGLE, {"format": "pt"})
    return module


def declare(folder: Path, *path: str, **config: Any) -> None:
    found = json.loads((folder / "config.json").read_text())
    inner = found
    for key in path:
        inner = inner.setdefault(key, {})
    inner |= config
    (folder / "config.json").write_text(json.dumps(found))


@pytest.mark.parametrize("path", [(), ("text_config",), ("thinker_config", "text_config")])
def test_declared_quantisation_raises(folder: Path, path: tuple[str, ...]) -> None:
    refuse_declared(folder)
    declare(folder, *path, quantization_config={"quant_method": "bitsandbytes"})
    where = ".".join([*path, "quantization_config"])
    for enter in (build_skeleton, refuse_unservable, lambda folder: load_whole(str(folder))):
        with pytest.raises(UnsupportedModelError, match=rf"bitsandbytes.*{where}"):
            enter(folder)


def test_whole_models_with_a_declaration_raise(folder: Path) -> None:
    file = folder / "hf_quant_config.json"
    file.write_text(
        json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}})
    )
    build_skeleton(folder)  # a quantised cache leaves the weights as they are
    file.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    build_skeleton(folder)  # weights that are not quantised are read as they are
    with pytest.raises(UnsupportedModelError, match=r"modelopt.*hf_quant_config.json.*--memory"):
        load_whole(str(folder))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize("part", [EXPERT, "q_proj.weight", "lm_head.weight"])
def test_integers_for_float_parameter_raise(folder: Path, dtype: torch.dtype, part: str) -> None:
    tensors = load_file(folder / SINGLE)
    short = str(dtype).removeprefix("torch.")
    name = next(name for name in tensors if name.endswith(part))
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    for enter in (build_skeleton, lambda folder: load_whole(str(folder))):
        with pytest.raises(UnsupportedModelError, match=rf"{name} is {short}"):
            enter(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["Olmoe", "Mixtral"])
def test_undeclared_scales_raise(tmp_path: Path, family: str, kind: str) -> None:
    folder = saved(tiny(family), tmp_path)
    meaning, more = KINDS[kind]
    part = EXPERT if family == "Olmoe" else "experts.0.w1.weight"
    tensors = load_file(folder / SINGLE)
    weight = next(name for name in tensors if name.endswith(part))
    module = weight.removesuffix(".weight")
    tensors |= {f"{module}.{short}": tensor for short, tensor in more.items()}
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=meaning):
        build_skeleton(folder)


@pytest.mark.parametrize("bits", [3, 5])
def test_packed_integers_of_other_widths_raise(folder: Path, bits: int) -> None:
    def packed(module: str, weight: Tensor) -> dict[str, Tensor]:
        return {
            f"{module}.weight_packed": torch.zeros(24, 4, dtype=torch.int32),
            f"{module}.weight_scale": torch.ones(24, 1),
        }

    change_tensors(folder, packed)
    weights = {"num_bits": bits}
    groups = {"config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}}
    declare(folder, quantization_config={"quant_method": "compressed-tensors", **groups})
    with pytest.raises(
        UnsupportedModelError, match=rf"to {bits} bits \(compressed-tensors\).*integers of 2, 4, 8"
    ):
        build_skeleton(folder)


@pytest.mark.parametrize(("method", "key"), [("gptq", "bits"), ("awq", "w_bit")])
def test_declared_width_that_cannot_be_read_is_named(folder: Path, method: str, key: str) -> None:
    declare(folder, quantization_config={"quant_method": method, key: 3})
    with pytest.raises(UnsupportedModelError, match=rf"to 3 bits \({method}\)"):
        build_skeleton(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_models_pass(tmp_path: Path, family: str) -> None:
    build_skeleton(saved(tiny(family), tmp_path))


def test_unrelated_scales_are_accepted(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    more: dict[str, Tensor] = {
        "model.layers.0.self_attn.k_scale": torch.ones(1),  # of a quantised cache
        "vision_tower.blocks.0.layer_scale": torch.ones(4),  # of a part that is not loaded
        "model.layers.2.norm.scale": torch.ones(4),
        "logit_scale": torch.ones(()),
    }
    save_file(tensors | more, folder / SINGLE, {"format": "pt"})
    assert set(build_skeleton(folder).map.unused) == more.keys()


def test_ordinary_weight_names_are_accepted() -> None:
    for name in ("model.norm.weight", "model.layers.0.mlp.gate.weight", "lm_head.bias"):
        assert sign_of(name) is None


@pytest.mark.parametrize(
    "command",
    [("generate", "x"), ("generate", "x", "--memory", "9GiB"), ("describe", "--memory", "9GiB"),
     ("pack",), ("eval",), ("eval", "--memory", "9GiB"), ("bench",)],
    ids=" ".join,
)  # fmt: skip
def test_every_command_rejects_quantised_models(folder: Path, command: tuple[str, ...]) -> None:
    change_tensors(
        folder, lambda module, weight: {f"{module}.weight": weight.to(torch.float8_e5m2)}
    )
    for file in reference_path().glob("tokenizer*"):
        shutil.copy(file, folder)
    name, *rest = command
    found = CliRunner().invoke(app, [name, str(folder), *rest], env={"COLUMNS": "400"})
    assert found.exit_code == 1 and "is quantised" in str(found.exception)
