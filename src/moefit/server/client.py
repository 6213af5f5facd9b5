"""Asking a server: JSON there and back, and streams.

Owns the connection and what its errors say. Knows nothing of what is asked for, nor whether it is
our server or another with OpenAI's API.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from moefit.errors import ConfigError
from moefit.server.security import is_loopback


class ServerError(ConfigError):
    """The server did not do it, or there is none; `code` is its word for why."""

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code


class Client:
    """A server at `url`, such as http://127.0.0.1:8000; a /v1 at its end may be there or not.

    key: sent as a bearer token. timeout: seconds without a byte. Raises ConfigError for what is no
    address.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 300.0):
        if (host := _host(url)) is None:
            raise ConfigError(f"{url!r} is no address of a server, such as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key, self._timeout = key, timeout
        # A proxy, if one is configured, cannot reach this machine's own loopback.
        self._opener = build_opener(*([ProxyHandler({})] if is_loopback(host) else []))

    def get(self, path: str) -> Any:
        """What is there. Raises ServerError."""
        return self._read(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """What the server makes of it. Raises ServerError."""
        return self._read(path, body)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. Raises ServerError; closing it ends the answer."""
        with closing(self._open(path, {**body, "stream": True})) as response:
            try:
                yield from _events(response)
            except ValueError as error:
                raise ServerError(f"{self.url} sent an event that is not JSON: {error}") from error
            except (HTTPException, OSError) as error:
                raise ServerError(f"the connection to {self.url} broke: {error}") from error

    def _read(self, path: str, body: dict[str, Any] | None) -> Any:
        with closing(self._open(path, body)) as response:
            try:
                return json.load(response)
            except ValueError as error:
                raise ServerError(
                    f"{self.url}{path} answers, but not in JSON: it is another kind of server"
                ) from error
            except (HTTPException, OSError) as error:
                raise ServerError(f"the connection to {self.url} broke: {error}") from error

    def _open(self, path: str, body: dict[str, Any] | None) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data=data, headers=headers)
        try:
            return self._opener.open(request, timeout=self._timeout)
        except HTTPError as error:
            with closing(error):
                raise _said(self.url, error) from error
        except (URLError, HTTPException, OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            raise ServerError(
                f"no server answers at {self.url}: {why}; start one with `moefit serve`, or give "
                "--url"
            ) from error


def _host(url: str) -> str | None:
    """The host of a server's address; None if it is no such address."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is no number
        return None
    return parts.hostname if known else None


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        name, _, data = line.decode("utf-8").strip().partition(":")
        if name != "data":
            continue
        if data.strip() == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ServerError(event["error"]["message"], event["error"].get("code"))
        yield event


def _said(url: str, error: HTTPError) -> ServerError:
    try:
        said = json.loads(error.read())["error"]
        return ServerError(f"{url} says: {said['message']}", said.get("code"))
    except (ValueError, LookupError, TypeError, OSError):
        return ServerError(f"{url} answered {error.code} {error.reason}")
