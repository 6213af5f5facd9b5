import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import differs_by
from tiny_served import COMMON, FAMILIES, Disk, logits, reading_through, saved, tiny, tokens
from transformers import LlamaConfig, LlamaForCausalLM

import moefit
from moefit.checkpoint.safetensors import SINGLE
from moefit.errors import BudgetTooSmallError, CheckpointError, ConfigError, UnsupportedModelError
from moefit.serve import load
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.io.loads import BACKGROUND_READERS
from moefit.serve.load import load_model
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.memory.estimate import SPARES, memory_budget

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny("Mixtral"), tmp_path)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def open_files(folder: Path) -> int:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(str(link.readlink()).startswith(str(folder)) for link in links)


def test_missing_config_raises(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"has no config.json; give a folder that save"):
            load_model(folder, LoadSettings())


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"model_type": "no such family"}'])
def test_damaged_config_raises(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json .*cannot be read"):
        load_model(folder, LoadSettings())


def test_missing_weights_raise(folder: Path) -> None:
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="only safetensors checkpoints"):
        load_model(folder, LoadSettings())


@pytest.mark.parametrize("part", ["lm_head", "input_layernorm", "block_sparse_moe.gate", "q_proj"])
def test_missing_tensors_are_named(folder: Path, part: str) -> None:
    tensors = load_file(folder / SINGLE)
    gone = [name for name in tensors if part in name]
    save_file({n: t for n, t in tensors.items() if n not in gone}, folder / SINGLE,
              {"format": "pt"})  # fmt: skip
    with pytest.raises(CheckpointError, match=rf"lacks {len(gone)} weights .*{part[-4:]}"):
        load_model(folder, LoadSettings())


def test_tensors_of_another_shape_are_named(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, 1:].contiguous()
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"another shape .*lm_head"):
        load_model(folder, LoadSettings())


def test_other_number_of_experts_raises(folder: Path) -> None:
    change_config(folder, num_local_experts=9)
    with pytest.raises(CheckpointError, match="needs 9 experts, but the checkpoint has 8"):
        load_model(folder, LoadSettings())


def test_dense_model_raises(tmp_path: Path) -> None:
    saved(LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=16)), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no experts"):
        load_model(tmp_path, LoadSettings())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"eviction": "fifo"}, "eviction 'fifo' is not one of lru, lfu, importance"),
        ({"mode": "fast"}, "mode='fast' is not one of exact, bounded, virtual"),
        ({"device": "tpu"}, "device='tpu' is not available here"),
        ({"memory": "much"}, "'much' is not a size"),
        ({"memory": 0}, "0 is not a size"),
        ({"host_memory": "1GiB"}, "host_memory='1GiB', but on a CPU .* give it to memory"),
        ({"host_memory": 0}, "host_memory=0, but on a CPU"),
        ({"host_compute": "monde"}, "host_compute='monde' divides misses between a GPU and"),
        ({"host_compute": "all"}, "host_compute='all' is not one of auto, fetch-all"),
        ({"context": 0}, "context=0"),
        ({"context": -5}, "context=-5"),
        ({"context": 1.5}, "context=1.5"),
        ({"readers": 0}, "readers=0"),
        ({"readers": "4"}, "readers='4'"),
        ({"half_life_tokens": 0.0}, "half_life_tokens=0.0"),
        ({"half_life_tokens": float("nan")}, "half_life_tokens=nan"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
    ],
)
def test_invalid_settings_raise(folder: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_model(folder, LoadSettings(**settings))
    assert open_files(folder) == 0


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"bound": 2.0}, "bound=2.0"),
        ({"bounds": 0.1}, "unknown setting"),
        ({"prefill": 1}, "prefill"),
    ],
)
def test_invalid_policies_raise(folder: Path, policy: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_model(folder, LoadSettings(), **policy)
    assert open_files(folder) == 0


@pytest.mark.parametrize("name", ["float32", "torch.float32"])
def test_dtype_may_be_a_name(folder: Path, name: str) -> None:
    with moefit.load(folder, dtype=name) as served:
        assert {weight.dtype for weight in served.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["fp32", "Tensor", "int8"])
def test_unknown_name_of_a_dtype_raises(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not torch\.float32, torch\.bfloat16 or"):
        moefit.load(folder, dtype=name)


def floor_of(folder: Path, **settings: Any) -> MemoryBudget:
    return memory_budget(build_skeleton(folder, settings.get("dtype")), LoadSettings(**settings))


def test_too_small_budget_raises_before_reading(folder: Path) -> None:
    with reading_through(Disk()) as disk, pytest.raises(BudgetTooSmallError) as caught:
        load_model(folder, LoadSettings(memory="10MiB"))
    assert disk.calls == 0
    named = int(str(caught.value).split("at least ")[1].split()[0])
    with load_model(folder, LoadSettings(memory=named + MIB)) as served:
        assert min(served.report()["slots"].values()) >= 1
        served.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_budget_at_load_becomes_slots(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    saved(model, tmp_path)
    before = floor_of(tmp_path, context=64)
    some = before.min_bytes + sum(2 * block.slot_bytes for block in before.blocks)
    # The process itself may have grown or shrunk by a page or two between the two ledgers.
    slack = before.blocks[0].slot_bytes // 2
    with load_model(tmp_path, LoadSettings(memory=some + slack, context=64)) as served:
        served.check()
        report = served.report()
        assert report["slot_bytes"] + report["spare_bytes"] <= some + slack - (
            served.budget.fixed - served.budget.staging
        )
        assert differs_by(logits(served.model, tokens(1, 6)), logits(model, tokens(1, 6))) < 1e-4


def test_no_budget_makes_all_resident(folder: Path) -> None:
    with load_model(folder, LoadSettings(context=64)) as served:
        assert set(served.report()["slots"].values()) == {8}
        assert served.budget.total is None


def test_estimate_depends_on_context_dtype_and_readers(folder: Path) -> None:
    short, long = floor_of(folder, context=16), floor_of(folder, context=64)
    assert long.kv_cache == 4 * short.kv_cache and long.workspace > short.workspace
    assert floor_of(folder, context=10**9).kv_cache == floor_of(folder, context=128).kv_cache
    half = floor_of(folder, context=64, dtype=torch.bfloat16)
    assert 2 * half.kv_cache == long.kv_cache and 2 * half.weights == long.weights
    slot = long.blocks[0].slot_bytes
    assert long.staging == SPARES * slot
    converted = floor_of(folder, context=64, dtype=torch.bfloat16, readers=3)
    expert = 3 * 24 * 32 * 4
    assert converted.staging == SPARES * half.blocks[0].slot_bytes + 2 * expert * (
        3 + BACKGROUND_READERS
    )


def test_an_int8_cache_takes_a_byte_a_value_and_four_a_head(folder: Path) -> None:
    own, rounded = floor_of(folder, context=64), floor_of(folder, context=64, kv_cache="int8")
    assert (own.kv_dtype, rounded.kv_dtype) == ("float32", "int8")
    assert rounded.kv_cache * 4 * 8 == own.kv_cache * (8 + 4)  # heads of 8 values
    ours, theirs = (one.fixed - one.process for one in (own, rounded))  # this process grows
    assert ours - theirs == own.kv_cache - rounded.kv_cache


def test_gpu_estimate_without_gpu(folder: Path) -> None:
    cpu, gpu = floor_of(folder, context=64), floor_of(folder, context=64, device="cuda")
    assert cpu.process > 50 * MIB, "interpreter and libraries"
    assert gpu.process == torch.cuda.memory_reserved(), "which are not on it"
    assert (gpu.weights, gpu.kv_cache) == (cpu.weights, cpu.kv_cache)
    assert gpu.blocks[0].slot_bytes >= cpu.blocks[0].slot_bytes
    assert gpu.staging == SPARES * gpu.blocks[0].slot_bytes
    converted = floor_of(folder, context=64, device="cuda", dtype=torch.bfloat16)
    assert converted.staging == SPARES * converted.blocks[0].slot_bytes, "converted in host memory"


def test_host_memory_default(folder: Path) -> None:
    slot = floor_of(folder).blocks[0].slot_bytes
    assert floor_of(folder).host is None
    assert floor_of(folder, device="cuda").host == slot * (4 + BACKGROUND_READERS)
    assert floor_of(folder, device="cuda:0", readers=2, host_memory=0).host == slot * (
        2 + BACKGROUND_READERS
    )
    assert floor_of(folder, device="cuda", host_memory="1MiB").host == MIB
    with pytest.raises(ConfigError, match=f"cannot hold an expert.* give at least {slot} bytes"):
        floor_of(folder, device="cuda", host_memory=slot - 1)
    assert floor_of(folder, device="cuda", host_memory=slot).host == slot
    with pytest.raises(ConfigError, match="is not a size"):
        floor_of(folder, device="cuda", host_memory="lots")
    packed = floor_of(folder, device="cuda", precision="int4")
    assert packed.host == packed.blocks[0].slot_bytes * (4 + BACKGROUND_READERS) < 6 * slot
    assert floor_of(folder, device="cuda", precision="auto").host == 6 * slot, "the largest format"


@pytest.mark.parametrize("family", FAMILIES)
def test_other_dtype_equals_converted_model(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    saved(model, tmp_path)
    model.to(torch.bfloat16)
    with load_model(tmp_path, LoadSettings(context=64, dtype=torch.bfloat16)) as served:
        for parameter in served.model.parameters():
            assert parameter.dtype == torch.bfloat16 or parameter.dtype == torch.float32
        theirs, ours = logits(model, tokens(1, 8)), logits(served.model, tokens(1, 8))
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).abs().mean()) < 0.05 * float(theirs.abs().mean())


def test_converted_weights_equal_checkpoint(folder: Path) -> None:
    model = tiny("Mixtral")
    with load_model(folder, LoadSettings(context=64)) as served:
        own = dict(model.state_dict())
        for name, tensor in served.model.state_dict().items():
            assert torch.equal(tensor, own[name]), name
            assert not tensor.is_meta
        assert len(own) - len(served.model.state_dict()) == 4, "two stacks of experts a layer"


def broken_by(failure: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    return fail


@pytest.mark.parametrize("step", ["load_dense_weights", "attach_hooks", "grow", "allocate_spares"])
def test_failed_load_closes_files(folder: Path, monkeypatch, step: str) -> None:
    monkeypatch.setattr(load, step, broken_by(MemoryError("no more")))
    with pytest.raises(MemoryError, match="no more"):
        load_model(folder, LoadSettings())
    assert open_files(folder) == 0


def test_blocks_have_depth(folder: Path) -> None:
    with load_model(folder, LoadSettings(context=64)) as served:
        depths = [block.depth for block in served.blocks.values()]
    assert depths == [(n + 0.5) / len(depths) for n in range(len(depths))]


@pytest.mark.parametrize("precision", ["native", "int8"])
def test_experts_with_biases_in_float16(tmp_path: Path, precision: str) -> None:
    """Kernels compute them as they do those without."""
    folder = saved(tiny("GptOss"), tmp_path)
    with load_model(folder, LoadSettings(context=64, dtype=torch.float16)) as plain:
        expected = logits(plain.model, tokens(1, 9))
    settings = LoadSettings(context=64, dtype=torch.float16, precision=precision)
    with load_model(folder, settings) as served:
        found = logits(served.model, tokens(1, 9))
    assert differs_by(found, expected) < 0.05
