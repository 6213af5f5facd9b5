"""Signals: SIGINT and SIGTERM ask a loop to save and stop, SIGHUP to read files again.

Signal handlers are installed for the duration of a context, and the previous ones restored.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class StopRequest:
    """The signal that requested to stop; None until one arrives."""

    received: signal.Signals | None = None


@dataclass(slots=True)
class HangUp:
    """Whether SIGHUP has arrived since it was last asked."""

    received: bool = False

    def take(self) -> bool:
        """Return whether the signal has arrived, and forget it."""
        received, self.received = self.received, False
        return received


@contextmanager
def note_hangups() -> Iterator[HangUp]:
    """Note SIGHUP, which asks servers to read their files again, in the returned `HangUp`.

    Call this from the main thread: only that may set signal handlers.
    """
    hangup = HangUp()

    def record(number: int, frame: FrameType | None) -> None:
        hangup.received = True

    before = signal.signal(signal.SIGHUP, record)
    try:
        yield hangup
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Record the first signal in the returned `StopRequest`; raise KeyboardInterrupt on the second.

    Call this from the main thread: only that may set signal handlers.
    """
    request = StopRequest()

    def record(number: int, frame: FrameType | None) -> None:
        if request.received is not None:
            raise KeyboardInterrupt
        request.received = signal.Signals(number)

    before = {number: signal.signal(number, record) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
