"""A common interface to chat with a server or a local model.

`RemoteChat` and `LocalChat` implement `ChatBackend` for `moefit chat`.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any, Protocol

from moefit.engine.api import Event, FinishedEvent, PromptEvent, SamplingParams
from moefit.engine.engine import Engine
from moefit.errors import ConfigError
from moefit.serve.hf.generation_config import GenerationDefaults
from moefit.server.client import Client
from moefit.server.tokenizer import RequestTokenizer

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
            engine.served.tokenizer, size=text.vocab_size, max_tokens=lambda: engine.max_model_len
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
