"""Limit on the total size of request bodies in memory."""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from threading import Event, Thread
from urllib.parse import urlsplit

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from serving_http import client_of, error_of, fake_service

import moefit
from moefit.serve.model import ServedModel
from moefit.server.client import Client, ServerError
from moefit.server.middleware import BodyBudget, ServerSettings
from tests.server.test_http_server import Site, site, soon

HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 40000\r\n\r\n"
)


class Counted(RuleBasedStateMachine):
    """The budget against a list of reserved sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies, self.taken = BodyBudget(100), []

    @rule(size=st.integers(0, 60))
    def reserve(self, size: int) -> None:
        fits = sum(self.taken) + size <= 100
        assert self.bodies.reserve(size) == fits
        if fits:
            self.taken.append(size)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.taken:
            self.bodies.release(self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1))))

    @invariant()
    def same(self) -> None:
        self.bodies.check()
        assert self.bodies.held == sum(self.taken)


TestCounted = Counted.TestCase


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    with moefit.load("reference") as served:
        yield served


def test_body_budget_release_needs_reservation() -> None:
    with pytest.raises(AssertionError):
        BodyBudget(10).release(1)


def test_body_fits_with_others() -> None:
    settings = ServerSettings(name="model")
    assert settings.body_bytes * 4 <= settings.bodies_bytes


def _begun(here: Site, body: bytes) -> socket.socket:
    """Send part of a request with a body of 40,000 bytes."""
    connection = here.connect()
    connection.sendall(HEAD + body)
    return connection


def _refused(here: Site) -> ServerError | None:
    """Return the error for a body of 20,000 bytes; None if it succeeds."""
    try:
        Client(here.url).post("/tokenize", {"prompt": "a " * 10_000})
    except ServerError as error:
        return error
    return None


def test_total_size_of_bodies_is_limited(served) -> None:
    with site(served, bodies_bytes=50_000) as here:
        said = [_begun(here, b"") for _ in range(5)]  # 200,000 bytes, of which none has come
        assert _refused(here) is None
        held = _begun(here, b"{" + b" " * 35_000)
        soon(lambda: _refused(here) is not None)
        with here.connect() as late:
            late.sendall(HEAD + b"{" + b" " * 20_000)
            answer = late.recv(4096)
        assert answer.startswith(b"HTTP/1.1 429 ") and b"retry-after: 1\r\n" in answer.lower()
        refused = _refused(here)
        assert refused is not None and refused.code == "too_many_bodies"
        assert "50,000 bytes" in str(refused)
        assert Client(here.url).post("/tokenize", {"prompt": "a"})["count"] == 1  # what fits
        held.close()
        soon(lambda: _refused(here) is None)
        for one in said:
            one.close()


def test_body_is_counted_until_response_ends(served) -> None:
    with site(served, bodies_bytes=50_000) as here:
        going = here.ask(max_tokens=400, stream=True, user="u" * 35_000)
        soon(lambda: here.engine.stats().running == 1)
        assert _refused(here) is not None
        going.close()
        soon(lambda: _refused(here) is None)


def test_rejected_bodies_are_released(served) -> None:
    """However a request fails, none of its bytes remain reserved."""
    with site(served, bodies_bytes=50_000, body_bytes=45_000) as here:
        for path, prompt in (("/nowhere", "a"), ("/v1/completions", 1), ("/tokenize", 2)):
            for _ in range(3):
                with pytest.raises(ServerError):
                    Client(here.url).post(path, {"prompt": prompt, "user": "u" * 30_000})
        assert _refused(here) is None


def test_limit_applies_to_chunked_bodies(served) -> None:
    with fake_service(served, bodies_bytes=50_000) as (service, _), client_of(service) as client:
        chunks = iter([b"{" + b" " * 30_000, b" " * 30_000])
        kind = {"Content-Type": "application/json"}
        response = client.post("/v1/completions", content=chunks, headers=kind)
        assert error_of(response, 429)["code"] == "too_many_bodies"
        assert response.headers["retry-after"] == "1"


CHUNKED = (
    b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def _chunks(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def _read(connection: socket.socket) -> bytes:
    """Return everything the server sends until it closes or stops sending."""
    connection.settimeout(20)
    said = b""
    with suppress(OSError):
        while more := connection.recv(1 << 16):
            said += more
    return said


def test_many_small_chunks_do_not_block(served) -> None:
    with site(served) as here, here.connect() as connection:
        slowest, go_on = [0.0], Event()

        def look() -> None:
            while not go_on.is_set():
                began = time.monotonic()
                assert Client(here.url).get("/health") == {"status": "ok"}
                slowest[0] = max(slowest[0], time.monotonic() - began)

        looking = Thread(target=look)
        looking.start()
        try:
            with suppress(OSError):  # it need not take all of it
                connection.sendall(CHUNKED + _chunks(b" " * 300_000, 1))
            said = _read(connection)
        finally:
            go_on.set()
            looking.join()
        assert said.startswith(b"HTTP/1.1 400 ") and b'"code":"too_many_pieces"' in said
        assert slowest[0] < 1.5, "it was 5.8 s"


@pytest.mark.parametrize(("length", "size"), [(9_000, 1), (600_000, 32)])
def test_chunked_bodies_are_read(served, length: int, size: int) -> None:
    body = b'{"prompt": "a"' + b" " * length + b"}"
    with site(served) as here, here.connect() as connection:
        connection.sendall(CHUNKED + _chunks(body, size) + b"0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("chunked", [False, True])
def test_rejected_body_is_not_read_to_end(served, chunked: bool, close: bytes) -> None:
    how = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 10000000000"
    head = HEAD.replace(b"Content-Length: 40000\r\n", how + b"\r\n" + close)
    part = b" " * (1 << 16)
    part = _chunks(part, len(part)) if chunked else part
    with site(served) as here, here.connect() as connection:
        connection.sendall(head)
        sent, said = 0, []
        # A client that sends and never reads loses the response when the server closes.
        reader = Thread(target=lambda: said.append(connection.recv(4096)), daemon=True)
        reader.start()
        with suppress(OSError):
            while sent < 1 << 28:
                connection.sendall(part)
                sent += len(part)
        reader.join(20)
        assert sent < 1 << 27, f"{sent:,} bytes were read"
        assert said[0].startswith(b"HTTP/1.1 413 ")
        soon(lambda: not here.running.connections)


def test_connection_survives_rejected_request(served) -> None:
    with site(served) as here:
        connection = HTTPConnection(urlsplit(here.url).netloc, timeout=20)
        sockets = set()
        for _ in range(3):
            connection.request("POST", "/nowhere", b"{}", {"Content-Type": "application/json"})
            sockets.add(connection.sock)
            response = connection.getresponse()
            assert response.status == 404 and response.read()
        assert len(sockets) == 1
        connection.close()
