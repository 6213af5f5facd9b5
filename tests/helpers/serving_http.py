"""A service over the reference model's tokenizer and a fake engine."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from fake_engine import FakeEngine
from fastapi.testclient import TestClient

from moefit.engine.engine import Engine
from moefit.serve.model import ServedModel
from moefit.server.app import create_app
from moefit.server.middleware import ServerSettings
from moefit.server.service import Service


@contextmanager
def fake_service(
    served: ServedModel, *, pause: float = 0.0, **settings: Any
) -> Iterator[tuple[Service, FakeEngine]]:
    engine = FakeEngine(served, pause=pause)
    engine.start()
    service = Service(cast(Engine, engine), ServerSettings(**{"name": "reference", **settings}))
    try:
        yield service, engine
    finally:
        engine.close()
        service.close()


@contextmanager
def client_of(service: Service, **how: Any) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url="http://localhost:8000", **how) as client:
        yield client


def error_of(response: Any, status: int) -> dict[str, Any]:
    """Return the error after checking that it has OpenAI's format."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code", "request_id"}
    assert body["error"]["request_id"] == response.headers.get("x-request-id")
    assert "Traceback" not in response.text
    assert "/src/" not in response.text
    return body["error"]


def events(response: Any) -> list[dict[str, Any]]:
    """Return a stream's events after checking that it ends as OpenAI's does."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
