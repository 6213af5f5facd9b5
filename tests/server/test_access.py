"""Access control: hosts, origins, keys and error bodies."""

import re
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from serving_http import client_of, error_of, fake_service
from starlette.datastructures import Headers

from moefit.host import is_loopback
from moefit.serve.model import ServedModel
from moefit.server import errors as refusal
from moefit.server.middleware import (
    ServerSettings,
    cache_salt,
    host_name,
    is_allowed_host,
    is_allowed_origin,
)
from moefit.server.operation.keys import Keys

KEY = "sehr-geheim-é"


@pytest.fixture
def locked(served: ServedModel) -> Iterator[TestClient]:
    with fake_service(served, api_key="secret") as (service, _), client_of(service) as client:
        yield client


@pytest.fixture
def open_to_all(served: ServedModel) -> Iterator[TestClient]:
    with fake_service(served, body_bytes=2000) as (service, _), client_of(service) as client:
        yield client


@given(st.text())
def test_api_key_must_match(given_key: str) -> None:
    keys = Keys(KEY)
    assert (keys.find(f"Bearer {given_key}") is not None) == (given_key.strip() == KEY)
    assert keys.find(given_key or None) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9", "[::1]"])
def test_loopback_addresses(host: str) -> None:
    assert is_loopback(host)
    for name in ("localhost", "127.0.0.1:8000", "[::1]:80", "LocalHost:1"):
        assert is_allowed_host(host, name)
    for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", None, "["):
        assert not is_allowed_host(host, name)


def test_public_address_accepts_any_host() -> None:
    assert not is_loopback("0.0.0.0")
    assert is_allowed_host("0.0.0.0", "box.example:8000")


@given(st.text(max_size=30))
def test_arbitrary_headers_do_not_fail(header: str) -> None:
    host_name(header)
    is_allowed_origin(header, header, ())


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("http://localhost:8000", True),
        ("https://friend.example", True),
        ("http://localhost:9000", False),
        ("https://localhost", False),
        ("https://evil.example", False),
        ("null", False),
        ("http://[", False),
    ],
)
def test_origins(origin: str | None, allowed: bool) -> None:
    assert is_allowed_origin(origin, "localhost:8000", ["https://friend.example"]) == allowed


def salts(key: str | None, *headers: str, given: str | None = None) -> list[str]:
    settings = ServerSettings(name="m", api_key=key)
    return [cache_salt(settings, Headers({"authorization": one}), given) for one in headers]


def test_clients_with_different_keys_share_no_prefixes() -> None:
    one, other = salts("secret", "Bearer secret", "Bearer other")
    assert one != other and "secret" not in one
    assert salts("secret", "bearer  secret") == [one], "the same key, written otherwise"
    assert salts("secret", "Bearer secret", given="mine") != [one]
    assert len({*salts("a", "Bearer a", given="b"), *salts("b", "Bearer b", given="a")}) == 2
    assert salts(None, "Bearer any", "") == ["", ""], "without a key all clients are alike"
    assert salts(None, "Bearer any", given="a") == salts(None, "", given="a") != [""]


def test_requests_carry_their_salt(served: ServedModel) -> None:
    with fake_service(served, api_key="secret") as (service, engine), client_of(service) as client:
        headers = {"Authorization": "Bearer secret"}
        asked = {"prompt": "import os", "max_tokens": 1}
        for more in ({}, {"cache_salt": "mine"}):
            path = "/v1/completions"
            assert client.post(path, json=asked | more, headers=headers).status_code == 200
        empty = client.post("/v1/completions", json=asked | {"cache_salt": ""}, headers=headers)
        assert "cache_salt" in error_of(empty, 400)["message"]
    used = [sampling.cache_salt for _, sampling in engine.submitted]
    assert used == [
        *salts("secret", "Bearer secret"), *salts("secret", "Bearer secret", given="mine")
    ]  # fmt: skip


PLACES = [
    ("GET", "/v1/models"), ("GET", "/v1/memory"), ("POST", "/v1/memory"), ("GET", "/metrics"),
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"),
    ("GET", "/version"), ("GET", "/openapi.json"), ("GET", "/nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PLACES)
def test_only_health_and_page_need_no_key(locked, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
        response = locked.request(method, path, headers=headers)
        assert error_of(response, 401)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
    right = locked.request(method, path, headers={"Authorization": "Bearer secret"})
    assert right.status_code != 401
    assert locked.get("/health").status_code == 200
    assert locked.get("/").status_code != 401


@pytest.mark.parametrize("path", ["/v1/memory", "/v1/completions", "/tokenize"])
def test_other_origins_cannot_change_state(open_to_all, path: str) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        response = open_to_all.post(path, json={"bytes": "1GiB"}, headers={"Origin": origin})
        assert error_of(response, 403)["code"] == "wrong_origin"
    same = open_to_all.post(path, json={}, headers={"Origin": "http://localhost:8000"})
    assert same.status_code == 400


def test_dns_rebinding_is_rejected(open_to_all) -> None:
    response = open_to_all.get("/v1/memory", headers={"Host": "evil.example:8000"})
    assert error_of(response, 403)["code"] == "wrong_host"


def test_other_origins_need_permission(served, open_to_all) -> None:
    origin = {"Origin": "https://friend.example"}
    assert "access-control-allow-origin" not in open_to_all.get("/health", headers=origin).headers
    with (
        fake_service(served, origins=("https://friend.example",), api_key="k") as (service, _),
        client_of(service) as client,
    ):
        asks = {**origin, "Access-Control-Request-Method": "POST"}
        allowed = client.options("/v1/completions", headers=asks)
        assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
        wanted = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
        preflight = {**asks, "Access-Control-Request-Headers": wanted}
        allowed = client.options("/v1/chat/completions", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-headers"] == wanted
        other = {**preflight, "Origin": "https://evil.example"}
        assert client.options("/v1/completions", headers=other).status_code == 400
        headers = {**origin, "Authorization": "Bearer k"}
        answer = client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"


def test_responses_have_security_headers(open_to_all) -> None:
    for path in ("/", "/health", "/nowhere"):
        headers = open_to_all.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"


def test_body_limit_with_and_without_length(open_to_all) -> None:
    body = b'{"prompt": "' + b"a" * 3000 + b'"}'
    kind = {"Content-Type": "application/json"}
    said = open_to_all.post("/v1/completions", content=body, headers=kind)
    assert error_of(said, 413)["code"] == "body_too_large"
    chunked = open_to_all.post(
        "/v1/completions", content=iter([body[:1000], body[1000:]]), headers=kind
    )
    assert error_of(chunked, 413)["message"] == error_of(said, 413)["message"]
    elsewhere = open_to_all.post("/nowhere", content=body)
    error_of(elsewhere, 413)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b'"a"', b"null", b"1" * 1000, b"[" * 1900, b'{"a":' * 380,
        b'{"prompt": "\\ud800"}', b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "stop": "\\ud800"}', b'{"prompt": "a", "stop": ["a", "\\ud800"]}',
        b'{"prompt": ["\\ud800"]}', b'{"prompt": "a", "temperature": NaN}', b"\xff\xfe{}",
        b'{"prompt": "a", "seed": ' + b"9" * 1500 + b"}", b'{"prompt": "a", "seed": 1e400}',
    ],
)  # fmt: skip
def test_arbitrary_bodies_do_not_fail(open_to_all, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    error_of(open_to_all.post("/v1/completions", content=body, headers=headers), 400)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1.5] * 1000}),
        ("/v1/completions", {"prompt": [[1.5] * 500] * 2}),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [-1] * 1000}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(n): "x" for n in range(1000)}}),
        ("/v1/completions", {"prompt": "a"} | {f"field{n}": 1 for n in range(1000)}),
        ("/v1/chat/completions", {"messages": [{}] * 1000}),
        ("/v1/chat/completions", {"messages": [{f"field{n}": 1 for n in range(1000)}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * 1000}]}),
        ("/detokenize", {"tokens": ["a"] * 1000}),
        ("/detokenize", {"tokens": [1] * 200_000}),
        ("/tokenize", {"messages": [1] * 1000}),
        ("/v1/memory", {f"field{n}": 1 for n in range(1000)}),
    ],
)
def test_validation_errors_are_limited(served, monkeypatch, path: str, body: object) -> None:
    """A list would take 1 KiB per mistake, gigabytes for a body of 4 MiB."""
    counts: list[int] = []
    told = refusal.validation_error
    monkeypatch.setattr(
        refusal,
        "validation_error",
        lambda errors, body: counts.append(len(errors)) or told(errors, body),
    )
    with fake_service(served) as (service, _), client_of(service) as client:
        error_of(client.post(path, json=body), 400)
    assert counts and counts[0] <= 16


def test_deep_json_within_the_limit_of_bytes(served) -> None:
    with fake_service(served) as (service, _), client_of(service) as client:
        headers = {"Content-Type": "application/json"}
        for body in (b"[" * 1_000_000, b'{"prompt":' * 100_000, b'{"prompt": "\xff"}'):
            error = error_of(client.post("/v1/completions", content=body, headers=headers), 400)
            assert error["code"] == "invalid_json"
            assert "nested too deeply, or not in UTF-8" in error["message"]


def test_unknown_paths_and_methods(open_to_all) -> None:
    error_of(open_to_all.get("/nowhere"), 404)
    error_of(open_to_all.get("/v1/models/other"), 404)
    response = open_to_all.get("/v1/completions")
    assert error_of(response, 405)["code"] == "wrong_method"
    assert response.headers["allow"] == "POST"
    response = open_to_all.delete("/v1/memory")
    assert "does not support DELETE; use GET, POST" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "GET, POST"
    assert open_to_all.post("/page/index.html").headers["allow"] == "GET, HEAD"
    error_of(open_to_all.get("/docs"), 404)
    for name in ("../app.py", "%2e%2e/app.py", "..%2fapp.py", "/etc/passwd", "%00"):
        error_of(open_to_all.get(f"/page/{name}"), 404)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/embeddings", "without embeddings"),
        ("/v1/messages", "Anthropic's"),
        ("/v1/audio/speech", "speech synthesis is not supported"),
        ("/v1/assistants", "endpoints: /v1/chat/completions, /v1/completions, /v1/responses"),
        ("/chat/completions", "did you mean /v1/chat/completions"),
        ("/v1/v1/completions", "did you mean /v1/completions"),
        ("/elsewhere", "there is no /elsewhere"),
    ],
)
def test_unknown_path_suggests_nearest(open_to_all, path, words) -> None:
    for response in (open_to_all.post(path, json={}), open_to_all.get(path)):
        error = error_of(response, 404)
        assert error["code"] == "unknown_url"
        assert re.search(words, error["message"])
