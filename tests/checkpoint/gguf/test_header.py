"""Headers equal the `gguf` package's reading; damaged, cut and split files."""

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moefit.checkpoint.gguf.header import StoredList, first_part, read_gguf
from moefit.errors import CheckpointError, MoefitError, UnsupportedModelError

gguf: Any = pytest.importorskip("gguf", reason="needs the package gguf (moefit[gguf])")
WORDS = [f"word{number}" for number in range(1500)]


def write(path: Path, *, split: tuple[int, int] | None = None, count: int = 3) -> Path:
    """Write a file with metadata of every kind, and some tensors."""
    writer = gguf.GGUFWriter(path, "olmoe")
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", count * split[1])
    writer.add_context_length(17)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("words", WORDS)
    writer.add_array("few", [1.5, 2.5])
    writer.add_bool("flag", True)
    rng = np.random.default_rng(0)
    for number in range(count):
        data = rng.standard_normal((3, number + 2, 64)).astype(np.float32)
        name = f"t{0 if split is None else split[0]}.{number}"
        if number == 1:
            writer.add_tensor(
                name,
                gguf.quantize(data, gguf.GGMLQuantizationType.Q8_0),
                raw_dtype=gguf.GGMLQuantizationType.Q8_0,
            )
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "m.gguf")


def test_header_equals_the_package(file: Path) -> None:
    found, reader = read_gguf(file), gguf.GGUFReader(file)
    assert found.architecture == "olmoe"
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            value = found.metadata[name]
            assert (value.read() if isinstance(value, StoredList) else value) == field.contents()
    assert isinstance(found.metadata["words"], StoredList) and found.listed("words") == WORDS
    assert found.tensors.keys() == {one.name for one in reader.tensors}
    for one in reader.tensors:
        mine = found.tensors[one.name]
        assert (mine.span.offset, mine.span.nbytes) == (one.data_offset, one.n_bytes)
        assert mine.shape == tuple(one.shape[::-1].tolist())
        assert mine.type.name == one.tensor_type.name.lower()
        assert mine.span.row(2).nbytes * 3 == one.n_bytes


def test_every_cut_raises(file: Path) -> None:
    data = file.read_bytes()
    end = max(one.span.offset + one.span.nbytes for one in read_gguf(file).tensors.values())
    for size in [*range(0, 200, 7), 3000, end // 2, end - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"is damaged|is cut short"):
            read_gguf(file)


def test_damage_anywhere_in_the_header_is_an_error_or_read(file: Path) -> None:
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 500, 150).tolist():
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        try:
            read_gguf(file)
        except MoefitError as error:
            assert str(file) in str(error)


def test_unknown_type_is_named(file: Path) -> None:
    data = file.read_bytes()
    old = struct.pack("<QQII", 64, 2, 3, 0)[:8]
    at = data.index(b"t0.0") + 4 + 4 + 3 * 8
    assert data[at - 24 : at - 16] == old
    file.write_bytes(data[:at] + struct.pack("<I", 36) + data[at + 4 :])
    with pytest.raises(UnsupportedModelError, match=r"t0\.0 is of GGML type number 36.*q4_k"):
        read_gguf(file)


@pytest.mark.parametrize(
    ("begin", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04", "instead of GGUF"),
        (b"GGUF\x01\x00\x00\x00", "version 1; 2 and 3"),
        (b"GGUF\x00\x00\x00\x03", "another kind of processor"),
    ],
)
def test_other_files_raise(file: Path, begin: bytes, match: str) -> None:
    file.write_bytes(begin + file.read_bytes()[len(begin) :])
    with pytest.raises(CheckpointError, match=match):
        read_gguf(file)


def test_length_of_a_text_is_limited(file: Path) -> None:
    """A sparse file may claim to be as long as it likes."""
    data = file.read_bytes()
    at = data.index(b"general.architecture") + len(b"general.architecture") + 4
    file.write_bytes(data[:at] + struct.pack("<Q", 1 << 36) + data[at + 8 :])
    with file.open("r+b") as opened:
        opened.truncate(1 << 37)
    with pytest.raises(CheckpointError, match="a text of its header would have 68,719,476,736"):
        read_gguf(file)


def test_split_files(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"m-{n + 1:05}-of-00003.gguf", split=(n, 3)) for n in range(3)]
    found = read_gguf(parts[0])
    assert len(found.tensors) == 9
    assert {one.span.path for one in found.tensors.values()} == set(parts)
    assert first_part(parts[2]) == parts[0]
    with pytest.raises(CheckpointError, match="whose first is needed"):
        read_gguf(parts[1])
    as_number = struct.pack("<I", gguf.GGUFValueType.INT32) + struct.pack("<i", 9)
    as_text = struct.pack("<IQ", gguf.GGUFValueType.STRING, 1) + b"9"
    damaged = tmp_path / "odd" / parts[0].name
    shutil.copytree(tmp_path, damaged.parent, ignore=shutil.ignore_patterns("odd"))
    key = b"split.tensors.count"
    assert key + as_number in parts[0].read_bytes()
    damaged.write_bytes(parts[0].read_bytes().replace(key + as_number, key + as_text))
    with pytest.raises(CheckpointError):  # the tensors' data moved too
        read_gguf(damaged)
    parts[2].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match=r"lacks 1 of its 3 parts \(m-00003-of-00003"):
        read_gguf(parts[0])
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match="have 6 tensors, but should have 9"):
        read_gguf(parts[0])
