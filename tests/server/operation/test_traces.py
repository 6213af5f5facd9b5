"""OpenTelemetry traces: spans of requests, recorded by the library's own exporter in memory."""

import http.server
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from serving_http import client_of, fake_service

from moefit.engine.api import FinishedEvent, PromptEvent, TokenEvent
from moefit.errors import ConfigError
from moefit.server.operation.traces import RequestTraces, TracedRequest, traces_to

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="moefit[otel] is not installed")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ASKED = {"prompt": "import os", "max_tokens": 3, "ignore_eos": True}


@pytest.fixture
def recorded() -> Iterator[tuple[RequestTraces, Any]]:
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    traces = RequestTraces(provider)
    yield traces, exporter
    traces.close()


def spans(exporter: Any) -> dict[str, Any]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_spans_of_an_answer(served, recorded) -> None:
    traces, exporter = recorded
    with fake_service(served) as (service, engine), client_of(service) as client:
        service.traces, engine.cached_tokens = traces, 1
        headers = {"x-request-id": "one", "traceparent": PARENT}
        assert client.post("/v1/completions", json=ASKED, headers=headers).status_code == 200
        prompt = len(service.tokenizer.ids("import os"))
    found = spans(exporter)
    whole = found["moefit /v1/completions"]
    assert f"{whole.context.trace_id:x}" in PARENT and f"{whole.parent.span_id:x}" in PARENT
    expected = {
        "gen_ai.request.model": "reference", "gen_ai.operation.name": "text_completion",
        "gen_ai.usage.input_tokens": prompt, "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",), "gen_ai.request.max_tokens": 3,
        "moefit.request_id": "one", "moefit.cached_tokens": 1,
    }  # fmt: skip
    assert expected.items() <= dict(whole.attributes).items()
    assert "moefit.key" not in whole.attributes and "import os" not in whole.to_json()
    queue, prompt_span, answer = (found[name] for name in ("queue", "prompt", "answer"))
    for part in (queue, prompt_span, answer):
        assert part.parent.span_id == whole.context.span_id
        assert part.start_time <= part.end_time
    assert whole.start_time == queue.start_time and queue.end_time == prompt_span.start_time
    assert prompt_span.end_time == answer.start_time and answer.end_time == whole.end_time


def test_times_are_those_of_the_engine(recorded) -> None:
    _, exporter = recorded
    provider, now = sdk.TracerProvider(shutdown_on_exit=False), [100.0]
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    request = TracedRequest(
        request_id="r", path="/v1/chat/completions", model="m", key="alice", max_tokens=9,
        traceparent="no such thing",
    )  # fmt: skip
    heard: list[Any] = []
    listener = RequestTraces(provider, clock=lambda: now[0]).listener(heard.append, request)
    end = FinishedEvent(reason="error", prompt_tokens=4, completion_tokens=1, message="E: /x/y")
    for at, event in ((103.0, PromptEvent(waited=1.0)), (103.5, TokenEvent(token=1)), (105.0, end)):
        now[0] = at
        listener(event)
    assert len(heard) == 3
    found = spans(exporter)
    whole = found["moefit /v1/chat/completions"]
    assert whole.parent is None and whole.attributes["gen_ai.operation.name"] == "chat"
    assert whole.attributes["moefit.key"] == "alice"
    assert whole.attributes["moefit.seconds_to_first_token"] == 3.5
    assert (whole.status.description, whole.status.is_ok) == ("E", False)
    lengths = {name: (one.end_time - one.start_time) / 1e9 for name, one in found.items()}
    assert lengths == {
        "queue": 1.0, "prompt": 2.0, "answer": 2.0, "moefit /v1/chat/completions": 5.0
    }  # fmt: skip


def test_request_that_was_never_admitted_has_no_prompt(recorded) -> None:
    traces, exporter = recorded
    request = TracedRequest(
        request_id="r", path="/p", model="m", key=None, max_tokens=9, traceparent=None
    )
    traces.listener(lambda event: None, request)(
        FinishedEvent(reason="cancelled", prompt_tokens=4, completion_tokens=0)
    )
    assert sorted(spans(exporter)) == ["moefit /p", "queue"]


def test_failing_tracer_drops_no_event(recorded) -> None:
    traces, _ = recorded
    traces._tracer = None
    request = TracedRequest(
        request_id="r", path="/p", model="m", key=None, max_tokens=9, traceparent=None
    )
    heard: list[Any] = []
    end = FinishedEvent(reason="stop", prompt_tokens=1, completion_tokens=0)
    with pytest.raises(AttributeError):
        traces.listener(heard.append, request)(end)
    assert heard == [end]


def test_spans_reach_a_collector() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    bodies: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        traces = traces_to(f"http://127.0.0.1:{server.server_port}/v1/traces", "m")
        request = TracedRequest(
            request_id="r-77", path="/p", model="m", key=None, max_tokens=9, traceparent=None
        )
        end = FinishedEvent(reason="stop", prompt_tokens=1, completion_tokens=0)
        traces.listener(lambda event: None, request)(end)
        traces.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert any(b"r-77" in body for body in bodies)


@pytest.mark.parametrize(
    "url", ["", "collector:4318", "grpc://a:4317", "http://", "http://[", "/x"]
)
def test_endpoint_must_be_a_url(url: str) -> None:
    with pytest.raises(ConfigError, match="no URL of a collector"):
        traces_to(url, "m")


def test_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"moefit\[otel\]"):
        traces_to("http://127.0.0.1:4318/v1/traces", "m")
