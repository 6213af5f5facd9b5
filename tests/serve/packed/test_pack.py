"""Building packed stores: resuming, locking, full disks and invalid weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from killed import killed_packing
from safetensors.torch import load_file, save_file
from tiny_served import COMMON, saved, tiny
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from moefit.checkpoint.safetensors import SINGLE, SpanReader
from moefit.cli import app
from moefit.errors import CheckpointError, ConfigError, MoefitError, UnsupportedModelError
from moefit.folders import exclusive_folder
from moefit.quant.format import DECODED, FORMATS, NATIVE, parse_format
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.packed import build, file
from moefit.serve.packed.build import PackResult, pack
from moefit.serve.packed.check import check_packed
from moefit.serve.packed.store import PackedLocation

INT4, INT8 = parse_format("int4"), parse_format("int8")


pytestmark = pytest.mark.usefixtures("packed_cache")


def packed(folder: Path, *formats: Any, **how: Any) -> PackResult:
    return pack(build_skeleton(folder), formats or (INT8, INT4), **how)


def files_in(packed_cache: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(packed_cache)): path.read_bytes()
        for path in sorted(packed_cache.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_packing_reports_and_skips_existing_files(folder: Path, packed_cache: Path) -> None:
    heard: list[tuple[int, int]] = []
    skeleton = build_skeleton(folder)
    made = pack(skeleton, [INT8, INT4], progress=lambda done, total: heard.append((done, total)))
    native = sum(8 * block.expert_bytes for block in skeleton.blocks)
    assert (made.files, made.skipped, made.bytes_read) == (4, 0, native)
    assert heard[0] == (0, native) and heard[-1] == (native, native)
    assert made.bytes_written == sum(map(len, files_in(packed_cache).values()))
    assert 0 < made.relative_errors["int8"] < made.relative_errors["int4"] < 0.02

    before = {path: path.stat().st_mtime_ns for path in packed_cache.rglob("*.safetensors")}
    again = packed(folder, INT8, INT4, parse_format("int3"))
    assert (again.files, again.skipped) == (2, 4)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    forced = packed(folder, INT8, force=True)
    assert (forced.files, forced.skipped) == (2, 0)
    assert any(path.stat().st_mtime_ns != time for path, time in before.items())


def test_experts_are_read_once_for_all_formats(folder: Path, monkeypatch: Any) -> None:
    read: list[int] = []
    own = SpanReader.read_into

    def counted(self: SpanReader, span: Any, buffer: memoryview) -> None:
        read.append(len(buffer))
        own(self, span, buffer)

    monkeypatch.setattr("moefit.serve.packed.store.fingerprint", lambda skeleton: "0" * 32)
    monkeypatch.setattr(SpanReader, "read_into", counted)
    made = packed(folder, *(parse_format(f"int{bits}") for bits in (2, 3, 4, 5, 6, 8)))
    assert sum(read) == made.bytes_read


KILLED = killed_packing(
    'pack(build(Path(sys.argv[1])), [parse_format("int8"), parse_format("int4")])'
)


@pytest.mark.slow
def test_killed_packing_resumes(folder: Path, packed_cache: Path) -> None:
    packed(folder)
    whole = files_in(packed_cache)
    shutil.rmtree(packed_cache)
    # In the second block's fifth expert, the first format's file already having it.
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), "25"], timeout=120)
    assert done.returncode == -signal.SIGKILL
    left = files_in(packed_cache)
    assert sum(name.endswith(file.WRITING) for name in left) == 2
    finished = {name: data for name, data in left.items() if name.endswith(".safetensors")}
    assert len(finished) == 2 and finished.items() <= whole.items()

    again = packed(folder)
    assert (again.files, again.skipped) == (2, 2)
    assert files_in(packed_cache) == whole


def test_truncated_file_is_rebuilt(folder: Path, packed_cache: Path) -> None:
    packed(folder)
    whole = files_in(packed_cache)
    path = next(packed_cache.rglob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 1)
    assert "cut short" in check_packed(build_skeleton(folder)).problems[0]
    assert packed(folder).files == 1
    assert files_in(packed_cache) == whole
    path.write_bytes(b"")
    assert packed(folder).files == 1
    assert files_in(packed_cache) == whole


def test_full_disk_raises_before_writing(
    folder: Path, packed_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 << 10))
    with pytest.raises(CheckpointError, match=r"takes \d+ KiB \(4 files\).* 5.00 KiB are free"):
        packed(folder)
    assert files_in(packed_cache) == {}


def test_full_disk_keeps_complete_files(
    folder: Path, packed_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, left = os.pwrite, 25

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        return own(descriptor, data[:3000], offset)  # and never all at once

    monkeypatch.setattr(file.os, "pwrite", pwrite)
    with pytest.raises(
        CheckpointError, match=r"no space: a block takes .* are free; finished files"
    ):
        packed(folder)
    assert files_in(packed_cache) == {}
    left = 10**6
    packed(folder)
    assert check_packed(build_skeleton(folder)).problems == []


@pytest.mark.parametrize("how", ["written", "replaced", "removed"])
def test_checkpoint_that_changes_while_it_is_packed_is_not_kept(
    folder: Path, packed_cache: Path, how: str
) -> None:
    """Its experts would be those of another checkpoint, under the fingerprint of the first."""
    skeleton, path, changed = build_skeleton(folder), folder / SINGLE, False
    times = path.stat()

    def change(done: int, total: int) -> None:
        nonlocal changed
        if not changed and done > 0.7 * total:  # in the second of two blocks
            changed = True
            if how == "removed":
                path.unlink()
                return
            if how == "replaced":
                shutil.copy(path, folder / "new")
                (folder / "new").replace(path)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))

    with pytest.raises(CheckpointError, match="has changed while it was packed"):
        pack(skeleton, [INT4], progress=change)
    assert changed
    assert [Path(one).name for one in files_in(packed_cache)] == ["block-000.safetensors"]
    if how != "removed":
        assert packed(folder, INT4).files == 1
        assert check_packed(build_skeleton(folder)).problems == []


def test_formats_that_cannot_be_packed_are_not_called_sound(folder: Path) -> None:
    packed(folder, INT4)
    for format in (NATIVE, DECODED):
        with pytest.raises(ConfigError, match=f"{format.name} experts are read from the"):
            check_packed(build_skeleton(folder), [INT4, format])


def test_unwritable_cache_raises(folder: Path, packed_cache: Path) -> None:
    packed_cache.parent.parent.mkdir()
    packed_cache.parent.write_text("a file")
    with pytest.raises(CheckpointError, match="XDG_CACHE_HOME"):
        packed(folder)


def test_second_process_raises(folder: Path) -> None:
    place = PackedLocation(build_skeleton(folder))
    with (
        exclusive_folder(place.folder, busy=""),
        pytest.raises(ConfigError, match="another process is packing"),
    ):
        packed(folder)
    assert packed(folder).files == 4


def change(folder: Path, part: str, index: tuple[int, ...], value: float) -> None:
    tensors = load_file(folder / SINGLE)
    (name,) = (name for name in tensors if part in name)
    tensors[name][index] = value
    save_file(tensors, folder / SINGLE, {"format": "pt"})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e6])
def test_unencodable_weights_raise(folder: Path, packed_cache: Path, value: float) -> None:
    change(folder, "layers.1.block_sparse_moe.experts.6.w2", (3, 5), value)
    words = rf"expert 6 of .*layers.1.*: down_proj: the weight of output 3 for input 5 is {value}"
    with pytest.raises(CheckpointError, match=words):
        packed(folder)
    assert len([name for name in files_in(packed_cache) if "block-000" in name]) == 2
    assert not [name for name in files_in(packed_cache) if "block-001" in name]


def test_nonfinite_biases_raise(tmp_path: Path) -> None:
    folder = saved(tiny("GptOss"), tmp_path / "oss")
    change(folder, "layers.0.mlp.experts.down_proj_bias", (3, 5), torch.nan)
    with pytest.raises(CheckpointError, match=r"expert 3 of .*layers.0.*: down_proj_bias has"):
        packed(folder)


def test_peak_memory_is_one_expert_and_slots(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count live experts: each is released before the next is read."""
    alive: list[Any] = []
    most = 0
    own = build.ExpertStore.native

    def native(self: Any, block: str, expert: int) -> Any:
        nonlocal most
        tensors = own(self, block, expert)
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        most = max(most, sum(ref() is not None for ref in alive))
        return tensors

    monkeypatch.setattr(build.ExpertStore, "native", native)
    packed(folder)
    assert most <= 2 * 2, "two experts of two tensors: the one being made, the one before it"


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["pack", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_command(folder: Path, packed_cache: Path) -> None:
    made = json.loads(run(str(folder), "--formats", "int4, int4,int8", "--json").stdout)
    assert (made["files"], set(made["relative_errors"])) == (4, {"int4", "int8"})
    found = json.loads(run(str(folder), "--check", "--json").stdout)
    assert (found["files"], found["experts"], found["problems"]) == (4, 32, [])
    assert "4 exist already" in run(str(folder)).stderr
    assert "sound: 16 experts in int8" in run(str(folder), "--check", "--formats", "int8").stderr

    path = next(packed_cache.rglob("int8/block-001*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"expert 7 of model.layers.1.*checksum; pack int8"):
        run(str(folder), "--check")
    run(str(folder), "--formats", "int8", "--force")
    run(str(folder), "--check")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--formats", "int9"], "'int9' does not exist; .* nearest: int8"),
        (["--formats", "int4,"], "'' does not exist"),
        (["--formats", "int4,native"], "native experts are read from the checkpoint itself"),
        (["--check", "--force"], "give one of them"),
        (["--check"], "nothing of .* is packed in"),
    ],
)
def test_invalid_arguments_raise(folder: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(MoefitError, match=words):
        run(str(folder), *arguments)


def test_model_without_experts_raises(tmp_path: Path) -> None:
    saved(LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=16)), tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="has no experts"):
        run(str(tmp_path / "dense"))


def test_dsmoe_is_packed_in_every_format() -> None:
    names = [
        name for name, one in FORMATS.items() if one.is_encoded and not name.endswith("nearest")
    ]
    made = json.loads(run("reference", "--formats", ",".join(names), "--json").stdout)
    losses = [made["relative_errors"][f"int{bits}"] for bits in (2, 3, 4, 5, 6, 8)]
    assert losses == sorted(losses, reverse=True)
