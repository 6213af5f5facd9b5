import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from planned import profile
from tiny_served import saved, tiny, tokens

from moefit.api import folder_of
from moefit.errors import ConfigError, DataError
from moefit.evaluate.perplexity import Text
from moefit.plan.measure import MeasuredModel, Measurements
from moefit.plan.profile import (
    Profile,
    find_profile,
    folder_for,
    path_for,
    read_profile,
    write_profile,
)
from moefit.plan.profiler import Profiler
from moefit.plan.reference import windows_of
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.windows import Windows

WINDOWS = Windows(tokens(5, 33))


@cache
def folder() -> Path:
    return saved(tiny("Mixtral"), Path(mkdtemp()) / "model")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield


def profiler(**changes: Any) -> Profiler:
    return Profiler(MeasuredModel(folder=folder(), **changes), WINDOWS, text="random")


class _Killed(Exception):
    pass


def stop_after(count: int):
    def progress(name: str, done: int, total: int) -> None:
        if done >= count:
            raise _Killed

    return progress


def test_stopped_profile_resumes() -> None:
    with pytest.raises(_Killed):
        profiler().run(stop_after(2))
    kept = dict(read_profile(profiler().path).items)
    assert list(kept) == list(profiler().facts.wanted[:2])
    heard: list[str] = []

    def listen(name: str, done: int, total: int) -> None:
        heard.append(name)
        if done >= 4:
            raise _Killed

    with pytest.raises(_Killed):
        profiler().run(listen)
    assert heard[0] == profiler().facts.wanted[2]
    found = dict(read_profile(profiler().path).items)
    assert {name: found[name] for name in kept} == kept and len(found) == 4


_ANOTHER = """
import sys, platform
from moefit.folders import exclusive_folder
from moefit.plan.profile import profiles_root
with exclusive_folder(profiles_root(), busy="", lock=f".measuring-{platform.node()}"):
    print("has it", flush=True)
    sys.stdin.read()
"""


def test_concurrent_profiling_raises() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _ANOTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"has it\n"
        with pytest.raises(ConfigError, match=r"another moefit profile .* wait for it"):
            profiler().run()
        facts = profiler().facts
        write_profile(Profile(facts=facts, items=dict.fromkeys(facts.wanted)), profiler().path)
        assert not profiler().run().missing
        profiler().path.unlink()
        other.kill()
    with pytest.raises(_Killed):  # the lock has gone with its process
        profiler().run(stop_after(0))


@pytest.mark.parametrize(("rule", "says"), [("top_k:1", "only DS-MoE"), ("best", "best")])
def test_invalid_rule_raises_before_measuring(rule: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        profiler(rule=rule)


def test_too_many_experts_raise_before_measuring() -> None:
    subject = MeasuredModel(folder=folder_of("reference"), rule="top_k:99")
    with pytest.raises(ConfigError, match="the most that works is top_k:16"):
        Profiler(subject, WINDOWS, text="random")


def test_missing_device_raises_before_measuring() -> None:
    with pytest.raises(ConfigError, match="'tpu' is not available here"):
        profiler(device="tpu")


def test_again_measures_only_times(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = profiler().facts
    write_profile(Profile(facts=facts, items=dict.fromkeys(facts.wanted, 1)), profiler().path)
    monkeypatch.setattr(Measurements, "measure", lambda *_: 2)
    assert set(profiler().run().items.values()) == {1}
    items = profiler().run(again=True).items
    assert items == read_profile(profiler().path).items
    timed = {"bandwidth", "format", "rest", "steps"}
    anew = {name for name, value in items.items() if value == 2}
    assert anew == {name for name in facts.wanted if name.split("/")[0] in timed}


def test_stopped_remeasurement_resumes() -> None:
    facts = profiler().facts
    write_profile(Profile(facts=facts, items=dict.fromkeys(facts.wanted, 1)), profiler().path)
    with pytest.raises(_Killed):
        profiler().run(stop_after(0), again=True)
    left = read_profile(profiler().path)
    assert "bandwidth" in left.missing and "routes" not in left.missing


def test_unfinished_profile_names_command() -> None:
    with pytest.raises(_Killed):
        profiler().run(stop_after(1))
    with pytest.raises(ConfigError, match=r"1 of .* continues"):
        find_profile(skeleton(), model="m")


def skeleton() -> Skeleton:
    return build_skeleton(folder())


def test_missing_profile_names_command() -> None:
    with pytest.raises(ConfigError, match="moefit profile m"):
        find_profile(skeleton(), model="m")


def finished(path: Path, **changes: Any) -> Path:
    done = profile()
    write_profile(replace(done, facts=replace(done.facts, **changes)), path)
    return path


def test_newest_complete_profile_is_found() -> None:
    place = folder_for(skeleton())
    finished(place / "a.json")
    (place / "b.json").write_text("{")
    assert find_profile(skeleton(), model="m").facts.source == "nowhere"


def test_profile_of_this_machine_is_preferred() -> None:
    place = folder_for(skeleton())
    finished(place / "a.json", source="here")
    finished(place / "b.json", source="there", machine={**profile().facts.machine, "cores": 999})
    os.utime(place / "a.json", (1, 1))
    assert find_profile(skeleton(), model="m").facts.source == "here"
    (place / "a.json").unlink()
    assert find_profile(skeleton(), model="m").facts.source == "there"


def test_profile_round_trips(tmp_path: Path) -> None:
    assert read_profile(finished(tmp_path / "p.json")) == profile()


def test_profile_of_another_checkpoint_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another checkpoint"):
        find_profile(skeleton(), model="m", path=finished(tmp_path / "p.json"))


def test_profile_of_another_version_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="version 99"):
        read_profile(finished(tmp_path / "p.json", version=99))


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "not a profile"), ("[]", "version None"), (b"\xff\xfe", "not a profile")],
)
def test_invalid_profile_raises(tmp_path: Path, content: str | bytes, says: str) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=says):
        read_profile(file)


def test_damaged_profile_raises(tmp_path: Path) -> None:
    file = finished(tmp_path / "p.json")
    values = json.loads(file.read_text())
    del values["facts"]["blocks"]
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="damaged"):
        read_profile(file)


def test_unwritable_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        write_profile(profile(), tmp_path / "file" / "p.json")


def test_profile_file_depends_on_text_rule_and_machine() -> None:
    facts = profiler().facts
    paths = {
        path_for(skeleton(), one)
        for one in (
            facts,
            replace(facts, text_digest="other"),
            replace(facts, rule="top_k:1"),
            replace(facts, machine={**facts.machine, "cpu": "other"}),
        )
    }
    assert len(paths) == 4


def text(count: int, context: int = 32) -> Text:
    return Text(ids_T=torch.arange(count), text_bytes=1, context=context)


@pytest.mark.parametrize("count", [0, 1, 32, 100])
def test_too_short_text_names_minimum(count: int) -> None:
    with pytest.raises(DataError, match=r"at least 129 tokens"):
        windows_of(text(count))


def test_text_is_cut_into_full_windows() -> None:
    assert windows_of(text(129)).ids_BT.shape == (4, 33)
    assert windows_of(text(140)).ids_BT.shape == (4, 33)
