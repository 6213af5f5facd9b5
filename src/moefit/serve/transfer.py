"""Moving experts into slots, several at a time, beside the computation.

Owns the reading threads. A load is a `Future`: its caller waits for it, or asks later. Loads that
nobody waits for have threads of their own, so that a step's own loads never queue behind them.
Whatever a read raises reaches whoever waits; a thread that dies with it would not, so none may.
Knows nothing of tables, policies or modes.
"""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from threading import Lock
from time import perf_counter

from moefit.serve.copies import CopyEngine, CpuCopies
from moefit.serve.host_tier import Source
from moefit.serve.slots import Slot

BACKGROUND_READERS = 2


class Transfer:
    """Threads that fill slots from a source: `readers`, and some more for the background.

    `engine` is the one by which the source copies into slots. Close it at the end.
    """

    def __init__(self, source: Source, *, readers: int = 4, engine: CopyEngine | None = None):
        self._source, self._engine = source, engine or CpuCopies()
        self.readers = readers
        self._lock = Lock()
        self.loads, self.load_seconds = 0, 0.0  # that ended well
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="moefit-transfer")
        self._background = ThreadPoolExecutor(
            BACKGROUND_READERS, thread_name_prefix="moefit-background"
        )

    def load(
        self, block: str, expert: int, slot: Slot, *, background: bool = False
    ) -> Future[float]:
        """Begin to fill a slot; the result is the seconds that reading took.

        To be called where the computation is asked for that the slot was used by until now.
        """
        pool = self._background if background else self._pool
        return pool.submit(self._fill, self._engine.ordered(), block, expert, slot)

    def settle(self) -> None:
        """Wait until the device has done all that it was asked for."""
        self._engine.settle()

    def close(self) -> None:
        """Let loads that began end, and drop the others."""
        for pool in (self._pool, self._background):
            pool.shutdown(wait=True, cancel_futures=True)

    def _fill(
        self, ordered: AbstractContextManager[None], block: str, expert: int, slot: Slot
    ) -> float:
        began = perf_counter()
        with ordered:
            self._source.read(block, expert, slot)
        seconds = perf_counter() - began
        with self._lock:
            self.loads, self.load_seconds = self.loads + 1, self.load_seconds + seconds
        return seconds


def finish(load: Future[float]) -> None:
    """Wait for a load, and raise what it raised.

    However this ends, nothing writes into the slot any more: an interrupt ends the waiting only
    when the reading has ended too.
    """
    try:
        load.result()
    finally:
        while not load.done():
            with suppress(KeyboardInterrupt):  # one is on its way up already
                wait([load])
