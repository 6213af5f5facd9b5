"""What is measured of requests: times to tokens, ends, changes of the budget.

Owns the instruments, in a registry of its own, and their clock. Names are vLLM's, with our prefix,
where vLLM has one. What the engine and the model count themselves is read elsewhere (`metrics`).
"""

import threading
from collections import Counter as Tally
from time import monotonic
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram

from moefit.engine.request import Event, Finished, Listener, Prompt
from moefit.server.window import Window

PREFIX = "moefit:"
Change = Literal["ok", "refused", "failed"]
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Telemetry:
    """Instruments of one server, for the model of that name. Thread-safe."""

    def __init__(self, model: str):
        self.model, self.registry = model, CollectorRegistry()
        self._lock = threading.Lock()
        self._first, self._between = Window(), Window()
        self.changes: Tally[str] = Tally()
        self._finished = Counter(
            f"{PREFIX}request_success", "Requests that ended, by reason",
            ["model_name", "finished_reason"], registry=self.registry,
        )  # fmt: skip
        self._changes = Counter(
            f"{PREFIX}budget_changes", "Changes of budget or mode that were asked for",
            ["model_name", "result"], registry=self.registry,
        )  # fmt: skip
        self._time_to_first = self._histogram(
            "time_to_first_token_seconds", "From request to first token", _SLOW
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "From token to token", _FAST
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "From request to its end", _SLOW
        )
        self._queued = self._histogram(
            "request_queue_time_seconds", "From request to its place among those that run", _SLOW
        )
        self._reading = self._histogram(
            "request_prefill_time_seconds", "From its place to its prompt read", _SLOW
        )
        self._decoding = self._histogram(
            "request_decode_time_seconds", "From first to last token", _SLOW
        )
        self._running = self._histogram(
            "request_inference_time_seconds", "From its place to its end", _SLOW
        )

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        named = Histogram(
            PREFIX + name, meaning, ["model_name"], buckets=buckets, registry=self.registry
        )
        return named.labels(self.model)

    def listen(self, listener: Listener) -> Listener:
        """A listener that measures one request, which begins now, and passes events on."""
        timing = _Timing(self)

        def heard(event: Event) -> None:
            try:
                timing.hear(event, monotonic())
            finally:  # whatever fails in measuring, the request gets its event
                listener(event)

        return heard

    def changed(self, result: Change) -> None:
        """A change of budget or mode was asked for, and went so."""
        with self._lock:
            self.changes[result] += 1
        self._changes.labels(self.model, result).inc()

    def latency(self) -> dict[str, float | None]:
        """Seconds of the last minutes: to the first token, and between tokens."""
        now = monotonic()
        with self._lock:
            ttft = self._first.percentiles(0.5, 0.99, at=now)
            itl = self._between.percentiles(0.5, 0.99, at=now)
        return {"ttft_p50": ttft[0], "ttft_p99": ttft[1], "itl_p50": itl[0], "itl_p99": itl[1]}

    def prompt_read(self, waited: float, seconds: float) -> None:
        """A prompt was read: how long it waited for its place, and what reading took then."""
        self._queued.observe(waited)
        self._reading.observe(seconds)

    def first_token(self, seconds: float, now: float) -> None:
        """The first token came."""
        self._time_to_first.observe(seconds)
        with self._lock:
            self._first.add(seconds, at=now)

    def next_token(self, seconds: float, now: float) -> None:
        """Another token came."""
        self._inter_token.observe(seconds)
        with self._lock:
            self._between.add(seconds, at=now)

    def finished(
        self, reason: str, seconds: float, *, running: float | None, decoding: float | None
    ) -> None:
        """A request ended, so long after it came, after its place and, if it has tokens, the time
        from the first of them to the last."""
        self._finished.labels(self.model, reason).inc()
        self._whole.observe(seconds)
        if running is not None:
            self._running.observe(running)
        if decoding is not None:
            self._decoding.observe(decoding)


class _Timing:
    """The clock of one request, in the engine's thread."""

    def __init__(self, telemetry: Telemetry):
        self._telemetry, self._began = telemetry, monotonic()
        self._placed: float | None = None
        self._first: float | None = None
        self._last = self._began

    def hear(self, event: Event, now: float) -> None:
        telemetry = self._telemetry
        if isinstance(event, Prompt):
            self._placed = min(now, self._began + event.waited)
            telemetry.prompt_read(event.waited, now - self._placed)
        elif isinstance(event, Finished):
            telemetry.finished(
                event.reason,
                now - self._began,
                running=None if self._placed is None else now - self._placed,
                decoding=None if self._first is None else self._last - self._first,
            )
        elif self._first is None:
            self._first = self._last = now
            telemetry.first_token(now - self._began, now)
        else:
            telemetry.next_token(now - self._last, now)
            self._last = now
