"""Changing the placement of a served model: slots, formats, bytes and outputs."""

import threading
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_served import Disk, logits, reading_through, saved, settled, tiny, tokens

import moefit
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.serve.cache import resize
from moefit.serve.cache.scores import VirtualExpertManager
from moefit.serve.cache.slot import Slot
from moefit.serve.config import BlockPlacement, Placement
from moefit.serve.io.reader import ExpertStore
from moefit.serve.model import ServedModel
from moefit.serve.precision.allocate import AUTO_FORMATS

IDS = tokens(1, 12)
FIRST, SECOND = (f"model.layers.{number}.mlp.experts" for number in range(2))
MIXED = ("native", "int8", "int8", "int4", "native", "int2", "int6", "int3")


@cache
def folder() -> Path:
    return saved(tiny("Mixtral"), Path(mkdtemp()) / "model")


def of(slots: int, *formats: str) -> BlockPlacement:
    return BlockPlacement(slots=slots, formats=formats)


def placed(first: BlockPlacement, second: BlockPlacement) -> Placement:
    return {FIRST: first, SECOND: second}


NATIVE = placed(of(8, "native"), of(8, "native"))
SEATED = placed(of(8, *MIXED), of(2, "int8"))
FEW = placed(of(3, "native"), of(6, "int4"))


def load(placement: Placement, **settings: Any) -> ServedModel:
    return moefit.load(folder(), placement=placement, context=64, **settings)


def state(served: ServedModel) -> tuple[Any, ...]:
    report = served.report()
    return report["slots"], report["formats"], report["slot_bytes"], report["spare_bytes"]


def commit(served: ServedModel) -> None:
    """Wait until all loads have completed."""
    settled(served)
    for experts in served.blocks.values():
        experts.swaps.settle()
    served.check()


@pytest.mark.parametrize("before", [NATIVE, SEATED, FEW])
@pytest.mark.parametrize("after", [NATIVE, SEATED, FEW])
def test_changed_placement_equals_loaded_placement(before: Placement, after: Placement) -> None:
    with load(before) as served, load(after) as other:
        logits(served.model, IDS)
        served.set_placement(after, memory=None)
        assert state(served) == state(other)
        torch.testing.assert_close(logits(served.model, IDS), logits(other.model, IDS))
        commit(served)
        torch.testing.assert_close(logits(served.model, IDS), logits(other.model, IDS))
        served.check()


def test_experts_in_requested_format_stay() -> None:
    with load(NATIVE) as served:
        logits(served.model, IDS)
        loads, there = served.report()["loads"], set(served.report()["resident"][FIRST])
        assert there & {0, 4}
        served.set_placement(SEATED, memory=None)
        slots = served.blocks[FIRST].slots
        commit(served)
        for expert, format in enumerate(MIXED):
            assert slots[served.blocks[FIRST].slot_table.slot(expert)].format.name == format
        assert served.report()["loads"] - loads == 8 - len(there & {0, 4}) + 2


@pytest.mark.parametrize("failing", [1, 5, 9, 12])
def test_failed_allocation_keeps_slots(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(SEATED) as served:
        expected, before, budget = logits(served.model, IDS), state(served), served.budget
        allocate, calls = resize.allocate_slot, []

        def scarce(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == failing:
                raise OSError("cannot allocate memory")
            return allocate(*arguments)

        monkeypatch.setattr(resize, "allocate_slot", scarce)
        with pytest.raises(OSError, match="cannot allocate"):
            served.set_placement(placed(of(7, "int3"), of(8, *MIXED)), memory=None, mode="virtual")
        assert (state(served), served.budget, served.policy.mode) == (before, budget, "exact")
        torch.testing.assert_close(logits(served.model, IDS), expected)
        commit(served)
        torch.testing.assert_close(logits(served.model, IDS), expected)


def test_failed_read_affects_only_its_expert() -> None:
    with reading_through(Disk()) as disk, load(NATIVE) as served, load(SEATED) as other:
        disk.failures = 3
        served.set_placement(SEATED, memory=None)
        settled(served)
        disk.failures = 0
        torch.testing.assert_close(logits(served.model, IDS), logits(other.model, IDS))
        commit(served)
        assert state(served) == state(other)


def test_invalid_placement_changes_nothing() -> None:
    with load(SEATED, memory="4GiB") as served:
        before, budget = state(served), served.budget
        with pytest.raises(BudgetTooSmallError, match="plan again"):
            served.set_placement(NATIVE, memory=served.placement_budget.budget(NATIVE, None).fixed)
        with pytest.raises(ConfigError, match="differ in"):
            served.set_placement({FIRST: of(8, "native")}, memory="4GiB")
        with pytest.raises(ConfigError, match="not one of"):
            served.set_placement(NATIVE, memory="4GiB", mode="fast")  # pyright: ignore[reportArgumentType]
        assert (state(served), served.budget) == (before, budget)
        served.check()


def test_auto_precision_has_own_placements() -> None:
    with (
        moefit.load(folder(), memory="4GiB", precision="auto", context=64) as served,
        pytest.raises(ConfigError, match="precision auto"),
    ):
        served.set_placement(NATIVE, memory="4GiB")


def test_placement_changes_mode_and_keeps_swaps() -> None:
    with load(NATIVE) as served:
        served.set_placement(
            placed(of(4, "int8"), of(4, "int8")),
            memory=None,
            mode="virtual",
            manager=VirtualExpertManager(every=2),
        )
        commit(served)
        assert (served.policy.mode, served.policy.prefill) == ("virtual", "virtual")
        assert served._shared.manager.every == 2
        for seed in range(12):
            logits(served.model, tokens(1, 12, seed=seed))
            commit(served)
        assert served.report()["swaps"] > 8  # the first of each block filled it


def test_dropped_plan_leaves_spare_slots() -> None:
    with load(SEATED, memory="4GiB", mode="virtual") as served:
        logits(served.model, IDS)
        served.set_memory(served.budget.min_bytes + 1)
        assert served.budget.planned is None
        assert set(served.report()["slots"].values()) == {1}
        each = [one.block_slot_bytes for one in served.blocks.values()]
        assert served.report()["spare_bytes"] == 2 * sum(each)
        before = served.report()["swaps"]
        for seed in range(12):
            logits(served.model, tokens(1, 12, seed=seed))
            commit(served)
        assert served.report()["swaps"] > before


formats = st.sampled_from(AUTO_FORMATS)
blocks = st.one_of(
    st.builds(of, st.integers(1, 8), formats),
    st.lists(formats, min_size=8, max_size=8).map(lambda some: of(8, *some)),
)
modes = st.sampled_from(["exact", "virtual"])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(blocks, blocks, modes), min_size=1, max_size=4))
def test_random_placements_keep_invariants(steps: list[Any]) -> None:
    with load(NATIVE, memory="4GiB") as served:
        for number, (first, second, mode) in enumerate(steps):
            placement = placed(first, second)
            budget = served.set_placement(placement, memory="4GiB", mode=mode)
            assert budget.planned is not None
            assert served.report()["slot_bytes"] == budget.planned.nbytes
            served.check()
            logits(served.model, tokens(1, 6, seed=number))
            commit(served)
            for name, one in placement.items():
                experts = served.blocks[name]
                for expert in experts.slot_table.residents:
                    slot = experts.slots[experts.slot_table.slot(expert)]
                    assert slot.format == one.format_of(expert)


def test_placement_is_loaded_by_all_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads wait for each other until as many run as there are readers."""
    together = threading.Barrier(4, timeout=30)
    read = ExpertStore.read

    def reads_together(self: ExpertStore, block: str, expert: int, into: Slot) -> None:
        together.wait()
        read(self, block, expert, into)

    whole = placed(of(8, *["int4"] * 8), of(8, *["int4"] * 8))
    monkeypatch.setattr(ExpertStore, "read", reads_together)
    with load(whole, readers=4) as served:
        assert all(len(one.slot_table.residents) == 8 for one in served.blocks.values())
        served.check()
