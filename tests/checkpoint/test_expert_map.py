"""Expert maps: each tensor belongs to an expert or to the dense weights."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_served import FAMILIES, Disk, reading_through, saved, tiny

from moefit.checkpoint.expert_map import CheckpointMap, _last_layers, map_checkpoint
from moefit.checkpoint.safetensors import SINGLE, Span
from moefit.checkpoint.sources import ByteRange, CompositeSource, Conversion, ExpertSource
from moefit.errors import CheckpointError
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.memory.estimate import memory_budget


def map_of(folder: Path, dtype: torch.dtype | None = None) -> CheckpointMap:
    return build_skeleton(folder, dtype).map


def parts_of(found: CheckpointMap) -> list[ExpertSource]:
    parts: list[ExpertSource] = []
    for source in (source for sources in found.experts.values() for source in sources):
        assert isinstance(source, CompositeSource)
        parts.extend(source.parts)
    return parts


def ranges(spans: list[Span]) -> list[tuple[int, int]]:
    return sorted((span.offset, span.offset + span.nbytes) for span in spans)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_is_expert_or_dense(tmp_path: Path, family: str) -> None:
    skeleton = build_skeleton(saved(tiny(family), tmp_path))
    pieces = [part for part in parts_of(skeleton.map) if isinstance(part, ByteRange)]
    assert pieces == parts_of(skeleton.map), "all can be read straight into place"
    spans = skeleton.checkpoint.spans
    found = ranges(
        [piece.span for piece in pieces] + [spans[name] for name in skeleton.map.dense_weights]
    )
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(found))
    assert found[0][0] == ranges([*spans.values()])[0][0]
    assert sum(end - start for start, end in found) == sum(one.nbytes for one in spans.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_size_matches_block(tmp_path: Path, family: str) -> None:
    skeleton = build_skeleton(saved(tiny(family), tmp_path))
    assert list(skeleton.map.experts) == [block.name for block in skeleton.blocks]
    for block in skeleton.blocks:
        sources = skeleton.map.experts[block.name]
        assert [source.nbytes for source in sources] == [block.expert_bytes] * block.num_experts


def test_other_dtype_needs_conversion(tmp_path: Path) -> None:
    folder = saved(tiny("Mixtral"), tmp_path)
    half = parts_of(map_of(folder, torch.bfloat16))
    assert half and all(isinstance(part, Conversion) for part in half)
    assert sum(part.nbytes for part in half if isinstance(part, Conversion)) == sum(
        part.span.nbytes for part in parts_of(map_of(folder)) if isinstance(part, ByteRange)
    )


def change_tensor(folder: Path, part: str, change: Any) -> None:
    tensors = load_file(folder / SINGLE)
    (name,) = [name for name in tensors if part in name]
    changed = change(tensors.pop(name))
    save_file(tensors | changed, folder / SINGLE, {"format": "pt"})


def test_missing_expert_raises(tmp_path: Path) -> None:
    saved(tiny("Mixtral"), tmp_path)
    change_tensor(tmp_path, "layers.1.block_sparse_moe.experts.7.w2", lambda tensor: {})
    with pytest.raises(CheckpointError, match=r"layers.1.*needs 8 experts.* has 7"):
        map_of(tmp_path)


def test_layer_without_experts_raises(tmp_path: Path) -> None:
    saved(tiny("Mixtral"), tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    left = {name: value for name, value in tensors.items() if "layers.1.block_sparse" not in name}
    save_file(left, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no tensor for .*layers.1"):
        map_of(tmp_path)


def test_only_headers_are_read(tmp_path: Path) -> None:
    saved(tiny("Mixtral"), tmp_path)
    with reading_through(Disk()) as disk:
        skeleton = build_skeleton(tmp_path)
        again = map_checkpoint(skeleton.model, skeleton.checkpoint, skeleton.blocks)
    assert disk.calls == 0
    assert again == skeleton.map


def test_extra_layers_raise_except_multi_token_prediction(
    tmp_path: Path,
) -> None:
    folder = saved(tiny("Mixtral"), tmp_path)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"config\.json leaves out, model\.layers\.1\."):
        build_skeleton(folder)
    file.write_text(json.dumps(values | {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}))
    assert "model.layers.1" in build_skeleton(folder).left_out()


def test_unexpected_biases_raise(tmp_path: Path) -> None:
    folder = saved(tiny("Mixtral"), tmp_path)
    name = "model.layers.1.self_attn.q_proj.bias"
    save_file(load_file(folder / SINGLE) | {name: torch.ones(32)}, folder / SINGLE)
    with pytest.raises(CheckpointError, match=rf"1 weights .* leaves out, {name}"):
        build_skeleton(folder)


@pytest.mark.parametrize("layer", ["model.layers.2", "mtp.layers.0"])
def test_unused_layers_are_skipped(tmp_path: Path, layer: str) -> None:
    folder = saved(tiny("Mixtral"), tmp_path)
    before, tensors = build_skeleton(folder), load_file(folder / SINGLE)
    more = {
        f"{layer}.{name.removeprefix('model.layers.1.')}": tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.layers.1.")
    }
    if not layer.startswith("mtp"):
        more[f"{layer}.eh_proj.weight"] = torch.ones(4, 8)
    save_file(tensors | more, folder / SINGLE, {"format": "pt"})
    after = build_skeleton(folder)
    assert after.map.dense_weights.keys() == before.map.dense_weights.keys()
    assert after.map.experts.keys() == before.map.experts.keys()
    assert set(after.map.unused) == more.keys() and not before.map.unused
    group = "mtp" if layer.startswith("mtp") else layer
    assert after.left_out() == {group: (len(more), sum(one.nbytes for one in more.values()))}
    assert (
        memory_budget(after, LoadSettings()).weights
        == memory_budget(before, LoadSettings()).weights
    )


def test_last_layers_of_as_many_names_as_large_models_have() -> None:
    """Pass over them once: with a pass for each, this takes an hour."""
    layers = [("model.layers", n % 61, f"mlp.experts.{n}.w1.weight") for n in range(200_000)]
    assert _last_layers([*layers, ("encoder.h", 3, "norm.weight")]) == {
        "model.layers": 60,
        "encoder.h": 3,
    }
