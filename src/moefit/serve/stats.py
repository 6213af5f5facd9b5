"""Count accesses, swaps and failed reads: the statistics behind `report()`.

An access is one (step, block, expert): however many tokens of a step use an expert, it is needed
once (event-atomic, arXiv 2608.07911).
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from threading import Lock
from time import monotonic
from typing import Any

_LOG = logging.getLogger(__name__)
LOG_INTERVAL = 30.0  # seconds between two messages about failed reads
RECOVERY = 60.0  # seconds after the last failed read until reading counts as working again


@dataclass(slots=True)
class Counters:
    """Sums over all blocks and steps.

    Args:
        hits: Accesses of resident experts.
        fetches: Accesses for which the expert was loaded.
        computed_on_host: Accesses for which the expert was computed in host memory.
        substitutions: Experts that the router chose and others replaced.
        swaps: Experts that were swapped in.
        wait_seconds: Time that steps waited for loads.
        substituted: Sum over blocks and steps of the share of router weight that was substituted.
        routed: Number of those shares.
        prefetches: Experts that were read because they were predicted.
        prefetches_used: Those of them that the router then chose.
        prefetched_bytes: Bytes of the slots that prefetches filled.
        prefetch_wasted_bytes: The same of those that the router did not choose in that step.
    """

    hits: int = 0
    fetches: int = 0
    computed_on_host: int = 0
    substitutions: int = 0
    swaps: int = 0
    wait_seconds: float = 0.0
    substituted: float = 0.0
    routed: int = 0
    prefetches: int = 0
    prefetches_used: int = 0
    prefetched_bytes: int = 0
    prefetch_wasted_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of accesses that found their expert in memory; 1 without accesses."""
        accesses = self.hits + self.fetches + self.computed_on_host
        return self.hits / accesses if accesses else 1.0

    @property
    def substituted_mass(self) -> float:
        """Mean share of router weight that went to an expert the router did not choose."""
        return self.substituted / self.routed if self.routed else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        rates = {"hit_rate": self.hit_rate, "substituted_mass": self.substituted_mass}
        return {**asdict(self), **rates}


class LoadFailures:
    """Count failed reads of experts, and tell whether reading works now. Thread-safe.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock, self._lock = clock, Lock()
        self.demand = self.background = 0
        self._failed_at: float | None = None
        self._worked_at: float | None = None
        self._logged_at: float | None = None
        self._unlogged = 0

    @property
    def failing(self) -> bool:
        """Whether no read succeeded since the last failure, or that was less than a minute ago.

        One successful read is not enough, since part of a disk may be damaged.
        """
        with self._lock:
            if self._failed_at is None:
                return False
            works = self._worked_at is not None and self._worked_at >= self._failed_at
            return not works or self._clock() - self._failed_at < RECOVERY

    def worked(self) -> None:
        """Record a successful read."""
        with self._lock:
            self._worked_at = self._clock()

    def failed(self, block: str, expert: int, error: BaseException, *, background: bool) -> None:
        """Count a failed read, and log it unless one was logged within `LOG_INTERVAL`."""
        with self._lock:
            now = self._failed_at = self._clock()
            self.background += background
            self.demand += not background
            if self._logged_at is not None and now - self._logged_at < LOG_INTERVAL:
                self._unlogged += 1
                return
            self._logged_at, unlogged, self._unlogged = now, self._unlogged, 0
        more = f" ({unlogged:,} more reads failed since the last such message)" if unlogged else ""
        _LOG.warning(
            "expert %d of %s could not be read%s: %s: %s%s",
            expert, block, " in the background" if background else "",
            type(error).__name__, error, more,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        counts = {"demand": self.demand, "background": self.background}
        return {"load_failures": counts, "loads_failing": self.failing}
