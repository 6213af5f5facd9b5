"""Decide which steps are skipped: those whose loss or gradient is far above the last ones.

Dense and sparse steps have different losses, so each is compared with its own kind. Knows nothing
of tensors: it is given numbers, the same in all processes.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import TypedDict

WINDOW = 128
LEAST = 32
"""Steps of a kind before the first judgement."""
MOST_IN_A_ROW = 10


def _window() -> deque[float]:
    return deque(maxlen=WINDOW)


@dataclass(slots=True)
class _Kind:
    """The last steps of one kind that were not skipped, and those skipped since."""

    losses: deque[float] = field(default_factory=_window)
    norms: deque[float] = field(default_factory=_window)
    in_a_row: int = 0


class KindState(TypedDict):
    """What is known of the last steps of one kind."""

    losses: list[float]
    norms: list[float]
    in_a_row: int


class SpikeState(TypedDict):
    """The state of a `SpikeDetector`, for checkpoints."""

    dense: KindState
    sparse: KindState
    skipped: int


class SpikeDetector:
    """Finds steps that are more than `sigma` standard deviations above the mean of the last ones.

    Args:
        sigma: Above 0; None finds none.
    """

    def __init__(self, sigma: float | None):
        self._sigma = sigma
        self._dense, self._sparse = _Kind(), _Kind()
        self.skipped = 0
        """Steps found so far."""

    def is_spike(self, loss: float, norm: float, *, sparse: bool = False) -> bool:
        """Return whether a step is to be skipped, and remember its values if not.

        Values that are not finite are spikes too. After 10 spikes in a row of one kind the next
        step is none, and comparison begins anew: the model has changed, or diverged.

        Args:
            loss: Of the step.
            norm: Of its gradient.
            sparse: Whether the step used few experts.

        >>> detector = SpikeDetector(6)
        >>> [detector.is_spike(2 + step % 2 / 10, 1) for step in range(40)].count(True)
        0
        >>> detector.is_spike(2, 50), detector.is_spike(math.nan, 1), detector.is_spike(2, 1)
        (True, True, False)
        >>> detector.is_spike(9, 50, sparse=True)
        False
        """
        if self._sigma is None:
            return False
        kind = self._sparse if sparse else self._dense
        finite = math.isfinite(loss) and math.isfinite(norm)
        high = finite and (self._is_high(loss, kind.losses) or self._is_high(norm, kind.norms))
        if high or not finite:
            if kind.in_a_row < MOST_IN_A_ROW:
                self.skipped += 1
                kind.in_a_row += 1
                return True
            kind.losses.clear()
            kind.norms.clear()
        kind.in_a_row = 0
        if finite:
            kind.losses.append(loss)
            kind.norms.append(norm)
        return False

    def _is_high(self, value: float, before: deque[float]) -> bool:
        if len(before) < LEAST or self._sigma is None:
            return False
        return value > statistics.fmean(before) + self._sigma * statistics.pstdev(before)

    def state_dict(self) -> SpikeState:
        """Return the state, for checkpoints."""
        return {
            "dense": _saved(self._dense),
            "sparse": _saved(self._sparse),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: SpikeState) -> None:
        """Restore what `state_dict` returned."""
        self._dense, self._sparse = _restored(state["dense"]), _restored(state["sparse"])
        self.skipped = state["skipped"]


def _saved(kind: _Kind) -> KindState:
    return {"losses": list(kind.losses), "norms": list(kind.norms), "in_a_row": kind.in_a_row}


def _restored(state: KindState) -> _Kind:
    return _Kind(
        losses=deque(state["losses"], WINDOW),
        norms=deque(state["norms"], WINDOW),
        in_a_row=state["in_a_row"],
    )
