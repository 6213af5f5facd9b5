"""What other threads want done between two steps, each in its turn.

Owns the queue, and that whoever asked hears what came of it. Knows nothing of what is done, nor of
when a step ends.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Commands:
    """Asked for from any thread, carried out by one."""

    def __init__(self):
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def ask(self, command: Callable[[], T]) -> Future[T]:
        """Put it behind the others; the result is what it returns or raises."""
        future: Future[T] = Future()
        self._waiting.append((command, future))
        return future

    def carry_out(self) -> None:
        """Do all that wait, those too that are asked for meanwhile."""
        while self._waiting:
            command, future = self._waiting.popleft()
            try:
                future.set_result(command())
            except BaseException as error:  # noqa: BLE001 - whoever asked hears it
                future.set_exception(error)

    def refuse(self, error: Exception) -> None:
        """Do none of them: everyone who waits gets this error."""
        while self._waiting:
            self._waiting.popleft()[1].set_exception(error)
