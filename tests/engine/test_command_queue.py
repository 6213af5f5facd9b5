from concurrent.futures import Future
from typing import Any

import pytest

from moefit.engine.commands import CommandQueue
from moefit.errors import RefusedError


def test_commands_run_in_order_and_return() -> None:
    commands, done = CommandQueue(), []
    first = commands.submit(lambda: done.append(1) or "one")
    second = commands.submit(lambda: done.append(2) or "two")
    assert len(commands) == 2 and not done and not first.done()
    commands.run_all()
    assert done == [1, 2] and (first.result(0), second.result(0)) == ("one", "two")
    assert not commands


def test_failed_command_does_not_stop_others() -> None:
    commands = CommandQueue()
    bad, good = commands.submit(lambda: [][1]), commands.submit(lambda: 3)
    commands.run_all()
    assert isinstance(bad.exception(0), IndexError) and good.result(0) == 3


def test_commands_submitted_meanwhile_run() -> None:
    commands = CommandQueue()
    later: list[Future[Any]] = []
    commands.submit(lambda: later.append(commands.submit(lambda: "later")))
    commands.run_all()
    assert later[0].result(0) == "later"


def test_failed_commands_do_not_run() -> None:
    commands, done = CommandQueue(), []
    asked = [commands.submit(lambda: done.append(1)) for _ in range(2)]
    commands.fail_all(RefusedError("closed"))
    for future in asked:
        with pytest.raises(RefusedError, match="closed"):
            future.result(0)
    commands.run_all()
    assert not done and not commands
