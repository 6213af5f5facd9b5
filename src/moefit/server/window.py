"""Values of the last few minutes, and where their middle and their end are. Pure."""

from collections import deque
from math import ceil


class Window:
    """Values with their times, at most `most` of them and none older than `seconds`.

    >>> window = Window(seconds=10)
    >>> for at in range(5):
    ...     window.add(float(at), at=at)
    >>> window.percentiles(0.5, 0.99, at=11)
    (2.0, 4.0)
    """

    def __init__(self, *, seconds: float = 300.0, most: int = 4096):
        self._seconds = seconds
        self._values: deque[tuple[float, float]] = deque(maxlen=most)

    def add(self, value: float, *, at: float) -> None:
        """One more value; times do not fall."""
        self._values.append((at, value))

    def percentiles(self, *shares: float, at: float) -> tuple[float | None, ...]:
        """Per share the least value that so many are not above (nearest rank); None of nothing."""
        while self._values and self._values[0][0] < at - self._seconds:
            self._values.popleft()
        values = sorted(value for _, value in self._values)
        if not values:
            return tuple(None for _ in shares)
        return tuple(values[max(0, ceil(share * len(values)) - 1)] for share in shares)
