"""Server settings, and ASGI middleware for access and body limits.

Checks host, origin and API key before reading a body, and bounds the total size of request bodies
in memory.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moefit.host import is_loopback
from moefit.server.errors import APIError, error_response
from moefit.server.operation.keys import Keys, check_key, read_keys
from moefit.server.operation.request_id import Client, set_client
from moefit.server.tools.dialect import dialect_of


class BodyBudget:
    """Bytes of request bodies in memory, at most `most`."""

    def __init__(self, most: int):
        self.most, self.held = most, 0

    def reserve(self, size: int) -> bool:
        """Reserve bytes; return False if they exceed the limit."""
        if self.held + size > self.most:
            return False
        self.held += size
        return True

    def release(self, size: int) -> None:
        """Release reserved bytes."""
        self.held -= size
        self.check()

    def check(self) -> None:
        """Raise AssertionError if the count is out of range."""
        assert 0 <= self.held <= self.most, (self.held, self.most)


class BodyLimitMiddleware:
    """Count the bytes of a body as they are received, until its request has been answered.

    Content-Length is not trusted for this, so that announcing a large body reserves nothing. A body
    that exceeds a limit is rejected and its bytes released.

    Args:
        app: Application to wrap.
        bodies: Budget of all request bodies.
        max_body_size: Size of one body at most, in bytes.
    """

    def __init__(self, app: ASGIApp, bodies: BodyBudget, max_body_size: int):
        self._app, self._bodies, self._max_body_size = app, bodies, max_body_size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        held = 0

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            if held + size > self._max_body_size:
                raise _too_large(self._max_body_size)
            if not self._bodies.reserve(size):
                raise APIError(
                    429,
                    f"the bodies of all running requests exceed {self._bodies.most:,} bytes with "
                    "this one; try again later",
                    code="too_many_bodies",
                )
            held += size
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._bodies.release(held)


def _too_large(limit: int) -> APIError:
    return APIError(413, f"the body exceeds {limit:,} bytes", code="body_too_large")


MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP server.

    Attributes:
        name: Model name in requests and responses.
        host: Address to listen on.
        port: Port to listen on; 0 selects a free one.
        api_key: Key that clients must send, if any.
        keys_file: File with further keys, if any.
        origins: Origins of other web pages that may send requests.
        answers: Choices per request at most: n times the number of prompts.
        logprobs: Log-probabilities per request at most; each takes some 150 bytes until it is sent.
        chat_tokens: Default max_tokens of chat completions.
        tool_parser: Form of tool calls: "auto" (by the chat template), "none" or a name.
        reasoning_parser: Markers of reasoning: "auto", "none" or a name.
        body_bytes: Size of one request body at most.
        bodies_bytes: Size of all bodies of unfinished requests at most.
        connections: Simultaneous connections at most.
        wait_seconds: Time to wait for the head or body of a request, or for a client that does not
            read; up to twice as long for the latter.
        idle_seconds: How long to keep a connection between requests.
        drain_seconds: How long to wait for running requests at shutdown.
        traces_endpoint: URL to which OpenTelemetry traces are sent, if any.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    keys_file: Path | None = None
    origins: tuple[str, ...] = ()
    answers: int = 128
    logprobs: int = 1 << 19
    chat_tokens: int = 512
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    body_bytes: int = 4 * MIB
    bodies_bytes: int = 32 * MIB
    connections: int = 1024
    wait_seconds: float = 30.0
    idle_seconds: int = 30
    drain_seconds: float = 30.0
    traces_endpoint: str | None = None

    def check(self) -> None:
        """Raise ConfigError for an API key that cannot be sent, or an unknown parser."""
        dialect_of(None, "", self.tool_parser, self.reasoning_parser)
        if self.api_key is not None:
            check_key(self.api_key, "the key (--api-key, MOEFIT_API_KEY)")
        if self.keys_file is not None:
            read_keys(self.keys_file)

    @property
    def keyed(self) -> bool:
        """Whether clients must send a key."""
        return self.api_key is not None or self.keys_file is not None


_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_public(path: str) -> bool:
    """Return whether a path needs no key: the page, which contains no secrets, and /health."""
    return path in ("/", "/health") or path.startswith("/page/")


def cache_salt(settings: ServerSettings, headers: Headers, given: str | None) -> str:
    """Return what requests must share to reuse each other's keys and values.

    Args:
        settings: If they have keys, clients with different keys share nothing.
        headers: Of the request.
        given: Its `cache_salt`, if any.
    """
    key = headers.get("authorization", "") if settings.keyed else ""
    if not key and given is None:
        return ""
    return hashlib.sha256(repr((key.partition(" ")[2].strip(), given)).encode()).hexdigest()


def host_name(header: str | None) -> str:
    """Return the name in a Host header, without its port.

    >>> host_name("[::1]:8000"), host_name("localhost:8000")
    ('::1', 'localhost')
    """
    try:
        return urlsplit(f"//{header or ''}").hostname or ""
    except ValueError:
        return ""


def is_allowed_host(bound: str, header: str | None) -> bool:
    """Return whether the Host header is acceptable.

    A server bound to loopback rejects names that a web page has pointed to it (DNS rebinding).
    """
    if not is_loopback(bound):
        return True
    return host_name(header) in {*_LOCAL_NAMES, bound.strip("[]").lower()}


def is_allowed_origin(origin: str | None, host: str | None, allowed: Collection[str]) -> bool:
    """Return whether the Origin header is absent, the server's own or in `allowed`.

    >>> is_allowed_origin("http://localhost:8000", "localhost:8000", ())
    True
    >>> is_allowed_origin("https://example.org", "localhost:8000", ())
    False
    """
    if origin is None or origin in allowed or "*" in allowed:
        return True
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == (host or "").lower()
    except ValueError:
        return False


def check_request(
    method: str, path: str, headers: Headers, settings: ServerSettings, client: Client | None
) -> APIError | None:
    """Return the error for a request that must be rejected before its body is read, or None.

    Args:
        method: Its method.
        path: Its path.
        headers: Its headers.
        settings: The server's.
        client: Who sent it; None without a valid key.
    """
    host, origin = headers.get("host"), headers.get("origin")
    if not is_allowed_host(settings.host, host):
        return APIError(
            403,
            f"this server listens on {settings.host} and does not serve the requested host; use "
            "localhost, or start it with --host",
            code="wrong_host",
        )
    if method not in ("GET", "HEAD") and not is_allowed_origin(origin, host, settings.origins):
        return APIError(
            403,
            "web pages of other origins may not use this server; allow one with --cors-origin",
            code="wrong_origin",
        )
    if client is None and not is_public(path):
        return APIError(
            401, "send the server's API key: Authorization: Bearer KEY", code="wrong_key"
        )
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > settings.body_bytes:
        return _too_large(settings.body_bytes)
    return None


class AccessMiddleware:
    """Reject requests that `check_request` does not allow, and add security headers.

    Args:
        app: Application to wrap.
        settings: The server's.
        keys: Keys in force.
        leaving: Whether another server takes over, so that connections are closed.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, keys: Keys, leaving: Callable[[], bool]
    ):
        self._app, self._settings, self._keys = app, settings, keys
        self._leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if self._leaving():  # the client's next request shall reach the next server
                    headers["Connection"] = "close"
            await send(message)

        headers = Headers(scope=scope)
        client = self._keys.client(headers.get("authorization"))
        set_client(scope, client or Client(operator=False))
        refused = check_request(scope["method"], scope["path"], headers, self._settings, client)
        app = self._app if refused is None else error_response(refused)
        await app(scope, receive, send_with_headers)
