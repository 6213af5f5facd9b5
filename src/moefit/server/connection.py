"""One client's connection, which waits for nobody for ever.

Owns how long a request may take to come, and an answer to be taken, on top of what uvicorn bounds
itself: idle connections. Knows nothing of what is asked.
"""

import asyncio
import fcntl
import socket
import struct
import termios
from contextlib import suppress
from dataclasses import dataclass

from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from moefit.server.refusal import Refused, answer

_ANSWERED = 128  # connections beyond the most, which hear why they are not served
_PACE = 1024  # bytes a second that who is behind with reading must take
_CLOSED = 7  # TCP_CLOSE, the state of a connection whose other end has refused what was sent
_KNOCKS = 0.25  # seconds between two looks whether a client that sends no more still receives
_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
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
    response = answer(Refused(503, why, code="too_many_connections"))
    response.headers["Connection"] = "close"
    return response


class Timed(H11Protocol):
    """HTTP/1.1 between whose ends something must move.

    Every `seconds` it is looked whether the same part of a request is still awaited as at the look
    before: then the connection is closed. While a client does not read, writing stops as soon as
    the buffers are full; if it has then not taken `_PACE` bytes a second by the next look, the
    connection is cut, which cancels what is being answered. Class attributes, since uvicorn makes
    the instances.
    """

    seconds: float
    most: int  # connections; some above are answered 503, and others are not kept

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client is here."""
        super().connection_made(transport)
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
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return False
        self._sends_no_more = True
        if not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self.transport.write(_INTERIM)
        self.loop.call_later(_KNOCKS, self._knock)
        return True

    def on_response_complete(self) -> None:
        """A response has been sent."""
        super().on_response_complete()
        if self._sends_no_more and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def _knock(self) -> None:
        """Cut the connection of a client that is gone altogether, which cancels its requests."""
        if self.transport.is_closing():
            return
        if _state(self.transport) == _CLOSED:
            self.transport.abort()
            return
        self.loop.call_later(_KNOCKS, self._knock)

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        self._pauses += 1
        super().pause_writing()

    def _now(self) -> _Look:
        held = self.flow.write_paused or self.transport.is_closing()
        ours = self.transport.get_write_buffer_size() if held else 0
        unsent = ours + _queued(self.transport) if ours else 0
        return _Look(awaited=self._awaited(), pauses=self._pauses, unsent=unsent)

    def _awaited(self) -> tuple[object, str] | None:
        if self.cycle is None or self.cycle.response_complete:
            return self.cycle, "head"
        return (self.cycle, "body") if self.cycle.more_body else None

    def _look(self, before: _Look) -> None:
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


def _is_stuck(before: _Look, now: _Look, *, least: float) -> bool:
    """Whether the client has left unread all along what it should have read."""
    same = bool(before.unsent and now.unsent) and before.pauses == now.pauses
    return same and before.unsent - now.unsent < least
