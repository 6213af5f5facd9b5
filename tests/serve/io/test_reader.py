from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_served import FAMILIES, Disk, parts_of, reading_through, saved, tiny

from moefit.checkpoint.safetensors import SINGLE
from moefit.checkpoint.sources import ByteRange, CompositeSource, Conversion, ExpertSource
from moefit.errors import CheckpointError, MoefitError
from moefit.quant.format import NativeFormat
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.io.reader import ExpertStore

CPU = torch.device("cpu")


def open_store(folder: Path, dtype: torch.dtype | None = None) -> tuple[ExpertStore, Skeleton]:
    skeleton = build_skeleton(folder, dtype)
    blocks = {block.name: block for block in skeleton.blocks}
    return ExpertStore(skeleton.checkpoint, skeleton.map.experts, blocks), skeleton


def consists_of(source: ExpertSource, kind: type) -> bool:
    assert isinstance(source, CompositeSource)
    return all(isinstance(part, kind) for part in source.parts)


def dirty_slot(specs: Any) -> Slot:
    slot = allocate_slot(NativeFormat(), specs, CPU)
    for tensor in slot.tensors.values():
        tensor.fill_(torch.nan)
    return slot


def assert_reads_as_the_model_has_it(folder: Path, model: Any, dtype: torch.dtype | None = None):
    store, skeleton = open_store(folder, dtype)
    for block in skeleton.blocks:
        module = model.get_submodule(block.name)
        slot = dirty_slot(block.layout.specs)
        for expert in range(block.num_experts):
            store.read(block.name, expert, slot)
            expected = parts_of(module, block, expert)
            assert expected.keys() == slot.tensors.keys() == dict(block.layout.specs).keys()
            for short, value in expected.items():
                assert torch.equal(slot.tensors[short], value.to(dtype)), (expert, short)
    store.close()
    return store, skeleton


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_equal_model_weights(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    store, skeleton = assert_reads_as_the_model_has_it(saved(model, tmp_path), model)
    sources = [source for sources in skeleton.map.experts.values() for source in sources]
    assert all(consists_of(source, ByteRange) for source in sources), "straight into the slot"
    assert store.staging_bytes == 0
    assert store.bytes_read == sum(block.expert_bytes * 8 for block in skeleton.blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_several_shards(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    saved(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_reads_as_the_model_has_it(tmp_path, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_converted_one_at_a_time(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    store, skeleton = assert_reads_as_the_model_has_it(
        saved(model, tmp_path), model, torch.bfloat16
    )
    sources = [source for sources in skeleton.map.experts.values() for source in sources]
    assert all(consists_of(source, Conversion) for source in sources)
    assert store.staging_bytes == 2 * max(source.nbytes for source in sources)
    assert store.bytes_read == sum(source.nbytes for source in sources)


def test_separate_and_stacked_experts(tmp_path: Path) -> None:
    """Return the same model in both checkpoint layouts of its family."""
    model = tiny("Mixtral")
    saved(model, tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    assert any(".experts.3." in name for name in tensors), "one by one is what is written"
    stacked = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(2):
        experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for short, value in experts.named_parameters():
            stacked[f"model.layers.{layer}.mlp.experts.{short}"] = value.detach().contiguous()
    save_file(stacked, tmp_path / SINGLE, {"format": "pt"})
    assert_reads_as_the_model_has_it(tmp_path, model)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_norms_are_of_flattened_experts(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    for dtype in (None, torch.float64):
        store, skeleton = open_store(saved(model, tmp_path), dtype)
        block = skeleton.blocks[1]
        expected = [
            float(torch.cat([part.detach().flatten() for part in parts.values()]).norm())
            for parts in (parts_of(model.get_submodule(block.name), block, e) for e in range(8))
        ]
        assert store.norms(block.name) == pytest.approx(expected, rel=1e-5)
        store.close()


def test_failed_read_raises_and_next_read_works(tmp_path: Path) -> None:
    model = tiny("Mixtral")
    saved(model, tmp_path)
    with reading_through(Disk()) as disk:
        store, skeleton = open_store(tmp_path)
    block = skeleton.blocks[0]
    slot = dirty_slot(block.layout.specs)
    disk.failures = 10**6
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*cannot be read after 3"):
        store.read(block.name, 2, slot)
    assert store.bytes_read == 0
    disk.failures = 2
    store.read(block.name, 2, slot)
    for short, value in parts_of(model.get_submodule(block.name), block, 2).items():
        assert torch.equal(slot.tensors[short], value)


def test_expert_of_another_shape_raises(tmp_path: Path) -> None:
    saved(tiny("Mixtral"), tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    (name,) = [name for name in tensors if "layers.1.block_sparse_moe.experts.7.w2" in name]
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(MoefitError, match=r"layers.1.*experts"):
        store, skeleton = open_store(tmp_path)
        store.read(skeleton.blocks[1].name, 7, dirty_slot(skeleton.blocks[1].layout.specs))
