"""ASGI middleware and its settings: who may send requests, and how large bodies may be.

Checks host, origin and API key before anything is read, and bounds the bytes of all request bodies
that are held at a time.
"""

import hmac
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moefit.errors import ConfigError
from moefit.server.errors import APIError, error_response


class BodyBudget:
    """Bytes held, at most `most`."""

    def __init__(self, most: int):
        self.most, self.held = most, 0

    def take(self, size: int) -> bool:
        """Hold so many more, unless they are too many."""
        if self.held + size > self.most:
            return False
        self.held += size
        return True

    def give_back(self, size: int) -> None:
        """They are held no more."""
        self.held -= size
        self.check()

    def check(self) -> None:
        """Raise AssertionError if the count can't be."""
        assert 0 <= self.held <= self.most, (self.held, self.most)


class BodyLimitMiddleware:
    """Counts a body as it comes, not by what its head says, until its request is answered.

    One that would be too much, alone or with all others, is refused, and what there is of it given
    back: who only says that much will come takes nobody's place.

    Args:
        app: What answers requests.
        bodies: Counts the bodies of all requests.
        largest: Bytes that one body may have.
    """

    def __init__(self, app: ASGIApp, bodies: BodyBudget, largest: int):
        self._app, self._bodies, self._largest = app, bodies, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As every ASGI application."""
        held = 0

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            if held + size > self._largest:
                raise _too_large(self._largest)
            if not self._bodies.take(size):
                raise _too_many(self._bodies.most)
            held += size
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._bodies.give_back(held)


def _too_large(largest: int) -> APIError:
    return APIError(413, f"a body may have {largest:,} bytes", code="body_too_large")


def _too_many(most: int) -> APIError:
    return APIError(
        429,
        f"the bodies of all requests that are being answered may have {most:,} bytes together, and "
        "with this one they have more; try again later",
        code="too_many_bodies",
    )


MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What `moefit serve` takes beside the model's and the engine's settings.

    name: the model's name in requests and answers. origins: web pages of other origins that may
    ask. answers: the most that one request may ask for, n times its prompts; logprobs: likewise of
    log-probabilities, each of which takes some 150 bytes until it is sent. chat_tokens: the most
    tokens of a chat answer whose request does not say. body_bytes: of one body; bodies_bytes: of
    all together whose requests are not answered yet. connections: the most at a time.
    wait_seconds: how long the head or the body of a request is waited for, and for a client that
    does not read its answer, up to twice that.
    idle_seconds: how long a connection is kept between requests.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    answers: int = 128
    logprobs: int = 1 << 19
    chat_tokens: int = 512
    body_bytes: int = 4 * MIB
    bodies_bytes: int = 32 * MIB
    connections: int = 1024
    wait_seconds: float = 30.0
    idle_seconds: int = 30
    drain_seconds: float = 30.0

    def check(self) -> None:
        """Raise ConfigError for a key that is none, or that headers do not carry alike."""
        key = self.api_key
        if key == "":
            raise ConfigError(
                "the key (--api-key) is empty, and everybody would be let in; give one, such as "
                "what `openssl rand -hex 16` prints, or leave the option out"
            )
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(
                "the key (--api-key, MOEFIT_API_KEY) has spaces, control characters or letters "
                "beyond ASCII, which clients send in different ways; give another, such as what "
                "`openssl rand -hex 16` prints"
            )


_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_open(path: str) -> bool:
    """Whether a path needs no key: the page, which has no secrets, and whether we are well."""
    return path in ("/", "/health") or path.startswith("/page/")


def key_fits(key: str, authorization: str | None) -> bool:
    """Whether the header carries this key; takes as long for a wrong one, however wrong."""
    scheme, _, given = (authorization or "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), key.encode())
    return scheme.lower() == "bearer" and same


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_name(header: str | None) -> str:
    """The name in a Host header, without its port.

    >>> host_name("[::1]:8000"), host_name("localhost:8000")
    ('::1', 'localhost')
    """
    try:
        return urlsplit(f"//{header or ''}").hostname or ""
    except ValueError:
        return ""


def host_fits(bound: str, header: str | None) -> bool:
    """Whether a request for that host is for us.

    Bound to loopback, names that a web page made to point here (DNS rebinding) are refused.
    """
    if not is_loopback(bound):
        return True
    return host_name(header) in {*_LOCAL_NAMES, bound.strip("[]").lower()}


def origin_fits(origin: str | None, host: str | None, allowed: Collection[str]) -> bool:
    """Whether the web page that asks, if one does, is ours or one that may.

    >>> origin_fits("http://localhost:8000", "localhost:8000", ())
    True
    >>> origin_fits("https://example.org", "localhost:8000", ())
    False
    """
    if origin is None or origin in allowed or "*" in allowed:
        return True
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == (host or "").lower()
    except ValueError:
        return False


def check_request(
    method: str, path: str, headers: Headers, settings: ServerSettings
) -> APIError | None:
    """Why a request is refused before anything of it is read, if it is."""
    host, origin = headers.get("host"), headers.get("origin")
    if not host_fits(settings.host, host):
        return APIError(
            403,
            f"this server listens on {settings.host} and is not the host that was asked for; ask "
            "for localhost, or start it with --host",
            code="wrong_host",
        )
    if method not in ("GET", "HEAD") and not origin_fits(origin, host, settings.origins):
        return APIError(
            403,
            "web pages of another origin may not ask this server; allow one with --cors-origin",
            code="wrong_origin",
        )
    key = settings.api_key
    if key is not None and not is_open(path) and not key_fits(key, headers.get("authorization")):
        return APIError(401, "give the server's key: Authorization: Bearer KEY", code="wrong_key")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > settings.body_bytes:
        return _too_large(settings.body_bytes)
    return None


class AccessMiddleware:
    """Stands before the application; lets through what may be asked."""

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As every ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = check_request(
            scope["method"], scope["path"], Headers(scope=scope), self._settings
        )
        app = self._app if refused is None else error_response(refused)
        await app(scope, receive, send_with_headers)
