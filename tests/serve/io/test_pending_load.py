"""Completion of loads into slots."""

from concurrent.futures import Future

import pytest

from moefit.serve.cache.eviction import LeastRecentlyUsed
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.io.loads import PendingLoad
from moefit.serve.stats import Counters


def reserved() -> tuple[SlotTable, int, Future[float]]:
    table = SlotTable(4, 2, LeastRecentlyUsed())
    slot = table.reserve(3, ())
    assert slot is not None
    return table, slot, Future()


def test_commit_makes_the_expert_resident_and_counts_the_wait() -> None:
    table, slot, done = reserved()
    done.set_result(0.0)
    counters = Counters()
    PendingLoad(slot, done).commit(table, counters)
    assert list(table.residents) == [3] and counters.wait_seconds > 0
    table.check()


def test_failed_load_leaves_empty_slot() -> None:
    table, slot, done = reserved()
    done.set_exception(OSError("gone"))
    counters = Counters()
    with pytest.raises(OSError, match="gone"):
        PendingLoad(slot, done).commit(table, counters)
    assert not list(table.residents) and table.empty == 2 and counters.wait_seconds > 0
    table.check()
