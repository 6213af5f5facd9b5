"""Serving the application over HTTP until a signal says to stop.

Owns the socket, uvicorn's limits, and leaving politely: what runs is finished within a time,
a second signal ends at once. Knows nothing of endpoints.
"""

import os
import resource
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from time import sleep

import uvicorn

from moefit.errors import ConfigError
from moefit.server.app import create_app
from moefit.server.connection import Timed
from moefit.server.service import Service

_HEAD_BYTES = 64 << 10
_LOOK_EVERY = 0.1
_OTHER_FILES = 256  # that are open beside connections, or may be: a model's shards


def connections_for(wanted: int) -> int:
    """As many connections as this process may have files for; its limit is raised if it can be.

    Without files none could be answered, and no expert read.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + _OTHER_FILES:
        most = wanted + _OTHER_FILES
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - _OTHER_FILES))


def bind(host: str, port: int) -> socket.socket:
    """A socket of ours on that address; nobody can connect yet. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen on {host} port {port}: {why}; give another --port (0 takes a free one) "
            "or --host"
        ) from error
    return bound


def url_of(bound: socket.socket, host: str) -> str:
    """Where people find the server."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}"


def _config(service: Service) -> uvicorn.Config:
    settings = service.settings
    most = connections_for(settings.connections)
    protocol = type("Timed", (Timed,), {"seconds": settings.wait_seconds, "most": most})
    return uvicorn.Config(
        create_app(service),
        http=protocol,
        ws="none",
        loop="asyncio",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        lifespan="off",
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_keep_alive=settings.idle_seconds,
        timeout_graceful_shutdown=5,
    )


class Deadline:
    """Ends the process by force if closing takes longer than it may.

    A step that never ends, a read from a dead disk or a template that loops keeps its thread, and
    the interpreter waits for threads; nobody can stop them from within.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._timer = threading.Timer(seconds, self._leave)
        self._timer.daemon = True

    def start(self) -> None:
        """Begin to count."""
        self._timer.start()

    def cancel(self) -> None:
        """Everything has been closed."""
        self._timer.cancel()

    def _leave(self) -> None:
        sys.stderr.write(f"not all work ended within {self.seconds:g} s; leaving it\n")
        sys.stderr.flush()
        os._exit(1)


class Running:
    """A server in a thread of its own, so that the main thread is free for signals."""

    def __init__(self, service: Service, bound: socket.socket):
        self._service, self._bound = service, bound
        self._server = uvicorn.Server(_config(service))
        self._thread = threading.Thread(target=self._run, name="moefit-http", daemon=True)

    def start(self) -> None:
        """Listen; returns when clients can connect. Raises ConfigError."""
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            sleep(0.01)
        if not self._server.started:
            raise ConfigError("the server could not start; its log says why")

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._server.server_state.connections)

    def wait(self, stop: Callable[[], bool]) -> None:
        """Return when `stop` says so, or the server has ended."""
        while self.alive and not stop():
            sleep(_LOOK_EVERY)

    def drain(self) -> bool:
        """Finish what runs, refusing what comes; whether all ended in time."""
        service = self._service
        service.draining = True
        return service.engine.drain(service.settings.drain_seconds)

    def stop(self, *, at_once: bool = False) -> None:
        """Close the connections and end."""
        self._service.words.close()  # else conversations being written would hold it up
        self._server.should_exit, self._server.force_exit = True, at_once
        if self._thread.ident is not None:
            self._thread.join(timeout=1 if at_once else 10)
        self._bound.close()
        self._service.close()

    def _run(self) -> None:
        with suppress(SystemExit):  # uvicorn's way of saying that it could not start
            self._server.run(sockets=[self._bound])
