import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from tiny_served import MemoryStore, OverStorage, mixtral_block, parts_of

from moefit.quant.format import NATIVE
from moefit.serve.cache.eviction import LeastRecentlyUsed
from moefit.serve.cache.scores import VirtualExpertManager
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.cache.swaps import SharedState, Swaps
from moefit.serve.config import Policy
from moefit.serve.io.loads import Transfer

NUM_EXPERTS = 8


def new_slot() -> Slot:
    return allocate_slot(NATIVE, mixtral_block()[0].layout.specs, torch.device("cpu"))


class Bench:
    """A block's slot table, slots and spares, with storage that can be slow or fail."""

    def __init__(self, slots: int, *, residents: Sequence[int] = (), spares: int = 2):
        self.block, self.module = mixtral_block()
        self.store = MemoryStore(self.block, self.module)
        self.transfer = Transfer(self.store, readers=1)
        self.shared = SharedState(
            policy=Policy(),
            manager=VirtualExpertManager(max_swaps=2, margin=0.1),
            transfer=self.transfer,
        )
        self.eviction = LeastRecentlyUsed()
        self.slot_table = SlotTable(NUM_EXPERTS, slots, self.eviction)
        self.slots = {index: new_slot() for index in range(slots)}
        some = [new_slot() for _ in range(spares)]
        self.kind = NATIVE.name, new_slot().nbytes
        self.shared.spares[self.kind] = some
        self.held = slots + spares
        self.swaps = Swaps(self.block.name, self.shared, self.slot_table, self.slots)
        for expert in residents:
            slot = self.slot_table.reserve(expert)
            assert slot is not None
            self.store.read(self.block.name, expert, self.slots[slot])
            self.slot_table.publish(slot)

    @property
    def residents(self) -> set[int]:
        return set(self.slot_table.residents)

    def begin(self, *best: int, **how: Any) -> int:
        return self.swaps.begin(wanting(*best), self.kind, **how)

    def wait(self) -> None:
        """Wait until all is read; nothing is published."""
        for pending in self.swaps._pending:
            while not pending.done.done():
                time.sleep(0.001)

    def check(self) -> None:
        """Check that tables agree, all slots exist, and residents are complete."""
        self.slot_table.check()
        self.swaps.check()
        assert self.slot_table.num_slots == len(self.slots)
        assert len(self.slots) + len(self.shared.spares[self.kind]) == self.held
        for expert in self.residents:
            slot = self.slots[self.slot_table.slot(expert)]
            for short, value in parts_of(self.module, self.block, expert).items():
                assert torch.equal(slot.tensors[short], value), f"expert {expert} is not whole"

    def close(self) -> None:
        self.store.gate.set()
        self.transfer.close()


def wanting(*best: int) -> list[float]:
    """Return scores that rank these experts first, in this order."""
    return [float(10 - best.index(e)) if e in best else 0.1 * e for e in range(NUM_EXPERTS)]


@pytest.fixture
def make() -> Iterator[Any]:
    benches: list[Bench] = []

    def bench(*arguments: Any, **settings: Any) -> Bench:
        benches.append(Bench(*arguments, **settings))
        return benches[-1]

    yield bench
    for one in benches:
        one.close()


def test_swap_is_visible_when_published(make) -> None:
    bench = make(2, residents=[1, 4])
    bench.store.gate.clear()
    assert bench.begin(0, 5) == 2 and len(bench.swaps) == 2
    bench.swaps.publish()
    assert bench.residents == {1, 4} and bench.shared.spare_bytes == 0
    bench.check()
    bench.store.gate.set()
    bench.wait()
    assert bench.residents == {1, 4}
    bench.swaps.publish()
    assert bench.residents == {0, 5} and not bench.swaps
    assert bench.shared.counters.swaps == 2
    bench.check()


def test_swap_evicts_managers_choice(make) -> None:
    bench = make(2, residents=[1, 4])
    bench.eviction.observe({1: 1.0})
    assert bench.eviction.victim({1, 4}, ()) == 4
    bench.begin(0, 4)
    bench.swaps.settle()
    assert bench.residents == {0, 4}
    bench.check()


def test_swaps_are_limited_by_spares(make) -> None:
    bench = make(4, residents=[1, 2, 3, 4], spares=1)
    bench.store.gate.clear()
    assert bench.begin(0, 5) == 1
    assert bench.begin(0, 5) == 0
    bench.check()
    assert bench.swaps.begin(wanting(0), ("int4", 1)) == 0, "others' spares are not taken"


def test_evicting_expert_is_not_evicted_or_loaded_again(make) -> None:
    bench = make(2, residents=[1, 4])
    bench.store.gate.clear()
    assert bench.begin(0, 4) == 1
    assert bench.begin(0, 1, 4) == 0, "1 is leaving, 0 is coming, and 4 is the best of the rest"
    bench.check()


def test_filling_does_not_evict(make) -> None:
    bench = make(4, residents=[1])
    bench.swaps.fill(wanting(0, 5, 6, 7), bench.kind)
    assert len(bench.swaps) == 3 and bench.shared.spare_bytes == 2 * new_slot().nbytes
    bench.swaps.settle()
    assert bench.residents == {0, 1, 5, 6}
    assert bench.begin(7, fill=True) == 0
    bench.check()


def test_filling_stops_at_number_of_experts(make) -> None:
    bench = make(NUM_EXPERTS + 2)
    bench.swaps.fill(wanting(), bench.kind)
    bench.swaps.settle()
    assert bench.residents == set(range(NUM_EXPERTS)) and bench.slot_table.empty == 2
    bench.check()


def test_cancelled_swap_leaves_no_trace(make) -> None:
    bench = make(6)
    bench.store.gate.clear()
    bench.swaps.fill(wanting(0, 1, 2, 3, 4, 5), bench.kind)
    while sum(pending.done.running() for pending in bench.swaps._pending) < 2:  # two threads read
        time.sleep(0.001)
    bench.swaps.cancel([0, 4])
    assert len(bench.swaps) == 5, "0 is being read already"
    bench.swaps.cancel()
    assert len(bench.swaps) == 2 and bench.slot_table.empty == 4
    bench.check()
    bench.store.gate.set()
    bench.swaps.settle()
    assert bench.residents == {0, 1} and bench.store.reads.count(4) == 0
    bench.check()


def test_waiting_for_swaps_publishes_them(make) -> None:
    bench = make(4)
    bench.store.gate.clear()
    bench.swaps.fill(wanting(3, 2, 1, 0), bench.kind)
    threading.Timer(0.05, bench.store.gate.set).start()
    bench.swaps.wait_for_first()
    assert 3 in bench.residents
    bench.swaps.publish(wait_for=[0])
    assert 0 in bench.residents
    bench.check()


def test_failed_swap_returns_spare(make) -> None:
    bench = make(2, residents=[1, 4])
    bench.store.broken = {0}
    bench.begin(0, 5)
    bench.swaps.settle()
    assert bench.residents == {1, 5} and len(bench.shared.spares[bench.kind]) == 2
    assert bench.shared.counters.swaps == 1
    bench.check()


def test_swap_evicts_another_if_victim_has_left(make) -> None:
    bench = make(2, residents=[1, 4])
    bench.begin(0, 4)
    bench.wait()
    bench.slot_table.evict(1)
    bench.swaps.publish()
    assert bench.residents == {0, 4} and bench.slot_table.empty == 0
    bench.check()


def test_check_detects_expert_without_swap(make) -> None:
    bench = make(2)
    bench.slot_table.reserve(3)
    with pytest.raises(AssertionError, match="by no swap"):
        bench.swaps.check()


class Life(OverStorage):
    """Swaps start, end, fail and are dropped in any order while residents are evicted."""

    @initialize(slots=st.integers(0, 5), spares=st.integers(0, 2))
    def start(self, slots: int, spares: int) -> None:
        self.bench = Bench(slots, spares=spares)

    @rule(best=st.permutations(range(NUM_EXPERTS)), fill=st.booleans())
    def begin(self, best: list[int], fill: bool) -> None:
        before = self.bench.residents
        begun = self.bench.begin(*best, fill=fill)
        assert begun <= 2 and self.bench.residents == before

    @rule(best=st.permutations(range(NUM_EXPERTS)))
    def fill(self, best: list[int]) -> None:
        self.bench.swaps.fill(wanting(*best), self.bench.kind)
        empty = self.bench.slot_table.empty
        assert not empty or len(self.bench.residents) + len(self.bench.swaps) == NUM_EXPERTS

    @rule(experts=st.none() | st.sets(st.integers(0, NUM_EXPERTS - 1)))
    def give_up(self, experts: set[int] | None) -> None:
        self.bench.swaps.cancel(experts)

    @rule()
    def publish(self) -> None:
        self.bench.swaps.publish()

    @rule()
    def settle(self) -> None:
        self.bench.store.gate.set()
        self.bench.swaps.settle()
        assert not self.bench.swaps and not self.bench.slot_table.filling

    @rule()
    def evict(self) -> None:
        for expert in list(self.bench.residents)[:1]:
            self.bench.slot_table.evict(expert)


Life.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestLife = Life.TestCase
