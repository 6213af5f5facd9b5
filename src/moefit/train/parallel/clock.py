"""Measure how long a device communicates."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Measures the seconds that a device communicates, between two calls of `seconds`.

    Args:
        device: The device.
        begin: Called when a communication begins, also while nothing is measured.
    """

    def __init__(self, device: torch.device, begin: Callable[[], None] = lambda: None):
        self._begin = begin
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measure nothing inside the context, as what is outside of training steps."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the calls inside the context, on the current stream of a GPU."""
        self._begin()
        if self._is_paused:
            yield
            return
        if self._on_gpu:
            ends = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            ends[0].record()
            yield
            ends[1].record()
            self._events.append(ends)
            return
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """Return the seconds measured since the last call."""
        for _, end in self._events[-1:]:
            end.synchronize()
        total = self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        self._seconds, self._events = 0.0, []
        return total
