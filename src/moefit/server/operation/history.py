"""What happened lately: changes of the budget, and errors of requests. Bounded and thread-safe."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import time

MAX_ENTRIES = 50  # of each kind
MAX_CHARACTERS = 300
_SAME = 8  # latest errors among which one request occurs once


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something that happened.

    Attributes:
        at: When, in seconds since 1970.
        text: What.
        by: Name of the key with which it was asked for, if any.
        request_id: Request that it concerns, if any.
    """

    at: float
    text: str
    by: str | None = None
    request_id: str | None = None


class History:
    """The last changes and errors, the latest first.

    Args:
        clock: Returns the time in seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time):
        self._clock, self._lock = clock, threading.Lock()
        self._changes: deque[Entry] = deque(maxlen=MAX_ENTRIES)
        self._errors: deque[Entry] = deque(maxlen=MAX_ENTRIES)

    def changed(self, text: str, by: str | None = None) -> None:
        """Add a change of the budget or the mode, or one that was refused."""
        with self._lock:
            self._changes.appendleft(Entry(at=self._clock(), text=text[:MAX_CHARACTERS], by=by))

    def failed(self, text: str, request_id: str | None) -> None:
        """Add an error, unless the same request has just had one."""
        with self._lock:
            latest = list(self._errors)[:_SAME]
            if request_id is not None and any(one.request_id == request_id for one in latest):
                return
            entry = Entry(at=self._clock(), text=text[:MAX_CHARACTERS], request_id=request_id)
            self._errors.appendleft(entry)

    def changes(self) -> list[Entry]:
        """Return the changes."""
        with self._lock:
            return list(self._changes)

    def errors(self) -> list[Entry]:
        """Return the errors."""
        with self._lock:
            return list(self._errors)
