"""How a read into a slot ends."""

from concurrent.futures import Future

import pytest

from moefit.serve.coming import Coming
from moefit.serve.counters import Counters
from moefit.serve.eviction import LeastRecentlyUsed
from moefit.serve.residency import Residency


def reserved() -> tuple[Residency, int, Future[float]]:
    table = Residency(4, 2, LeastRecentlyUsed())
    slot = table.reserve(3, ())
    assert slot is not None
    return table, slot, Future()


def test_what_was_read_is_there_and_the_waiting_counted() -> None:
    table, slot, done = reserved()
    done.set_result(0.0)
    counters = Counters()
    Coming(slot, done).arrive(table, counters)
    assert list(table.residents) == [3] and counters.wait_seconds > 0
    table.check()


def test_what_could_not_be_read_leaves_an_empty_slot() -> None:
    table, slot, done = reserved()
    done.set_exception(OSError("gone"))
    counters = Counters()
    with pytest.raises(OSError, match="gone"):
        Coming(slot, done).arrive(table, counters)
    assert not list(table.residents) and table.empty == 2 and counters.wait_seconds > 0
    table.check()
