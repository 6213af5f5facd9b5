"""Stop gracefully: SIGINT and SIGTERM request that a loop saves and stops.

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
