"""What is asked of a plan beside its budget, and which point of a front keeps it.

Owns the promise and the choice. Takes a front with what predictions are worth; knows nothing of how
either came about.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moefit.errors import ConfigError
from moefit.plan.search import Point
from moefit.serve.budget import format_bytes

DEFAULT_LOSS = 0.02  # what is promised where nobody asks for anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """At most this loss of perplexity, or at least this many tokens a second; both None: neither.

    Without either, the fastest whose loss is at most `DEFAULT_LOSS` is wanted, or else the best.
    """

    max_loss: float | None = None
    min_speed: float | None = None

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return not (self.max_loss is self.min_speed is None)

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be promised."""
        if self.max_loss is not None and not 0 <= self.max_loss < math.inf:
            raise ConfigError(f"max-loss {self.max_loss!r}, but it is a share, such as 3% or 0.03")
        if self.min_speed is not None and not 0 < self.min_speed < math.inf:
            raise ConfigError(f"min-speed {self.min_speed!r}, but it is tokens a second, above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chooser:
    """margin: what a predicted loss may be short by; tolerance: a share of time, likewise."""

    margin: float
    tolerance: float

    def choose(self, front: Sequence[Point], promise: Promise, memory: int) -> Point:
        """The point of a front that keeps the promise best.

        Raises ConfigError if none does, with the nearest that can be promised.
        """
        promise.check()
        if not (good := [one for one in front if self.keeps(one, promise)]):
            raise ConfigError(self._nearest(front, promise, memory))
        if promise.min_speed is not None:
            return min(good, key=lambda one: (one.loss, one.seconds))
        if promise.max_loss is None:
            good = [one for one in front if one.loss <= DEFAULT_LOSS]
        return self._best_of_fastest(good) if good else min(front, key=lambda one: one.loss)

    def keeps(self, point: Point, promise: Promise) -> bool:
        """Whether this point may be promised to be so good and so fast."""
        return (promise.max_loss is None or self._at_most(point) <= promise.max_loss) and (
            promise.min_speed is None or point.speed >= promise.min_speed
        )

    def _best_of_fastest(self, points: Sequence[Point]) -> Point:
        """The best of those that predictions can't tell from the fastest."""
        fastest = min(one.seconds for one in points)
        near = [one for one in points if one.seconds <= fastest * (1 + self.tolerance)]
        return min(near, key=lambda one: (one.loss, one.seconds))

    def _at_most(self, point: Point) -> float:
        """The loss that can be promised; nothing is added where nothing is lost."""
        return point.loss + min(self.margin, max(0.0, point.loss))

    def _nearest(self, front: Sequence[Point], promise: Promise, memory: int) -> str:
        best, fastest = min(front, key=lambda p: p.loss), min(front, key=lambda p: p.seconds)
        given: list[str] = []
        if promise.max_loss is not None:
            given.append(f"a loss of at most {promise.max_loss:.2%}")
        if promise.min_speed is not None:
            given.append(f"at least {promise.min_speed:g} tokens/s")
        loss = math.ceil(1e4 * self._at_most(best)) / 1e4  # what is said can be asked for
        return (
            f"{' and '.join(given)} cannot be promised in {format_bytes(memory)}; there, the best "
            f"loses {loss:.2%} at {_down(best.speed):.2f} tokens/s, and the fastest makes "
            f"{_down(fastest.speed):.2f} tokens/s at a loss of {fastest.loss:.2%}"
        )


def _down(speed: float) -> float:
    return math.floor(100 * speed) / 100
