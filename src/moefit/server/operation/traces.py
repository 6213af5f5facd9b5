"""OpenTelemetry traces (`moefit[otel]`): a span per request, with those of its parts.

Spans are made when a request has ended, from the times that were noted, and sent by a thread of the
library from a bounded queue: a collector that is away delays nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, time_ns
from typing import Any
from urllib.parse import urlsplit

import moefit
from moefit.engine.api import Event, FinishedEvent, Listener, PromptEvent
from moefit.errors import ConfigError

_EXPORT_SECONDS = 5
_NANOSECONDS = 1_000_000_000
MISSING = "--otlp-traces-endpoint needs OpenTelemetry: pip install 'moefit[otel]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRequest:
    """What a span says of its request.

    Attributes:
        request_id: Its id.
        path: Its endpoint.
        model: Name of the model.
        key: Name of its key, if any.
        max_tokens: Tokens of its answer at most.
        traceparent: The client's span, as its header names it (W3C trace context).
    """

    request_id: str
    path: str
    model: str
    key: str | None
    max_tokens: int
    traceparent: str | None


class _Times:
    """When a request was queued, admitted, had its prompt computed and had its first token."""

    def __init__(self, clock: Callable[[], float]):
        self._clock, self.queued, self.queued_ns = clock, clock(), time_ns()
        self.waited = 0.0
        self.prompt: float | None = None
        self.first: float | None = None
        self.ended: float | None = None

    def note(self, event: Event) -> None:
        now = self._clock() - self.queued
        if isinstance(event, PromptEvent):
            self.waited, self.prompt = min(event.waited, now), now
        elif isinstance(event, FinishedEvent):
            self.ended = now
        elif self.first is None:
            self.first = now

    def at(self, seconds: float) -> int:
        """Return a time since the request was queued in nanoseconds since 1970."""
        return self.queued_ns + int(seconds * _NANOSECONDS)


class RequestTraces:
    """Makes spans of requests.

    Args:
        provider: OpenTelemetry's `TracerProvider`.
        clock: Returns the time in seconds.
    """

    def __init__(self, provider: Any, clock: Callable[[], float] = monotonic):
        self._provider, self._clock = provider, clock
        self._tracer = provider.get_tracer("moefit", moefit.__version__)

    def listener(self, listener: Listener, request: TracedRequest) -> Listener:
        """Return a listener that makes the spans of a request when it has ended."""
        times = _Times(self._clock)

        def on_event(event: Event) -> None:
            try:
                times.note(event)
                if isinstance(event, FinishedEvent):
                    self._record(request, times, event)
            finally:  # a failing trace must not drop the event
                listener(event)

        return on_event

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.shutdown()

    def _record(self, request: TracedRequest, times: _Times, end: FinishedEvent) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {} if request.traceparent is None else {"traceparent": request.traceparent}
        parent = TraceContextTextMapPropagator().extract(carrier)
        ended = times.ended or 0.0
        span = self._tracer.start_span(
            f"moefit {request.path}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            start_time=times.at(0),
            attributes=_attributes(request, times, end),
        )
        if end.reason == "error":
            kind = end.message.partition(":")[0]  # what follows may have local paths
            span.set_status(trace.Status(trace.StatusCode.ERROR, kind))
        within = trace.set_span_in_context(span, parent)
        admitted = ended if times.prompt is None else times.waited
        parts = [("queue", 0.0, admitted)]
        if times.prompt is not None:
            parts.append(("prompt", times.waited, times.prompt))
            parts.append(("answer", times.prompt, ended))
        for name, begin, stop in parts:
            part = self._tracer.start_span(name, context=within, start_time=times.at(begin))
            part.end(times.at(stop))
        span.end(times.at(ended))


def _attributes(request: TracedRequest, times: _Times, end: FinishedEvent) -> dict[str, Any]:
    """Return a span's attributes, named as OpenTelemetry's conventions for language models."""
    found = {
        "gen_ai.provider.name": "moefit",
        "gen_ai.operation.name": "chat" if "chat" in request.path else "text_completion",
        "gen_ai.request.model": request.model,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.usage.input_tokens": end.prompt_tokens,
        "gen_ai.usage.output_tokens": end.completion_tokens,
        "gen_ai.response.finish_reasons": (end.reason,),
        "moefit.cached_tokens": end.cached_tokens,
        "moefit.request_id": request.request_id,
        "moefit.key": request.key,
        "moefit.seconds_to_first_token": times.first,
    }
    return {name: value for name, value in found.items() if value is not None}


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def traces_to(endpoint: str, model: str) -> RequestTraces:
    """Return traces that are sent to a collector by OTLP over HTTP.

    Args:
        endpoint: URL, such as http://127.0.0.1:4318/v1/traces.
        model: Name of the model, for the traces' resource.

    Raises:
        ConfigError: If the URL is none, or OpenTelemetry is not installed.
    """
    if not _is_url(endpoint):
        raise ConfigError(
            f"--otlp-traces-endpoint {endpoint!r} is no URL of a collector; give one such as "
            "http://127.0.0.1:4318/v1/traces"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(MISSING) from error
    resource = Resource.create({"service.name": "moefit", "moefit.model": model})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return RequestTraces(provider)
