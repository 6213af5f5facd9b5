"""The commands cache ls, cache rm and cache prune."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_served import saved, tiny
from typer.testing import CliRunner

import moefit.cli.pack  # noqa: F401 -- registers the commands
from moefit.cli import app
from moefit.errors import ConfigError
from moefit.folders import exclusive_folder
from moefit.quant.format import parse_format
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.packed import file as packed_file
from moefit.serve.packed.build import pack
from moefit.serve.packed.kept import Entry, entries, find, unneeded
from moefit.serve.packed.store import PackedLocation

DAY = 86400.0


@pytest.fixture
def packed(tmp_path: Path, packed_cache: Path) -> PackedLocation:
    """The packed store of a small model, the only one in the cache."""
    skeleton = build_skeleton(saved(tiny("Mixtral"), tmp_path / "a[b]"))
    pack(skeleton, [parse_format("int4"), parse_format("int8-nearest")])
    return PackedLocation(skeleton)


def said(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["cache", *arguments, "--json"])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return json.loads(done.stdout)


def entry(name: str, *, nbytes: int = 10, days: float = 0, **more: Any) -> Entry:
    kind, _, rest = name.partition("/")
    return Entry(
        kind=kind, path=Path("/c") / kind / rest, nbytes=nbytes, changed=-days * DAY, **more
    )


def test_ls_shows_what_is_packed_and_from_what(packed: PackedLocation) -> None:
    (one,) = said("ls")["entries"]
    assert one["kind"] == "packed" and one["source"] == packed.source and not one["stale"]
    assert one["contents"] == ["int4", "int8-nearest"]
    files = [path for path in packed.folder.rglob("*") if path.is_file()]
    assert one["nbytes"] == sum(path.stat().st_size for path in files) > 10_000
    shown = CliRunner().invoke(app, ["cache", "ls"], env={"COLUMNS": "200"}).output
    assert packed.source in shown and "unused" not in shown


def test_rm_takes_a_model_or_the_beginning_of_a_name(packed: PackedLocation) -> None:
    assert said("rm", packed.source, "--dry-run")["entries"][0]["name"].startswith("packed/")
    assert packed.folder.is_dir()
    with pytest.raises(ConfigError, match="--yes"):
        said("rm", packed.source)
    assert packed.folder.is_dir()
    assert said("rm", packed.folder.name[:8], "--yes")["removed"]
    assert not packed.folder.exists() and said("ls")["entries"] == []
    with pytest.raises(ConfigError, match="it is empty"):
        said("rm", packed.source, "--yes")


def test_rm_finds_a_models_folder_however_it_is_named(
    packed: PackedLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(packed.source)
    monkeypatch.chdir(folder.parent)
    (one,) = said("rm", folder.name, "--dry-run")["entries"]
    assert one["source"] == packed.source


def test_store_of_a_gguf_file_is_kept(packed: PackedLocation, monkeypatch) -> None:
    file = Path(packed.source).with_name("m.gguf")

    def read(path: Path) -> packed_file.PackedFile:
        found = packed_file.read_packed(path)
        return replace(found, metadata=replace(found.metadata, source=str(file)))

    monkeypatch.setattr("moefit.serve.packed.kept.read_packed", read)
    assert "no longer in" in said("ls")["entries"][0]["stale"]
    file.write_bytes(b"")
    assert said("ls")["entries"][0]["stale"] == ""


def test_rm_waits_for_no_process_that_packs(packed: PackedLocation) -> None:
    with exclusive_folder(packed.folder, busy=""), pytest.raises(ConfigError, match="written"):
        said("rm", packed.source, "--yes")
    assert packed.path(parse_format("int4"), 0).is_file()


def test_prune_keeps_what_can_be_read(packed: PackedLocation) -> None:
    left = packed.folder / "int4" / ".block-000.safetensors.1.writing"
    left.write_bytes(b"x" * 100)
    assert said("prune", "--yes")["bytes"] == 0 and left.exists()  # another process may write it
    os.utime(left, (0, 0))
    assert said("prune", "--dry-run")["bytes"] == 100 and left.exists()
    with pytest.raises(ConfigError, match="--yes"):
        said("prune")
    assert said("prune", "--yes")["bytes"] == 100
    assert packed.path(parse_format("int4"), 0).is_file() and not left.exists()


@pytest.mark.parametrize("case", ["checkpoint", "layout", "encoder"])
def test_prune_removes_what_nothing_reads(
    packed: PackedLocation, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {"checkpoint": "no longer in", "layout": "layout", "encoder": "another version"}
    if case == "checkpoint":
        shutil.rmtree(packed.source)
    elif case == "layout":
        monkeypatch.setattr(packed_file, "LAYOUT", packed_file.LAYOUT + 1)
    else:
        monkeypatch.setattr("moefit.serve.packed.kept._encoder", lambda format: "better")
    assert expected[case] in said("ls")["entries"][0]["stale"]
    (gone,) = said("prune", "--yes")["entries"]
    assert expected[case] in gone["reason"] and not packed.folder.exists()


def test_profiles_and_tokens_are_listed(packed_cache: Path, tmp_path: Path) -> None:
    root = packed_cache.parent
    for kind in ("profiles", "data"):
        (root / kind / "0123").mkdir(parents=True)
    facts = {"facts": {"source": str(tmp_path / "lost")}}
    (root / "profiles/0123/a.json").write_text(json.dumps(facts))
    (root / "profiles/0123/b.json").write_text("damaged")
    found = {one.name: one for one in entries()}
    assert found["profiles/0123"].contents == ("2 profiles",)
    assert "no longer in" in found["profiles/0123"].stale and not found["data/0123"].stale


def test_names_that_stand_for_several_are_refused() -> None:
    among = [
        entry("packed/aa1", source="/m"),
        entry("packed/aa2"),
        entry("profiles/aa1", source="/m"),
    ]
    assert find(["/m"], among) == [among[0], among[2]]
    assert find(["packed/aa2", "aa2"], among) == [among[1]]
    with pytest.raises(ConfigError, match="packed/aa1, packed/aa2"):
        find(["packed/aa"], among)
    with pytest.raises(ConfigError, match="no entry"):
        find([""], among)


def test_oldest_are_removed_until_the_rest_fits() -> None:
    among = [entry(f"packed/{n}", nbytes=10, days=n) for n in range(5)]
    gone = unneeded(among, older_than_days=3.5, keep_bytes=25, now=0.0)
    assert {one.path.name for one, _ in gone} == {"4", "3", "2"}
    assert unneeded(among, now=0.0) == [] and unneeded(among, keep_bytes=50, now=0.0) == []


def test_an_unreadable_folder_is_named(packed: PackedLocation) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may remove everything")
    packed.folder.chmod(0o500)
    with pytest.raises(Exception, match="permission"):
        said("rm", packed.source, "--yes")
    packed.folder.chmod(0o700)
