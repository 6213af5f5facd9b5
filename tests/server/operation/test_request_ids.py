"""Ids of requests: in headers, in errors and in every log line, the engine's too."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_http import client_of, error_of, events, fake_service

from moefit.engine.api import EngineSettings
from moefit.engine.engine import Engine
from moefit.server.middleware import ServerSettings
from moefit.server.operation.json_log import JsonFormatter
from moefit.server.operation.request_id import current_request, sane_id
from moefit.server.service import Service

MADE = re.compile(r"req-[0-9a-f]{32}")
ASKED = {"prompt": "import os", "max_tokens": 3}
PATH = "/v1/completions"


class Lines(logging.Handler):
    """Keeps what `--log-json` would write."""

    def __init__(self):
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))

    def of(self, request: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("request_id") == request]


@contextmanager
def logged() -> Iterator[Lines]:
    ours, kept = logging.getLogger("moefit"), Lines()
    before = ours.level
    ours.addHandler(kept)
    ours.setLevel(logging.INFO)
    try:
        yield kept
    finally:
        ours.removeHandler(kept)
        ours.setLevel(before)


@given(st.text())
def test_ids_are_safe_whatever_is_given(given_id: str) -> None:
    used = sane_id(given_id)
    assert re.fullmatch(r"[A-Za-z0-9._:=@/+-]{1,128}", used)
    assert used == given_id or MADE.fullmatch(used)


@pytest.mark.parametrize(
    "given_id", ["order-17", "Root=1-67891233-abcdef012345678912345678", "a" * 128]
)
def test_sane_ids_are_kept(given_id: str) -> None:
    assert sane_id(given_id) == given_id


@pytest.mark.parametrize("wrong", ["a" * 129, "a b", 'a"', "<b>", "a\tb", "é", ""])
def test_other_ids_are_replaced(served, wrong: str) -> None:
    with fake_service(served) as (service, engine), client_of(service) as client:
        headers = {"x-request-id": wrong.encode("latin-1")}
        response = client.post(PATH, json=ASKED, headers=headers)
    assert response.status_code == 200
    assert MADE.fullmatch(response.headers["x-request-id"])
    assert engine.labels == [response.headers["x-request-id"]]


def test_id_is_in_header_error_and_engine(served) -> None:
    with fake_service(served, api_key="k") as (service, engine), client_of(service) as client:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer k", "Host": "evil.example"}, 403),
            ({"Authorization": "Bearer k"}, 400),
        ):
            named = {**headers, "x-request-id": "mine"}
            error = error_of(client.post(PATH, json={"max_tokens": -1}, headers=named), status)
            assert error["request_id"] == "mine"
        named = {"Authorization": "Bearer k", "x-request-id": "mine"}
        answered = client.post(PATH, json=ASKED | {"n": 2}, headers=named)
        assert answered.headers["x-request-id"] == "mine"
    assert engine.labels == ["mine", "mine"]
    assert current_request.get() is None


def test_id_is_in_unexpected_errors_and_streams(served, monkeypatch) -> None:
    with (
        logged() as lines,
        fake_service(served) as (service, engine),
        client_of(service, raise_server_exceptions=False) as client,
    ):
        engine.fail[tuple(service.tokenizer.ids("import os"))] = "no such shard"
        stream = client.post(PATH, json=ASKED | {"stream": True}, headers={"x-request-id": "s"})
        assert events(stream)[-1]["error"]["request_id"] == "s"
        monkeypatch.setattr(service, "check_model", lambda name: 1 / 0)
        broken = client.post(PATH, json=ASKED, headers={"x-request-id": "b"})
        assert error_of(broken, 500)["request_id"] == "b"
    (failed,) = [line for line in lines.of("b") if line["level"] == "error"]
    assert "ZeroDivisionError" in failed["message"]
    (access,) = [line for line in lines.of("b") if line["logger"] == "moefit.access"]
    assert (access["method"], access["path"], access["status"]) == ("POST", PATH, 500)


def test_work_in_threads_knows_the_id(served) -> None:
    with logged() as lines, fake_service(served) as (service, _), client_of(service) as client:
        ids = service.tokenizer.ids

        def tokenized(text: str, **how: Any) -> list[int]:
            logging.getLogger("moefit.test").warning("in a thread")
            return ids(text, **how)

        service.tokenizer.ids = tokenized
        client.post(PATH, json=ASKED, headers={"x-request-id": "t"})
    assert next(one["message"] for one in lines.of("t")) == "in a thread"


def test_polls_are_not_logged(served) -> None:
    with logged() as lines, fake_service(served) as (service, _), client_of(service) as client:
        for path in ("/health", "/v1/memory", "/metrics"):
            assert client.get(path).status_code == 200
        client.get("/nowhere?secret=1")
    assert [line["path"] for line in lines.lines] == ["/nowhere"]


def test_engine_logs_admission_and_end(served) -> None:
    served.set_memory("4GiB")
    engine = Engine(served, EngineSettings(max_model_len=64))
    engine.start()
    service = Service(engine, ServerSettings(name="reference"))
    try:
        with logged() as lines, client_of(service) as client:
            asked = ASKED | {"n": 2, "ignore_eos": True}
            client.post(PATH, json=asked, headers={"x-request-id": "one"})
            error_of(client.post(PATH, json=ASKED | {"max_tokens": 99}), 400)
            prompts = service.tokenizer.ids("import os")
    finally:
        engine.close()
        service.close()
    *of_engine, access = lines.of("one")
    assert access["logger"] == "moefit.access" and access["status"] == 200
    begun = [one for one in of_engine if one["message"] == "request one runs"]
    assert {one["engine_request"] for one in begun} == {"request-1", "request-2"}
    ended = [one for one in of_engine if one["message"] == "request one ended: length"]
    assert len(ended) == 2
    for one in ended:
        assert one["prompt_tokens"] == len(prompts) and one["completion_tokens"] == 3
        assert 0 < one["first_token_seconds"] <= one["seconds"]
        assert one["queue_seconds"] >= 0 and one["expert_bytes_read"] >= 0
        assert one["finish_reason"] == "length"
