"""Who may ask: the key, the host that was asked for, and the web page that asks.

Owns these decisions and the gate before the application that carries them out; also what every
answer says to browsers. Knows nothing of endpoints but which are open to all.
"""

import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moefit.server.refusal import Refused, answer
from moefit.server.settings import ServerSettings

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


def refusal_of(
    method: str, path: str, headers: Headers, settings: ServerSettings
) -> Refused | None:
    """Why a request is refused before anything of it is read, if it is."""
    host, origin = headers.get("host"), headers.get("origin")
    if not host_fits(settings.host, host):
        return Refused(
            403,
            f"this server listens on {settings.host} and is not the host that was asked for; ask "
            "for localhost, or start it with --host",
            code="wrong_host",
        )
    if method not in ("GET", "HEAD") and not origin_fits(origin, host, settings.origins):
        return Refused(
            403,
            "web pages of another origin may not ask this server; allow one with --cors-origin",
            code="wrong_origin",
        )
    key = settings.api_key
    if key is not None and not is_open(path) and not key_fits(key, headers.get("authorization")):
        return Refused(401, "give the server's key: Authorization: Bearer KEY", code="wrong_key")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > settings.body_bytes:
        return Refused(413, f"a body may have {settings.body_bytes:,} bytes", code="body_too_large")
    return None


class Gate:
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

        refused = refusal_of(scope["method"], scope["path"], Headers(scope=scope), self._settings)
        app = self._app if refused is None else answer(refused)
        await app(scope, receive, send_with_headers)
