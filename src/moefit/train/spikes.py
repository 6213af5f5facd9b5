"""Decide which steps are skipped: those whose loss or gradient is far above the last ones.

Knows nothing of tensors: it is given numbers, the same in all processes.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

WINDOW = 128
LEAST = 32
"""Steps before the first judgement."""
MOST_IN_A_ROW = 10


class SpikeDetector:
    """Finds steps that are more than `sigma` standard deviations above the mean of the last ones.

    Args:
        sigma: Above 0; None finds none.
    """

    def __init__(self, sigma: float | None):
        self._sigma = sigma
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0
        """Steps found so far."""
        self._in_a_row = 0

    def is_spike(self, loss: float, norm: float) -> bool:
        """Return whether a step is to be skipped, and remember its values if not.

        Values that are not finite are spikes too, but after 10 spikes in a row nothing is one: the
        model has changed, or diverged.

        >>> detector = SpikeDetector(6)
        >>> [detector.is_spike(2 + step % 2 / 10, 1) for step in range(40)].count(True)
        0
        >>> detector.is_spike(2, 50), detector.is_spike(math.nan, 1), detector.is_spike(2, 1)
        (True, True, False)
        """
        if self._sigma is None:
            return False
        finite = math.isfinite(loss) and math.isfinite(norm)
        high = finite and (self._is_high(loss, self._losses) or self._is_high(norm, self._norms))
        if (high or not finite) and self._in_a_row < MOST_IN_A_ROW:
            self.skipped += 1
            self._in_a_row += 1
            return True
        self._in_a_row = 0
        if finite:
            self._losses.append(loss)
            self._norms.append(norm)
        return False

    def _is_high(self, value: float, before: Sequence[float]) -> bool:
        if len(before) < LEAST or self._sigma is None:
            return False
        return value > statistics.fmean(before) + self._sigma * statistics.pstdev(before)

    def state_dict(self) -> dict[str, list[float] | int]:
        """Return the state, for checkpoints."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Sequence[float] | int]) -> None:
        """Restore what `state_dict` returned."""
        losses, norms = state["losses"], state["norms"]
        assert isinstance(losses, list)
        assert isinstance(norms, list)
        self._losses, self._norms = deque(losses, WINDOW), deque(norms, WINDOW)
        self.skipped, self._in_a_row = int(state["skipped"]), int(state["in_a_row"])  # pyright: ignore[reportArgumentType]
