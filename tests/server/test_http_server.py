"""The server on a real socket: clients that disconnect, stall or flood, and shutdown."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from fake_engine import FakeEngine
from serving_http import fake_service

from moefit.errors import ConfigError
from moefit.serve.model import ServedModel
from moefit.server.chat_backend import ChatOptions, RemoteChat
from moefit.server.client import Client, ServerError
from moefit.server.run import HttpServer, bind, url_of
from moefit.server.service import Service


class Site:
    """A running server, and ways to connect to it."""

    def __init__(
        self, running: HttpServer, service: Service, engine: FakeEngine, bound: socket.socket
    ):
        self.running, self.service, self.engine = running, service, engine
        self.address = bound.getsockname()
        self.url = url_of(bound, "127.0.0.1")

    def connect(self, *, ahead: int | None = None) -> socket.socket:
        """Connect a client; `ahead` limits the bytes that its kernel buffers."""
        connection = socket.socket()
        connection.settimeout(20)
        if ahead is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ahead)
        connection.connect(self.address)
        return connection

    def ask(self, *, ahead: int | None = None, **asked: Any) -> socket.socket:
        """Open a connection and request a completion."""
        body = json.dumps({"prompt": "a", "ignore_eos": True, **asked}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        )
        connection = self.connect(ahead=ahead)
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        return connection


@contextmanager
def site(served: ServedModel, *, pause: float = 0.01, **settings: Any) -> Iterator[Site]:
    bound = bind("127.0.0.1", 0)
    settings = {"logprobs": 1 << 50, **settings}
    with fake_service(served, pause=pause, **settings) as (service, engine):
        running = HttpServer(service, bound)
        running.start()
        try:
            yield Site(running, service, engine, bound)
        finally:
            running.stop()
            assert not running.alive


def soon(what: Callable[[], bool]) -> None:
    """Wait until a condition holds, with a time limit."""
    for _ in range(2000):
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("it never came about")


@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_cancels_all_choices(served, stream: bool) -> None:
    with site(served) as here:
        connection = here.ask(max_tokens=500, n=3, stream=stream)
        soon(lambda: here.engine.stats().running == 3)
        if stream:
            while b"data:" not in connection.recv(4096):
                pass
        connection.close()
        soon(lambda: len(here.engine.cancelled) == 3)
        assert here.engine.stats().running == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_half_closed_connection_gets_response(served, stream: bool, version: str) -> None:
    with site(served) as here:
        asked = {"prompt": "a", "ignore_eos": True, "max_tokens": 60, "stream": stream}
        body = json.dumps(asked).encode()
        head = (
            f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection = here.connect()
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        began = time.monotonic()
        answer = connection.makefile("rb").read()
        assert time.monotonic() - began < 10, "the connection is closed behind the answer"
        assert b" 200 OK\r\n" in answer
        assert answer.count(b"HTTP/1.1 100 Continue\r\n\r\n") == int(version == "1.1")
        assert b"[DONE]" in answer if stream else b'"completion_tokens":60' in answer
        assert not here.engine.cancelled
        connection.close()
        soon(lambda: here.running.connections == 0)


def test_incomplete_request_is_closed(served) -> None:
    with site(served) as here:
        connection = here.connect()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        connection.sendall(head)
        connection.shutdown(socket.SHUT_WR)
        soon(lambda: here.running.connections == 0)
        assert not here.engine.submitted
        connection.close()


def test_interim_responses_are_skipped_by_http_client(served) -> None:
    with site(served) as here:
        connection = http.client.HTTPConnection(*here.address)
        body = json.dumps({"prompt": "a", "ignore_eos": True, "max_tokens": 30})
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, kind)
        connection.sock.shutdown(socket.SHUT_WR)
        response = connection.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["usage"]["completion_tokens"] == 30
        connection.close()


LONG = {"prompt": "a", "n": 50, "logprobs": 20}  # much more than the system takes in


def test_slow_reader_does_not_block_others(served) -> None:
    with site(served, pause=0.0) as here:
        lazy = here.ask(ahead=1024, **LONG, max_tokens=500, stream=True)
        soon(lambda: bool(here.engine.submitted))
        answer = Client(here.url).post("/v1/completions", {"prompt": "b", "max_tokens": 3})
        assert answer["usage"]["completion_tokens"] == 3
        lazy.close()


def test_client_that_never_reads_is_closed(served) -> None:
    with site(served, pause=0.001, wait_seconds=1) as here:
        here.engine.max_model_len = 1 << 40
        lazy = here.ask(ahead=1024, **{**LONG, "n": 5}, max_tokens=1 << 30, stream=True)
        soon(lambda: here.engine.stats().running == 5)
        soon(lambda: len(here.engine.cancelled) == 5)
        soon(lambda: not here.running.connections)
        lazy.close()
        assert _healthy(here)


@pytest.mark.slow
def test_unread_complete_response_is_closed(served) -> None:
    with site(served, pause=0.0, wait_seconds=1, idle_seconds=1) as here:
        lazy = here.ask(ahead=1024, **LONG, max_tokens=250)
        soon(lambda: bool(here.engine.submitted) and here.engine.stats().running == 0)
        soon(lambda: not here.running.connections)
        assert not here.engine.cancelled
        lazy.close()


def test_slow_reader_gets_full_response(served) -> None:
    """The response exceeds the kernel's buffers and takes longer than any single write may wait."""
    with site(served, pause=0.0, wait_seconds=1) as here:
        slow = here.ask(ahead=1 << 16, **LONG, max_tokens=250)
        said = slow.recv(1 << 14)
        while b"\r\n\r\n" not in said:
            said += slow.recv(1 << 14)
        head, _, body = said.partition(b"\r\n\r\n")
        left = int(re.search(rb"content-length: (\d+)", head)[1]) - len(body)
        assert left > 3 << 20
        began = time.monotonic()
        while left:
            read = slow.recv(1 << 14)
            assert read, f"cut off with {left:,} bytes unread"
            left -= len(read)
            time.sleep(0.01)
        assert time.monotonic() - began > 1
        slow.close()


def test_slow_requests_time_out(served) -> None:
    with site(served, wait_seconds=0.2) as here:
        beginnings = [
            b"",
            b"GET /hea",
            b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
        ]
        connections = [here.connect() for _ in beginnings]
        for connection, beginning in zip(connections, beginnings, strict=True):
            connection.sendall(beginning)
        for connection in connections:
            with suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass
            connection.close()
        soon(lambda: _healthy(here))


def test_response_may_exceed_request_timeout(served) -> None:
    with site(served, pause=0.2, wait_seconds=1) as here:
        answer = Client(here.url).post("/v1/completions", {"prompt": "b", "max_tokens": 8})
        assert answer["usage"]["completion_tokens"] == 8


def test_many_connections_are_survived(served) -> None:
    with site(served, connections=20, wait_seconds=0.3) as here:
        crowd = [here.connect() for _ in range(100)]
        with here.connect() as late:
            late.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            said = b""
            while more := late.recv(4096):
                said += more
            assert said.startswith(b"HTTP/1.1 503")
            error = json.loads(said.split(b"\r\n\r\n")[1])["error"]
            assert error["code"] == "too_many_connections" and "all 20" in error["message"]
        soon(lambda: _healthy(here))
        for connection in crowd:
            connection.close()


def _healthy(here: Site) -> bool:
    with suppress(ServerError):
        return Client(here.url).get("/health") == {"status": "ok"}
    return False


def test_endless_header_raises(served) -> None:
    with site(served) as here, here.connect() as connection:
        with suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 500_000)
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        assert _healthy(here)


def test_draining_finishes_running_requests(served) -> None:
    with site(served, pause=0.05) as here:
        client, told = Client(here.url), []
        asked = {"prompt": "a", "max_tokens": 30}
        thread = threading.Thread(
            target=lambda: told.extend(client.stream("/v1/completions", asked))
        )
        thread.start()
        soon(lambda: here.engine.stats().running == 1)
        here.service.draining = True
        with pytest.raises(ServerError, match="shutting down"):
            client.get("/health")
        with pytest.raises(ServerError, match="shutting down") as refused:
            client.post("/v1/completions", {"prompt": "b"})
        assert refused.value.code == "shutting_down"
        assert here.running.drain()
        thread.join()
        assert told[-1]["choices"][0]["finish_reason"] == "length"


def test_looping_templates_do_not_block_exit(served) -> None:
    again = "{% for i in range(99999) %}"
    served.tokenizer.chat_template = f"{again * 3}{'{% endfor %}' * 3}"
    heard: list[str | None] = []

    def ask(url: str) -> None:
        try:
            Client(url).post(
                "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}
            )
        except ServerError as error:
            heard.append(error.code)

    try:
        with site(served) as here:
            asks = [threading.Thread(target=ask, args=(here.url,)) for _ in range(3)]
            for one in asks:
                one.start()
            soon(lambda: here.running.connections == 3)
            time.sleep(0.5)
            began = time.monotonic()
            here.running.stop()
            for one in asks:
                one.join()
            assert time.monotonic() - began < 8.0
    finally:
        served.tokenizer.chat_template = None
    assert heard == ["shutting_down"] * 3


def test_draining_times_out(served) -> None:
    with (
        site(served, pause=0.1, drain_seconds=0.2) as here,
        here.ask(max_tokens=400) as connection,
    ):
        soon(lambda: here.engine.stats().running == 1)
        assert not here.running.drain()
        here.engine.close()
        assert b"503" in connection.recv(4096).split(b"\r\n")[0]


def test_unavailable_address_raises() -> None:
    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(ConfigError, match="in use"):
            bind("127.0.0.1", bound.getsockname()[1])
    for host in ("192.0.2.1", "no such host", ""):
        with suppress(ConfigError):  # an empty name is every address
            bind(host, 0).close()
    with pytest.raises(ConfigError, match="cannot listen"):
        bind("192.0.2.1", 0)


def test_remote_chat(served) -> None:
    with site(served) as here:
        partner = RemoteChat(Client(here.url + "/v1/"))
        assert (partner.name, partner.supports_chat) == ("reference", False)
        options = ChatOptions(max_tokens=5, temperature=0.0, seed=3)
        turns = [{"role": "user", "content": "import"}]
        whole = "".join(partner.generate(turns, options))
        answer = Client(here.url).post(
            "/v1/completions", {"prompt": "import", "max_tokens": 5, "seed": 3}
        )
        assert whole == answer["choices"][0]["text"]
        pieces = partner.generate(turns, ChatOptions(max_tokens=400, temperature=0.0))
        next(pieces)
        pieces.close()
        soon(lambda: len(here.engine.cancelled) == 1)


def test_missing_server_raises() -> None:
    with bind("127.0.0.1", 0) as bound, pytest.raises(ServerError, match="moefit serve"):
        Client(url_of(bound, "127.0.0.1")).get("/health")
    with pytest.raises(ConfigError, match="not a server address"):
        Client("localhost:8000")


def test_official_openai_client(served) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    with site(served, api_key="secret") as here:
        with openai.OpenAI(base_url=f"{here.url}/v1", api_key="secret", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["reference"]
            asked = {"model": "reference", "prompt": ["a", "b"], "max_tokens": 6, "n": 2}
            whole = client.completions.create(**asked, logprobs=2, echo=True)
            assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
            assert whole.choices[0].logprobs.token_logprobs[0] is None
            assert whole.usage.completion_tokens == 24
            texts = {0: "", 1: "", 2: "", 3: ""}
            usage = None
            for chunk in client.completions.create(
                **asked, echo=True, stream=True, stream_options={"include_usage": True}
            ):
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
            assert list(texts.values()) == [choice.text for choice in whole.choices]
            assert usage == whole.usage
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="other", prompt="a")
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                client.chat.completions.create(
                    model="reference", messages=[{"role": "user", "content": "x"}]
                )
            served.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
            try:
                hello = [{"role": "user", "content": "hello"}]
                chat = {"model": "reference", "messages": hello, "max_tokens": 6}
                said = client.chat.completions.create(**chat).choices[0].message.content
                pieces = client.chat.completions.create(**chat, stream=True)
                assert said == "".join(p.choices[0].delta.content or "" for p in pieces)
                given_back = {"role": "assistant", "content": None, "refusal": None}
                again = [{"role": "developer", "content": "x"}, *hello, given_back, *hello]
                client.chat.completions.create(**{**chat, "messages": again}, store=False)
                image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
                with pytest.raises(openai.BadRequestError, match="an image") as refused:
                    client.chat.completions.create(
                        model="reference", messages=[*hello, {"role": "user", "content": image}]
                    )
                assert refused.value.param == "messages[1].content[0]"
                short = {"model": "reference", "input": "x", "max_output_tokens": 4}
                answer = client.responses.create(**short)
                pieces = list(client.responses.create(**short, stream=True))
                said = [p.delta for p in pieces if p.type == "response.output_text.delta"]
                assert "".join(said) == answer.output_text
                assert pieces[-1].response.status == answer.status == "incomplete"
                with pytest.raises(openai.NotFoundError, match="without embeddings"):
                    client.embeddings.create(model="reference", input="x")
            finally:
                served.tokenizer.chat_template = None
        with (
            openai.OpenAI(base_url=f"{here.url}/v1", api_key="no", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.models.list()
