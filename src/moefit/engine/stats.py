"""What an engine is doing and has done, and how fast answers come lately.

Owns the record, and the window that the pace is measured over. Knows nothing of requests, nor of
threads: whoever uses a `Pace` from several holds a lock.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

_RECENT = 5.0  # seconds that the pace looks back


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine is doing, and has done.

    kv_tokens: of the context; kv_tokens_used: reserved by requests that run. Totals count from the
    engine's beginning; tokens_per_second is of answers, over the last few seconds.
    """

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens: int
    prompt_tokens_total: int
    generation_tokens_total: int
    tokens_per_second: float
    steps: int
    runner: str


class Pace:
    """How many tokens have been made, in all and a second. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic):
        self.total = 0
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        """So many more have been made just now."""
        self.total += tokens
        self._recent.append((self._clock(), tokens))
        self._forget()

    def per_second(self) -> float:
        """Tokens a second over the last few seconds; 0 if none was made in them."""
        self._forget()
        if not self._recent:
            return 0.0
        seconds = max(self._clock() - self._recent[0][0], 0.5)
        return sum(made for _, made in self._recent) / seconds

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < self._clock() - _RECENT:
            self._recent.popleft()
