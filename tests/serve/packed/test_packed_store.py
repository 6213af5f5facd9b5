"""Serving from the packed store: the same bytes, verified, of the same checkpoint."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quantised
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from serving import give_slots
from tiny_served import FAMILIES, logits, mixtral_block, saved, tiny, tokens

from moefit.checkpoint.safetensors import SINGLE, Span, read_header
from moefit.errors import CheckpointError
from moefit.quant.cpu_kernels import kernels
from moefit.quant.format import NATIVE, Format, parse_format
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.load import load_model
from moefit.serve.memory.estimate import SPARES, memory_budget
from moefit.serve.packed import file as packed_file
from moefit.serve.packed import store as packed_store
from moefit.serve.packed.build import pack
from moefit.serve.packed.file import read_packed
from moefit.serve.packed.store import PackedLocation, fingerprint, open_packed

CPU = torch.device("cpu")
INT4, INT8 = parse_format("int4"), parse_format("int8")


pytestmark = pytest.mark.usefixtures("packed_cache")


def store_of(skeleton: Skeleton, *formats: Format) -> ExpertStore:
    blocks = {block.name: block for block in skeleton.blocks}
    packed = open_packed(skeleton, formats)
    return ExpertStore(skeleton.checkpoint, skeleton.map.experts, blocks, packed)


def dirty_slot(format: Format, specs: Any) -> Slot:
    """Bytes that encoding sets are dirty; those between parts are zero in a new slot."""
    slot = allocate_slot(format, specs, CPU)
    for weight in slot.tensors.values():
        for tensor in [weight] if isinstance(weight, torch.Tensor) else [weight.codes_RB]:
            tensor.fill_(77)
    return slot


def path_of(skeleton: Skeleton, format: Format, index: int) -> Path:
    return PackedLocation(skeleton).path(format, index)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(data)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_slot_equals_encoded_slot(
    tmp_path: Path, family: str, dtype: torch.dtype | None
) -> None:
    skeleton = build_skeleton(saved(tiny(family), tmp_path / "model"), dtype)
    formats = [INT8, INT4, parse_format("int3-nearest")]
    pack(skeleton, formats)
    packed, encoded = store_of(skeleton, *formats), store_of(skeleton)
    expected_bytes = 0
    for format in formats:
        for block in skeleton.blocks:
            assert packed.packed.has(block.name, format)
            one = dirty_slot(format, block.layout.specs)
            other = dirty_slot(format, block.layout.specs)
            for expert in range(block.num_experts):
                packed.read(block.name, expert, one)
                encoded.read(block.name, expert, other)
                assert torch.equal(one.buffer_B, other.buffer_B), (format, block.name, expert)
                expected_bytes += one.nbytes
    assert packed.bytes_read == expected_bytes
    packed.close()
    encoded.close()


def test_packed_file_is_page_aligned_safetensors(folder: Path) -> None:
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    block = skeleton.blocks[1]
    path = path_of(skeleton, INT4, 1)
    file = read_packed(path)
    assert [span.offset % 4096 for span in file.spans] == [0] * 8
    assert path.stat().st_size == file.spans[-1].offset + file.spans[-1].nbytes
    slot = allocate_slot(INT4, block.layout.specs, CPU)
    with safe_open(path, "pt") as opened:
        for expert in range(8):
            store_of(skeleton).read(block.name, expert, slot)
            assert torch.equal(opened.get_tensor(f"{block.name}.{expert}"), slot.buffer_B)
        remarks = opened.metadata()
    assert (remarks["format"], remarks["encoder"], remarks["layout"]) == ("int4", "fitted", "3")
    assert remarks["source"] == str(folder)


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_expert_errors_are_measured(
    folder: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels:
        monkeypatch.setattr(
            "moefit.quant.error_model.decoded", lambda matrix, dtype: matrix.dense(dtype)
        )
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4, INT8])
    store, packed = store_of(skeleton), open_packed(skeleton, [INT4, INT8])
    block = skeleton.blocks[0]
    slot = allocate_slot(INT4, block.layout.specs, CPU)
    told = packed.relative_errors(block.name, INT4)
    for expert in range(8):
        native = store.native(block.name, expert)
        store.read(block.name, expert, slot)
        lost = total = 0.0
        for short, matrix in slot.tensors.items():
            assert not isinstance(matrix, torch.Tensor)
            lost += float((matrix.dense() - native[short]).square().sum())
            total += float(native[short].square().sum())
        assert told[expert] == pytest.approx(lost / total, rel=1e-4)
    assert max(packed.relative_errors(block.name, INT8)) < min(told)


def test_zero_weights_have_zero_error() -> None:
    specs = mixtral_block()[0].layout.specs
    slot = allocate_slot(INT4, specs, CPU)
    native = {s: torch.zeros(spec.shape, dtype=spec.dtype) for s, spec in specs.items()}
    INT4.encode(slot.tensors, native, specs)
    assert INT4.relative_error(slot.tensors, native, specs) == 0


def test_serving_uses_packed_store(folder: Path) -> None:
    ids = tokens(1, 8)
    settings = LoadSettings(precision="int4")
    with load_model(folder, settings) as served:
        assert served.report()["experts_from"] == "encoded while reading"
        expected = logits(served.model, ids)
        slow = served.report()["bytes_read"]
    with load_model(folder, LoadSettings()) as served:
        assert served.report()["experts_from"] == "checkpoint"
    pack(build_skeleton(folder), [INT4])
    with load_model(folder, settings) as served:
        give_slots(served, 3)
        assert torch.equal(logits(served.model, ids), expected)
        report = served.report()
        assert (report["experts_from"], report["packed_ignored"]) == ("packed", [])
        slot_bytes = served.budget.blocks[0].slot_bytes
        assert report["bytes_read"] % slot_bytes == 0 and slow % slot_bytes
    path_of(build_skeleton(folder), INT4, 1).unlink()
    with load_model(folder, settings) as served:
        assert served.report()["experts_from"] == "packed, but encoded while reading in 1 of 2"
        assert torch.equal(logits(served.model, ids), expected)


def decoded_bytes(skeleton: Skeleton) -> int:
    """Bytes of the expert that is decoded to be computed, which kernels need not do."""
    return 0 if kernels() else skeleton.blocks[0].expert_bytes


def test_packed_model_needs_no_encoding_memory(folder: Path) -> None:
    skeleton, settings = build_skeleton(folder), LoadSettings(precision="int4")
    specs = skeleton.blocks[0].layout.specs
    slots = SPARES * INT4.nbytes(specs) + decoded_bytes(skeleton)
    before = memory_budget(skeleton, settings)
    assert before.staging == slots + 6 * INT4.encoding_bytes(specs)
    pack(skeleton, [INT4])
    assert memory_budget(skeleton, settings).staging == slots
    path_of(skeleton, INT4, 0).unlink()
    assert memory_budget(skeleton, settings).staging == before.staging


def test_packed_experts_need_no_conversion_memory(folder: Path) -> None:
    skeleton = build_skeleton(folder, torch.bfloat16)
    settings = LoadSettings(precision="int4", dtype=torch.bfloat16)
    pack(skeleton, [INT4])
    block = skeleton.blocks[0]
    needed = SPARES * INT4.nbytes(block.layout.specs) + decoded_bytes(skeleton)
    assert memory_budget(skeleton, settings).staging == needed
    other = memory_budget(
        build_skeleton(folder), LoadSettings(precision="int4")
    )  # in float32: not packed
    assert other.staging > needed + block.expert_bytes


def test_damaged_expert_raises_when_read(folder: Path) -> None:
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    name, path = skeleton.blocks[1].name, path_of(skeleton, INT4, 1)
    span = read_packed(path).spans[5]
    overwrite(path, span.offset + 100, b"\xff\x00\xff\x00")
    store = store_of(skeleton, INT4)
    slot = allocate_slot(INT4, skeleton.blocks[1].layout.specs, CPU)
    with pytest.raises(
        CheckpointError, match=rf"block-001.*expert 5 of {name}.*moefit pack --force"
    ):
        store.read(name, 5, slot)
    assert store.bytes_read == 0
    store.read(name, 4, slot)
    pack(skeleton, [INT4], force=True)
    store_of(skeleton, INT4).read(name, 5, slot)


def test_truncated_file_is_not_used(folder: Path) -> None:
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    path = path_of(skeleton, INT4, 0)
    os.truncate(path, path.stat().st_size - 1)
    packed = open_packed(skeleton, [INT4])
    first, second = (block.name for block in skeleton.blocks)
    assert not packed.has(first, INT4) and packed.has(second, INT4)
    assert "block-000.safetensors is cut short" in packed.ignored[0]


def test_file_truncated_while_in_use_raises(folder: Path) -> None:
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    store, block = store_of(skeleton, INT4), skeleton.blocks[0]
    os.truncate(path_of(skeleton, INT4, 0), 8192)
    slot = allocate_slot(INT4, block.layout.specs, CPU)
    with pytest.raises(CheckpointError, match=rf"block-000.*: expert 7 of {block.name} cannot be"):
        store.read(block.name, 7, slot)


@pytest.mark.parametrize("offset", [0, 20, 400])
def test_damaged_header_is_not_used(folder: Path, offset: int) -> None:
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    path = path_of(skeleton, INT4, 0)
    overwrite(path, offset, b"\xff" * 16)
    (why,) = open_packed(skeleton, [INT4]).ignored
    assert "block-000" in why
    assert pack(skeleton, [INT4]).files == 1
    assert open_packed(skeleton, [INT4]).ignored == ()


def test_file_of_another_checkpoint_is_not_used(folder: Path, tmp_path: Path) -> None:
    other = build_skeleton(saved(tiny("Mixtral", seed=1), tmp_path / "other"))
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    pack(other, [INT4])
    shutil.copy(path_of(other, INT4, 1), path_of(skeleton, INT4, 1))
    packed = open_packed(skeleton, [INT4])
    assert not packed.has(skeleton.blocks[1].name, INT4)
    assert f"packed from another checkpoint ({tmp_path / 'other'})" in packed.ignored[0]
    assert pack(skeleton, [INT4]).files == 1


def test_file_of_another_block_or_format_is_not_used(folder: Path) -> None:
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4, INT8])
    shutil.copy(path_of(skeleton, INT8, 0), path_of(skeleton, INT4, 0))
    shutil.copy(path_of(skeleton, INT8, 0), path_of(skeleton, INT8, 1))
    packed = open_packed(skeleton, [INT4, INT8])
    assert len(packed.ignored) == 2
    assert "in int8 (fitted) from float32, not 8 of" in packed.ignored[0]


def test_file_of_another_layout_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    monkeypatch.setattr(packed_file, "LAYOUT", packed_file.LAYOUT + 1)
    packed = open_packed(skeleton, [INT4])
    assert not packed.has(skeleton.blocks[0].name, INT4)
    assert "has layout 3, but this moefit reads and writes layout 4" in packed.ignored[0]
    assert pack(skeleton, [INT4]).files == 2
    assert open_packed(skeleton, [INT4]).ignored == ()


@pytest.mark.parametrize(
    "change",
    [{"relative_errors": "0 " * 8}, {"source": "elsewhere"}, {"checksums": "00000000 " * 8},
     {"encoder": "nearest"}, {"text": "another"}, {"more": "x"}, {"remarks_checksum": "0"}],
    ids=str,
)  # fmt: skip
def test_all_header_fields_are_checksummed(folder: Path, change: dict[str, str]) -> None:
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    path = path_of(skeleton, INT4, 0)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= change
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(CheckpointError, match="its header does not match its checksum"):
        read_packed(path)
    assert "pack it again" in open_packed(skeleton, [INT4]).ignored[0]
    assert pack(skeleton, [INT4]).files == 1
    assert open_packed(skeleton, [INT4]).ignored == ()


def test_other_safetensors_file_is_not_used(folder: Path) -> None:
    skeleton = build_skeleton(folder)
    path = path_of(skeleton, INT4, 0)
    path.parent.mkdir(parents=True)
    save_file({"a": torch.zeros(3)}, path)
    assert "was not written by `moefit pack`" in open_packed(skeleton, [INT4]).ignored[0]


def test_header_with_a_dtype_that_cannot_be_read_is_ignored(folder: Path) -> None:
    """A foreign file, or damage: the model is served without it."""
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    path = path_of(skeleton, INT4, 0)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"U8"', b'"F4"', 1))
    packed = open_packed(skeleton, [INT4])
    assert "is not a valid packed file" in packed.ignored[0]
    assert not packed.has(skeleton.blocks[0].name, INT4)
    assert packed.has(skeleton.blocks[1].name, INT4)


def pack_otherwise(skeleton: Skeleton, index: int, **changes: str) -> list[bytes]:
    """Replace a packed file by another one, as `pack` does; return its experts."""
    path, block = path_of(skeleton, INT4, index), skeleton.blocks[index]
    old, data = read_packed(path), path.read_bytes()
    experts = [data[one.offset : one.offset + one.nbytes][::-1] for one in old.spans]
    metadata = replace(old.metadata, calibration="digest", text="a long name " * 400)
    metadata = replace(metadata, **changes)
    with packed_file.PackedWriter(path, metadata, block.num_experts, len(experts[0])) as writer:
        for expert in experts:
            writer.write(memoryview(expert), 0.125)
        writer.commit()
    assert read_packed(path).spans[0].offset > old.spans[0].offset
    return experts


@pytest.mark.parametrize("read_before", [False, True])
def test_file_that_is_packed_again_while_a_store_is_open(folder: Path, read_before: bool) -> None:
    """Its header is known, and its name belongs to another file when it is first read."""
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    name, packed = skeleton.blocks[0].name, open_packed(skeleton, [INT4])
    slot, old = (allocate_slot(INT4, skeleton.blocks[0].layout.specs, CPU) for _ in range(2))
    packed.read(skeleton.blocks[1].name, 0, slot)
    if read_before:
        packed.read(name, 2, old)
    experts = pack_otherwise(skeleton, 0)
    if read_before:  # the old file is open and whole
        packed.read(name, 2, slot)
        assert torch.equal(slot.buffer_B, old.buffer_B) and packed.calibration(name, INT4) == ""
        return
    for expert in (7, 0, 7):
        assert packed.read(name, expert, slot) == slot.nbytes
        assert bytes(slot.buffer_B.numpy()) == experts[expert]
    assert packed.calibration(name, INT4) == "digest"
    assert packed.relative_errors(name, INT4)[0] == 0.125
    packed.close()


def test_damaged_file_that_is_packed_again_is_read_without_a_restart(folder: Path) -> None:
    """As the error asks for, while a server keeps the damaged file open."""
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    path, name = path_of(skeleton, INT4, 0), skeleton.blocks[0].name
    overwrite(path, read_packed(path).spans[3].offset + 40, b"\xff\x00\xff\x00")
    store, slot = store_of(skeleton, INT4), dirty_slot(INT4, skeleton.blocks[0].layout.specs)
    with pytest.raises(CheckpointError, match=r"expert 3 .* does not match its checksum"):
        store.read(name, 3, slot)
    pack_otherwise(skeleton, 0, block="another")
    with pytest.raises(CheckpointError, match=r"expert 3 .* does not match its checksum"):
        store.read(name, 3, slot)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"expert 3 .* does not match its checksum"):
        store.read(name, 3, slot)
    pack(skeleton, [INT4])
    store.read(name, 3, slot)
    encoded = dirty_slot(INT4, skeleton.blocks[0].layout.specs)
    store_of(skeleton).read(name, 3, encoded)
    assert torch.equal(slot.buffer_B, encoded.buffer_B)
    store.close()


def test_changed_weights_change_fingerprint(folder: Path) -> None:
    pack(build_skeleton(folder), [INT4])
    tensors = load_file(folder / SINGLE)
    remarks = read_header(folder / SINGLE)[0]
    size = (folder / SINGLE).stat().st_size
    save_file({n: t * 1.5 for n, t in tensors.items()}, folder / SINGLE, dict(remarks))
    assert (folder / SINGLE).stat().st_size == size
    with load_model(folder, LoadSettings(precision="int4")) as served:
        report = served.report()
    assert report["experts_from"] == "encoded while reading"
    assert "was packed from another checkpoint, which" in report["packed_ignored"][0]


@pytest.mark.parametrize(
    ("kind", "experts"),
    [("w4a16", 48), ("int8-channels", 32), ("awq", 48), ("w4a16-asymmetric", 8), ("mxfp4", 32)],
)
def test_fingerprint_covers_every_tensor_of_an_expert(
    tmp_path: Path, kind: str, experts: int
) -> None:
    """Whatever the number of experts and of their tensors have in common."""
    how = quantised.KINDS.get(kind, (quantised.mxfp4, {"quant_method": "mxfp4"}))
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    sizes["num_local_experts" if kind == "mxfp4" else "num_experts"] = experts
    model = tiny("GptOss" if kind == "mxfp4" else "Olmoe", dtype=torch.bfloat16, **sizes)
    folder = quantised.quantise(saved(model, tmp_path / "plain"), tmp_path / "quantised", *how)
    skeleton = build_skeleton(folder)
    sources = skeleton.map.experts[skeleton.blocks[1].name]
    assert len(sources) == experts
    before = fingerprint(skeleton)
    for number in range(len(sources[0].spans)):
        spans = [source.spans[number] for source in sources]
        data = spans[0].path.read_bytes()
        for span in spans:
            middle = span.offset + span.nbytes // 2
            overwrite(span.path, middle, bytes([data[middle] ^ 1]))
        assert fingerprint(skeleton) != before, spans[0].name
        spans[0].path.write_bytes(data)
    assert fingerprint(skeleton) == before


@pytest.mark.parametrize(("experts", "parts"), [(8, 3), (64, 3), (128, 3), (16, 6), (64, 9)])
def test_samples_are_those_of_earlier_versions_where_these_cover_all(
    experts: int, parts: int
) -> None:
    """Stores, plans and profiles of such models stay valid."""
    spans = {(e, p): span_of(f"{e}.{p}") for e in range(experts) for p in range(parts)}
    sources: Any = [
        SimpleNamespace(spans=[spans[e, p] for p in range(parts)]) for e in range(experts)
    ]
    found = [span.name for span in packed_store._sampled(sources)]
    assert found == [f"{e}.{e % parts}" for e in range(0, experts, -(-experts // 16))]


def span_of(name: str) -> Span:
    return Span(name=name, path=Path(), offset=0, nbytes=1, dtype=torch.uint8, shape=(1,))


def test_fingerprint_depends_on_content_only(folder: Path, tmp_path: Path) -> None:
    first = fingerprint(build_skeleton(folder))
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(build_skeleton(copy)) == first
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert fingerprint(build_skeleton(copy)) != first
    pack(build_skeleton(folder), [INT4])
    moved = folder.rename(tmp_path / "moved")
    assert open_packed(build_skeleton(moved), [INT4]).has(
        build_skeleton(moved).blocks[0].name, INT4
    )


def test_packed_store_is_not_read_unless_needed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moefit.serve.packed.store.fingerprint", lambda skeleton: pytest.fail("read")
    )
    packed = open_packed(build_skeleton(folder), [NATIVE])
    assert packed.ignored == ()


def test_a_file_that_changes_while_open_is_verified_again(folder: Path) -> None:
    skeleton = build_skeleton(folder)
    pack(skeleton, [INT4])
    block = skeleton.blocks[0]
    store, slot = open_packed(skeleton, [INT4]), dirty_slot(INT4, block.layout.specs)
    store.read(block.name, 0, slot)
    path = path_of(skeleton, INT4, 0)
    place = read_packed(path).spans[0].offset
    overwrite(path, place, bytes([path.read_bytes()[place] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        store.read(block.name, 0, slot)
    store.close()
