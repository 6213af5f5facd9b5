import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moefit.serve.cache.eviction import LeastRecentlyUsed
from moefit.serve.cache.slot_table import SlotTable

NUM_EXPERTS = 7
experts = st.integers(0, NUM_EXPERTS - 1)


class Table(RuleBasedStateMachine):
    """Random operations on a table, compared with a simple model."""

    @initialize(slots=st.integers(0, NUM_EXPERTS))
    def begin(self, slots: int) -> None:
        self.policy = LeastRecentlyUsed()
        self.table = SlotTable(NUM_EXPERTS, slots, self.policy)
        self.residents: dict[int, int] = {}
        self.filling: dict[int, int] = {}  # slot -> expert
        self.slots = set(range(slots))
        self.own: dict[int, int] = {}

    @property
    def absent(self) -> set[int]:
        return set(range(NUM_EXPERTS)) - set(self.residents) - set(self.filling.values())

    @property
    def empty(self) -> set[int]:
        return self.slots - set(self.residents.values()) - set(self.filling)

    @rule(used=st.sets(experts, min_size=1, max_size=3))
    def use(self, used: set[int]) -> None:
        self.policy.observe(dict.fromkeys(used, 1.0))

    @precondition(lambda self: self.absent)
    @rule(data=st.data(), protected=st.sets(experts))
    def reserve(self, data, protected: set[int]) -> None:
        expert = data.draw(st.sampled_from(sorted(self.absent)))
        empty, before = self.empty, dict(self.residents)
        slot = self.table.reserve(expert, protected)
        if self.own.get(expert) in empty:
            assert slot == self.own[expert]
        elif empty:
            assert slot in empty
        elif evictable := set(before) - protected:
            (gone,) = set(before) - set(self.table.residents)
            assert gone in evictable and self.residents.pop(gone) == slot
        else:
            assert slot is None
        if slot is not None:
            self.filling[slot] = expert

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def publish(self, data) -> None:
        slot = data.draw(st.sampled_from(sorted(self.filling)))
        self.table.publish(slot)
        expert = self.filling.pop(slot)
        self.residents[expert] = slot
        assert self.table.slot(expert) == slot

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def abandon(self, data) -> None:
        slot = data.draw(st.sampled_from(sorted(self.filling)))
        self.table.abandon(slot)
        del self.filling[slot]

    @precondition(lambda self: self.residents)
    @rule(data=st.data())
    def evict(self, data) -> None:
        expert = data.draw(st.sampled_from(sorted(self.residents)))
        assert self.table.evict(expert) == self.residents.pop(expert)

    @rule(slots=st.integers(0, 3))
    def grow(self, slots: int) -> None:
        new = self.table.grow(slots)
        assert len(set(new)) == slots and not set(new) & self.slots
        self.slots |= set(new)

    @rule(slots=st.integers(0, 4))
    def shrink(self, slots: int) -> None:
        empty, free = self.empty, self.slots - set(self.filling)
        gone = self.table.shrink(slots)
        assert len(set(gone)) == len(gone) == min(slots, len(free)) and set(gone) <= free
        assert set(gone) <= empty or empty <= set(gone), "empty ones go first"
        self.slots -= set(gone)
        self.residents = {e: slot for e, slot in self.residents.items() if slot not in gone}
        self.own = {e: slot for e, slot in self.own.items() if slot not in gone}

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), expert=experts)
    def set_owner(self, data, expert: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.slots)))
        self.table.set_owner(expert, slot)
        self.own = {e: own for e, own in self.own.items() if own != slot} | {expert: slot}

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "table"):
            return
        self.table.check()
        assert set(self.table.residents) == set(self.residents)
        assert sorted(self.table.filling) == sorted(self.filling.values())
        assert {e: self.table.slot(e) for e in self.residents} == self.residents
        assert self.own == {e: s for s in self.slots if (e := self.table.owner(s)) is not None}
        assert self.table.num_slots == len(self.slots) and self.table.empty == len(self.empty)


Table.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTable = Table.TestCase


def full_table() -> SlotTable:
    table = SlotTable(NUM_EXPERTS, 2, LeastRecentlyUsed())
    for expert in (3, 5):
        slot = table.reserve(expert)
        assert slot is not None
        table.publish(slot)
    return table


def test_slots_of_several_experts_are_those_of_each() -> None:
    table = full_table()
    one, other = table.residents
    assert table.slots_of([other, one, other]) == [*map(table.slot, (other, one, other))]
    assert table.slots_of([one, 7]) is None
    table.reserve(7)
    assert table.slots_of([7]) is None  # until it is loaded


def test_expert_is_not_loaded_twice() -> None:
    table = full_table()
    with pytest.raises(AssertionError):
        table.reserve(3)
    table.reserve(4)
    with pytest.raises(AssertionError):
        table.reserve(4)


def test_evicted_expert_is_not_resident_while_slot_fills() -> None:
    table = full_table()
    slot = table.reserve(0)
    assert slot is not None
    assert list(table.residents) == [5] and list(table.filling) == [0]
    with pytest.raises(KeyError):
        table.slot(0)
    table.publish(slot)
    assert sorted(table.residents) == [0, 5]


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: table._slot_of.update({4: 0}),
        lambda table: table._filling.update({9: 3}),
        lambda table: table._empty.append(1),
        lambda table: table._slot_of.update({99: 7}),
        lambda table: table._filling.update({12: 0}),
        lambda table: table._own.update({0: 1, 1: 1}),
        lambda table: table._own.update({0: 99}),
    ],
)
def test_check_detects_violations(damage) -> None:
    table = full_table()
    table.check()
    damage(table)
    with pytest.raises(AssertionError):
        table.check()
