"""Load experts into slots on background threads.

`Transfer` owns the threads; a load is a `Future` whose caller waits for it or asks later. Loads
that nobody waits for have threads of their own, so that they do not delay a step's own loads.
`PendingLoad` ties a load to the slot that was reserved for it, and commits or abandons it.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from threading import Lock
from time import monotonic, perf_counter
from typing import Any

from moefit.serve.cache.host_cache import ExpertReader
from moefit.serve.cache.slot import Slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.io.device_copy import CopyEngine, CpuCopies
from moefit.serve.stats import Counters

_LOG = logging.getLogger(__name__)
BACKGROUND_READERS = 2
SAY_EVERY = 30.0  # seconds between two lines about failed reads
FAILING = 60.0  # seconds after the last failed read until reading counts as sound again


class LoadFailures:
    """Reads of experts that failed: how many, and whether reading works now. Thread-safe.

    Args:
        clock: Gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock, self._lock = clock, Lock()
        self.demand = self.background = 0
        self._failed_at: float | None = None
        self._worked_at: float | None = None
        self._said_at: float | None = None
        self._unsaid = 0

    @property
    def failing(self) -> bool:
        """Whether no read has worked since one failed, or one failed within the last minute.

        Where a part of a disk is damaged, some reads work and others do not, so a read that works
        is not enough to be sound again.
        """
        with self._lock:
            if self._failed_at is None:
                return False
            works = self._worked_at is not None and self._worked_at >= self._failed_at
            return not works or self._clock() - self._failed_at < FAILING

    def worked(self) -> None:
        """Note a read that worked."""
        with self._lock:
            self._worked_at = self._clock()

    def failed(self, block: str, expert: int, error: BaseException, *, background: bool) -> None:
        """Count a read that failed, and log it if nothing was logged lately."""
        with self._lock:
            now = self._failed_at = self._clock()
            self.background += background
            self.demand += not background
            if self._said_at is not None and now - self._said_at < SAY_EVERY:
                self._unsaid += 1
                return
            self._said_at, unsaid, self._unsaid = now, self._unsaid, 0
        more = f" ({unsaid:,} more reads failed since the last such line)" if unsaid else ""
        _LOG.warning(
            "expert %d of %s could not be read%s: %s: %s%s",
            expert, block, " in the background" if background else "",
            type(error).__name__, error, more,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        counts = {"demand": self.demand, "background": self.background}
        return {"load_failures": counts, "loads_failing": self.failing}


class Transfer:
    """Threads that fill slots from a source: `readers`, and some more for the background.

    `engine` is the one by which the source copies into slots. Close it at the end.
    """

    def __init__(self, source: ExpertReader, *, readers: int = 4, engine: CopyEngine | None = None):
        self._source, self._engine = source, engine or CpuCopies()
        self.readers = readers
        self._lock = Lock()
        self.loads, self.load_seconds = 0, 0.0  # that ended well
        self.failures = LoadFailures()
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
        ordered = self._engine.ordered()
        return pool.submit(self._fill, ordered, block, expert, slot, background=background)

    def settle(self) -> None:
        """Wait until the device has done all that it was asked for."""
        self._engine.settle()

    def close(self) -> None:
        """Let loads that began end, and drop the others."""
        for pool in (self._pool, self._background):
            pool.shutdown(wait=True, cancel_futures=True)

    def _fill(
        self,
        ordered: AbstractContextManager[None],
        block: str,
        expert: int,
        slot: Slot,
        *,
        background: bool,
    ) -> float:
        began = perf_counter()
        try:
            with ordered:
                self._source.read(block, expert, slot)
        except BaseException as error:
            self.failures.failed(block, expert, error, background=background)
            raise
        self.failures.worked()
        seconds = perf_counter() - began
        with self._lock:
            self.loads, self.load_seconds = self.loads + 1, self.load_seconds + seconds
        return seconds


def wait_for_load(load: Future[float]) -> None:
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


def end_all(ends: Iterable[Callable[[], None]]) -> None:
    """End loads that nobody needs any more, whatever one of them raises.

    Each must be waited for, or its slot stays half-filled. What failed was counted and logged where
    it was read.

    Args:
        ends: For each load, what waits for it.

    Raises:
        KeyboardInterrupt: There was an interrupt meanwhile; all loads have ended.
    """
    interrupted: KeyboardInterrupt | None = None
    for end in ends:
        try:
            end()
        except KeyboardInterrupt as error:
            interrupted = error
        except BaseException:  # noqa: BLE001 - such as a panic in a library
            continue
    if interrupted is not None:
        raise interrupted


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """A read into slot `slot`, reserved in the table."""

    slot: int
    done: Future[float]

    def commit(self, table: SlotTable, counters: Counters) -> None:
        """Wait for the read; raises what it raised, and nobody is in the slot then."""
        began = perf_counter()
        try:
            wait_for_load(self.done)
        except BaseException:
            table.abandon(self.slot)
            raise
        finally:
            counters.wait_seconds += perf_counter() - began
        table.publish(self.slot)
