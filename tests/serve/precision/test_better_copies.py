"""The scratch slots' table: whatever steps, failures and interruptions come."""

from collections.abc import Generator
from typing import Any, cast

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tiny_served import mixtral_block

from moefit.moe.routing import Routing
from moefit.quant.format import FORMATS, NATIVE, Format
from moefit.serve.cache.host_cache import HostCache
from moefit.serve.cache.slot import Slot
from moefit.serve.io.device_copy import CpuCopies
from moefit.serve.io.loads import Transfer
from moefit.serve.precision.refetch import SCRATCH_SLOTS, BetterCopies
from moefit.serve.stats import Counters

NUM_EXPERTS = 8
EXPERTS = st.sets(st.integers(0, NUM_EXPERTS - 1), max_size=NUM_EXPERTS)


class Block:
    """As much of a `MoeBlock` as copies ask for."""

    def __init__(self, name: str):
        self.name, self.num_experts, self.layout = name, NUM_EXPERTS, mixtral_block()[0].layout


BLOCKS = [Block("a"), Block("b")]
FORMAT = {"a": FORMATS["int8"], "b": FORMATS["int4"]}


class MarkingStore:
    """Writes into each byte whose copy it is; fails for those in `broken`, half-way."""

    def __init__(self):
        self.broken: set[tuple[str, int]] = set()
        self.reads: list[tuple[str, int]] = []

    def read(self, block: str, expert: int, into: Slot) -> None:
        assert into.format == FORMAT[block]
        into.buffer_B.fill_(255)
        self.reads.append((block, expert))
        if (block, expert) in self.broken:
            raise OSError("storage is gone")
        into.buffer_B.fill_(mark(block, expert))


def mark(block: str, expert: int) -> int:
    return expert + NUM_EXPERTS * (block == "b")


def copies_over(transfer: Transfer, counters: Counters) -> BetterCopies:
    return BetterCopies(BLOCKS, FORMAT, transfer, counters, torch.device("cpu"))  # pyright: ignore[reportArgumentType]


class Steps(RuleBasedStateMachine):
    """Bytes tell whose copy a slot holds; what was held before a step is not read in it."""

    def __init__(self):
        super().__init__()
        self.store, self.counters = MarkingStore(), Counters()
        self.transfer = Transfer(self.store, readers=2)
        self.copies = copies_over(self.transfer, self.counters)

    def teardown(self):
        self.transfer.close()

    def held(self) -> set[tuple[str, int]]:
        return {
            (name, expert)
            for name in FORMAT
            for expert in range(NUM_EXPERTS)
            if self.copies.holds(name, expert)
        }

    @rule(block=st.sampled_from("ab"), experts=EXPERTS)
    def step(self, block: str, experts: set[int]) -> None:
        before, reads = self.held(), len(self.store.reads)
        given = []
        for expert, slot in self.copies.begin(block, experts):
            given.append(expert)
            assert slot.format == FORMAT[block]
            assert slot.buffer_B.unique().tolist() == [mark(block, expert)]
        assert sorted(given) == sorted(experts), "each of them once"
        wanted = {(block, expert) for expert in experts}
        assert sorted(self.store.reads[reads:]) == sorted(wanted - before), "and no more is read"
        if len(wanted) <= SCRATCH_SLOTS:
            assert wanted <= self.held() <= before | wanted
            assert len(self.held()) == min(SCRATCH_SLOTS, len(before | wanted))

    @rule(block=st.sampled_from("ab"), experts=EXPERTS, after=st.integers(0, 8), then=EXPERTS)
    def interrupted(self, block: str, experts: set[int], after: int, then: set[int]) -> None:
        """Whoever computes fails, and the next step wants others, or the same."""
        coming = cast("Generator[Any]", self.copies.begin(block, experts))
        for _ in zip(range(after), coming, strict=False):
            pass
        self.copies.check()
        others = self.copies.begin(block, then)
        coming.close()  # as late as a traceback may keep it
        assert sorted(expert for expert, _ in others) == sorted(then)

    @rule(block=st.sampled_from("ab"), experts=EXPERTS, data=st.data())
    def broken(self, block: str, experts: set[int], data: st.DataObject) -> None:
        absent = sorted(expert for expert in experts if not self.copies.holds(block, expert))
        if not absent:
            return
        lost = data.draw(st.sampled_from(absent))
        self.store.broken = {(block, lost)}
        with pytest.raises(OSError, match="storage is gone"):
            list(self.copies.begin(block, experts))
        self.store.broken = set()
        assert not self.copies.holds(block, lost)

    @invariant()
    def sound(self) -> None:
        self.copies.check()
        assert self.counters.refetches <= len(self.store.reads)


TestSteps = Steps.TestCase
TestSteps.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@pytest.fixture
def copies():
    transfer = Transfer(MarkingStore(), readers=2)
    yield copies_over(transfer, Counters())
    transfer.close()


def test_all_bytes_are_there_from_the_start(copies) -> None:
    specs = BLOCKS[0].layout.specs
    assert copies.nbytes == SCRATCH_SLOTS * FORMATS["int8"].nbytes(specs)


def test_padding_weighs_nothing_and_an_expert_chosen_twice_weighs_twice(copies) -> None:
    def now(_expert: int) -> Format:
        return FORMATS["int2"]

    ids_TK = torch.tensor([[1, 2, NUM_EXPERTS], [3, 3, 4]])
    weights_TK = torch.tensor([[3.0, 1.0, 9.0], [2.0, 2.0, 3.0]])
    assert copies.wanted("a", Routing(ids_TK, weights_TK), 0.5, now).experts == {1, 3}
    assert copies.wanted("a", Routing(ids_TK, -weights_TK), 0.25, now).experts == {1, 2, 3, 4}
    assert not copies.wanted("a", Routing(ids_TK, weights_TK), 0.1, lambda _: NATIVE).experts


def test_what_was_read_is_counted_and_what_was_there_is_not() -> None:
    counters = Counters()
    transfer = Transfer(MarkingStore(), readers=2)
    copies = copies_over(transfer, counters)
    size = FORMATS["int4"].nbytes(BLOCKS[1].layout.specs)
    for _ in range(3):
        list(copies.begin("b", {1, 5}))
    transfer.close()
    assert (counters.refetches, counters.refetch_bytes) == (2, 2 * size)


def test_what_is_wanted_often_stays_while_others_pass_through(copies) -> None:
    for turn in range(12):
        for block, expert in (("a", 0), ("b", turn % 8), ("b", (turn + 4) % 8)):
            list(copies.begin(block, {expert}))
        assert turn == 0 or copies.holds("a", 0), "by last use, b's would have taken both slots"


def test_on_the_way_to_a_gpu_they_go_through_the_host_tier() -> None:
    store = MarkingStore()
    tier = HostCache(store, CpuCopies(), limit=1 << 20)
    transfer = Transfer(tier, readers=2)
    copies = copies_over(transfer, Counters())
    for block, experts in (("a", {0, 1, 2}), ("b", {1, 3}), ("a", {0, 1, 2})):
        for expert, slot in copies.begin(block, experts):
            assert slot.buffer_B.unique().tolist() == [mark(block, expert)]
        tier.check()
        copies.check()
    assert sorted(store.reads) == [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 3)]
    transfer.close()
    tier.close()
