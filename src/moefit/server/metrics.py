"""GET /metrics: what engine and model count themselves, read when it is asked for.

Owns the names and what each is made of. Where vLLM has a name, it is that; the experts' own are
ours. Knows nothing of who asks.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from moefit.server.telemetry import PREFIX

_LABELS = ["model_name"]


class Stats(Protocol):
    """What an engine tells of itself; see `EngineStats`."""

    @property
    def running(self) -> int: ...  # noqa: D102
    @property
    def waiting(self) -> int: ...  # noqa: D102
    @property
    def kv_tokens_used(self) -> int: ...  # noqa: D102
    @property
    def kv_tokens(self) -> int: ...  # noqa: D102
    @property
    def prompt_tokens_total(self) -> int: ...  # noqa: D102
    @property
    def generation_tokens_total(self) -> int: ...  # noqa: D102


class ModelCollector:
    """Reads `stats()` of the engine and `report()` of the model."""

    def __init__(
        self, model: str, stats: Callable[[], Stats], report: Callable[[], dict[str, Any]]
    ):
        self._model, self._stats, self._report = model, stats, report

    def describe(self) -> list[Metric]:
        """Nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All values, read once."""
        yield from self._of_engine(self._stats())
        report = self._report()
        yield from self._of_experts(report)
        yield from self._of_blocks(report)

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

    def _of_engine(self, stats: Stats) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Requests that run", stats.running)
        yield self._gauge("num_requests_waiting", "Requests that wait", stats.waiting)
        used = stats.kv_tokens_used / stats.kv_tokens if stats.kv_tokens else 0.0
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1", used)
        yield self._counter("prompt_tokens", "Prompt tokens read", stats.prompt_tokens_total)
        yield self._counter("generation_tokens", "Tokens made", stats.generation_tokens_total)

    def _of_experts(self, report: dict[str, Any]) -> Iterator[Metric]:
        budget = report["budget"]
        total = budget["most"] if budget["total"] is None else budget["total"]
        for name, meaning, value in (
            ("expert_budget_bytes", "Bytes that the process may hold", total),
            ("expert_floor_bytes", "The least budget", budget["floor"]),
            ("expert_resident_bytes", "Bytes of slots, filled or not", report["slot_bytes"]),
            ("process_bytes", "Bytes that the process holds", report["process_bytes"]),
            ("peak_process_bytes", "The most it ever held", report["peak_process_bytes"]),
        ):
            yield self._gauge(name, meaning, value)
        outcomes = {"hit": "hits", "fetch": "fetches", "substitute": "substitutions"}
        yield self._by(
            "expert_requests", "Experts that a step asked for, by what happened", "outcome",
            {outcome: report[name] for outcome, name in outcomes.items()},
        )  # fmt: skip
        yield self._summary(
            "expert_substituted_mass",
            "Share of router weight that went to another expert, by block and step",
            count=report["routed"], total=report["substituted"],
        )  # fmt: skip
        read = {"storage": report["bytes_read"]}
        yield self._by("expert_bytes_loaded", "Bytes of experts read", "tier", read)
        yield self._counter(
            "expert_refetches", "Better copies of experts that were read", report["refetches"]
        )
        yield self._counter(
            "expert_refetch_bytes", "Bytes of these copies", report["refetch_bytes"]
        )
        if "host_hits" in report:
            hits = report["host_hits"]
            yield self._counter("expert_host_hits", "Experts found in host memory", hits)
        yield self._by(
            "expert_swaps", "Experts exchanged", "reason", {"importance": report["swaps"]}
        )
        yield self._summary(
            "expert_load_seconds", "Time to bring an expert in",
            count=report["loads"], total=report["load_seconds"],
        )  # fmt: skip
        yield self._by(
            "expert_load_failures", "Reads of experts that failed, by who waited", "reason",
            report["load_failures"],
        )  # fmt: skip
        failing = report["loads_failing"]
        yield self._gauge("expert_loads_failing", "1 while experts cannot be read, else 0", failing)
        yield self._counter(
            "expert_wait_seconds", "Time that steps waited for experts", report["wait_seconds"]
        )

    def _of_blocks(self, report: dict[str, Any]) -> Iterator[Metric]:
        resident = {name: len(experts) for name, experts in report["resident"].items()}
        for name, meaning, values in (
            ("expert_resident", "Experts in memory", resident),
            ("expert_slots", "Slots for experts", report["slots"]),
        ):
            family = GaugeMetricFamily(PREFIX + name, meaning, labels=[*_LABELS, "layer"])
            for layer, value in values.items():
                family.add_metric([self._model, layer], value)
            yield family
