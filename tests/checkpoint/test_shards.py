import json
import os
import struct
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from moefit.checkpoint.safetensors import (
    DTYPES,
    INDEX,
    SINGLE,
    UNREADABLE,
    Checkpoint,
    LazyTensor,
    Span,
    pread,
)
from moefit.errors import CheckpointError, UnsupportedModelError


def random_bits(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Random bit patterns, including NaN; booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == torch.bool else 256
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, top, (size,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(shape)


def same_bits(one: Tensor, other: Tensor) -> bool:
    assert one.dtype == other.dtype and one.shape == other.shape
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def write_shards(folder: Path, *shards: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name)
    weight_map = {
        tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors
    }
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {tensor: value for tensors in shards for tensor, value in tensors.items()}


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    """Write a file with this header without padding, so that tensors start at any offset."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def matrix(number: int = 0) -> dict[str, Tensor]:
    return {f"weight{number}": random_bits(torch.float32, 4, 6, seed=number)}


class Disk:
    """A `pread` that fails a number of times, or returns at most `most` bytes."""

    def __init__(self, *, failures: int = 0, most: int | None = None, end: int | None = None):
        self.failures, self.most, self.end, self.calls = failures, most, end, 0

    def __call__(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        self.calls += 1
        if self.failures:
            self.failures -= 1
            buffer[:] = b"\xff" * len(buffer)  # a failed read may leave anything
            raise OSError(5, "Input/output error")
        if self.end is not None and offset >= self.end:
            return 0
        return pread(descriptor, buffer[: self.most], offset)


def test_tensors_equal_safetensors(tmp_path: Path) -> None:
    shapes = [(), (1,), (0, 3), (3, 5), (2, 3, 4)]
    tensors = {
        f"{name}{list(shape)}": random_bits(dtype, *shape)
        for name, dtype in DTYPES.items()
        for shape in shapes
    }
    save_file(tensors, tmp_path / SINGLE)
    theirs = load_file(tmp_path / SINGLE)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.spans.keys() == tensors.keys()
        for name, span in checkpoint.spans.items():
            assert same_bits(checkpoint.tensor(span), tensors[name]), name
            assert same_bits(checkpoint.tensor(span), theirs[name]), name


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
     torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex64, torch.int64, torch.int32,
     torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool],
)  # fmt: skip
def test_all_safetensors_dtypes_are_known(tmp_path: Path, dtype: torch.dtype) -> None:
    value = random_bits(dtype, 2, 3)
    save_file({"x": value}, tmp_path / SINGLE)
    with Checkpoint(tmp_path) as checkpoint:
        assert same_bits(checkpoint.tensor(checkpoint.spans["x"]), value)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(DTYPES)),
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
        ),
        max_size=6,
    ),
    st.integers(0, 9),
)
def test_arbitrary_tensors_are_read(tmp_path_factory, kinds, seed: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    tensors = {
        str(i): random_bits(DTYPES[name], *shape, seed=seed + i)
        for i, (name, shape) in enumerate(kinds)
    }
    (folder / SINGLE).write_bytes(save(tensors, {"format": "pt"}))
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.spans.keys() == tensors.keys()
        for name, value in tensors.items():
            assert same_bits(checkpoint.tensor(checkpoint.spans[name]), value)


@pytest.mark.parametrize("gap", range(1, 9))
def test_tensors_at_odd_offsets(tmp_path: Path, gap: int) -> None:
    first = random_bits(torch.uint8, gap)
    second = random_bits(torch.float64, 5, 3)
    header = {
        "first": {"dtype": "U8", "shape": [gap], "data_offsets": [0, gap]},
        "second": {"dtype": "F64", "shape": [5, 3], "data_offsets": [gap, gap + 120]},
    }
    data = first.numpy().tobytes() + second.flatten().view(torch.uint8).numpy().tobytes()
    write_raw(tmp_path / SINGLE, header, data)
    with Checkpoint(tmp_path) as checkpoint:
        span = checkpoint.spans["second"]
        assert same_bits(checkpoint.tensor(span), second)
        for row in range(5):
            assert same_bits(checkpoint.tensor(span.row(row)), second[row])


def test_several_shards(tmp_path: Path) -> None:
    expected = write_shards(tmp_path, matrix(0) | matrix(1), matrix(2), matrix(3))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.spans.keys() == expected.keys()
        for name, value in expected.items():
            assert same_bits(checkpoint.tensor(checkpoint.spans[name]), value)


def test_index_takes_precedence_over_single_file(tmp_path: Path) -> None:
    save_file(matrix(9), tmp_path / SINGLE)
    write_shards(tmp_path, matrix(0))
    assert Checkpoint(tmp_path).spans.keys() == matrix(0).keys()


def test_nested_rows_are_read(tmp_path: Path) -> None:
    value = random_bits(torch.bfloat16, 3, 4, 5)
    save_file({"x": value}, tmp_path / SINGLE)
    with Checkpoint(tmp_path) as checkpoint:
        span = checkpoint.spans["x"].row(2).row(1)
        assert span.name == "x[2][1]" and span.shape == (5,) and span.nbytes == 10
        assert same_bits(checkpoint.tensor(span), value[2, 1])


def test_reads_stay_within_buffer(tmp_path: Path) -> None:
    save_file(matrix(), tmp_path / SINGLE)
    with Checkpoint(tmp_path) as checkpoint:
        span = checkpoint.spans["weight0"]
        memory = bytearray(b"x" * (span.nbytes + 20))
        checkpoint.reader.read_into(span, memoryview(memory)[7 : 7 + span.nbytes])
        assert memory[:7] == b"x" * 7 and memory[7 + span.nbytes :] == b"x" * 13
        assert memory[7 : 7 + span.nbytes] == matrix()["weight0"].numpy().tobytes()


def test_files_are_not_mapped(tmp_path: Path) -> None:
    save_file(matrix(), tmp_path / SINGLE)
    with Checkpoint(tmp_path) as checkpoint:
        kept = [checkpoint.tensor(span) for span in checkpoint.spans.values()]
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        assert kept


def open_files(folder: Path) -> int:
    links = (Path("/proc/self/fd") / entry for entry in os.listdir("/proc/self/fd"))
    return sum(link.is_symlink() and str(folder) in os.readlink(link) for link in links)


def test_closing_closes_every_file(tmp_path: Path) -> None:
    expected = write_shards(tmp_path, matrix(0), matrix(1))
    with Checkpoint(tmp_path) as checkpoint:
        assert open_files(tmp_path) == 0
        for name in expected:
            checkpoint.tensor(checkpoint.spans[name])
        assert open_files(tmp_path) == 2
    assert open_files(tmp_path) == 0
    checkpoint.close()


def test_concurrent_reads(tmp_path: Path) -> None:
    expected = write_shards(tmp_path, *({str(i): random_bits(torch.int32, 999, seed=i)}
                                        for i in range(4)))  # fmt: skip
    wrong: list[str] = []

    def read(checkpoint: Checkpoint, start: int) -> None:
        for step in range(40):
            name = str((start + step) % 4)
            if not same_bits(checkpoint.tensor(checkpoint.spans[name]), expected[name]):
                wrong.append(name)

    with Checkpoint(tmp_path, read=Disk(most=500)) as checkpoint:
        threads = [threading.Thread(target=read, args=(checkpoint, i)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert open_files(tmp_path) == 4
    assert not wrong


@pytest.mark.parametrize("most", [1, 7, 95])
def test_short_reads_are_continued(tmp_path: Path, most: int) -> None:
    save_file(matrix(), tmp_path / SINGLE)
    with Checkpoint(tmp_path, read=Disk(most=most)) as checkpoint:
        assert same_bits(checkpoint.tensor(checkpoint.spans["weight0"]), matrix()["weight0"])


@pytest.mark.parametrize("failures", [1, 2])
def test_failed_read_is_retried(tmp_path: Path, failures: int) -> None:
    save_file(matrix(), tmp_path / SINGLE)
    with Checkpoint(tmp_path, read=Disk(failures=failures, most=50)) as checkpoint:
        assert same_bits(checkpoint.tensor(checkpoint.spans["weight0"]), matrix()["weight0"])


def test_persistent_read_failure_raises(tmp_path: Path) -> None:
    save_file(matrix(), tmp_path / SINGLE)
    disk = Disk(failures=10**6)
    with Checkpoint(tmp_path, read=disk) as checkpoint:
        span = checkpoint.spans["weight0"]
        with pytest.raises(CheckpointError, match=r"weight0 cannot be read after 3 .*Input/output"):
            checkpoint.tensor(span)
        assert disk.calls == 3
        disk.failures = 0
        assert same_bits(checkpoint.tensor(span), matrix()["weight0"])


def test_file_truncated_after_opening_raises(tmp_path: Path) -> None:
    save_file(matrix(), tmp_path / SINGLE)
    with Checkpoint(tmp_path) as checkpoint:
        span = checkpoint.spans["weight0"]
        os.truncate(tmp_path / SINGLE, span.offset + 40)
        with pytest.raises(CheckpointError, match=f"the file ends at byte {span.offset + 40}"):
            checkpoint.tensor(span)


def test_deleted_file_raises(tmp_path: Path) -> None:
    save_file(matrix(), tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.tensor(checkpoint.spans["weight0"])


def test_lazy_tensor_matches_safetensors_slice(tmp_path: Path) -> None:
    save_file(matrix(), tmp_path / SINGLE)
    with Checkpoint(tmp_path) as checkpoint:
        lazy = LazyTensor(checkpoint, checkpoint.spans["weight0"])
        assert lazy.get_shape() == [4, 6] and lazy.get_dtype() == "F32"
        assert same_bits(lazy[...], matrix()["weight0"])
        assert same_bits(lazy[1:3], matrix()["weight0"][1:3])


def test_missing_safetensors_error_names_alternatives(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .*index.json"):
            Checkpoint(folder)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, matrix(0), matrix(1), matrix(2))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 shards \(model-00002-of-00003"):
        Checkpoint(tmp_path)


def test_index_with_absent_tensors_raises(tmp_path: Path) -> None:
    write_shards(tmp_path, matrix(0))
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["expert.7"] = "model-00001-of-00001.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names 1 tensors that its shards lack \(expert.7"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "5", "null", "{}", '{"weight_map": null}', '{"weight_map": []}',
     '{"weight_map": {"a": 5}}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": ["b"]}}',
     '{"weight_map": {"a": "x", "b": 5}}', "\ufffe\x00"],
)  # fmt: skip
def test_damaged_index_raises(tmp_path: Path, text: str) -> None:
    save_file(matrix(), tmp_path / SINGLE)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=f"{INDEX} cannot be read"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("missing", [1, 40, 96])
def test_truncated_shard_raises(tmp_path: Path, missing: int) -> None:
    write_shards(tmp_path, matrix(0), matrix(1))
    path = tmp_path / "model-00002-of-00002.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - missing)
    with pytest.raises(CheckpointError, match=rf"00002-of-00002.*cut short: .*end at {size:,}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20])
def test_truncated_header_raises(tmp_path: Path, size: int) -> None:
    save_file(matrix(), tmp_path / SINGLE)
    os.truncate(tmp_path / SINGLE, size)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: .* again"):
        Checkpoint(tmp_path)


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"not json", b"\xff\xfe", b"[1]", b"5", b'"text"', b"null", b"[" * 200_000,
     {"x": None}, {"x": []}, {"x": {}}, {"x": 7},
     {"x": {k: v for k, v in GOOD.items() if k != "shape"}},
     {"x": GOOD | {"dtype": None}},
     {"x": GOOD | {"dtype": ["F32"]}},
     {"x": GOOD | {"shape": None}},
     {"x": GOOD | {"shape": 4}},
     {"x": GOOD | {"shape": "22"}},
     {"x": GOOD | {"shape": [2, 3]}},
     {"x": GOOD | {"shape": [-2, -2]}},
     {"x": GOOD | {"shape": [2.0, 2]}},
     {"x": GOOD | {"shape": [True, 4]}},
     {"x": GOOD | {"shape": ["2", 2]}},
     {"x": GOOD | {"data_offsets": [0]}},
     {"x": GOOD | {"data_offsets": [16, 0]}},
     {"x": GOOD | {"data_offsets": [-16, 0]}},
     {"x": GOOD | {"data_offsets": [0, 15]}},
     {"x": GOOD | {"data_offsets": ["0", "16"]}},
     {"x": GOOD | {"data_offsets": [0.0, 16.0]}},
     {"x": GOOD | {"data_offsets": None}}],
    ids=lambda header: str(header)[:60],
)  # fmt: skip
def test_damaged_header_raises(tmp_path: Path, header: object) -> None:
    write_raw(tmp_path / SINGLE, header, b"\0" * 16)
    with pytest.raises(CheckpointError, match=r"is damaged: .*; copy or download it again"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", UNREADABLE)
def test_unused_dtype_is_accepted(tmp_path: Path, dtype: str) -> None:
    bits = int(dtype[1])
    header = {"x": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, 16 * bits // 8]}}
    write_raw(tmp_path / SINGLE, header, b"\0" * (2 * bits))
    with pytest.raises(UnsupportedModelError, match=f"x is of dtype {dtype}.*bfloat16") as caught:
        Checkpoint(tmp_path)
    assert "damaged" not in str(caught.value)


def test_unknown_dtype_raises(tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE, {"x": GOOD | {"dtype": "F7"}}, b"\0" * 16)
    with pytest.raises(CheckpointError, match=r"or of a newer kind: x is of dtype 'F7'.*BF16"):
        Checkpoint(tmp_path)


def test_implausible_header_length_raises(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="its header would have 9,223,372,036,854,775,808"):
        Checkpoint(tmp_path)


@given(st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_changed_byte_never_crashes(tmp_path_factory, where: int, what: int) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    content = bytearray(save(matrix(0) | matrix(1)))
    content[where % len(content)] = what
    (folder / SINGLE).write_bytes(content)
    try:
        checkpoint = Checkpoint(folder)
    except CheckpointError:
        return
    with checkpoint:
        for span in checkpoint.spans.values():
            assert isinstance(span, Span)
            assert checkpoint.tensor(span).shape == span.shape
