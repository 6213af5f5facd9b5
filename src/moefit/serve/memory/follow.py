"""Keep the budget at what other processes leave free: `--memory auto`.

`BudgetRule` decides in plain Python from what the system reports: it shrinks the budget at once
when memory becomes scarce, and lets it grow again slowly, once memory has been free for a while.
`BudgetFollower` asks the system several times a second and applies the decisions.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic

from moefit.errors import MoefitError
from moefit.host import available_bytes, memory_pressure, process_bytes, total_bytes
from moefit.serve.memory.budget import format_bytes

_LOG = logging.getLogger(__name__)

AUTO_MEMORY = "auto"  # instead of a size
LEAST_HEADROOM = 512 << 20
HEADROOM_SHARE = 16  # of the memory that may be used, the part that stays free, at least
INTERVAL = 0.2  # seconds between two readings
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
        room, reserve = self.room(reading), min(budget, self.most) // RESERVE
        target = room if room == self.most else max(self.least, room - reserve)
        if budget > self.most or room < budget - budget // TOLERANCE:
            self.reset()
            return target
        waiting = reading.pressure >= CALM and reading.available < 2 * self.headroom
        if target <= budget or waiting:
            self.reset()
            return None
        if self._free_since is None:
            self._free_since = now
        self._free = min(self._free, target)
        if now - self._free_since < GROW_AFTER:
            return None
        grown = min(int(self._free), int(budget * MOST_GROWTH))
        self.reset()
        return grown

    def reset(self) -> None:
        """Forget for how long memory has been free."""
        self._free_since, self._free = None, math.inf


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
        """Follow free memory from now on, and set the budget for what is free now.

        Raises:
            MoefitError: The budget cannot be changed. It is not followed then, unless it was.
            OSError: The system's figures cannot be read, or memory cannot be allocated.
        """
        with self._changing:
            if not self.active:
                self.rule.reset()
            self._change(at_least_once=not self.active)
            self._on.set()

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Set the budget within the block, and follow it no longer unless the block raises."""
        with self._changing:
            before = self.active
            self._on.clear()
            try:
                yield
            except BaseException:
                if before:
                    self._on.set()
                raise

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._on.set()
        self._thread.join(timeout=10)

    def step(self) -> None:
        """Read once, and change the budget if the rule says so. Errors are logged."""
        with self._changing:
            if not self._on.is_set() or self._closed.is_set():
                return
            try:
                self._change()
            except (MoefitError, OSError) as error:
                self._say_failed(str(error))
            else:
                self._failed = ""

    def _change(self, *, at_least_once: bool = False) -> None:
        reading, before = self._read(), self._budget()
        wanted = self.rule.next(monotonic(), before, reading)
        if wanted is None or wanted == before:
            if at_least_once:  # a budget without a limit gets one
                self._apply(before)
            return
        self._apply(wanted)
        own, free = format_bytes(reading.process), format_bytes(reading.available)
        with suppress(OSError, SystemExit):  # whoever read the output may be gone
            self._announce(
                f"budget {format_bytes(before)} -> {format_bytes(wanted)}: {free} free beside this "
                f"process's {own}"
            )

    def _say_failed(self, error: str) -> None:
        """Log an error once, however often it is repeated."""
        if error != self._failed:
            _LOG.warning("the budget cannot follow free memory now: %s", error)
        self._failed = error

    def _run(self) -> None:
        while self._on.wait() and not self._closed.wait(self._interval):
            try:
                self.step()
            except Exception:  # noqa: BLE001 - logged; serving goes on with this budget
                _LOG.exception("the budget no longer follows free memory")
                self._on.clear()
