"""Metrics: request latencies, and GET /metrics for Prometheus.

`Telemetry` measures time to first token and inter-token latency from events; `ModelCollector` reads
the counters of engine and model when Prometheus scrapes. `Window` keeps recent values for
percentiles.
"""

import threading
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterator
from math import ceil
from time import monotonic
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from moefit.engine.api import EngineStats, Event, FinishedEvent, Listener, PromptEvent
from moefit.engine.speculation.drafts import SpeculationStats
from moefit.quant.format import NATIVE


class Window:
    """Recent values, at most `most` of them and none older than `seconds`.

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
        """Add a value at a time; times must not decrease."""
        self._values.append((at, value))

    def percentiles(self, *shares: float, at: float) -> tuple[float | None, ...]:
        """Return nearest-rank percentiles, one per fraction; None without values."""
        while self._values and self._values[0][0] < at - self._seconds:
            self._values.popleft()
        values = sorted(value for _, value in self._values)
        if not values:
            return tuple(None for _ in shares)
        return tuple(values[max(0, ceil(share * len(values)) - 1)] for share in shares)


PREFIX = "moefit:"
Change = Literal["ok", "refused", "failed"]
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Telemetry:
    """Metrics of one server. Thread-safe.

    Args:
        model: Value of the label `model_name`.
    """

    def __init__(self, model: str):
        self.model, self.registry = model, CollectorRegistry()
        self._lock = threading.Lock()
        self.first, self.between = Window(), Window()
        self.changes: Tally[str] = Tally()
        self.success = Counter(
            f"{PREFIX}request_success", "Finished requests by reason",
            ["model_name", "finished_reason"], registry=self.registry,
        )  # fmt: skip
        self._changes = Counter(
            f"{PREFIX}budget_changes", "Requested changes of budget or mode by result",
            ["model_name", "result"], registry=self.registry,
        )  # fmt: skip
        self.time_to_first = self._histogram(
            "time_to_first_token_seconds", "Time to first token", _SLOW
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Time between tokens", _FAST
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "End-to-end request latency", _SLOW
        )
        self.queued = self._histogram("request_queue_time_seconds", "Time in the queue", _SLOW)
        self.reading = self._histogram("request_prefill_time_seconds", "Time in prefill", _SLOW)
        self.decoding = self._histogram("request_decode_time_seconds", "Time in decode", _SLOW)
        self.running = self._histogram(
            "request_inference_time_seconds", "Time from admission to end", _SLOW
        )

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        named = Histogram(
            PREFIX + name, meaning, ["model_name"], buckets=buckets, registry=self.registry
        )
        return named.labels(self.model)

    def wrap_listener(self, listener: Listener) -> Listener:
        """Return a listener that measures a request, beginning now, and passes its events on."""
        timing = _Timing(self)

        def on_event(event: Event) -> None:
            try:
                timing.on_event(event, monotonic())
            finally:  # a failing measurement must not drop the event
                listener(event)

        return on_event

    def changed(self, result: Change) -> None:
        """Count a change of budget or mode."""
        with self._lock:
            self.changes[result] += 1
        self._changes.labels(self.model, result).inc()

    def add_recent(self, window: Window, seconds: float, now: float) -> None:
        """Add a latency to one of the windows."""
        with self._lock:
            window.add(seconds, at=now)

    def latency(self) -> dict[str, float | None]:
        """Return p50 and p99 of time to first token and inter-token latency, in seconds."""
        now = monotonic()
        with self._lock:
            ttft = self.first.percentiles(0.5, 0.99, at=now)
            itl = self.between.percentiles(0.5, 0.99, at=now)
        return {"ttft_p50": ttft[0], "ttft_p99": ttft[1], "itl_p50": itl[0], "itl_p99": itl[1]}


class _Timing:
    """Timestamps of one request, recorded in the engine's thread; all times are in seconds."""

    def __init__(self, telemetry: "Telemetry"):
        self._telemetry, self._began = telemetry, monotonic()
        self._placed: float | None = None
        self._first: float | None = None
        self._last = self._began

    def on_event(self, event: Event, now: float) -> None:
        telemetry = self._telemetry
        if isinstance(event, PromptEvent):
            self._placed = min(now, self._began + event.waited)
            telemetry.queued.observe(event.waited)
            telemetry.reading.observe(now - self._placed)
        elif isinstance(event, FinishedEvent):
            telemetry.success.labels(telemetry.model, event.reason).inc()
            telemetry.whole.observe(now - self._began)
            if self._placed is not None:
                telemetry.running.observe(now - self._placed)
            if self._first is not None:
                telemetry.decoding.observe(self._last - self._first)
        elif self._first is None:
            self._first = self._last = now
            telemetry.time_to_first.observe(now - self._began)
            telemetry.add_recent(telemetry.first, now - self._began, now)
        else:
            telemetry.inter_token.observe(now - self._last)
            telemetry.add_recent(telemetry.between, now - self._last, now)
            self._last = now


_LABELS = ["model_name"]


class ModelCollector:
    """Prometheus collector over the engine's `stats()` and the model's `report()`."""

    def __init__(
        self, model: str, stats: Callable[[], EngineStats], report: Callable[[], dict[str, Any]]
    ):
        self._model, self._stats, self._report = model, stats, report

    def describe(self) -> list[Metric]:
        """Return no descriptions, so that registering reads no values."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, read at one time."""
        yield from self._of_engine(self._stats())
        report = self._report()
        yield from self._of_experts(report)
        yield from self.blocks(report)

    def _gauge(self, name: str, meaning: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(PREFIX + name, meaning, labels=_LABELS)
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, meaning: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(PREFIX + name, meaning, labels=_LABELS)
        family.add_metric([self._model], value)
        return family

    def _by(self, name: str, meaning: str, label: str, counts: dict[str, float]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, meaning, labels=[*_LABELS, label])
        for value, count in counts.items():
            family.add_metric([self._model, value], count)
        return family

    def _summary(self, name: str, meaning: str, *, count: int, total: float) -> Metric:
        family = SummaryMetricFamily(PREFIX + name, meaning, labels=_LABELS)
        family.add_metric([self._model], count_value=count, sum_value=total)
        return family

    def _of_engine(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Running requests", stats.running)
        yield self._gauge("num_requests_waiting", "Waiting requests", stats.waiting)
        used = stats.kv_tokens_used / stats.kv_tokens if stats.kv_tokens else 0.0
        yield self._gauge("kv_cache_usage_perc", "Fraction of the KV cache in use, 0 to 1", used)
        yield self._gauge("kv_cache_tokens", "Tokens that the KV cache holds", stats.kv_tokens)
        yield self._gauge(
            "kv_cache_max_tokens", "Tokens to which the KV cache may grow", stats.kv_tokens_most
        )
        yield self._counter(
            "prompt_tokens",
            "Prompt tokens computed, without those found in the cache",
            stats.prompt_tokens_total,
        )
        yield self._counter("generation_tokens", "Tokens generated", stats.generation_tokens_total)
        if (prefixes := stats.prefixes) is not None:
            yield self._counter(
                "prefix_cache_queries", "Prompt tokens looked up in the cache", prefixes.queries
            )
            yield self._counter(
                "prefix_cache_hits", "Prompt tokens found in the cache", prefixes.hits
            )
            yield self._counter(
                "prefix_cache_evictions", "Cached tokens removed for requests", prefixes.evicted
            )
            held = prefixes.tokens + prefixes.shared
            yield self._gauge("prefix_cache_tokens", "Tokens that requests may reuse", held)
        if stats.speculation is not None:
            yield from self._of_drafts(stats.speculation)
        if (files := stats.prefix_files) is not None:
            yield self._gauge("prefix_cache_disk_bytes", "Bytes of prefixes in files", files.bytes)
            yield self._counter(
                "prefix_cache_disk_read_tokens", "Tokens read from files", files.read
            )
            yield self._counter(
                "prefix_cache_disk_written_tokens", "Tokens written to files", files.written
            )

    def _of_drafts(self, totals: SpeculationStats) -> Iterator[Metric]:
        yield self._counter("spec_decode_num_drafts", "Drafts that were verified", totals.drafts)
        yield self._counter(
            "spec_decode_num_draft_tokens", "Drafted tokens that were verified", totals.drafted
        )
        yield self._counter(
            "spec_decode_num_accepted_tokens", "Drafted tokens that were right", totals.accepted
        )
        places = {str(place): count for place, count in enumerate(totals.accepted_at)}
        yield self._by(
            "spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were right, by place in the draft",
            "position",
            dict(places),
        )
        yield self._counter(
            "spec_decode_num_plain_steps",
            "Steps without drafts because verifying them would have been slower",
            totals.plain_steps,
        )

    def _of_experts(self, report: dict[str, Any]) -> Iterator[Metric]:
        budget = report["budget"]
        total = budget["most"] if budget["total"] is None else budget["total"]
        for name, meaning, value in (
            ("expert_budget_bytes", "Memory budget of the process", total),
            ("expert_floor_bytes", "Minimum budget", budget["floor"]),
            ("expert_resident_bytes", "Bytes of all slots", report["slot_bytes"]),
            ("process_bytes", "Memory of the process", report["process_bytes"]),
            ("peak_process_bytes", "Peak memory of the process", report["peak_process_bytes"]),
        ):
            yield self._gauge(name, meaning, value)
        outcomes = {
            "hit": "hits",
            "fetch": "fetches",
            "host": "computed_on_host",
            "substitute": "substitutions",
        }
        yield self._by(
            "expert_requests", "Expert requests by outcome", "outcome",
            {outcome: report[name] for outcome, name in outcomes.items()},
        )  # fmt: skip
        yield self._summary(
            "expert_substituted_mass",
            "Fraction of router weight substituted, per block and step",
            count=report["routed"], total=report["substituted"],
        )  # fmt: skip
        read = {"storage": report["bytes_read"]}
        yield self._by("expert_bytes_loaded", "Bytes of experts read by tier", "tier", read)
        if "host_hits" in report:
            hits = report["host_hits"]
            yield self._counter("expert_host_hits", "Experts found in host memory", hits)
        yield self._by("expert_swaps", "Expert swaps", "reason", {"importance": report["swaps"]})
        early = {
            "used": report["prefetched_bytes"] - report["prefetch_wasted_bytes"],
            "wasted": report["prefetch_wasted_bytes"],
        }
        yield self._by(
            "expert_prefetched_bytes", "Bytes of experts read because predicted", "outcome", early
        )
        yield self._summary(
            "expert_load_seconds", "Time to load an expert",
            count=report["loads"], total=report["load_seconds"],
        )  # fmt: skip
        yield self._by(
            "expert_load_failures", "Failed expert reads by reason", "reason",
            report["load_failures"],
        )  # fmt: skip
        failing = report["loads_failing"]
        yield self._gauge("expert_loads_failing", "1 while experts cannot be read, else 0", failing)
        yield self._counter(
            "expert_wait_seconds", "Time steps spent waiting for experts", report["wait_seconds"]
        )

    def blocks(self, report: dict[str, Any]) -> Iterator[Metric]:
        """Yield the metrics of slots and residents."""
        resident = {name: len(experts) for name, experts in report["resident"].items()}
        for name, meaning, values in (
            ("expert_resident", "Experts in memory", resident),
            ("expert_slots", "Slots for experts", report["slots"]),
        ):
            family = GaugeMetricFamily(PREFIX + name, meaning, labels=[*_LABELS, "layer"])
            for layer, value in values.items():
                family.add_metric([self._model, layer], value)
            yield family
        yield self._slots_by_format(report)

    def _slots_by_format(self, report: dict[str, Any]) -> Metric:
        """Return the numbers of slots; those with the checkpoint's codes by the codes' format."""
        family = GaugeMetricFamily(
            PREFIX + "expert_slots_by_format", "Slots for experts", labels=[*_LABELS, "format"]
        )
        counts = Tally[str]()
        for block, formats in report["formats"].items():
            own = "+".join(report["checkpoint"]["held_in"].get(block, ())) or NATIVE.name
            for name, count in formats.items():
                counts[own if name == NATIVE.name else name] += count
        for name, count in counts.items():
            family.add_metric([self._model, name], count)
        return family
