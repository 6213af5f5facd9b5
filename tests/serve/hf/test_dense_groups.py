"""Dense weights are loaded and encoded group by group, to the same values as all at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_served import FAMILIES, saved, tiny, tokens

from moefit.quant.format import parse_format
from moefit.serve.config import LoadSettings
from moefit.serve.hf import dense_groups as groups
from moefit.serve.hf import skeleton as loading
from moefit.serve.hf.quant_linear import DenseEncoder, quantizable_modules
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.load import load_model

WIDE = {"hidden_size": 256}


def logits(folder: Path, **settings: Any) -> torch.Tensor:
    loaded = load_model(folder, LoadSettings(context=64, **settings))
    with loaded as served, torch.inference_mode():
        return served.model(tokens(1, 9)).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_groups_give_the_same_model(tmp_path: Path, family: str, tied: bool, monkeypatch) -> None:
    folder = saved(tiny(family, tie_word_embeddings=tied, **WIDE), tmp_path)
    at_once = logits(folder, dense_precision="int8")
    monkeypatch.setattr(groups, "GROUP_BYTES", 1)
    encoded: list[tuple[str, ...] | None] = []

    class Recorded(DenseEncoder):
        def encode(self, names=None):
            encoded.append(names)
            return super().encode(names)

    monkeypatch.setattr(loading, "DenseEncoder", Recorded)
    assert torch.equal(logits(folder, dense_precision="int8"), at_once)
    assert encoded[-1] is None and len(encoded) > 3
    assert all(names is not None and len(names) == 1 for names in encoded[:-1])


def test_tied_weights_wait_for_the_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(groups, "GROUP_BYTES", 1)
    for tied in (False, True):
        model = tiny("Mixtral", tie_word_embeddings=tied, **WIDE)
        skeleton = build_skeleton(saved(model, tmp_path / str(tied)))
        found = groups.dense_groups(
            skeleton.model, skeleton.map.dense_weights, skeleton.blocks, torch.float32
        )
        names = {name for group in found.groups for name in group.modules}
        both = {"lm_head", "model.embed_tokens"}
        assert names == set(quantizable_modules(skeleton.model, skeleton.blocks)) - (
            both if tied else set()
        )
        table = model.get_input_embeddings().weight
        assert found.rest == (table.numel() * 4 if tied else 0)
        assert found.peak >= table.numel() * 4


def test_biases_belong_to_their_matrix(tmp_path: Path) -> None:
    skeleton = build_skeleton(saved(tiny("GptOss", **WIDE), tmp_path))
    found = groups.dense_groups(
        skeleton.model, skeleton.map.dense_weights, skeleton.blocks, torch.bfloat16
    )
    sources = [name for group in found.groups for name in group.sources]
    assert "model.layers.0.self_attn.q_proj.bias" in sources
    stored = skeleton.map.dense_weights["model.layers.0.self_attn.q_proj.weight"]
    assert stored.dtype == torch.float32, "loaded as bfloat16, so that both exist for a moment"
    held = sum(group.nbytes for group in found.groups)
    assert held == sum(6 * skeleton.map.dense_weights[name].nbytes // 4 for name in sources)


def test_encoder_frees_what_it_encoded(tmp_path: Path) -> None:
    folder = saved(tiny("Mixtral", **WIDE), tmp_path)
    skeleton = build_skeleton(folder)
    done: list[tuple[int, int]] = []
    with load_model(
        folder,
        LoadSettings(context=64, dense_precision="int4"),
        progress=lambda what, at, total: done.append((at, total)) if what.startswith("d") else None,
    ) as served:
        assert not quantizable_modules(served.model, skeleton.blocks)
    assert done[-1][0] == done[-1][1] == len(done)
    assert parse_format("int4").dense_format is not None
