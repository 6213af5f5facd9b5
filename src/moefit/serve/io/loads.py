"""Load experts into slots on background threads.

`Transfer` owns the threads and returns a `Future` per load. Loads that no step waits for run on
separate threads, so that they do not delay the others. `PendingLoad` connects a load to
its reserved slot, and commits or abandons it.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from threading import Lock
from time import perf_counter

from moefit.serve.cache.host_cache import ExpertReader
from moefit.serve.cache.slot import Slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.io.device_copy import CopyEngine, CpuCopies
from moefit.serve.stats import Counters, LoadFailures

BACKGROUND_READERS = 2
_RATE_HALF_LIFE = 64  # loads


class Transfer:
    """Fill slots from a source on background threads. Call `close` at the end.

    Args:
        source: Reads experts.
        readers: Threads for the loads that steps wait for; there are `BACKGROUND_READERS` more.
        engine: The engine with which the source copies into slots; by default within host memory.
    """

    def __init__(self, source: ExpertReader, *, readers: int = 4, engine: CopyEngine | None = None):
        self._source, self.engine = source, engine or CpuCopies()
        self.readers = readers
        self._lock = Lock()
        self.loads, self.load_seconds = 0, 0.0  # of successful loads
        self._rate = _Rate()
        self.failures = LoadFailures()
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="moefit-transfer")
        self._background = ThreadPoolExecutor(
            BACKGROUND_READERS, thread_name_prefix="moefit-background"
        )

    def load(
        self, block: str, expert: int, slot: Slot, *, background: bool = False
    ) -> Future[float]:
        """Start filling a slot.

        Call this on the thread that requested the computation which last used the slot.

        Args:
            block: Name of the MoE block.
            expert: Its index in the block.
            slot: The memory to fill.
            background: Whether no step waits for this load.

        Returns:
            A future of the seconds that reading took.
        """
        pool = self._background if background else self._pool
        ordered = self.engine.ordered()
        return pool.submit(self._fill, ordered, block, expert, slot, background=background)

    @property
    def seconds_per_load(self) -> float | None:
        """Time in which storage delivers one expert, of recent loads; None before the first.

        Loads at the same time share it, so this is the inverse of the bandwidth.
        """
        with self._lock:
            return self._rate.seconds_per_load

    def settle(self) -> None:
        """Wait until the device has completed all requested work."""
        self.engine.settle()

    def close(self) -> None:
        """Finish the loads in progress, and cancel the others."""
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
        with self._lock:
            self._rate.began(began)
        try:
            with ordered:
                self._source.read(block, expert, slot)
        except BaseException as error:
            with self._lock:
                self._rate.ended(perf_counter(), worked=False)
            self.failures.failed(block, expert, error, background=background)
            raise
        self.failures.worked()
        ended = perf_counter()
        seconds = ended - began
        with self._lock:
            self._rate.ended(ended, worked=True)
            self.loads, self.load_seconds = self.loads + 1, self.load_seconds + seconds
        return seconds


@dataclass(slots=True)
class _Rate:
    """Time during which anything is being read, per load; older loads count less."""

    active: int = 0
    since: float = 0.0
    busy: float = 0.0
    loads: float = 0.0

    @property
    def seconds_per_load(self) -> float | None:
        return self.busy / self.loads if self.loads else None

    def began(self, now: float) -> None:
        if self.active == 0:
            self.since = now
        self.active += 1

    def ended(self, now: float, *, worked: bool) -> None:
        keep = 0.5 ** (1 / _RATE_HALF_LIFE)
        self.busy = (self.busy + now - self.since) * keep
        self.loads = (self.loads + worked) * keep
        self.since = now
        self.active -= 1


def wait_for_load(load: Future[float]) -> None:
    """Wait for a load, and raise what it raised.

    On return nothing writes into the slot any more, even after KeyboardInterrupt: that is raised
    only once reading has ended.
    """
    try:
        load.result()
    finally:
        while not load.done():
            with suppress(KeyboardInterrupt):  # the first one is being raised already
                wait([load])


def end_all(ends: Iterable[Callable[[], None]]) -> None:
    """Wait for loads that are no longer needed, ignoring their errors.

    Without waiting, a load could still write into its slot. Failed reads are counted and logged
    where they occur.

    Args:
        ends: For each load, a function that waits for it.

    Raises:
        KeyboardInterrupt: An interrupt occurred meanwhile; all loads have ended.
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
    """A load into slot `slot`, which is reserved in the slot table."""

    slot: int
    done: Future[float]

    def commit(self, slot_table: SlotTable, counters: Counters) -> None:
        """Wait for the load and make its expert resident.

        Raises what the load raised; the slot is empty then.
        """
        began = perf_counter()
        try:
            wait_for_load(self.done)
        except BaseException:
            slot_table.abandon(self.slot)
            raise
        finally:
            counters.wait_seconds += perf_counter() - began
        slot_table.publish(self.slot)
