"""POST /v1/chat/completions: a conversation is answered, by the chat template of the model.

Owns the shape of the answers. Tools and other formats than text are refused by `asked`.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from moefit.engine.api import Event, FinishedEvent, TokenEvent, TokenLogprob
from moefit.server.errors import APIError
from moefit.server.openai_schema import (
    ChatChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    Delta,
    DeltaChoice,
    Message,
    TokenizeRequest,
    TopLogprob,
)
from moefit.server.service import FINGERPRINT, EngineRequest, Service, new_id, numbered
from moefit.server.streaming import STREAM, EngineEvents, TokenCounts, respond
from moefit.server.tokenizer import RequestTokenizer

_TAKEN = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize", "return_assistant_tokens_mask",
}  # fmt: skip


def as_template_wants(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates know them; `developer` is today's word for `system`."""
    plain = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content = [{"type": "text", "text": text} for text in message.texts]
        more = {"name": message.name, "reasoning_content": message.thoughts}
        given = {name: value for name, value in more.items() if value is not None}
        plain.append({"role": role, "content": content, **given})
    return plain


def conversation_ids(
    words: RequestTokenizer, body: ChatCompletionRequest | TokenizeRequest
) -> list[int]:
    """Return a conversation's tokens. Raises APIError where the model knows none."""
    values = body.chat_template_kwargs or {}
    if taken := sorted(values.keys() & _TAKEN):
        raise APIError(
            400,
            f"chat_template_kwargs.{taken[0]}: the server gives this to the template itself; "
            "kwargs are for its other variables, such as enable_thinking",
            param=f"chat_template_kwargs.{taken[0]}",
        )
    if not words.has_template:
        raise APIError(
            400,
            "this model has no chat template, so it does not know conversations; it continues "
            "text: use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    written = words.conversation(as_template_wants(body.messages or ()), values)
    return words.ids(written, special=False)


class ChatBuilder:
    """One request to /v1/chat/completions."""

    def __init__(self, service: Service, body: ChatCompletionRequest):
        self._service, self._asked = service, body
        self._id, self._n = new_id("chatcmpl"), body.n or 1
        self._tally = TokenCounts(self._n)

    def check(self) -> None:
        """Refuse what is not done."""
        body = self._asked
        self._service.check_open()
        self._service.check_model(body.model)
        self._service.check_choices(body, 1)
        if body.top_logprobs and not body.logprobs:
            raise APIError(400, "top_logprobs is for logprobs=true alone", param="top_logprobs")
        if None not in (both := {body.max_tokens, body.max_completion_tokens}) and len(both) > 1:
            raise APIError(
                400, "max_tokens and max_completion_tokens say different things",
                param="max_tokens",
            )  # fmt: skip

    def engine_requests(self) -> list[EngineRequest]:
        """What is asked of the engine; takes as long as reading the conversation does."""
        body, service = self._asked, self._service
        ids = conversation_ids(service.words, body)
        if not ids:
            raise APIError(400, "the conversation has no tokens", param="messages")
        room = max(1, service.engine.max_model_len - len(ids))
        most = body.max_completion_tokens or body.max_tokens
        sampling = service.sampling(
            body,
            most or min(room, service.settings.chat_tokens),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        engine_requests = [
            EngineRequest(prompt=ids, sampling=one) for one in numbered(sampling, self._n)
        ]
        service.check_logprobs(engine_requests)
        return engine_requests

    async def full_response(self, engine_events: EngineEvents) -> ChatCompletionResponse:
        """All answers, once they have ended."""
        heard: list[list[Event]] = [[] for _ in range(self._n)]
        async for number, event in engine_events:
            heard[number].append(event)
            if isinstance(event, FinishedEvent):
                self._tally.add(number, event)
        return ChatCompletionResponse(
            **self._head(),
            choices=[self._choice(number, events) for number, events in enumerate(heard)],
            usage=self._tally.usage(),
        )

    def _choice(self, index: int, events: Sequence[Event]) -> ChatChoice:
        last = events[-1]
        assert isinstance(last, FinishedEvent)
        assert last.reason in ("stop", "length"), "other ends are errors"
        tokens = [one for one in events if isinstance(one, TokenEvent)]
        text = "".join(one.text for one in tokens) + last.text
        told = self._told([one.logprob for one in tokens if one.logprob is not None])
        return ChatChoice(
            index=index,
            message=ChatMessage(content=text),
            logprobs=told if self._asked.logprobs else None,
            finish_reason=last.reason,
        )

    async def chunks(self, engine_events: EngineEvents) -> AsyncIterator[ChatCompletionChunk]:
        """Answers as they come, and at the end, if asked for, the usage."""
        for number in range(self._n):
            yield self._chunk(number, Delta(role="assistant", content=""))
        async for number, event in engine_events:
            if isinstance(event, TokenEvent) and (event.text or self._asked.logprobs):
                told = self._told([event.logprob]) if event.logprob is not None else None
                yield self._chunk(number, Delta(content=event.text), told)
            elif isinstance(event, FinishedEvent):
                self._tally.add(number, event)
                if event.text:
                    yield self._chunk(number, Delta(content=event.text))
                yield self._end(number, event)
        if self.streams_usage:
            yield ChatCompletionChunk(**self._head(), choices=[], usage=self._tally.usage())

    def _end(self, number: int, event: FinishedEvent) -> ChatCompletionChunk:
        assert event.reason in ("stop", "length"), "other ends are errors"
        choice = DeltaChoice(index=number, delta=Delta(), logprobs=None, finish_reason=event.reason)
        return ChatCompletionChunk(**self._head(), choices=[choice])

    @property
    def streams_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        options = self._asked.stream_options
        return bool(options and options.include_usage)

    def _chunk(
        self, number: int, delta: Delta, told: ChatLogprobs | None = None
    ) -> ChatCompletionChunk:
        choice = DeltaChoice(index=number, delta=delta, logprobs=told, finish_reason=None)
        return ChatCompletionChunk(**self._head(), choices=[choice])

    def _told(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
        words = self._service.words
        return ChatLogprobs(
            content=[
                ChatLogprob(
                    token=words.name(one.token),
                    logprob=one.logprob,
                    bytes=list(words.raw(one.token)),
                    top_logprobs=[
                        TopLogprob(
                            token=words.name(token), logprob=logprob, bytes=list(words.raw(token))
                        )
                        for token, logprob in one.top
                    ],
                )
                for one in logprobs
            ]
        )

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "created": self._service.now(),
            "model": self._service.settings.name,
            "system_fingerprint": FINGERPRINT,
        }


def router(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()
    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": ChatCompletionResponse, "content": {STREAM: {}}}
    }

    @routes.post("/v1/chat/completions", responses=answers, response_model=None)
    async def chat(body: Annotated[ChatCompletionRequest, Body()], request: Request) -> Response:
        """Answer a conversation. With `stream`, server-sent events."""
        return await respond(service, ChatBuilder(service, body), request, stream=bool(body.stream))

    return routes
