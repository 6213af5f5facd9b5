"""Functions that other threads let an engine's thread run between two steps."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class CommandQueue:
    """A queue of functions that any thread submits and one thread runs."""

    def __init__(self):
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def __len__(self) -> int:
        """Return the number of queued functions."""
        return len(self._waiting)

    def submit(self, command: Callable[[], T]) -> Future[T]:
        """Queue a function and return a future for its result or exception."""
        future: Future[T] = Future()
        self._waiting.append((command, future))
        return future

    def run_all(self) -> None:
        """Run all queued functions, including those queued in the meantime."""
        while self._waiting:
            command, future = self._waiting.popleft()
            try:
                future.set_result(command())
            except BaseException as error:  # noqa: BLE001 - raised by future.result()
                future.set_exception(error)

    def fail_all(self, error: Exception) -> None:
        """Set an exception on the futures of all queued functions, without running them."""
        while self._waiting:
            self._waiting.popleft()[1].set_exception(error)
