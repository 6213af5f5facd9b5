import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from tiny_served import saved, tiny, tokens

import moefit.plan.measure
from moefit.errors import BudgetTooSmallError
from moefit.plan.configuration import uniform
from moefit.plan.experiments import BlockShape
from moefit.plan.measure import MeasuredModel, Measurements, _with_fewer_slots
from moefit.plan.profile import Profile
from moefit.plan.profiler import Profiler
from moefit.plan.reference import Reference, read_reference
from moefit.serve.windows import Windows

WINDOWS = Windows(tokens(3, 33))


@cache
def folder() -> Path:
    return saved(tiny("Mixtral", initializer_range=0.1), Path(mkdtemp()) / "model")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def measuring(memory: int | None = None) -> tuple[Measurements, Profile]:
    profiler = Profiler(MeasuredModel(folder=folder()), WINDOWS, text="random", memory=memory)
    return profiler._measurements, Profile(facts=profiler.facts, items={})


def measured(names: list[str]) -> dict:
    measurements, profile = measuring()
    for name in names:
        profile = profile.with_item(name, measurements.measure(name, profile))
    return dict(profile.items)


def test_results_do_not_depend_on_memory(monkeypatch) -> None:
    names = ["routes", "quality/uniform/int4", "quality/block/int2/0"]
    plenty = measured(names)
    with monkeypatch.context() as patch:
        patch.setattr(moefit.plan.measure, "available_bytes", lambda: 1)
        short = measured(names)
    for block, one in short["routes"].items():
        assert one["mass"] == pytest.approx(plenty["routes"][block]["mass"])
    for name in names[1:]:
        one, other = short[name], plenty[name]
        assert one["configuration"]["blocks"] != other["configuration"]["blocks"]
        assert one["divergence"] == pytest.approx(other["divergence"], rel=1e-3)


def test_reference_is_kept_and_recreated(tmp_path: Path) -> None:
    measurements, profile = measuring()
    profile = profile.with_item("routes", measurements.measure("routes", profile))
    (kept,) = tmp_path.rglob("*.npz")
    before = kept.read_bytes()
    again, _ = measuring()
    assert again.measure("quality/uniform/native", profile)["divergence"] < 1e-6
    kept.unlink()
    again, _ = measuring()
    again.measure("quality/uniform/native", profile)
    assert kept.read_bytes() == before


def test_too_little_memory_names_minimum() -> None:
    with pytest.raises(BudgetTooSmallError, match=r"give at least \d+ bytes"):
        measuring(memory=1 << 20)


def test_fewer_slots_are_split_evenly() -> None:
    shape = BlockShape(num_experts=8, weights=1, slot_bytes={"native": 100, "int4": 30}, errors={})
    shapes = {"a": shape, "b": shape}
    full = uniform(dict.fromkeys(shapes, 8), "native")
    assert [one.slots for one in _with_fewer_slots(full, 1000, shapes).placement.values()] == [5, 5]
    assert [one.slots for one in _with_fewer_slots(full, 10, shapes).placement.values()] == [1, 1]
    assert _with_fewer_slots(full, 10**6, shapes).placement == full.placement


def test_cached_model_does_not_reduce_memory(monkeypatch) -> None:
    measurements, profile = measuring()
    profile = profile.with_item("routes", measurements.measure("routes", profile))
    measurements.measure("quality/uniform/native", profile)
    monkeypatch.setattr("moefit.serve.memory.held.held_bytes", lambda _: 1 << 60)  # it has grown
    one = measurements.measure("quality/block/int2/0", profile)
    assert [block["slots"] for block in one["configuration"]["blocks"].values()] == [8, 8]
    measurements.close()


def test_damaged_reference_is_recreated(tmp_path: Path) -> None:
    """Damaged files and inconsistent arrays are read as None."""
    path = tmp_path / "reference.npz"
    whole = Reference(
        windows=Windows(torch.zeros(2, 5, dtype=torch.int64)),
        ids_BTN=torch.zeros(2, 4, 3, dtype=torch.int32),
        logp_BTN=torch.zeros(2, 4, 3),
        nll_BT=torch.zeros(2, 4),
    )
    whole.save(path)
    content = path.read_bytes()
    assert read_reference(path) is not None
    for size in (0, 1, 30, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert read_reference(path) is None
    rng = random.Random(0)
    for _ in range(300):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        read_reference(path)
    for other in (
        replace(whole, ids_BTN=whole.ids_BTN[:, 1:]),
        replace(whole, nll_BT=whole.nll_BT.double()),
        replace(whole, windows=Windows(whole.windows.ids_BT[0])),
        replace(whole, windows=Windows(whole.windows.ids_BT, torch.zeros(1, 5, dtype=torch.int64))),
    ):
        other.save(path)
        assert read_reference(path) is None
