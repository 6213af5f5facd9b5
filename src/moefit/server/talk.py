"""Somebody to talk to: a server, or a model in this process, behind one face.

Owns how an answer comes out of either, piece by piece. Knows nothing of terminals.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any, Protocol

from moefit.engine.engine import Engine
from moefit.engine.request import Event, Finished, Prompt, Sampling
from moefit.errors import ConfigError
from moefit.serve.generation import GenerationDefaults
from moefit.server.client import Client
from moefit.server.vocabulary import Vocabulary

Turn = dict[str, str]
TEMPERATURE = 0.7  # of a model here whose checkpoint names none


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How to answer; see `Sampling`. None: as who answers does it."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


class Partner(Protocol):
    """`chats`: it knows conversations; else it continues text."""

    name: str
    chats: bool

    def answer(self, turns: Sequence[Turn], manner: Manner) -> Generator[str, None, None]:
        """The answer to a conversation, or what follows the last turn's text.

        Closing the iterator ends the answer.
        """
        ...


class RemotePartner:
    """A server with OpenAI's API; ours says whether its model chats, others are believed to.

    Raises ServerError if it does not answer, ConfigError if it serves nothing.
    """

    def __init__(self, client: Client):
        self._client = client
        models = client.get("/v1/models")["data"]
        if not models:
            raise ConfigError(f"{client.url} serves no model")
        self.name, self.chats = models[0]["id"], models[0].get("chat", True)

    def answer(self, turns: Sequence[Turn], manner: Manner) -> Generator[str, None, None]:
        """See `Partner`."""
        given = {name: value for name, value in asdict(manner).items() if value is not None}
        body: dict[str, Any] = {"model": self.name, **given}
        if self.chats:
            body["messages"] = list(turns)
            for event in self._client.stream("/v1/chat/completions", body):
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
            return
        body["prompt"] = turns[-1]["content"]
        for event in self._client.stream("/v1/completions", body):
            for choice in event["choices"]:
                yield choice["text"]


class LocalPartner:
    """A model in this process."""

    def __init__(self, name: str, engine: Engine):
        self.name, self._engine = name, engine
        text = engine.served.model.config.get_text_config(decoder=True)
        self._words = Vocabulary(
            engine.served.tokenizer, size=text.vocab_size, most=engine.max_model_len
        )
        self.chats = self._words.has_template

    def answer(self, turns: Sequence[Turn], manner: Manner) -> Generator[str, None, None]:
        """See `Partner`. Raises ConfigError, RequestTooLargeError."""
        events: SimpleQueue[Event] = SimpleQueue()
        sampling = sampling_of(manner, self._engine.served.generation)
        request = self._engine.submit(self._ids(turns), sampling, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, Prompt):
                    continue
                yield event.text
                if isinstance(event, Finished):
                    if event.message:
                        raise ConfigError(f"the model failed at this: {event.message}")
                    return
        finally:
            self._engine.cancel(request)

    def _ids(self, turns: Sequence[Turn]) -> list[int]:
        if not self.chats:
            return self._words.ids(turns[-1]["content"])
        return self._words.ids(self._words.conversation(turns), special=False)


def sampling_of(manner: Manner, default: GenerationDefaults) -> Sampling:
    """The manner as a request; what it leaves open is as generation_config.json has it."""
    given = {name: value for name, value in asdict(manner).items() if value is not None}
    return Sampling(**{"temperature": TEMPERATURE, **default.sampling(), **given})
