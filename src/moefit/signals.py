"""Leaving politely: SIGINT and SIGTERM ask the loop to save and stop.

Owns the handlers while a run lasts and puts back those that were there before.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class StopRequest:
    """Which signal asked to stop, None so far."""

    received: signal.Signals | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block a first signal is noted; a second one interrupts at once.

    Only the main thread may set handlers; call it from there.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.received is not None:
            raise KeyboardInterrupt
        request.received = signal.Signals(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
