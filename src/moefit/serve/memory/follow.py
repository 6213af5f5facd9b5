"""Keep the budget at what other processes leave free: `--memory auto`.

`BudgetRule` decides in plain Python from what the system reports: it shrinks the budget at once
when memory becomes scarce, and lets it grow again slowly, once memory has been free for a while.
`BudgetFollower` asks the system several times a second and applies the decisions.
"""

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from moefit.errors import MoefitError
from moefit.host import available_bytes, memory_pressure, process_bytes, total_bytes
from moefit.serve.memory.budget import format_bytes

_LOG = logging.getLogger(__name__)

AUTO_MEMORY = "auto"  # instead of a size
LEAST_HEADROOM = 512 << 20
HEADROOM_SHARE = 16  # of the memory that may be used, the part that stays free, at least
INTERVAL = 0.1  # seconds between two readings
GROW_AFTER = 10.0  # seconds for which memory must have been free
MOST_GROWTH = 1.25  # of one change
TOLERANCE = 64  # of the budget, the part by which it may exceed what is free
RESERVE = 32  # of the budget, the part that a change leaves unused, so that the next is not at once
CALM = 1.0  # percent of ten seconds in which processes may wait for memory while the budget grows


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReading:
    """What the system reports.

    Args:
        process: Resident bytes of this process.
        available: Bytes that it can still allocate.
        pressure: Percent of the last ten seconds in which some process waited for memory.
    """

    process: int
    available: int
    pressure: float = 0.0


def read_memory() -> MemoryReading:
    """Return what the system reports now."""
    return MemoryReading(
        process=process_bytes(), available=available_bytes(), pressure=memory_pressure()
    )


def default_headroom() -> int:
    """Return the bytes that stay free unless told otherwise."""
    return max(LEAST_HEADROOM, total_bytes() // HEADROOM_SHARE)


class BudgetRule:
    """When to change the budget, and to what.

    Args:
        least: Smallest budget in bytes.
        most: Largest budget in bytes, at least `least`.
        headroom: Bytes that should stay free for other processes.
    """

    def __init__(self, *, least: int, most: int, headroom: int):
        assert 0 < least <= most and headroom >= 0
        self.least, self.most, self.headroom = least, most, headroom
        self._free_since: float | None = None
        self._free = math.inf  # the smallest room since then

    def room(self, reading: MemoryReading) -> int:
        """Return the budget that leaves the headroom free, within the bounds."""
        room = reading.process + reading.available - self.headroom
        return max(self.least, min(self.most, room))

    def next(self, now: float, budget: int, reading: MemoryReading) -> int | None:
        """Return the budget to change to; None to leave it.

        Args:
            now: Time in seconds, of a clock that never goes back.
            budget: The budget in force, in bytes.
            reading: What the system reports.
        """
        room, reserve = self.room(reading), budget // RESERVE
        if room < budget - budget // TOLERANCE:
            self._free_since = None
            return max(self.least, room - reserve)
        if (
            room - reserve <= budget
            or budget >= self.most
            or (reading.pressure >= CALM and reading.available < 2 * self.headroom)
        ):
            self._free_since = None
            return None
        if self._free_since is None:
            self._free_since, self._free = now, room
        self._free = min(self._free, room)
        if now - self._free_since < GROW_AFTER:
            return None
        self._free_since = None
        grown = self.most if self._free == self.most else int(self._free) - reserve
        return max(budget, min(grown, int(budget * MOST_GROWTH)))


class BudgetFollower:
    """Apply a rule to a model's budget, in a thread of its own.

    Args:
        rule: The rule.
        budget: Returns the budget in force, in bytes.
        apply: Changes the budget; may raise.
        read: Returns what the system reports.
        announce: Called with a line of text after each change.
        interval: Seconds between two readings.
    """

    def __init__(
        self,
        rule: BudgetRule,
        budget: Callable[[], int],
        apply: Callable[[int], object],
        *,
        read: Callable[[], MemoryReading] = read_memory,
        announce: Callable[[str], None] = _LOG.info,
        interval: float = INTERVAL,
    ):
        self.rule, self._budget, self._apply, self._read = rule, budget, apply, read
        self._announce, self._interval = announce, interval
        self._on, self._closed = threading.Event(), threading.Event()
        self._changing = threading.Lock()
        self._failed = ""
        self._thread = threading.Thread(target=self._run, name="moefit-budget", daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        """Whether the budget follows free memory."""
        return self._on.is_set()

    def resume(self) -> None:
        """Follow free memory from now on, and change the budget now if it is too large."""
        self._on.set()
        self.step()

    def pause(self) -> None:
        """Leave the budget as it is. A change that has begun ends before this returns."""
        self._on.clear()
        with self._changing:
            pass

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._on.set()
        self._thread.join(timeout=10)

    def step(self) -> None:
        """Read once, and change the budget if the rule says so."""
        with self._changing:
            if not self._on.is_set() or self._closed.is_set():
                return
            reading, before = self._read(), self._budget()
            wanted = self.rule.next(monotonic(), before, reading)
            if wanted is None or wanted == before:
                return
            try:
                self._apply(wanted)
            except (MoefitError, OSError) as error:
                self._say_failed(wanted, str(error))
                return
            self._failed = ""
            own, free = format_bytes(reading.process), format_bytes(reading.available)
            self._announce(
                f"budget {format_bytes(before)} -> {format_bytes(wanted)}: {free} free beside this "
                f"process's {own}"
            )

    def _say_failed(self, wanted: int, error: str) -> None:
        """Log an error once, however often it is repeated."""
        if error != self._failed:
            _LOG.warning("the budget cannot follow to %s: %s", format_bytes(wanted), error)
        self._failed = error

    def _run(self) -> None:
        while self._on.wait() and not self._closed.wait(self._interval):
            try:
                self.step()
            except Exception:  # noqa: BLE001 - logged; serving goes on with this budget
                _LOG.exception("the budget no longer follows free memory")
                self._on.clear()
