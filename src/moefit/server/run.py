"""Run the application over HTTP until a signal stops it.

Opens the socket, runs uvicorn in a thread and drains requests at the end. `TimedConnection` closes
connections whose clients send or read too slowly.
"""

import asyncio
import fcntl
import logging
import os
import resource
import socket
import struct
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import sleep
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol

from moefit.errors import ConfigError
from moefit.server.app import create_app
from moefit.server.errors import APIError, error_response
from moefit.server.operation.handover import Leaving
from moefit.server.operation.request_id import RequestIdMiddleware, current_request, sane_id
from moefit.server.service import Service

_LOG = logging.getLogger(__name__)
_REJECTED_CONNECTIONS = 128  # excess connections that get a 503 response
_MIN_READ_RATE = 1024  # bytes per second that a slow client must read
_TCP_CLOSE = 7  # TCP state after the peer has reset the connection
_PROBE_SECONDS = 0.25  # seconds between checks of a half-closed connection
_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
_MAX_SMALL_PIECES = 16_384  # pieces per body without a minimum size
_MIN_PIECE_BYTES = 64  # average size of further pieces
_EVENTS_PER_TURN = 256  # events before other connections get their turn
_DISCARD_BYTES = 8 << 20  # bytes of a body read after its response
_LINGER_SECONDS = 5.0  # seconds to read them


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    """State of a connection at one time.

    Attributes:
        awaited: Part of a request that has not been received yet, and the request before it; None
            while a response is in progress.
        pauses: How often writing was paused.
        unsent: Bytes not yet received by the client, if writing is paused or the connection closes.
    """

    awaited: tuple[object, str] | None
    pauses: int
    unsent: int


def _reject_connection(most: int) -> ASGIApp:
    """Return an application that responds 503 on excess connections."""
    why = f"all {most:,} connections are in use; try again later"

    async def reject(scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(APIError(503, why, code="too_many_connections"))
        response.headers["Connection"] = "close"
        await response(scope, receive, send)

    return RequestIdMiddleware(reject)


class _Parser(h11.Connection):
    """h11 connection that limits events per turn and rejects bodies in too many small pieces.

    Each piece, a chunk or the content of one packet, takes some 20 microseconds regardless of size.
    """

    def __init__(self, most: int | None):
        super().__init__(h11.SERVER, most or HIGH_WATER_LIMIT)
        self.turn = self.chunks = self.size = 0
        self.too_many, self.last = False, None

    def next_event(self) -> Any:
        """Return the next event, or NEED_DATA at the end of a turn."""
        if self.turn >= _EVENTS_PER_TURN:
            return h11.NEED_DATA
        self.last = event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.size = 0
        elif isinstance(event, h11.Data):
            self.turn, self.chunks = self.turn + 1, self.chunks + 1
            self.size += len(event.data)
            if self.chunks > _MAX_SMALL_PIECES + self.size // _MIN_PIECE_BYTES:
                self.too_many = True
                raise h11.RemoteProtocolError("a body of too many small pieces")
        return event


class _LingeringTransport:
    """Transport that reads what the client is still sending before it closes.

    Closing a socket with unread bytes resets the connection, and the client may lose the response.
    """

    def __init__(self, transport: asyncio.Transport, protocol: "TimedConnection"):
        self._transport, self._protocol = transport, protocol
        self.left: int | None = None  # bytes still to be read while lingering

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return whether nothing can be sent any more."""
        return self.left is not None or self._transport.is_closing()

    def close(self) -> None:
        """Close, immediately if the client has sent its whole request."""
        unsent = self._protocol.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if self.is_closing() or not unsent or not self._transport.can_write_eof():
            self._transport.close()
            return
        self.left = _DISCARD_BYTES
        self._transport.write_eof()
        self._transport.resume_reading()
        self._protocol.loop.call_later(_LINGER_SECONDS, self._transport.close)

    def discard(self, data: bytes) -> bool:
        """Return whether to discard received data; close after too much of it."""
        if self.left is None:
            return False
        self.left -= len(data)
        if self.left < 0:
            self._transport.close()
        return True


class TimedConnection(H11Protocol):
    """HTTP/1.1 connection that is closed when it makes no progress.

    Progress is checked every `seconds`. The connection is closed if it still awaits the same part
    of a request, and aborted, cancelling its response, if the client reads less than
    `_MIN_READ_RATE` bytes per second while the buffers are full. Bodies are read one turn at a
    time; after an early response, only a limited part of the body is read. Settings are class
    attributes because uvicorn creates the instances.
    """

    seconds: float
    most: int  # connections; some excess ones get a 503, others are closed

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to serve a client."""
        super().connection_made(transport)
        self.conn = _Parser(self.config.h11_max_incomplete_event_size)
        self._lingering = _LingeringTransport(transport, self)
        self.transport = self._lingering  # pyright: ignore[reportAttributeAccessIssue]
        self._held = False
        if len(self.connections) > self.most:
            self.app = _reject_connection(self.most)
        if len(self.connections) > self.most + _REJECTED_CONNECTIONS:
            transport.close()
        self._pauses, self._sends_no_more = 0, False
        self._timer = self.loop.call_later(self.seconds, self._check_progress, self._snapshot())

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer when the client has disconnected."""
        self._timer.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return whether to keep the connection open although the client sends no more.

        The client may have closed only its sending half and still wait for the response. A client
        that has disconnected completely looks the same until data is sent, so send an interim
        response: HTTP/1.1 clients skip it, and a closed socket rejects it.
        """
        if self.cycle is None or self.cycle.response_complete or self.transport.is_closing():
            return False
        if self.cycle.more_body and not self._held:  # held events may end the body
            return False
        self._sends_no_more = True
        if not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self.transport.write(_INTERIM)
        self.loop.call_later(_PROBE_SECONDS, self._probe)
        return True

    def _probe(self) -> None:
        """Abort the connection of a disconnected client, which cancels its requests."""
        if self.transport.is_closing():
            return
        if _tcp_state(self.transport) == _TCP_CLOSE:
            self.transport.abort()
            return
        self.loop.call_later(_PROBE_SECONDS, self._probe)

    def data_received(self, data: bytes) -> None:
        """Parse received data, unless the connection is lingering."""
        if not self._lingering.discard(data):
            super().data_received(data)

    def handle_events(self) -> None:
        """Handle one turn of events; continue after other connections have had their turn."""
        if self.transport.is_closing():
            return
        self.conn.turn = 0
        super().handle_events()
        unwanted = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if unwanted and self.conn.size > _DISCARD_BYTES:
            self.transport.abort()
            return
        if self.conn.turn >= _EVENTS_PER_TURN:
            self._held = True
            self.flow.pause_reading()
            self.loop.call_soon(self.handle_events)
        elif self._held:
            self._held = False
            full = self.cycle is not None and len(self.cycle.body) > HIGH_WATER_LIMIT
            if not full and self.conn.last is not h11.PAUSED:
                self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Close after the response if the client sends no more."""
        super().on_response_complete()
        last = self._sends_no_more and (self.cycle is None or self.cycle.response_complete)
        if last and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Reject invalid HTTP, or a body in too many pieces, unless a response has begun."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        code = "invalid_http"
        if self.conn.too_many:
            code = "too_many_pieces"
            msg = (
                f"the body has too many small pieces: after {_MAX_SMALL_PIECES:,} they must "
                f"average {_MIN_PIECE_BYTES} bytes; send larger ones"
            )
        token = current_request.set(sane_id(None))  # nothing that the client sent can be trusted
        response = error_response(APIError(400, msg, code=code))
        _LOG.info("refused what is not valid HTTP: %s", msg)
        current_request.reset(token)
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # wake the endpoint that awaits the body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    @property
    def is_busy(self) -> bool:
        """Whether a request is being received or answered."""
        received = self.conn.their_state is not h11.IDLE or bool(self.conn.trailing_data[0])
        answered = self.cycle is None or self.cycle.response_complete
        return not answered or (received and not self.transport.is_closing())

    def pause_writing(self) -> None:
        """Count pauses caused by a client that reads slowly."""
        self._pauses += 1
        super().pause_writing()

    def _snapshot(self) -> _Snapshot:
        held = self.flow.write_paused or self.transport.is_closing()
        ours = self.transport.get_write_buffer_size() if held else 0
        unsent = ours + _kernel_send_queue(self.transport) if ours else 0
        return _Snapshot(awaited=self._awaited(), pauses=self._pauses, unsent=unsent)

    def _awaited(self) -> tuple[object, str] | None:
        if self.cycle is None or self.cycle.response_complete:
            return self.cycle, "head"
        return (self.cycle, "body") if self.cycle.more_body else None

    def _check_progress(self, before: _Snapshot) -> None:
        now = self._snapshot()
        if _is_stuck(before, now, min_bytes=_MIN_READ_RATE * self.seconds):
            self.transport.abort()  # close() would wait until everything is read
            return
        if now.awaited is not None and now.awaited == before.awaited and not now.unsent:
            self.transport.close()
        self._timer = self.loop.call_later(self.seconds, self._check_progress, now)


def _kernel_send_queue(transport: asyncio.Transport) -> int:
    """Return the bytes in the kernel's send queue; 0 if unknown.

    Without them, a client would seem to read nothing until a third of the queue is free, because
    the kernel accepts no more before that.
    """
    connection = transport.get_extra_info("socket")
    if connection is None or connection.fileno() < 0:
        return 0
    with suppress(OSError):
        return struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]
    return 0


def _tcp_state(transport: asyncio.Transport) -> int:
    """Return the state of a TCP connection; 0 if unknown."""
    connection = transport.get_extra_info("socket")
    if connection is None or connection.fileno() < 0:
        return 0
    with suppress(OSError):
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return 0


def _is_stuck(before: _Snapshot, now: _Snapshot, *, min_bytes: float) -> bool:
    """Return whether the client read less than `min_bytes` between two snapshots."""
    same = bool(before.unsent and now.unsent) and before.pauses == now.pauses
    return same and before.unsent - now.unsent < min_bytes


_MAX_HEAD_BYTES = 64 << 10
_POLL_SECONDS = 0.1
_IDLE_GRACE = 1.0  # seconds for which a leaving server keeps idle connections open
_RESERVED_FILES = 256  # files other than connections, such as a model's shards


def available_connections(wanted: int) -> int:
    """Return how many of `wanted` connections the file limit allows, raising the limit if possible.

    Without free file descriptors, no connection could be accepted and no expert read.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + _RESERVED_FILES:
        most = wanted + _RESERVED_FILES
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - _RESERVED_FILES))


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, not listening yet.

    Args:
        host: Host name or IP address.
        port: Port; 0 selects a free one.

    Raises:
        ConfigError: If the address is not available.
    """
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
            f"cannot listen on {host} port {port}: {why}; use another --port (0 selects a free "
            "one) or --host"
        ) from error
    return bound


def url_of(bound: socket.socket, host: str) -> str:
    """Return the URL of the server."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}"


def _config(service: Service) -> uvicorn.Config:
    settings = service.settings
    most = available_connections(settings.connections)
    protocol = type("Timed", (TimedConnection,), {"seconds": settings.wait_seconds, "most": most})
    return uvicorn.Config(
        create_app(service),
        http=protocol,
        ws="none",
        loop="asyncio",
        log_config=None,  # `--log-json` decides where lines go
        log_level="error",
        access_log=False,  # RequestIdMiddleware writes these lines, with more in them
        proxy_headers=False,
        server_header=False,
        lifespan="off",
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        timeout_keep_alive=settings.idle_seconds,
        timeout_graceful_shutdown=5,
    )


def exit_timer(seconds: float) -> threading.Timer:
    """Return a timer that exits the process, for when closing takes too long.

    A step that never ends, a read from a failed disk or a template in a loop blocks its thread;
    Python waits for threads and cannot stop them.
    """

    def give_up() -> None:
        _LOG.critical("not all work ended within %g s; exiting anyway", seconds)
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    return timer


class HttpServer:
    """HTTP server in its own thread, so that the main thread can handle signals.

    Args:
        service: What to serve.
        bound: Socket from `bind`, or an inherited one.
        inherited: Whether another server takes over the socket when this one leaves.
    """

    def __init__(self, service: Service, bound: socket.socket, *, inherited: bool = False):
        self._service, self._bound, self._inherited = service, bound, inherited
        self._server = uvicorn.Server(_config(service))
        self._thread = threading.Thread(target=self._run, name="moefit-http", daemon=True)

    def start(self) -> None:
        """Start the thread and return when clients can connect.

        Raises:
            ConfigError: If uvicorn cannot start.
        """
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            sleep(0.01)
        if not self._server.started:
            raise ConfigError("the server could not start; see its log")

    @property
    def alive(self) -> bool:
        """Whether the server is running."""
        return self._thread.is_alive()

    @property
    def connections(self) -> int:
        """Number of connected clients."""
        return len(self._server.server_state.connections)

    def drain(self) -> bool:
        """Answer what has been accepted, and return whether all of it ended in time.

        With a socket that the next server inherits, accept no more; otherwise answer 503.
        """
        service = self._service
        if not self._inherited:
            service.draining = True
            return service.engine.drain(service.settings.drain_seconds)
        service.leaving = True
        longest = service.settings.drain_seconds + _LINGER_SECONDS
        left = False
        with suppress(TimeoutError, RuntimeError):  # the event loop hangs or has ended
            loop = self._server.servers[0].get_loop()
            left = asyncio.run_coroutine_threadsafe(self._leave(), loop).result(longest)
        service.draining = True
        return left

    async def _leave(self) -> bool:
        """Stop accepting, and wait until nothing has been under way for a moment."""
        loop = asyncio.get_running_loop()
        # Not Server.close(), which loses connections that have been accepted but not begun.
        loop.remove_reader(self._bound.fileno())
        leaving = Leaving(loop.time(), _IDLE_GRACE)
        deadline = loop.time() + self._service.settings.drain_seconds
        while not leaving.may_end(self._busy(), loop.time()):
            if loop.time() >= deadline:
                return not self._busy()
            await asyncio.sleep(_POLL_SECONDS / 2)
        return True

    def _busy(self) -> bool:
        """Return whether a request is under way; call in the event loop."""
        found: set[Any] = self._server.server_state.connections
        return any(one.is_busy for one in found)

    def wait(self, stop: Callable[[], bool]) -> None:
        """Return when `stop` returns True or the server has ended."""
        while self.alive and not stop():
            sleep(_POLL_SECONDS)

    def stop(self, *, at_once: bool = False) -> None:
        """Close the connections and the service."""
        self._service.tokenizer.close()  # or templates being rendered would delay this
        self._server.should_exit, self._server.force_exit = True, at_once
        if self._thread.ident is not None:
            self._thread.join(timeout=1 if at_once else 10)
        self._bound.close()
        self._service.close()

    def _run(self) -> None:
        with suppress(SystemExit):  # raised by uvicorn if it cannot start
            self._server.run(sockets=[self._bound])
