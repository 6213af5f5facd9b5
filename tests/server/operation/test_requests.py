"""Requests that run or wait: how far each is, cancelling them, and what happened lately."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from engines import Heard, ask, engine_of, greedy, paused, prompts
from fake_engine import FakeEngine
from fastapi.testclient import TestClient
from serving_http import client_of, error_of, fake_service
from tiny_served import saved, tiny

from moefit.engine.scheduler import Limits, Scheduler
from moefit.server.operation.history import MAX_ENTRIES, History
from moefit.server.service import Service

ASKED = {"prompt": "import os", "max_tokens": 400, "ignore_eos": True}
KEYS = "keys: [{name: boss, key: b, operator: true}, {name: ann, key: a}, {name: cy, key: c}]"


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def until(holds: Any) -> Any:
    for _ in range(1000):
        if found := holds():
            return found
        sleep(0.01)
    raise AssertionError("it never came about")


@contextmanager
def asking(client: TestClient, **how: Any) -> Iterator[list[Any]]:
    """A request in another thread; its response is in the list at the end."""
    got: list[Any] = []
    thread = threading.Thread(
        target=lambda: got.append(client.post("/v1/completions", **{"json": ASKED, **how}))
    )
    thread.start()
    try:
        yield got
    finally:
        thread.join(30)


@pytest.fixture
def slow(served, tmp_path: Path) -> Iterator[tuple[Service, FakeEngine, TestClient]]:
    (tmp_path / "keys").write_text(KEYS)
    with (
        fake_service(served, pause=0.02, keys_file=tmp_path / "keys") as (service, engine),
        client_of(service) as client,
    ):
        yield service, engine, client


def listed(client: TestClient, who: str) -> dict[str, Any]:
    response = client.get("/v1/requests", headers=key(who))
    assert response.status_code == 200
    return response.json()


@pytest.mark.parametrize("stream", [False, True])
def test_request_is_listed_and_cancelled(slow, stream: bool) -> None:
    service, engine, client = slow
    headers = {**key("a"), "x-request-id": "one"}
    with asking(client, headers=headers, json=ASKED | {"n": 2, "stream": stream}) as got:
        (shown,) = until(lambda: listed(client, "b")["requests"])
        assert (shown["request_id"], shown["key"], shown["path"]) == (
            "one",
            "ann",
            "/v1/completions",
        )
        assert (shown["choices"], shown["max_tokens"], shown["state"]) == (2, 800, "answer")
        assert (shown["computed_tokens"], shown["generated_tokens"]) == (6, 4)
        done = client.post(
            "/v1/requests/cancel", json={"number": shown["number"]}, headers=key("b")
        )
        assert done.json() == {"cancelled": shown["number"]}
    if stream:
        assert (
            json.loads(got[0].text.split("data: ")[-2])["error"]["code"] == "cancelled_by_operator"
        )
    else:
        error = error_of(got[0], 400)  # clients try 5xx again
        assert (error["code"], error["request_id"]) == ("cancelled_by_operator", "one")
    assert listed(client, "b")["total"] == 0 and len(engine.cancelled) == 2
    assert service.limits.uses()["ann"].running == 0


def test_others_see_and_cancel_only_their_own(slow) -> None:
    _, engine, client = slow
    with asking(client, headers=key("a")), asking(client, headers=key("c")):
        until(lambda: listed(client, "b")["total"] == 2)
        mine = listed(client, "a")
        assert mine["total"] == 1 and mine["requests"][0]["key"] == "ann"
        assert not mine["operator"] and mine["changes"] == mine["errors"] == []
        (other,) = (one for one in listed(client, "b")["requests"] if one["key"] == "cy")
        body = {"number": other["number"]}
        refused = client.post("/v1/requests/cancel", json=body, headers=key("a"))
        unknown = client.post("/v1/requests/cancel", json={"number": 10**6}, headers=key("a"))
        assert error_of(refused, 404)["code"] == error_of(unknown, 404)["code"]
        assert not engine.cancelled
        for one in listed(client, "b")["requests"]:
            client.post("/v1/requests/cancel", json={"number": one["number"]}, headers=key("b"))


def test_changes_and_errors_are_kept(slow, monkeypatch) -> None:
    service, engine, client = slow
    engine.fail[tuple(service.tokenizer.ids("import os"))] = "OSError: /home/me/shard-3"
    headers = {**key("a"), "x-request-id": "bad"}
    for stream in (True, False):
        client.post("/v1/completions", json=ASKED | {"stream": stream}, headers=headers)
    (error,) = listed(client, "b")["errors"]
    assert (error["text"], error["request_id"]) == ("the model failed: OSError", "bad")
    client.post("/v1/memory", json={"bytes": "4GiB"}, headers=key("b"))
    refused = client.post("/v1/memory", json={"bytes": 1}, headers=key("b"))
    error_of(refused, 400)
    latest, first = listed(client, "b")["changes"]
    assert latest["text"].startswith("refused: ") and latest["by"] == "boss"
    assert first["text"].endswith("to 4.00 GiB exact")

    def fails(self: Service) -> list[str]:
        raise RuntimeError("not for clients")

    monkeypatch.setattr(Service, "problems", fails)
    with pytest.raises(RuntimeError):
        client.get("/v1/memory", headers=key("b"))
    assert len(listed(client, "b")["errors"]) == 1, "polls do not push others out"


def test_history_is_bounded() -> None:
    history = History(clock=lambda: 5.0)
    for number in range(3 * MAX_ENTRIES):
        history.failed("x" * 5000, f"r{number}")
        history.failed("again", f"r{number}")
        history.changed("y" * 5000)
    errors = history.errors()
    assert len(errors) == len(history.changes()) == MAX_ENTRIES
    assert errors[0].request_id == f"r{3 * MAX_ENTRIES - 1}" and errors[0].at == 5.0
    assert max(len(one.text) for one in errors) == 300
    history.failed("without an id", None)
    history.failed("without an id", None)
    assert len({one.text for one in history.errors()[:2]}) == 1


def test_engine_says_what_requests_wait_for(tmp_path: Path) -> None:
    folder = saved(tiny("Mixtral"), tmp_path)
    with engine_of(folder, context=64, max_concurrency=2, max_model_len=64) as engine:
        with paused(engine) as go:
            heard = [ask(engine, prompt, greedy(8)) for prompt in prompts((5, 13, 9))]
            large = Heard()
            name = engine.submit(prompts((20,))[0], greedy(40), large)
            progress = engine.progress()
            waiting = {k: one.waits_for for k, one in progress.items() if one.stage == "waiting"}
            first, *others = waiting.values()
            assert first.startswith(("one of 2 places", "13 tokens of KV cache"))
            assert others == [f"{n} before it" for n in ("1 request", "2 requests", "3 requests")]
            engine.cancel(name, "no longer wanted", code="mine")
            go.set()
        assert large.end.reason == "cancelled" and large.end.code == "mine"
        assert large.end.message == "no longer wanted"
        for one in heard:
            assert one.end.reason == "length"
        assert engine.progress() == {}


def test_scheduler_says_why_a_request_waits() -> None:
    limits = Limits(tokens=100, max_concurrency=2, prefill_chunk=8, max_waiting=9)
    scheduler = Scheduler(limits)
    for name in ("a", "b", "c"):
        scheduler.submit(name, prompt=10, max_new_tokens=40)
    scheduler.admit()
    assert scheduler.waits() == {"c": "one of 2 places to run"}
    scheduler.remove("b")
    scheduler.submit("d", prompt=10, max_new_tokens=80)
    scheduler.admit()
    scheduler.remove("a")
    assert scheduler.waits() == {"d": "90 tokens of KV cache; 50 are free"}
    scheduler.hold("c")
    assert scheduler.waits()["c"].startswith("a prefix that another request computes")
    assert (scheduler.computed("c"), scheduler.computed("d"), scheduler.computed("no")) == (0, 0, 0)
