from concurrent.futures import Future
from typing import Any

import pytest

from moefit.engine.engine import CommandQueue
from moefit.errors import RefusedError


def test_each_is_done_in_its_turn_and_whoever_asked_hears_of_it() -> None:
    commands, done = CommandQueue(), []
    first = commands.ask(lambda: done.append(1) or "one")
    second = commands.ask(lambda: done.append(2) or "two")
    assert len(commands) == 2 and not done and not first.done()
    commands.carry_out()
    assert done == [1, 2] and (first.result(0), second.result(0)) == ("one", "two")
    assert not commands


def test_one_that_fails_stops_no_other() -> None:
    commands = CommandQueue()
    bad, good = commands.ask(lambda: [][1]), commands.ask(lambda: 3)
    commands.carry_out()
    assert isinstance(bad.exception(0), IndexError) and good.result(0) == 3


def test_what_is_asked_for_meanwhile_is_done_too() -> None:
    commands = CommandQueue()
    later: list[Future[Any]] = []
    commands.ask(lambda: later.append(commands.ask(lambda: "later")))
    commands.carry_out()
    assert later[0].result(0) == "later"


def test_refused_are_not_done() -> None:
    commands, done = CommandQueue(), []
    asked = [commands.ask(lambda: done.append(1)) for _ in range(2)]
    commands.refuse(RefusedError("closed"))
    for future in asked:
        with pytest.raises(RefusedError, match="closed"):
            future.result(0)
    commands.carry_out()
    assert not done and not commands
