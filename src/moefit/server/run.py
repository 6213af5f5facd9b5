"""Run the application over HTTP until a signal stops it.

Owns the socket, uvicorn's thread and draining at the end. `TimedConnection` closes connections of
clients that send or read too slowly.
"""

import asyncio
import fcntl
import os
import resource
import socket
import struct
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import sleep
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol

from moefit.errors import ConfigError
from moefit.server.app import create_app
from moefit.server.errors import APIError, error_response
from moefit.server.service import Service

_ANSWERED = 128  # connections beyond the most, which hear why they are not served
_PACE = 1024  # bytes a second that who is behind with reading must take
_CLOSED = 7  # TCP_CLOSE, the state of a connection whose other end has refused what was sent
_KNOCKS = 0.25  # seconds between two looks whether a client that sends no more still receives
_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
_PIECES = 16_384  # of a body, however small
_PIECE = 64  # bytes that pieces beyond these must have on average
_AT_ONCE = 256  # pieces until other connections have their turn
_UNWANTED = 8 << 20  # bytes that are still read of a body after its answer
_LINGER = 5.0  # seconds for which they are


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    """What was awaited at a time.

    awaited: what of a request has not come yet, after which one; None while one is answered.
    pauses, unsent: how often writing has had to stop, and, where it has stopped now or nothing
    more will be written, the bytes that the client has not taken yet.
    """

    awaited: tuple[object, str] | None
    pauses: int
    unsent: int


def _full(most: int) -> ASGIApp:
    """Answers on a connection that is one too many."""
    why = f"all {most:,} connections are taken; try again later"
    response = error_response(APIError(503, why, code="too_many_connections"))
    response.headers["Connection"] = "close"
    return response


class _Parser(h11.Connection):
    """Gives events until a turn is over, and refuses bodies of too many small pieces.

    Each piece, a chunk or what one packet brought, costs some 20 microseconds, whatever its size.
    """

    def __init__(self, most: int | None):
        super().__init__(h11.SERVER, most or HIGH_WATER_LIMIT)
        self.turn = self.chunks = self.size = 0
        self.too_many, self.last = False, None

    def next_event(self) -> Any:
        """Return the next event, or NEED_DATA where the turn is over."""
        if self.turn >= _AT_ONCE:
            return h11.NEED_DATA
        self.last = event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.size = 0
        elif isinstance(event, h11.Data):
            self.turn, self.chunks = self.turn + 1, self.chunks + 1
            self.size += len(event.data)
            if self.chunks > _PIECES + self.size // _PIECE:
                self.too_many = True
                raise h11.RemoteProtocolError("a body of too many small pieces")
        return event


class _Lingering:
    """A transport that, when it is closed, first reads what the client is still sending.

    Closing with bytes unread makes the system reset the connection, and the client may lose the
    answer that says why.
    """

    def __init__(self, transport: asyncio.Transport, protocol: "TimedConnection"):
        self._transport, self._protocol = transport, protocol
        self.left: int | None = None  # bytes to be read yet, once it lingers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return whether nothing can be sent any more."""
        return self.left is not None or self._transport.is_closing()

    def close(self) -> None:
        """Close, at once if the client has sent its request."""
        unsent = self._protocol.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if self.is_closing() or not unsent or not self._transport.can_write_eof():
            self._transport.close()
            return
        self.left = _UNWANTED
        self._transport.write_eof()
        self._transport.resume_reading()
        self._protocol.loop.call_later(_LINGER, self._transport.close)

    def unwanted(self, data: bytes) -> bool:
        """Return whether what has come is not to be read; closes after too much of it."""
        if self.left is None:
            return False
        self.left -= len(data)
        if self.left < 0:
            self._transport.close()
        return True


class TimedConnection(H11Protocol):
    """HTTP/1.1 between whose ends something must move.

    Every `seconds` it is looked whether the same part of a request is still awaited as at the look
    before: then the connection is closed. While a client does not read, writing stops as soon as
    the buffers are full; if it has then not taken `_PACE` bytes a second by the next look, the
    connection is cut, which cancels what is being answered. A body is read a turn at a time, and
    after an answer that did not wait for it only so much of it is read. Class attributes,
    since uvicorn makes the instances.
    """

    seconds: float
    most: int  # connections; some above are answered 503, and others are not kept

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client is here."""
        super().connection_made(transport)
        self.conn = _Parser(self.config.h11_max_incomplete_event_size)
        self._lingering = _Lingering(transport, self)
        self.transport = self._lingering  # pyright: ignore[reportAttributeAccessIssue]
        self._held = False
        if len(self.connections) > self.most:
            self.app = _full(self.most)
        if len(self.connections) > self.most + _ANSWERED:
            transport.close()
        self._pauses, self._sends_no_more = 0, False
        self._timer = self.loop.call_later(self.seconds, self._look, self._now())

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._timer.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return whether to keep the connection, for the client sends no more.

        It may have closed its sending half alone, and wait for its answer. One that is gone
        altogether looks the same until something is sent: so an interim response is, which clients
        of HTTP/1.1 pass over, and which the system of one that is gone refuses.
        """
        if self.cycle is None or self.cycle.response_complete or self.transport.is_closing():
            return False
        if self.cycle.more_body and not self._held:  # what is held may be the rest of the body
            return False
        self._sends_no_more = True
        if not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self.transport.write(_INTERIM)
        self.loop.call_later(_KNOCKS, self._knock)
        return True

    def _knock(self) -> None:
        """Cut the connection of a client that is gone altogether, which cancels its requests."""
        if self.transport.is_closing():
            return
        if _state(self.transport) == _CLOSED:
            self.transport.abort()
            return
        self.loop.call_later(_KNOCKS, self._knock)

    def data_received(self, data: bytes) -> None:
        """Something has come."""
        if not self._lingering.unwanted(data):
            super().data_received(data)

    def handle_events(self) -> None:
        """Handle what has come, a turn of it; the rest after other connections have had theirs."""
        if self.transport.is_closing():
            return
        self.conn.turn = 0
        super().handle_events()
        unwanted = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if unwanted and self.conn.size > _UNWANTED:
            self.transport.abort()
            return
        if self.conn.turn >= _AT_ONCE:
            self._held = True
            self.flow.pause_reading()
            self.loop.call_soon(self.handle_events)
        elif self._held:
            self._held = False
            full = self.cycle is not None and len(self.cycle.body) > HIGH_WATER_LIMIT
            if not full and self.conn.last is not h11.PAUSED:
                self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """A response has been sent."""
        super().on_response_complete()
        last = self._sends_no_more and (self.cycle is None or self.cycle.response_complete)
        if last and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or comes in too many pieces, unless an answer has begun."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        code = "invalid_http"
        if self.conn.too_many:
            code = "too_many_pieces"
            msg = (
                f"the body comes in too many small pieces: after {_PIECES:,} they must have "
                f"{_PIECE} bytes on average; send it in larger ones"
            )
        response = error_response(APIError(400, msg, code=code))
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # whoever waits for the rest of the body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        self._pauses += 1
        super().pause_writing()

    def _now(self) -> _Snapshot:
        held = self.flow.write_paused or self.transport.is_closing()
        ours = self.transport.get_write_buffer_size() if held else 0
        unsent = ours + _queued(self.transport) if ours else 0
        return _Snapshot(awaited=self._awaited(), pauses=self._pauses, unsent=unsent)

    def _awaited(self) -> tuple[object, str] | None:
        if self.cycle is None or self.cycle.response_complete:
            return self.cycle, "head"
        return (self.cycle, "body") if self.cycle.more_body else None

    def _look(self, before: _Snapshot) -> None:
        now = self._now()
        if _is_stuck(before, now, least=_PACE * self.seconds):
            self.transport.abort()  # to close would wait until all is read
            return
        if now.awaited is not None and now.awaited == before.awaited and not now.unsent:
            self.transport.close()
        self._timer = self.loop.call_later(self.seconds, self._look, now)


def _queued(transport: asyncio.Transport) -> int:
    """Bytes that the system has taken from us and the client's has not; 0 where it does not say.

    Without these a client would seem to read nothing until a third of them is gone: so long does
    the system take no more from us.
    """
    connection = transport.get_extra_info("socket")
    if connection is None or connection.fileno() < 0:
        return 0
    with suppress(OSError):
        return struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]
    return 0


def _state(transport: asyncio.Transport) -> int:
    """Return the state of a TCP connection; 0 where the system does not say."""
    connection = transport.get_extra_info("socket")
    if connection is None or connection.fileno() < 0:
        return 0
    with suppress(OSError):
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return 0


def _is_stuck(before: _Snapshot, now: _Snapshot, *, least: float) -> bool:
    """Whether the client has left unread all along what it should have read."""
    same = bool(before.unsent and now.unsent) and before.pauses == now.pauses
    return same and before.unsent - now.unsent < least


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
    protocol = type("Timed", (TimedConnection,), {"seconds": settings.wait_seconds, "most": most})
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


class HttpServer:
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
