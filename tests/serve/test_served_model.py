import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import differs_by
from tiny_served import (
    FAMILIES,
    Disk,
    logits,
    model_of,
    reading_through,
    settled,
    tokens,
    with_slots,
)

from moefit.errors import BudgetTooSmallError, CheckpointError, ConfigError
from moefit.serve.cache import resize
from moefit.serve.config import LoadSettings
from moefit.serve.io.loads import BACKGROUND_READERS
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel

NEW_TOKENS = 12


@pytest.fixture
def serve(folders) -> Iterator[Any]:
    """A served model with few slots more than the minimum, and its simulated disk."""
    open_models: list[tuple[ServedModel, Disk]] = []

    def make(family: str = "Mixtral", *, slots: int | None = None, **how: Any):
        with reading_through(Disk()) as disk:
            served = load_model(folders(family), LoadSettings(context=64), **how)
        if slots is not None:
            served.set_memory(with_slots(served, slots))
        open_models.append((served, disk))
        return served, disk

    yield make
    for served, disk in open_models:
        disk.open.set()
        served.close()


def generated(one: Any, **how: Any) -> list[int]:
    made = one.generate(tokens(1, 9), max_new_tokens=NEW_TOKENS, do_sample=False, **how)
    return made[0].tolist()


@pytest.mark.slow  # torch.compile takes seconds
@pytest.mark.parametrize("precision", ["native", "int8"])
def test_compiled_model_computes_the_same(folders, precision):
    settings = LoadSettings(context=64, dtype=torch.bfloat16, precision=precision)
    served = load_model(folders("Olmoe"), settings)
    compiled = torch.compile(served.model, backend="eager")
    with torch.inference_mode():
        for length in (9, 1, 3):
            expected = served.model(tokens(1, length)).logits
            assert torch.equal(compiled(tokens(1, length)).logits, expected)
    torch.compiler.reset()
    served.close()


def slots_of(served: ServedModel) -> set[int]:
    return set(served.report()["slots"].values())


@pytest.mark.parametrize("slots", [None, 1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_equals_model_at_any_budget(serve, family: str, slots: int) -> None:
    served, _ = serve(family, slots=slots)
    assert (
        differs_by(logits(served.model, tokens(2, 7)), logits(model_of(family), tokens(2, 7)))
        < 1e-4
    )
    assert generated(served) == generated(model_of(family))
    served.check()
    assert slots_of(served) == {slots or 8}


def test_memory_grows_and_shrinks(serve) -> None:
    served, _ = serve(slots=4)
    expected = generated(model_of("Mixtral"))
    for slots in (4, 1, 7, 2, 8, 3, 1):
        budget = served.set_memory(with_slots(served, slots))
        assert budget is served.budget and slots_of(served) == {slots}
        served.check()
        assert generated(served) == expected
        report = served.report()
        assert report["slot_bytes"] + report["budget"]["staging"] <= budget.total - (
            budget.fixed - budget.staging
        )
    served.set_memory(None)
    assert slots_of(served) == {8}
    assert generated(served) == expected


def test_growing_fills_new_slots_in_the_background(serve) -> None:
    served, disk = serve(slots=1)
    generated(served)
    disk.open.clear()
    served.set_memory(None)
    assert disk.waiting.wait(10), "loading has begun"
    served.check()
    assert sum(map(len, served.report()["resident"].values())) <= 2, "and nobody waits for it"
    disk.open.set()
    settled(served)
    before = served.report()["bytes_read"]
    assert generated(served) == generated(model_of("Mixtral"))
    assert all(len(one) == 8 for one in served.report()["resident"].values())
    assert served.report()["bytes_read"] == before


def test_shrinking_cancels_pending_loads(serve) -> None:
    served, disk = serve(slots=1)
    generated(served)
    before = served.report()["bytes_read"]
    (slot_bytes,) = {block.slot_bytes for block in served.budget.blocks}
    disk.open.clear()
    served.set_memory(None)
    assert disk.waiting.wait(10), "loading has begun"
    threading.Timer(0.1, disk.open.set).start()
    served.set_memory(with_slots(served, 2))
    served.check()
    assert slots_of(served) == {2}
    settled(served)
    read = served.report()["bytes_read"] - before
    assert read <= (BACKGROUND_READERS + 2) * slot_bytes, "begun then, and what fills two slots"
    assert generated(served) == generated(model_of("Mixtral"))


def test_growing_with_slow_storage(serve) -> None:
    """All slots wait for experts that the first step does not use."""
    served, disk = serve(slots=1)
    disk.open.clear()
    served.set_memory(with_slots(served, 2))
    threading.Timer(0.1, disk.open.set).start()
    assert generated(served) == generated(model_of("Mixtral"))
    served.check()


@pytest.mark.parametrize("memory", [1, "1MiB", "floor"])
def test_budget_below_minimum_changes_nothing(serve, memory) -> None:
    served, _ = serve(slots=3)
    generated(served)
    before, budget = served.report(), served.budget
    with pytest.raises(BudgetTooSmallError, match=f"at least {budget.min_bytes} bytes"):
        served.set_memory(budget.min_bytes - 1 if memory == "floor" else memory)
    after = served.report()
    assert served.budget is budget
    assert [after[key] for key in ("slots", "resident", "slot_bytes")] == [
        before[key] for key in ("slots", "resident", "slot_bytes")
    ]
    served.set_memory(budget.min_bytes)
    assert slots_of(served) == {1}


@pytest.mark.parametrize("memory", ["", "lots", 0, -5, "0GiB"])
def test_invalid_size_changes_nothing(serve, memory) -> None:
    served, _ = serve(slots=2)
    with pytest.raises(ConfigError, match="is not a size"):
        served.set_memory(memory)
    assert slots_of(served) == {2}


@pytest.mark.parametrize("fails_at", [0, 1, 5])
def test_failed_allocation_changes_nothing(serve, monkeypatch, fails_at: int) -> None:
    served, _ = serve(slots=2)
    expected = generated(served)
    budget, allocate, calls = served.budget, resize.allocate_slot, []

    def scarce(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > fails_at:
            raise OSError(12, "Cannot allocate memory")
        return allocate(*args)

    monkeypatch.setattr(resize, "allocate_slot", scarce)
    with pytest.raises(OSError, match="Cannot allocate"):
        served.set_memory(None)
    served.check()
    assert served.budget is budget and slots_of(served) == {2}
    assert generated(served) == expected
    monkeypatch.undo()
    served.set_memory(None)
    assert slots_of(served) == {8} and generated(served) == expected


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "fast"}, "mode='fast' is not one of exact, bounded, virtual"),
        ({"mode": None}, "mode=None is not one of"),
        ({"mode": "virtual", "prefill": "none"}, "prefill='none' is not one of"),
        ({"mode": "bounded", "bound": 2}, "bound=2"),
        ({"mode": "bounded", "ramp": 1.5}, "ramp=1.5"),
        ({"mode": "bounded", "bounds": 0.2}, "unknown setting.*bounds.*use mode, prefill"),
        ({"mode": "exact", "residency": "no"}, "residency='no'"),
    ],
)
def test_unknown_mode_changes_nothing(serve, settings, says: str) -> None:
    served, _ = serve(slots=2)
    served.set_mode("bounded", bound=0.5)
    before = served.policy
    with pytest.raises(ConfigError, match=says):
        served.set_mode(**settings)
    assert served.policy is before


@pytest.mark.parametrize("family", FAMILIES)
def test_all_resident_makes_every_mode_exact(serve, family: str) -> None:
    served, _ = serve(family)
    for experts in served.blocks.values():
        experts.set_residents(range(8))
    expected = logits(model_of(family), tokens(2, 9))
    for mode in ("virtual", "bounded"):
        served.set_mode(mode, prefill=mode)
        assert differs_by(logits(served.model, tokens(2, 9)), expected) < 1e-4
        assert served.report()["substituted_mass"] == 0.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["virtual", "bounded"])
def test_fixed_residents_are_reproducible(serve, family: str, mode: str) -> None:
    served, _ = serve(family, slots=4)
    generated(served)
    served.set_mode(mode, residency="fixed", prefill=mode)
    before = served.report()["resident"]
    results = []
    for _ in range(3):
        results.append(logits(served.model, tokens(2, 9)))
        generated(served)
    assert all(torch.equal(one, results[0]) for one in results)
    assert served.report()["resident"] == before
    served.check()


def test_fixing_residents_waits_for_loads(serve) -> None:
    """Otherwise an earlier swap would be published in between."""
    served, disk = serve(slots=4)
    generated(served)
    disk.open.clear()
    served.set_memory(with_slots(served, 6))
    threading.Timer(0.1, disk.open.set).start()
    served.set_mode("virtual", residency="fixed")
    before = served.report()["resident"]
    assert all(len(one) == 6 for one in before.values())
    generated(served)
    assert served.report()["resident"] == before


def test_grown_fixed_set_is_filled_before_next_step(serve) -> None:
    served, disk = serve(slots=3)
    generated(served)
    served.set_mode("virtual", residency="fixed")
    served.set_memory(with_slots(served, 5))
    before = served.report()["resident"]
    assert all(len(one) == 5 for one in before.values())
    generated(served)
    assert served.report()["resident"] == before and disk.open.is_set()


def test_virtual_swaps_follow_router(serve) -> None:
    served, _ = serve(slots=3)
    served.set_mode("virtual")
    for _ in range(4):
        generated(served)
        settled(served)
        served.check()
    report = served.report()
    assert report["swaps"] > 0 and 0 < report["substituted_mass"] < 1
    for experts in served.blocks.values():
        experts.swaps.settle()
    assert slots_of(served) == {3}


def test_failed_swap_leaves_model_usable(serve) -> None:
    served, disk = serve(slots=2)
    served.set_mode("virtual")
    generated(served)
    settled(served)
    generated(served)
    disk.failures = 10**6
    for _ in range(3):
        generated(served)
        settled(served)
        served.check()
    disk.failures = 0
    served.set_mode("exact")
    assert generated(served) == generated(model_of("Mixtral"))
    served.check()


def test_failed_fetch_raises_and_next_generation_works(serve) -> None:
    served, disk = serve(slots=1)
    disk.failures = 10**6
    with pytest.raises(CheckpointError, match="cannot be read after 3 attempts"):
        generated(served)
    served.check()
    disk.failures = 0
    assert generated(served) == generated(model_of("Mixtral"))


class Elsewhere:
    """A thread that repeats an action until stopped and raises its error here."""

    def __init__(self, act: Any):
        self._act, self._stop, self.error, self.done = act, threading.Event(), None, 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._act(self.done)
                self.done += 1
        except BaseException as error:  # noqa: BLE001 - raised again where the thread is joined
            self.error = error

    def __enter__(self) -> "Elsewhere":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        if self.error is not None:
            raise self.error


def test_budget_changes_during_exact_generation(serve) -> None:
    served, _ = serve(slots=3)
    expected = generated(model_of("Mixtral"))
    over: list[str] = []

    def change(step: int) -> None:
        served.set_memory(with_slots(served, 1 + step * 5 % 8))
        served.check()
        report = served.report()
        room = report["budget"]["total"] - served.budget.fixed + report["budget"]["staging"]
        if report["slot_bytes"] + report["spare_bytes"] > room:
            over.append(str(report))

    with Elsewhere(change) as other:
        for _ in range(8):
            assert generated(served) == expected
        while other.done < 16 and other.error is None:
            time.sleep(0.01)
    assert not over


def test_modes_and_budgets_change_during_generation(serve) -> None:
    served, _ = serve("DeepseekV3", slots=3)
    expected = generated(model_of("DeepseekV3"))
    modes = ("virtual", "bounded", "exact")

    def change(step: int) -> None:
        served.set_mode(modes[step % 3], residency=("manager", "fixed")[step // 3 % 2])
        served.set_memory(with_slots(served, 1 + step * 5 % 8))
        served.check()

    with Elsewhere(change) as other:
        for _ in range(6):
            made = generated(served)
            assert len(made) == 9 + NEW_TOKENS
        while other.done < 12 and other.error is None:
            time.sleep(0.01)
    served.set_mode("exact", residency="manager")
    assert generated(served) == expected
    served.check()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["exact", "bounded", "virtual"]), st.integers(1, 8)),
                min_size=1, max_size=5))  # fmt: skip
def test_exact_after_any_history(folders, history: list[tuple[Any, int]]) -> None:
    with load_model(folders("Olmoe"), LoadSettings(context=64)) as served:
        for mode, slots in history:
            served.set_mode(mode)
            served.set_memory(with_slots(served, slots))
            generated(served)
            served.check()
        served.set_mode("exact")
        assert generated(served) == generated(model_of("Olmoe"))


def test_report_is_json_and_resets(serve) -> None:
    served, _ = serve(slots=2)
    generated(served)
    report = served.report()
    assert json.loads(json.dumps(report)) == report
    assert report["mode"] == report["prefill"] == "exact"
    assert report["fetches"] > 0 and report["bytes_read"] > 0 and report["wait_seconds"] > 0
    assert report["experts"].keys() == report["slots"].keys() == served.blocks.keys()
    assert report["peak_process_bytes"] >= report["process_bytes"] > 0
    served.reset()
    assert served.report()["hits"] == served.report()["fetches"] == 0
    generated(served)
    assert served.report()["hits"] > 0


def test_isolated_context_has_no_effects(serve) -> None:
    served, _ = serve(slots=3)
    generated(served)
    keys = ("mode", "resident", "hits", "fetches", "substituted_mass", "swaps")
    before = [served.report()[key] for key in keys]
    scores = [experts.importance.scores() for experts in served.blocks.values()]
    with served.isolated(served.checked_policy("virtual")):
        assert served.policy.mode == "virtual" and served.policy.residency == "fixed"
        generated(served)
    assert [served.report()[key] for key in keys] == before
    assert scores == [experts.importance.scores() for experts in served.blocks.values()]


def test_isolated_context_ends_after_error(serve) -> None:
    served, _ = serve(slots=3)
    before = served.policy
    with pytest.raises(ZeroDivisionError), served.isolated(served.checked_policy("virtual")):
        raise ZeroDivisionError
    assert served.policy is before


def test_isolated_context_restores_policy(serve) -> None:
    """A running step must not observe the change."""
    served, _ = serve(slots=3)
    before, policy = served.policy, served.checked_policy("virtual")
    within, leave = threading.Event(), threading.Event()

    def compute() -> None:
        with served.isolated(policy):
            within.set()
            leave.wait(30)

    worker = threading.Thread(target=compute)
    worker.start()
    assert within.wait(30)
    with served._shared.lock:  # as a step holds it
        leave.set()
        worker.join(0.3)
        assert served.policy.mode == "virtual"
    worker.join(30)
    assert served.policy == before


def test_concurrent_mode_changes_are_kept(serve) -> None:
    """The second change is based on the policy set by the first."""
    served, _ = serve(slots=3)
    with served._shared.lock:
        worker = threading.Thread(target=lambda: served.set_mode("exact", ramp=0.5))
        worker.start()
        worker.join(0.3)  # it waits for the lock, and has read nothing yet
        served.set_mode("exact", bound=0.123)
    worker.join(30)
    assert (served.policy.bound, served.policy.ramp) == (0.123, 0.5)


def test_model_without_tokenizer_is_served_by_ids(serve) -> None:
    served, _ = serve()
    with pytest.raises(ConfigError, match=r"has no tokenizer .*The model itself takes token ids"):
        _ = served.tokenizer


def test_closing_removes_threads_and_hooks(folders) -> None:
    before = threading.active_count()
    with load_model(folders("Mixtral"), LoadSettings(context=64)) as served:
        generated(served)
        assert threading.active_count() > before
    assert threading.active_count() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in served.model.modules())  # fmt: skip
    served.close()
