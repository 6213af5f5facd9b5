"""Pickled checkpoints written as safetensors: the same weights, whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_served import logits, saved, tiny, tokens
from typer.testing import CliRunner

from moefit.checkpoint.pickled import convert_pickled
from moefit.checkpoint.safetensors import INDEX, SINGLE
from moefit.cli import app
from moefit.errors import CheckpointError, ConfigError
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model


def pickled(folder: Path, *, shards: int = 1, **how: Any) -> Path:
    """Write a model with pickled weights, in shards of interleaved names."""
    saved(tiny("Mixtral"), folder)
    (folder / SINGLE).unlink()
    (folder / "notes.md").write_text("notes")
    state = tiny("Mixtral").state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **how)
        return folder
    where = {
        name: f"pytorch_model-{n % shards + 1:05d}-of-{shards:05d}.bin"
        for n, name in enumerate(state)
    }
    for file in set(where.values()):
        torch.save({name: state[name] for name in state if where[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("kind", ["one file", "shards", "old format", "wrapped"])
def test_written_model_is_the_same(tmp_path: Path, kind: str) -> None:
    how = {"_use_new_zipfile_serialization": False} if kind == "old format" else {}
    folder = pickled(tmp_path / "model", shards=3 if kind == "shards" else 1, **how)
    if kind == "wrapped":
        state = torch.load(folder / "pytorch_model.bin")
        torch.save({"state_dict": state, "epoch": 3}, folder / "pytorch_model.bin")
    out, seen = tmp_path / "out", []
    made = convert_pickled(folder, out, lambda done, total: seen.append(done / total))
    assert (made.files, made.tensors) == (
        3 if kind == "shards" else 1,
        len(tiny("Mixtral").state_dict()),
    )
    assert seen[-1] == 1 and (out / INDEX).is_file() == (kind == "shards")
    assert (out / "notes.md").read_text() == "notes"
    assert not list(out.glob("*.bin*")) and not list(tmp_path.glob(".out*"))
    with load_model(out, LoadSettings(context=64)) as served:
        ids = tokens(2, 9)
        expected = logits(tiny("Mixtral"), ids)
        torch.testing.assert_close(logits(served.model, ids), expected, atol=1e-4, rtol=0)


def test_shared_and_transposed_tensors_are_written_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    base = torch.arange(24.0).view(4, 6)
    state = {"a": base, "b": base, "c": base.T, "d": base[1:3], "e": torch.ones(()), "f": base[:0]}
    torch.save(state, folder / "pytorch_model.bin")
    convert_pickled(folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / SINGLE)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], one) for name, one in state.items())


class _Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"a": torch.ones(2), "b": _Code()}, "holds more than tensors.*never run"),
        ({"a": torch.ones(2), "b": 3}, "'b': int where a tensor belongs"),
        ({"a": torch.ones(2).to_sparse()}, "layout torch.sparse_coo"),
        ({"a": torch.ones(1).expand(10**13)}, r"10000000000000\], but not in the file"),
        ({"a": torch.ones(2, device="meta")}, "8 bytes .* but not in the file"),
        ({"__metadata__": torch.ones(2)}, "the name '__metadata__', which no tensor"),
        ([torch.ones(2)], "no weights by name"),
        (b"PK damaged", "is damaged"),
    ],
)
def test_other_content_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model" / "pytorch_model.bin"
    file.parent.mkdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=match):
        convert_pickled(file.parent, tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model"]


def test_changed_bytes_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "model" / "pytorch_model.bin"
    file.parent.mkdir()
    torch.save({"a": torch.full((64,), 7.0)}, file)
    data = bytearray(file.read_bytes())
    data[data.find(torch.full((64,), 7.0).numpy().tobytes()) + 100] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"data/0 differ from their checksum; copy or down"):
        convert_pickled(file.parent, tmp_path / "out")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert convert_pickled(file.parent, tmp_path / "out").tensors == 1


def test_writing_that_fails_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pickled(tmp_path / "model")

    def fails(tensor: torch.Tensor) -> memoryview:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr("moefit.checkpoint.pickled.bytes_of", fails)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be written.*not enough"):
        convert_pickled(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pickled(tmp_path / "model", shards=2)
    for out in (folder, tmp_path):
        with pytest.raises(ConfigError, match="is in use"):
            convert_pickled(folder, out)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 4, 5))
        with pytest.raises(CheckpointError, match=r"takes .* bytes, and 5 are free"):
            convert_pickled(folder, tmp_path / "out")
    next(folder.glob("*-00002-*.bin")).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 shards"):
        convert_pickled(folder, tmp_path / "out")
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "pytorch_model-00001-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="tensors that its shards lack"):
        convert_pickled(folder, tmp_path / "out")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="names no tensors"):
        convert_pickled(folder, tmp_path / "out")
    plain = saved(tiny("Mixtral"), tmp_path / "plain")
    with pytest.raises(ConfigError, match="has safetensors already"):
        convert_pickled(plain, tmp_path / "out")
    (plain / SINGLE).rename(plain / "consolidated.00.pth")
    with pytest.raises(ConfigError, match=r"has neither pytorch_model.bin nor"):
        convert_pickled(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusal_names_the_command_and_it_works(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "model")
    with pytest.raises(CheckpointError, match="moefit convert FOLDER OUT"):
        load_model(folder, LoadSettings())
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(folder / "pytorch_model.bin", lone)
    found = CliRunner().invoke(app, ["convert", str(lone), str(tmp_path / "out")])
    assert "no config.json; put the model's own" in str(found.exception)
    done = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["tensors"] == len(tiny("Mixtral").state_dict())
