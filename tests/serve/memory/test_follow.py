"""Budgets that follow free memory."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.errors import BudgetTooSmallError
from moefit.serve.memory.follow import (
    GROW_AFTER,
    MOST_GROWTH,
    BudgetFollower,
    BudgetRule,
    MemoryReading,
)

MIB, GIB = 1 << 20, 1 << 30


def rule() -> BudgetRule:
    return BudgetRule(least=GIB, most=8 * GIB, headroom=GIB)


def reading(room: int, *, process: int = GIB, pressure: float = 0.0) -> MemoryReading:
    """Return a reading that leaves `room` for the budget beside a headroom of 1 GiB."""
    return MemoryReading(process=process, available=room + GIB - process, pressure=pressure)


def grown(deciding: BudgetRule, budget: int, seconds: float, room: int, begin: float = 0) -> int:
    """Return the budget after readings of the same room, ten a second."""
    for tick in range(round(10 * seconds) + 1):
        budget = deciding.next(begin + tick / 10, budget, reading(room)) or budget
    return budget


def test_scarce_memory_shrinks_budget_at_once() -> None:
    wanted = rule().next(0.0, 6 * GIB, reading(4 * GIB))
    assert wanted is not None and 3.8 * GIB < wanted < 4 * GIB


def test_budget_never_leaves_its_bounds() -> None:
    assert rule().next(0.0, 6 * GIB, reading(0)) == GIB
    assert grown(rule(), 2 * GIB, 200, 100 * GIB) == 8 * GIB


def test_budget_above_the_most_becomes_the_most() -> None:
    assert rule().next(0.0, 60 * GIB, reading(60 * GIB)) == 8 * GIB


def test_budget_grows_to_the_most_even_by_less_than_the_reserve() -> None:
    assert grown(rule(), int(7.9 * GIB), 30, 20 * GIB) == 8 * GIB
    narrow = BudgetRule(least=GIB, most=GIB + 10 * MIB, headroom=GIB)
    assert grown(narrow, GIB, 30, 20 * GIB) == GIB + 10 * MIB


def test_budget_grows_only_after_memory_was_free_for_a_while() -> None:
    assert grown(rule(), 2 * GIB, GROW_AFTER - 1, 6 * GIB) == 2 * GIB
    assert grown(rule(), 2 * GIB, GROW_AFTER, 6 * GIB) == int(2 * GIB * MOST_GROWTH)
    deciding = rule()
    assert grown(deciding, 2 * GIB, GROW_AFTER - 1, 6 * GIB) == 2 * GIB
    assert deciding.next(GROW_AFTER, 2 * GIB, reading(2 * GIB)) is None, "free no longer"
    assert grown(deciding, 2 * GIB, GROW_AFTER - 1, 6 * GIB, begin=GROW_AFTER + 1) == 2 * GIB


def test_waiting_processes_hold_growth_back_where_little_is_free() -> None:
    deciding = rule()
    for tick in range(300):
        busy = reading(int(2.2 * GIB), process=2 * GIB, pressure=5.0)
        assert deciding.next(tick / 10, 2 * GIB, busy) is None
    assert grown(rule(), 2 * GIB, GROW_AFTER, int(2.2 * GIB)) > 2 * GIB


@given(st.lists(st.integers(0, 10 * GIB), min_size=1, max_size=60))
def test_budget_leaves_headroom_and_does_not_swing(rooms: list[int]) -> None:
    deciding, budget, changes = rule(), 4 * GIB, 0
    for second, room in enumerate(rooms):
        wanted = deciding.next(float(second), budget, reading(room))
        if wanted is not None:
            changes += wanted > budget
            budget = wanted
        allowed = max(GIB, min(8 * GIB, room))
        assert GIB <= budget <= max(allowed * 65 / 64, GIB)
    assert changes <= 1 + len(rooms) / GROW_AFTER, "grows at most once in that time"
    last = max(GIB, min(8 * GIB, rooms[-1]))
    settled = grown(deciding, budget, 200, rooms[-1], begin=float(len(rooms)))
    assert grown(deciding, settled, 30, rooms[-1], begin=1000.0) == settled, "comes to rest"
    assert settled >= last * 0.9


class Machine:
    """A machine on which this process takes its whole budget, beside others."""

    def __init__(self, total: int):
        self.total, self.others, self.budget = total, 0, 4 * GIB
        self.fails = False
        self.changed = threading.Event()

    def read(self) -> MemoryReading:
        return MemoryReading(
            process=self.budget, available=max(0, self.total - self.others - self.budget)
        )

    def apply(self, size: int) -> None:
        if self.fails:
            raise BudgetTooSmallError("too small")
        self.budget = size
        self.changed.set()


@pytest.fixture
def machine():
    machine = Machine(8 * GIB)
    follower = BudgetFollower(
        rule(), lambda: machine.budget, machine.apply, read=machine.read, interval=0.001
    )
    yield machine, follower
    follower.close()
    assert not follower._thread.is_alive()


def test_follower_shrinks_until_budget_is_set(machine) -> None:
    system, follower = machine
    assert not follower.active
    follower.resume()
    assert system.budget == 4 * GIB, "enough is free"
    system.changed.clear()
    system.others = 7 * GIB // 2
    assert system.changed.wait(10)
    assert 3.3 * GIB < system.budget <= 3.5 * GIB
    with pytest.raises(BudgetTooSmallError), follower.fixed():
        raise BudgetTooSmallError("too small")
    assert follower.active, "a change that fails changes nothing"
    with follower.fixed():
        system.budget = 4 * GIB
    follower.step()
    assert system.budget == 4 * GIB and not follower.active


def test_follower_survives_output_that_nobody_reads() -> None:
    machine = Machine(8 * GIB)

    def announce(line: str) -> None:
        raise SystemExit(1)

    follower = BudgetFollower(
        rule(), lambda: machine.budget, machine.apply,
        read=machine.read, announce=announce, interval=0.001,
    )  # fmt: skip
    follower.resume()
    machine.changed.clear()
    machine.others = 7 * GIB // 2
    assert machine.changed.wait(10) and machine.budget < 3.5 * GIB
    assert follower.active and follower._thread.is_alive()
    follower.close()


def test_growth_waits_again_after_resuming() -> None:
    deciding = rule()
    assert deciding.next(0.0, 2 * GIB, reading(6 * GIB)) is None
    deciding.reset()
    assert deciding.next(3600.0, 2 * GIB, reading(6 * GIB)) is None


def test_follower_goes_on_after_failed_change(machine, caplog) -> None:
    system, follower = machine
    follower.resume()
    system.fails, system.others = True, 7 * GIB // 2
    follower.step()
    follower.step()
    assert [one.message for one in caplog.records] == [
        "the budget cannot follow free memory now: too small"
    ], "the same error is logged once"
    system.changed.clear()
    system.fails = False
    assert system.changed.wait(10) and system.budget < 3.5 * GIB


def test_resuming_raises_where_the_budget_cannot_change(machine) -> None:
    system, follower = machine
    system.others, system.fails = 7 * GIB // 2, True
    with pytest.raises(BudgetTooSmallError):
        follower.resume()
    assert not follower.active
