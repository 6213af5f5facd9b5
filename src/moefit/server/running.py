"""Serving the application over HTTP until a signal says to stop.

Owns the socket, uvicorn's limits, and leaving politely: what runs is finished within a time,
a second signal ends at once. Knows nothing of endpoints.
"""

import asyncio
import resource
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from time import sleep

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from moefit.errors import ConfigError
from moefit.server.app import create_app
from moefit.server.service import Service

_HEAD_BYTES = 64 << 10
_LOOK_EVERY = 0.1
_ANSWERED = 128  # connections beyond the most, which hear why they are not served
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


class Timed(H11Protocol):
    """HTTP/1.1 that does not wait for ever for the rest of a request.

    uvicorn bounds idle connections but not slow requests, so that few clients could keep all
    connections. Here every `seconds` it is looked whether the same part of a request is still
    awaited as at the look before; a class attribute, since uvicorn makes the instances.
    """

    seconds: float
    most: int  # connections; the one above is answered 503, and others are not kept

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client is here."""
        super().connection_made(transport)
        if len(self.connections) > self.most + _ANSWERED:
            transport.close()
        self._timer = self.loop.call_later(self.seconds, self._look, self._awaited())

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _awaited(self) -> tuple[object, str] | None:
        """What of a request has not come yet, after which one; None while one is answered."""
        if self.cycle is None or self.cycle.response_complete:
            return self.cycle, "head"
        return (self.cycle, "body") if self.cycle.more_body else None

    def _look(self, before: tuple[object, str] | None) -> None:
        now = self._awaited()
        if now is not None and now == before:
            self.transport.close()
            return
        self._timer = self.loop.call_later(self.seconds, self._look, now)


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
        limit_concurrency=most,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_keep_alive=settings.idle_seconds,
        timeout_graceful_shutdown=5,
    )


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
        self._server.should_exit, self._server.force_exit = True, at_once
        self._thread.join(timeout=1 if at_once else 10)
        self._bound.close()
        self._service.close()

    def _run(self) -> None:
        with suppress(SystemExit):  # uvicorn's way of saying that it could not start
            self._server.run(sockets=[self._bound])
