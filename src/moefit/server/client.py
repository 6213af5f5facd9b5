"""Client of the HTTP API, and a common interface to chat with a server or a local model.

`Client` sends JSON and reads server-sent events with the standard library. `RemoteChat` and
`LocalChat` implement `ChatBackend` for `moefit chat`.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPResponse
from queue import SimpleQueue
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from moefit.engine.api import Event, FinishedEvent, PromptEvent, SamplingParams
from moefit.engine.engine import Engine
from moefit.errors import ConfigError
from moefit.serve.hf.generation_config import GenerationDefaults
from moefit.server.middleware import is_loopback
from moefit.server.tokenizer import RequestTokenizer


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


ChatTurn = dict[str, str]
TEMPERATURE = 0.7  # for local models without a default


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Options of a response; None leaves the choice to the backend. See `SamplingParams`."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


class ChatBackend(Protocol):
    """A model to chat with. `supports_chat`: it has a chat template; if not, it continues text."""

    name: str
    supports_chat: bool

    def generate(
        self, turns: Sequence[ChatTurn], options: ChatOptions
    ) -> Generator[str, None, None]:
        """Yield the text of the next message, or the continuation of the last message.

        Closing the iterator cancels the request.
        """
        ...


class RemoteChat:
    """Chat with a server that has OpenAI's API.

    moefit's servers report whether the model supports chat; other servers are assumed to.

    Raises:
        ServerError: If the server does not respond.
        ConfigError: If it serves no model.
    """

    def __init__(self, client: Client):
        self._client = client
        models = client.get("/v1/models")["data"]
        if not models:
            raise ConfigError(f"{client.url} serves no model")
        self.name, self.supports_chat = models[0]["id"], models[0].get("chat", True)

    def generate(
        self, turns: Sequence[ChatTurn], options: ChatOptions
    ) -> Generator[str, None, None]:
        """Yield the text of the next message; see `ChatBackend`."""
        given = {name: value for name, value in asdict(options).items() if value is not None}
        body: dict[str, Any] = {"model": self.name, **given}
        if self.supports_chat:
            body["messages"] = list(turns)
            for event in self._client.stream("/v1/chat/completions", body):
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
            return
        body["prompt"] = turns[-1]["content"]
        for event in self._client.stream("/v1/completions", body):
            for choice in event["choices"]:
                yield choice["text"]


class LocalChat:
    """Chat with a model in this process."""

    def __init__(self, name: str, engine: Engine):
        self.name, self._engine = name, engine
        text = engine.served.model.config.get_text_config(decoder=True)
        self._tokenizer = RequestTokenizer(
            engine.served.tokenizer, size=text.vocab_size, max_tokens=engine.max_model_len
        )
        self.supports_chat = self._tokenizer.has_template

    def generate(
        self, turns: Sequence[ChatTurn], options: ChatOptions
    ) -> Generator[str, None, None]:
        """Yield the text of the next message; see `ChatBackend`.

        Raises:
            RequestTooLargeError: If the conversation is too long.
            ConfigError: If the request is invalid or the model fails.
        """
        events: SimpleQueue[Event] = SimpleQueue()
        sampling = to_sampling_params(options, self._engine.served.generation)
        request = self._engine.submit(self._ids(turns), sampling, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, PromptEvent):
                    continue
                yield event.text
                if isinstance(event, FinishedEvent):
                    if event.message:
                        raise ConfigError(f"the model failed on this request: {event.message}")
                    return
        finally:
            self._engine.cancel(request)

    def _ids(self, turns: Sequence[ChatTurn]) -> list[int]:
        if not self.supports_chat:
            return self._tokenizer.ids(turns[-1]["content"])
        return self._tokenizer.ids(self._tokenizer.conversation(turns), special=False)


def to_sampling_params(options: ChatOptions, default: GenerationDefaults) -> SamplingParams:
    """Return sampling parameters; missing options come from generation_config.json."""
    given = {name: value for name, value in asdict(options).items() if value is not None}
    return SamplingParams(**{"temperature": TEMPERATURE, **default.sampling(), **given})
