"""LoRA adapters: the served model is the merged one, and what cannot be applied is refused."""

import json
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_served import logits, saved, tiny, tokens
from torch import Tensor
from typer.testing import CliRunner

from moefit.checkpoint.adapter import read_adapter
from moefit.cli import app
from moefit.errors import CheckpointError, ConfigError, MoefitError, UnsupportedModelError
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model

WIDTH = 32
QUERY = "model.layers.1.self_attn.q_proj"
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": "a/b",
    "use_dora": False, "alpha_pattern": {},
}  # fmt: skip


def written(folder: Path, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    """Write an adapter as PEFT does."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    stored = {f"base_model.model.{name}": one.contiguous() for name, one in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    return folder


def pair(module: str, rows: int, cols: int, rank: int = 4) -> dict[str, Tensor]:
    """Return random A and B for a linear layer."""
    a, b = torch.randn(rank, cols), torch.randn(rows, rank)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny("Mixtral"), tmp_path_factory.mktemp("model"))


def test_served_model_is_the_merged_one(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = tiny("Mixtral")
    vocabulary = model.config.vocab_size
    tensors = pair(QUERY, WIDTH, WIDTH) | pair("model.layers.0.mlp.gate", 8, WIDTH, rank=2)
    embedding = torch.randn(4, vocabulary), torch.randn(WIDTH, 4)
    names = (f"model.embed_tokens.lora_embedding_{half}" for half in "AB")
    tensors |= dict(zip(names, embedding, strict=True))
    tensors["lm_head.modules_to_save.weight"] = torch.randn(vocabulary, WIDTH) * 0.2
    path = written(tmp_path / "adapter", tensors, alpha_pattern={"mlp.gate": 3})

    def delta(module: str, scale: float) -> Tensor:
        a, b = (tensors[f"{module}.lora_{half}.weight"] for half in "AB")
        return scale * b @ a

    with torch.no_grad():
        model.get_parameter(f"{QUERY}.weight").add_(delta(QUERY, 6 / 4))
        model.model.layers[0].mlp.gate.weight.add_(delta("model.layers.0.mlp.gate", 3 / 2))
        model.model.embed_tokens.weight.add_(6 / 4 * (embedding[1] @ embedding[0]).T)
        model.lm_head.weight.copy_(tensors["lm_head.modules_to_save.weight"])
    ids = tokens(2, 9)
    with load_model(folder, LoadSettings(context=64, adapter=str(path))) as served:
        served.set_memory(served.budget.min_bytes)  # builds the model's description again
        expected = logits(model, ids)
        torch.testing.assert_close(logits(served.model, ids), expected, atol=1e-4, rtol=0)
    with load_model(folder, LoadSettings(context=64)) as plain:
        assert not torch.allclose(logits(plain.model, ids), logits(model, ids), atol=0.1)


@pytest.mark.parametrize("kind", ["mixed dtypes", "rslora", "transposed"])
def test_product_and_scale(folder: Path, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    tensors = pair(QUERY, WIDTH, WIDTH)
    settings = {"use_rslora": kind == "rslora", "fan_in_fan_out": kind == "transposed"}
    if kind == "mixed dtypes":
        tensors = {name: one.bfloat16() for name, one in tensors.items()}
    path = written(tmp_path / "adapter", tensors, **settings)
    a, b = (one.float() for one in tensors.values())
    product = b @ a * (6 / sqrt(4) if kind == "rslora" else 6 / 4)
    expected = tiny("Mixtral").get_parameter(f"{QUERY}.weight").detach() + (
        product.T if kind == "transposed" else product
    )
    with load_model(folder, LoadSettings(context=64, adapter=path)) as served:
        torch.testing.assert_close(served.model.get_parameter(f"{QUERY}.weight"), expected)


BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "experts": (pair("model.layers.0.block_sparse_moe.experts.3.w1", 24, WIDTH), {}, "adapts exp"),
    "other model": (pair("model.layers.9.self_attn.q_proj", WIDTH, WIDTH), {}, "no such dense"),
    "shape": (pair(QUERY, WIDTH, 48), {}, r"\[32, 48\], but the model's is \[32, 32\].*'a/b'"),
    "half": (dict(list(pair(QUERY, WIDTH, WIDTH).items())[:1]), {}, "only one of the two"),
    "rank": (
        pair(QUERY, WIDTH, WIDTH) | {f"{QUERY}.lora_B.weight": torch.ones(WIDTH, 3)},
        {}, "do not multiply",
    ),
    "dora": (pair(QUERY, WIDTH, WIDTH), {"use_dora": True}, "uses use_dora; only LoRA"),
    "kind": (pair(QUERY, WIDTH, WIDTH), {"peft_type": "IA3"}, "of the kind IA3; only LoRA"),
    "tensor": ({f"{QUERY}.lora_magnitude_vector": torch.ones(4)}, {}, "no matrix of LoRA"),
    "alpha": (pair(QUERY, WIDTH, WIDTH), {"lora_alpha": "6"}, "'6' where a finite number"),
    "pattern": (pair(QUERY, WIDTH, WIDTH), {"alpha_pattern": {"(": 2}}, "alpha_pattern has"),
    "alpha that is not finite": (
        pair(QUERY, WIDTH, WIDTH), {"lora_alpha": float("nan")}, "nan where a finite number",
    ),
    "alpha of 400 digits": (pair(QUERY, WIDTH, WIDTH), {"lora_alpha": 10**400}, "too large"),
    "patterns": (pair(QUERY, WIDTH, WIDTH), {"alpha_pattern": ["x"]}, "numbers by pattern belong"),
    "slow group": (pair(QUERY, WIDTH, WIDTH), {"alpha_pattern": {"((.)*)*X": 2}}, "very long"),
    "slow rest": (pair(QUERY, WIDTH, WIDTH), {"alpha_pattern": {".*.*.*.*X": 2}}, "very long"),
    "rank 0": (pair(QUERY, WIDTH, WIDTH, rank=0), {}, "do not multiply"),
    "pissa": (
        pair(QUERY, WIDTH, WIDTH), {"init_lora_weights": "pissa_niter_4"},
        "path_initial_model_for_weight_conversion",
    ),
    "no tensors": ({}, {}, "has no tensors"),
    "twice": (
        pair(QUERY, WIDTH, WIDTH) | {f"{QUERY}.lora_A.default.weight": torch.ones(4, WIDTH)},
        {}, "two tensors for one weight",
    ),
    "whole, not finite": (
        {"model.norm.weight": torch.full((WIDTH,), torch.nan)}, {}, "not finite",
    ),
    "whole, integers": (
        {"model.norm.weight": torch.ones(WIDTH, dtype=torch.int8)}, {}, "in int8, where floating",
    ),
    "nan": ({n: t * torch.nan for n, t in pair(QUERY, WIDTH, WIDTH).items()}, {}, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_applied_raises(folder: Path, tmp_path: Path, kind: str) -> None:
    tensors, settings, match = BAD[kind]
    path = written(tmp_path / "adapter", tensors, **settings)
    with pytest.raises(MoefitError, match=match) as raised:
        load_model(folder, LoadSettings(context=64, adapter=path)).close()
    unsupported = kind in ("experts", "dora", "kind", "tensor", "pissa")
    assert isinstance(raised.value, UnsupportedModelError) == unsupported


def test_tied_weights_are_one(tmp_path: Path) -> None:
    """A saved head that equals the saved embedding is served; another is not."""
    folder = saved(tiny("Mixtral", tie_word_embeddings=True), tmp_path / "model")
    rows = torch.randn(tiny("Mixtral").config.vocab_size, WIDTH)
    both = {"model.embed_tokens.weight": rows, "lm_head.weight": rows.clone()}
    path = written(tmp_path / "a", both)
    with load_model(folder, LoadSettings(context=64, adapter=path)) as served:
        assert torch.equal(served.model.lm_head.weight, rows)
        assert served.report()["adapter"] == str(path)
    others = (both | {"lm_head.weight": rows + 1}, pair("lm_head", len(rows), WIDTH))
    for tensors in (*others, {"lm_head.weight": rows}):
        path = written(tmp_path / "a", tensors)
        with pytest.raises(UnsupportedModelError, match=r"lm_head.weight, which .* has tied to"):
            load_model(folder, LoadSettings(context=64, adapter=path)).close()


def test_missing_files_raise(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json.*hf download"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"has no adapter_model.safetensors.*adapter_model.bin"
    ):
        read_adapter(tmp_path)


def test_command_takes_an_adapter() -> None:
    """The option reaches the loader, also in commands that could load the model as a whole."""
    found = CliRunner().invoke(app, ["generate", "reference", "x", "--adapter", "nowhere"])
    assert isinstance(found.exception, CheckpointError)
    assert "nowhere has no adapter_config.json" in str(found.exception)
    planned = ["--adapter", "nowhere", "--memory", "1GiB", "--max-loss", "3%"]
    found = CliRunner().invoke(app, ["generate", "reference", "x", *planned])
    assert isinstance(found.exception, ConfigError)
    assert "plans predict the loss of the model without an adapter" in str(found.exception)
