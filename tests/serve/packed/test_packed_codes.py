"""Packing the checkpoint's own codes: the same slots, fewer reads, and the same refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
from tiny_gguf import VOCABULARY, configs
from tiny_served import logits, saved, settled, tiny, tokens, with_slots
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moefit
from moefit.checkpoint.safetensors import SpanReader
from moefit.cli import app
from moefit.errors import CheckpointError, ConfigError
from moefit.gguf.write import write_gguf
from moefit.quant.format import DECODED, NATIVE, parse_format
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.memory import estimate, held
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.packed import store as packed_store
from moefit.serve.packed.build import pack
from moefit.serve.packed.calibrate import CalibrationText
from moefit.serve.packed.check import check_packed
from moefit.serve.packed.file import read_packed
from moefit.serve.packed.store import PackedLocation, open_packed
from moefit.serve.windows import Windows
from moefit.train.data.tokenizer import train_bpe

pytestmark = pytest.mark.usefixtures("packed_cache")

# Widths that are no multiples of 64 inputs, and rows that are none of 16.
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "mxfp4": ("GptOss", {"hidden_size": 96, "intermediate_size": 160}),
    "fp8-blocks": ("Mixtral", {"hidden_size": 192, "intermediate_size": 152, "head_dim": 8}),
    "fp8-tensor": ("Olmoe", {"hidden_size": 40, "intermediate_size": 20}),
    "int8-channels": ("Olmoe", {"hidden_size": 40, "intermediate_size": 20}),
    "w4a16": ("Mixtral", {"hidden_size": 96, "intermediate_size": 32, "head_dim": 8}),
    "w4a16-asymmetric": ("Mixtral", {"hidden_size": 96, "intermediate_size": 32, "head_dim": 8}),
    "awq": ("Mixtral", {"hidden_size": 96, "intermediate_size": 32, "head_dim": 8}),
}
KINDS = [*ODD, "q8_0.gguf", "q4_0.gguf", "mixed"]


def made(folder: Path, kind: str) -> Path:
    """Return a quantised model whose slots hold codes, in two layers."""
    if kind == "mixed":
        return mixed_model(folder)
    if kind.endswith(".gguf"):
        return gguf_file(folder, kind)
    family, sizes = ODD[kind]
    plain = saved(tiny(family, dtype=torch.bfloat16, **sizes), folder / "plain")
    store, config = quantised.KINDS.get(kind, (quantised.mxfp4, {"quant_method": "mxfp4"}))
    if kind == "fp8-blocks":
        store, config = (
            lambda W: quantised.fp8_blocks(W, 128),
            {**config, "weight_block_size": [128, 128]},
        )
    return quantised.quantise(plain, folder / kind, store, config)


def gguf_file(folder: Path, kind: str) -> Path:
    model = AutoModelForCausalLM.from_config(configs()["olmoe"])
    model.bfloat16().save_pretrained(folder / "plain")
    train_bpe(["some text"], VOCABULARY).save_pretrained(folder / "plain")
    write_gguf(folder / "plain", folder / kind, type=kind.removesuffix(".gguf"))
    return folder / kind


def mixed_model(folder: Path) -> Path:
    """Return a model with codes in the first layer, and values in the second."""
    plain = saved(
        tiny("Olmoe", dtype=torch.bfloat16, hidden_size=64, intermediate_size=32), folder / "plain"
    )
    tensors = quantised.load_file(plain / quantised.SINGLE)
    second = {name: one for name, one in tensors.items() if "layers.1.mlp.experts" in name}
    chosen = quantised.quantise(plain, folder / "mixed", quantised.w4a16, quantised.CT)
    tensors = quantised.load_file(chosen / quantised.SINGLE)
    first = {name: one for name, one in tensors.items() if "layers.1.mlp.experts" not in name}
    quantised.save_file(first | second, chosen / quantised.SINGLE, {"format": "pt"})
    return chosen


def store_of(skeleton: Skeleton, *, packed: bool) -> ExpertStore:
    blocks = {block.name: block for block in skeleton.blocks}
    found = open_packed(skeleton, [NATIVE] if packed else [])
    return ExpertStore(skeleton.checkpoint, skeleton.map.experts, blocks, found)


def slot_of(skeleton: Skeleton, index: int = 0) -> Slot:
    return allocate_slot(NATIVE, skeleton.blocks[index].layout.specs, torch.device("cpu"))


def path_of(skeleton: Skeleton, index: int = 0) -> Path:
    return PackedLocation(skeleton).path(NATIVE, index)


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_slots_and_logits_are_the_same_bit_for_bit(tmp_path: Path, kind: str) -> None:
    folder, ids = made(tmp_path, kind), tokens(2, 9)
    with moefit.load(folder, mode="exact", context=64) as served:
        expected = logits(served.model, ids)
        assert served.report()["experts_from"] == "checkpoint"
    skeleton = build_skeleton(folder)
    assert skeleton.stored().held
    done = pack(skeleton, [NATIVE])
    kept = [index for index in range(2) if kind != "mixed" or index == 0]
    assert (done.files, done.relative_errors) == (len(kept), {"native": 0.0})
    packed, plain = store_of(skeleton, packed=True), store_of(skeleton, packed=False)
    for index in kept:
        block, one, other = skeleton.blocks[index], slot_of(skeleton, index), slot_of(skeleton)
        for expert in range(block.num_experts):
            packed.read(block.name, expert, one)
            plain.read(block.name, expert, other)
            assert torch.equal(one.buffer_B, other.buffer_B), (block.name, expert)
    with moefit.load(folder, mode="exact", context=64) as served:
        assert torch.equal(logits(served.model, ids), expected)
        served.set_memory(with_slots(served, 1))
        settled(served)
        before = served.report()["bytes_read"]
        assert torch.equal(logits(served.model, ids), expected)
        report = served.report()
        words = "packed" if kind != "mixed" else "packed, but from the checkpoint in 1 of 2"
        assert report["experts_from"] == words and report["unpacked_bytes"] == 0
        if kind != "mixed":
            assert (report["bytes_read"] - before) % slot_of(skeleton).nbytes == 0


def test_one_aligned_read_an_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = build_skeleton(made(tmp_path, "mxfp4"))
    pack(skeleton, [NATIVE])
    slot, store = slot_of(skeleton), store_of(skeleton, packed=True)
    reads, own = [], SpanReader.read_into

    def read_into(self: SpanReader, span: Any, buffer: memoryview) -> None:
        reads.append((span.offset, span.nbytes))
        own(self, span, buffer)

    monkeypatch.setattr(SpanReader, "read_into", read_into)
    monkeypatch.setattr("moefit.checkpoint.direct_file._by_bounce", lambda *_: pytest.fail("read"))
    monkeypatch.setattr("moefit.checkpoint.direct_file.LEAST", 4096)
    store.read(skeleton.blocks[0].name, 3, slot)
    assert len(reads) == 1 and reads[0][0] % 4096 == 0 and reads[0][1] == slot.nbytes


def test_estimate_needs_no_memory_to_read(tmp_path: Path) -> None:
    folder = made(tmp_path, "mxfp4")
    skeleton, settings = build_skeleton(folder), LoadSettings(context=64)
    before = memory_budget(skeleton, settings).staging
    pack(skeleton, [NATIVE])
    after = memory_budget(skeleton, settings).staging
    readers = settings.readers + 2
    assert before - after >= readers * max(
        source.staging_bytes for some in skeleton.map.experts.values() for source in some
    )


def test_integers_can_be_packed_beside_codes(tmp_path: Path) -> None:
    skeleton = build_skeleton(made(tmp_path, "mxfp4"))
    done = pack(skeleton, [NATIVE, parse_format("int2")])
    assert done.files == 4 and done.relative_errors["int2"] > done.relative_errors["native"] == 0
    again = pack(skeleton, [NATIVE, parse_format("int2")])
    assert (again.files, again.skipped) == (0, 4)
    assert check_packed(skeleton).problems == []


def test_codes_are_not_calibrated(tmp_path: Path) -> None:
    windows = Windows(ids_BT=tokens(1, 8))
    text = CalibrationText(text="text", digest="d", windows=windows)
    with pytest.raises(ConfigError, match="native keeps the checkpoint's codes, whatever the text"):
        pack(build_skeleton(made(tmp_path, "mxfp4")), [NATIVE], calibration=text)


def test_damaged_codes_are_not_packed(tmp_path: Path) -> None:
    folder = made(tmp_path, "mxfp4")
    file = folder / quantised.SINGLE
    tensors = quantised.load_file(file)
    name = next(one for one in tensors if one.endswith("1.mlp.experts.down_proj_scales"))
    scales = tensors[name].clone()
    tensors[name][3, 5, 1] = 255  # not a number
    quantised.save_file(tensors, file, {"format": "pt"})
    skeleton = build_skeleton(folder)
    with pytest.raises(CheckpointError, match=r"down_proj\[3\] \(mxfp4\).*not finite"):
        pack(skeleton, [NATIVE])
    assert path_of(skeleton, 0).is_file() and not path_of(skeleton, 1).exists()
    tensors[name] = scales
    biases = next(one for one in tensors if one.endswith("1.mlp.experts.down_proj_bias"))
    tensors[biases][2, 7] = torch.inf
    quantised.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expert 2 of .*down_proj_bias has weights that are"):
        pack(build_skeleton(folder), [NATIVE])


def test_damaged_store_is_refused_and_found_by_check(tmp_path: Path) -> None:
    skeleton = build_skeleton(made(tmp_path, "w4a16"))
    pack(skeleton, [NATIVE])
    name, path = skeleton.blocks[1].name, path_of(skeleton, 1)
    with path.open("r+b") as file:
        file.seek(read_packed(path).spans[5].offset + 100)
        file.write(b"\xff\x00\xff\x00")
    store, slot = store_of(skeleton, packed=True), slot_of(skeleton)
    with pytest.raises(CheckpointError, match=rf"expert 5 of {name}.*moefit pack --force"):
        store.read(name, 5, slot)
    store.read(name, 4, slot)
    assert "expert 5" in check_packed(skeleton).problems[0]
    path.unlink()
    store_of(skeleton, packed=True).read(name, 5, slot)
    assert check_packed(skeleton).problems == [f"{name} is not packed in native"]


def test_store_of_another_checkpoint_or_block_is_ignored(tmp_path: Path) -> None:
    folder = made(tmp_path, "mxfp4")
    skeleton = build_skeleton(folder)
    pack(skeleton, [NATIVE])
    tensors = quantised.load_file(folder / quantised.SINGLE)
    shutil.copytree(folder, tmp_path / "other")
    changed = {n: t.flip(0) if n.endswith("blocks") else t for n, t in tensors.items()}
    quantised.save_file(changed, tmp_path / "other" / quantised.SINGLE, {"format": "pt"})
    other = build_skeleton(tmp_path / "other")
    pack(other, [NATIVE])
    shutil.copy(path_of(other, 1), path_of(skeleton, 1))
    shutil.copy(path_of(skeleton, 0), path_of(other, 1))
    first, second = (open_packed(one, [NATIVE]) for one in (skeleton, other))
    for packed in (first, second):
        assert packed.has(skeleton.blocks[0].name, NATIVE)
        assert not packed.has(skeleton.blocks[1].name, NATIVE)
        assert "packed from another checkpoint" in packed.ignored[0]


def test_store_of_other_codes_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another version holds a type of the checkpoint as codes, or no longer."""
    skeleton = build_skeleton(made(tmp_path, "w4a16"))
    pack(skeleton, [NATIVE])
    assert (
        "gate_up_proj: int4 with bfloat16 of 32, down_proj: "
        in read_packed(path_of(skeleton)).metadata.codes
    )
    monkeypatch.setattr(packed_store, "_codes", lambda format, block: "others")
    packed = open_packed(skeleton, [NATIVE])
    assert len(packed.ignored) == 2 and "in native (others)" in packed.ignored[0]
    assert not packed.has(skeleton.blocks[0].name, NATIVE)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("mxfp4", torch.float32), ("nvfp4", None), ("plain", None)]
)
def test_values_are_not_packed_as_the_checkpoints_own(
    tmp_path: Path, kind: str, dtype: torch.dtype | None
) -> None:
    if kind == "nvfp4":
        sizes = {"hidden_size": 64, "intermediate_size": 48}
        plain = saved(tiny("Olmoe", dtype=torch.bfloat16, **sizes), tmp_path / "plain")
        folder = quantised.quantise(plain, tmp_path / "q", *quantised.KINDS["nvfp4"])
    else:
        folder = made(tmp_path, "mxfp4")
        folder = folder if kind == "mxfp4" else tmp_path / "plain"
    skeleton = build_skeleton(folder, dtype)
    with pytest.raises(ConfigError, match=r"native experts are read .* slots hold values of"):
        pack(skeleton, [NATIVE])
    with pytest.raises(ConfigError, match=r"decoded experts are read .* need no packing; give"):
        pack(skeleton, [DECODED])
    assert open_packed(skeleton, [NATIVE]).ignored == ()


def test_commands(tmp_path: Path, packed_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where importing takes more than serving without experts, the least budget holds some of them;
    # and this process grows between the commands.
    monkeypatch.setattr(held, "droppable_bytes", lambda: held.LIBRARY_PAGES)
    monkeypatch.setattr(estimate, "settled_bytes", lambda _device: 500 << 20)
    folder = str(made(tmp_path, "mxfp4"))
    asked = "describe", folder, "--exact", "--context", "64"
    budget = json.loads(run(*asked, "--json").stdout)
    assert budget["unpacked_bytes"] == 0, "all experts fit"
    least = ("--memory", str(budget["minimum"]["generate"]))
    short = json.loads(run(*asked, *least, "--json").stdout)
    skeleton = build_skeleton(Path(folder))
    assert short["unpacked_bytes"] == 2 * 8 * NATIVE.nbytes(skeleton.blocks[0].layout.specs)
    assert "pack" in run(*asked, *least).stdout and "--formats native" in run(*asked, *least).stdout
    made_files = json.loads(run("pack", folder, "--json").stdout)
    assert list(made_files["relative_errors"]) == ["native"], "the default of such checkpoints"
    assert "the checkpoint's own codes, as slots hold them" in run("pack", folder, "--force").stderr
    assert "sound: 16 experts in native, 2 files" in run("pack", folder, "--check").stderr
    assert json.loads(run(*asked, *least, "--json").stdout)["unpacked_bytes"] == 0
    (entry,) = json.loads(run("cache", "ls", "--json").stdout)["entries"]
    assert (entry["contents"], entry["stale"], entry["source"]) == (["native"], "", folder)
    assert json.loads(run("cache", "prune", "--yes", "--json").stdout)["bytes"] == 0
    assert run("cache", "rm", folder, "--yes").exit_code == 0 and not list(packed_cache.iterdir())
