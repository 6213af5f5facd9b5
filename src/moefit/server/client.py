"""Client of the HTTP API, made of the standard library alone.

`Client` sends JSON and reads server-sent events.
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
from moefit.host import is_loopback


class ServerError(ConfigError):
    """The server returned an error or is not reachable; `code` is the error's code, if any."""

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code


class Client:
    """Client of a server.

    Args:
        url: Address such as http://127.0.0.1:8000, with or without /v1.
        key: API key, sent as a bearer token.
        timeout: Seconds to wait for data.

    Raises:
        ConfigError: If `url` is not a valid address.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 300.0):
        if (host := _host(url)) is None:
            raise ConfigError(f"{url!r} is not a server address such as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key, self._timeout = key, timeout
        # A configured proxy cannot reach this machine's loopback interface.
        self._opener = build_opener(*([ProxyHandler({})] if is_loopback(host) else []))

    def get(self, path: str) -> Any:
        """Return the JSON at a path. Raises ServerError."""
        return self._read(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON and return the response. Raises ServerError."""
        return self._read(path, body)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a streamed response. Closing the iterator cancels the request.

        Raises:
            ServerError: If the server returns an error or the connection breaks.
        """
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
                    f"{self.url}{path} did not return JSON; is it an OpenAI-compatible server?"
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
                raise _error_message(self.url, error) from error
        except (URLError, HTTPException, OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            raise ServerError(
                f"no server responds at {self.url}: {why}; start one with `moefit serve`, or give "
                "--url"
            ) from error


def _host(url: str) -> str | None:
    """Return the host of a server's address; None if the address is invalid."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # an unclosed bracket, a port that is not a number
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


def _error_message(url: str, error: HTTPError) -> ServerError:
    try:
        body = json.loads(error.read())["error"]
        return ServerError(f"{url}: {body['message']}", body.get("code"))
    except (ValueError, LookupError, TypeError, OSError):
        return ServerError(f"{url} returned {error.code} {error.reason}")
