"""A server that is replaced: the next one inherits the socket, and no request is lost."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving_http import fake_service

from moefit.errors import ConfigError
from moefit.server.operation.handover import Leaving, inherited_socket, notify_supervisor
from moefit.server.run import HttpServer, bind

ASKED = {"prompt": "import os", "ignore_eos": True, "max_tokens": 12}
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "moefit", "serve", *sys.argv[2:]])
"""


class Crowd:
    """Clients that ask without pause: on new connections, on kept ones, and for streams."""

    def __init__(self, port: int, **asked: Any):
        self.port, self.asked = port, {**ASKED, **asked}
        self.answers: dict[str, int] = {"new": 0, "kept": 0, "stream": 0}
        self.wrong: list[str] = []
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._go_on, args=(how,)) for how in self.answers]

    def __enter__(self) -> "Crowd":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(60)

    def more(self, least: int, seconds: float = 60) -> None:
        """Wait until each kind of client has had some more answers."""
        before, deadline = dict(self.answers), time.monotonic() + seconds
        while any(self.answers[how] < before[how] + least for how in before):
            assert time.monotonic() < deadline and not self.wrong, (self.answers, self.wrong)
            time.sleep(0.02)

    def _go_on(self, how: str) -> None:
        client = self._client()
        try:
            while not self._ends.is_set():
                if self._ask(client, how) or how != "kept":
                    client.close()
                    client = self._client()
        except Exception as error:  # noqa: BLE001 - any is a lost request
            self.wrong.append(f"{how}: {error!r}")
        finally:
            client.close()

    def _client(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def _ask(self, client: http.client.HTTPConnection, how: str) -> bool:
        body = json.dumps(self.asked | {"stream": how == "stream"})
        client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = client.getresponse()
        said = response.read()
        whole = said.endswith(b"data: [DONE]\n\n") if how == "stream" else b'"length"' in said
        assert response.status == 200 and whole and b'"error"' not in said, said
        self.answers[how] += 1
        return response.headers.get("connection") == "close"


@contextmanager
def listening() -> Iterator[socket.socket]:
    with bind("127.0.0.1", 0) as bound:
        bound.listen(100)
        yield bound


def test_no_request_is_lost_between_two_servers(served) -> None:
    with listening() as bound, fake_service(served, pause=0.005) as (first, engine):
        leaving = HttpServer(first, bound.dup(), inherited=True)
        leaving.start()
        with Crowd(bound.getsockname()[1]) as crowd:
            crowd.more(5)
            assert leaving.drain(), "all has been answered"
            leaving.stop()
            assert engine.stats().running == 0 and not engine.cancelled
            before = dict(crowd.answers)
            time.sleep(0.2)  # nobody accepts: requests wait in the socket
            assert crowd.answers == before
            with fake_service(served, pause=0.005) as (second, _):
                next_one = HttpServer(second, bound.dup(), inherited=True)
                next_one.start()
                crowd.more(5)
                crowd.__exit__()
                next_one.stop()
        assert not crowd.wrong


def test_leaving_is_bounded(served) -> None:
    with (
        listening() as bound,
        fake_service(served, pause=0.05, drain_seconds=0.3) as (service, engine),
    ):
        running = HttpServer(service, bound.dup(), inherited=True)
        running.start()
        with Crowd(bound.getsockname()[1], max_tokens=500) as crowd:
            while engine.stats().running < 3:
                time.sleep(0.01)
            began = time.monotonic()
            assert not running.drain()
            assert time.monotonic() - began < 5
            engine.close()
            running.stop()
            crowd._ends.set()
        assert len(crowd.wrong) == 3


def test_own_socket_still_answers_503_while_draining(served) -> None:
    with bind("127.0.0.1", 0) as bound, fake_service(served) as (service, _):
        running = HttpServer(service, bound)
        running.start()
        assert running.drain()
        client = http.client.HTTPConnection(*bound.getsockname(), timeout=20)
        client.request("GET", "/health")
        assert client.getresponse().status == 503
        client.close()
        running.stop()


def test_idle_time_decides_when_to_end() -> None:
    leaving = Leaving(0.0, 1.0)
    assert not leaving.may_end(False, 0.9)
    assert not leaving.may_end(True, 0.95)
    assert not leaving.may_end(False, 1.9)
    assert leaving.may_end(False, 1.95)


CHECK = """
import os, sys
from moefit.errors import ConfigError
from moefit.server.operation.handover import inherited_socket
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS=sys.argv[2], LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="http")
try:
    found = inherited_socket(os.environ)
    print(found.getsockname()[1] if found else None, [n for n in os.environ if "LISTEN" in n])
except ConfigError as error:
    print(error)
"""


def test_sockets_that_are_inherited_or_refused(tmp_path: Path) -> None:
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "s"))
    unix.listen()
    with listening() as tcp, bind("127.0.0.1", 0) as silent, open(os.devnull) as file:
        port = tcp.getsockname()[1]
        for given, number, words in (
            (tcp, "1", f"{port} []"),
            (tcp, "0", "None []"),
            (tcp, "2", "leave one ListenStream="),
            (tcp, "many", "leave one ListenStream="),
            (unix, "1", "not TCP but AF_UNIX"),
            (silent, "1", "does not listen"),
            (file, "1", "descriptor 3 is no socket"),
        ):
            command = [sys.executable, "-c", CHECK, str(given.fileno()), number]
            made = subprocess.run(
                command, capture_output=True, text=True, pass_fds=(given.fileno(),), timeout=60
            )
            assert words in made.stdout, (made.stdout, made.stderr)
    unix.close()


def test_sockets_of_others_are_left_alone() -> None:
    environ = {"LISTEN_FDS": "1", "LISTEN_PID": "1", "HOME": "/"}
    assert inherited_socket(environ) is None and environ == {"HOME": "/"}
    with pytest.raises(ConfigError):
        inherited_socket({"LISTEN_FDS": "-1", "LISTEN_PID": str(os.getpid())})


@pytest.mark.parametrize("abstract", [False, True])
def test_supervisor_is_told(tmp_path: Path, abstract: bool) -> None:
    path = f"@moefit-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(path.replace("@", "\0"))
        notify_supervisor({"NOTIFY_SOCKET": path}, "READY=1")
        assert supervisor.recv(100) == b"READY=1"
    notify_supervisor({"NOTIFY_SOCKET": path}, "READY=1")  # gone: nobody to tell
    notify_supervisor({}, "READY=1")


@contextmanager
def process(bound: socket.socket, notify: Path) -> Iterator[subprocess.Popen[str]]:
    """A server of the shipped model on an inherited socket, once it is ready."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(notify))
        supervisor.settimeout(120)
        number = str(bound.fileno())
        made = subprocess.Popen(
            [sys.executable, "-c", START, number, "reference", "--memory", "4GiB"],
            pass_fds=(bound.fileno(),),
            env={**os.environ, "NOTIFY_SOCKET": str(notify)},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert supervisor.recv(100) == b"READY=1"
            yield made
        finally:
            made.kill()
            made.communicate()


@pytest.mark.slow
def test_restart_of_the_shipped_model_loses_nothing(tmp_path: Path) -> None:
    with listening() as bound, process(bound, tmp_path / "first") as first:
        with Crowd(bound.getsockname()[1]) as crowd:
            crowd.more(3)
            first.send_signal(signal.SIGTERM)
            with process(bound, tmp_path / "second") as second:
                assert first.wait(60) == 0
                said = first.stderr.read() if first.stderr else ""
                assert "a socket that the next server takes over" in said
                assert "cancelling" not in said
                crowd.more(3)
                crowd.__exit__()
                second.send_signal(signal.SIGTERM)
                assert second.wait(60) == 0
        assert not crowd.wrong, crowd.wrong
