"""Ids of HTTP requests, and a log line for each.

`RequestIdMiddleware` takes the id from the client's `x-request-id` header or makes one. The id is
in the response's header, in the body of an error and, by a context variable, in every log line that
is written while the request is handled.
"""

import logging
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic
from typing import Any
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
MAX_ID_CHARACTERS = 128
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that disconnected
_SANE = re.compile(rf"[A-Za-z0-9._:=@/+-]{{1,{MAX_ID_CHARACTERS}}}")
_LOG = logging.getLogger("moefit.access")
_POLLED = ("/health", "/metrics", "/v1/memory", "/v1/requests")
_SCOPE_NAME = "moefit.client"
_MAX_PATH = 200
_MAX_METHOD = 32

current_request: ContextVar[str | None] = ContextVar("moefit_request_id", default=None)
"""Id of the HTTP request that is being handled; None outside of requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Who sent a request.

    Attributes:
        key: Name of the key that was sent; None on a server without keys.
        operator: Whether this client may change the budget, and see and cancel all requests.
    """

    key: str | None = None
    operator: bool = True


def set_client(scope: Scope, client: Client) -> None:
    """Note who sent a request, for what handles it."""
    scope[_SCOPE_NAME] = client


def client_of(scope: Scope) -> Client:
    """Return who sent a request; one without a key if nothing was noted."""
    return scope.get(_SCOPE_NAME) or Client()


def sane_id(given: str | None) -> str:
    """Return a client's id if it is short and of safe characters, else a new one.

    >>> sane_id("order-17")
    'order-17'
    >>> sane_id("x" * 200)[:4], sane_id("a b")[:4], sane_id(None)[:4]
    ('req-', 'req-', 'req-')
    """
    if given is not None and _SANE.fullmatch(given):
        return given
    return f"req-{uuid4().hex}"


def log_fields(**fields: Any) -> dict[str, Any]:
    """Return `extra` of a log call: fields that a JSON line has besides its message.

    `request_id` names the request that a line concerns where no HTTP request is being handled, as
    in the engine's thread.
    """
    return {"fields": fields}


class RequestIdMiddleware:
    """Give each request an id, and log it when it has been answered.

    Args:
        app: Application to wrap.
        failed: Called with what was asked and its id if the server has failed on it.
    """

    def __init__(self, app: ASGIApp, failed: Callable[[str, str], None] | None = None):
        self._app, self._failed = app, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(HEADER.encode())
        name = sane_id(None if given is None else given.decode("latin-1"))
        current_request.set(name)  # not reset: what handles errors outside still needs it
        began, status = monotonic(), CLIENT_CLOSED_REQUEST

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            status = 500
            raise
        finally:
            _log_access(scope, status, monotonic() - began)
            method, path = scope["method"][:_MAX_METHOD], scope["path"][:_MAX_PATH]
            if self._failed is not None and status >= 500 and path not in _POLLED:
                self._failed(f"{method} {path}: {status}", name)


def _log_access(scope: Scope, status: int, seconds: float) -> None:
    """Log an answered request, unless it is one of those that are sent every few seconds."""
    method, path = scope["method"][:_MAX_METHOD], scope["path"][:_MAX_PATH]
    polled = method == "GET" and path in _POLLED and status < 400
    level = logging.DEBUG if polled else logging.INFO
    if not _LOG.isEnabledFor(level):
        return
    peer = scope.get("client")
    fields: Mapping[str, Any] = {
        "method": method,
        "path": path,
        "status": status,
        "seconds": round(seconds, 4),
        "peer": None if peer is None else f"{peer[0]}:{peer[1]}",
        "key": client_of(scope).key,
    }
    _LOG.log(level, "%s %s %d", method, path, status, extra=log_fields(**fields))
