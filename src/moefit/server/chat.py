"""POST /v1/chat/completions: generate the next message of a conversation.

Renders the conversation with the model's chat template and builds the responses. Tools and response
formats other than text are rejected by `openai_schema`.
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
from moefit.server.service import FINGERPRINT, EngineRequest, Service, new_id, sampling_per_choice
from moefit.server.streaming import STREAM, EngineEvents, UsageCounter, respond
from moefit.server.structured.request import answer_form, compiled_form
from moefit.server.tokenizer import RequestTokenizer

_RESERVED_KWARGS = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize", "return_assistant_tokens_mask",
}  # fmt: skip


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages in the form that chat templates expect; `developer` becomes `system`."""
    plain = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content = [{"type": "text", "text": text} for text in message.texts]
        more = {"name": message.name, "reasoning_content": message.thoughts}
        given = {name: value for name, value in more.items() if value is not None}
        plain.append({"role": role, "content": content, **given})
    return plain


def conversation_ids(
    tokenizer: RequestTokenizer, body: ChatCompletionRequest | TokenizeRequest
) -> list[int]:
    """Return the token ids of a conversation.

    Args:
        tokenizer: The model's tokenizer.
        body: Request with messages and `chat_template_kwargs`.

    Raises:
        APIError: If the model has no chat template or a reserved variable is given.
    """
    values = body.chat_template_kwargs or {}
    if reserved := sorted(values.keys() & _RESERVED_KWARGS):
        raise APIError(
            400,
            f"chat_template_kwargs.{reserved[0]}: reserved; the server sets it. "
            "Use chat_template_kwargs for other variables, such as enable_thinking",
            param=f"chat_template_kwargs.{reserved[0]}",
        )
    if not tokenizer.has_template:
        raise APIError(
            400,
            "this model has no chat template and only continues text; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    text = tokenizer.conversation(template_messages(body.messages or ()), values)
    return tokenizer.ids(text, special=False)


class ChatBuilder:
    """Build engine requests and responses for one request to /v1/chat/completions."""

    def __init__(self, service: Service, body: ChatCompletionRequest):
        self._service, self._body = service, body
        self._id, self._n = new_id("chatcmpl"), body.n or 1
        self._usage = UsageCounter(self._n)

    def check(self) -> None:
        """Raise APIError if the request is not supported or the server cannot accept it."""
        body = self._body
        self._service.check_open()
        self._service.check_model(body.model)
        self._service.check_choices(body, 1)
        if body.top_logprobs and not body.logprobs:
            raise APIError(400, "top_logprobs requires logprobs=true", param="top_logprobs")
        if None not in (both := {body.max_tokens, body.max_completion_tokens}) and len(both) > 1:
            raise APIError(
                400, "max_tokens and max_completion_tokens differ; give one of them",
                param="max_tokens",
            )  # fmt: skip

    def engine_requests(self) -> list[EngineRequest]:
        """Return one engine request per choice. Renders and tokenizes, which may be slow."""
        body, service = self._body, self._service
        ids = conversation_ids(service.tokenizer, body)
        if not ids:
            raise APIError(
                400, "the conversation is empty; give at least one token", param="messages"
            )
        available = max(1, service.engine.max_model_len - len(ids))
        max_tokens = body.max_completion_tokens or body.max_tokens
        sampling = service.sampling(
            body,
            max_tokens or min(available, service.settings.chat_tokens),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=compiled_form(service.grammars, answer_form(body)),
        )
        engine_requests = [
            EngineRequest(prompt=ids, sampling=one)
            for one in sampling_per_choice(sampling, self._n)
        ]
        service.check_logprobs(engine_requests)
        return engine_requests

    async def full_response(self, engine_events: EngineEvents) -> ChatCompletionResponse:
        """Return the response with all choices, after all have finished."""
        events_by_choice: list[list[Event]] = [[] for _ in range(self._n)]
        async for number, event in engine_events:
            events_by_choice[number].append(event)
            if isinstance(event, FinishedEvent):
                self._usage.add(number, event)
        return ChatCompletionResponse(
            **self._head(),
            choices=[
                self._choice(number, events) for number, events in enumerate(events_by_choice)
            ],
            usage=self._usage.usage(),
        )

    def _choice(self, index: int, events: Sequence[Event]) -> ChatChoice:
        last = events[-1]
        assert isinstance(last, FinishedEvent)
        assert last.reason in ("stop", "length"), "other finish reasons raise errors"
        tokens = [one for one in events if isinstance(one, TokenEvent)]
        text = "".join(one.text for one in tokens) + last.text
        logprobs = self._logprobs([one.logprob for one in tokens if one.logprob is not None])
        return ChatChoice(
            index=index,
            message=ChatMessage(content=text),
            logprobs=logprobs if self._body.logprobs else None,
            finish_reason=last.reason,
        )

    async def chunks(self, engine_events: EngineEvents) -> AsyncIterator[ChatCompletionChunk]:
        """Yield response chunks as they are generated, then the usage if requested."""
        for number in range(self._n):
            yield self._chunk(number, Delta(role="assistant", content=""))
        async for number, event in engine_events:
            if isinstance(event, TokenEvent) and (event.text or self._body.logprobs):
                logprobs = self._logprobs([event.logprob]) if event.logprob is not None else None
                yield self._chunk(number, Delta(content=event.text), logprobs)
            elif isinstance(event, FinishedEvent):
                self._usage.add(number, event)
                if event.text:
                    yield self._chunk(number, Delta(content=event.text))
                yield self._end(number, event)
        if self._body.streams_usage:
            yield ChatCompletionChunk(**self._head(), choices=[], usage=self._usage.usage())

    def _end(self, number: int, event: FinishedEvent) -> ChatCompletionChunk:
        assert event.reason in ("stop", "length"), "other finish reasons raise errors"
        choice = DeltaChoice(index=number, delta=Delta(), logprobs=None, finish_reason=event.reason)
        return ChatCompletionChunk(**self._head(), choices=[choice])

    def _chunk(
        self, number: int, delta: Delta, logprobs: ChatLogprobs | None = None
    ) -> ChatCompletionChunk:
        choice = DeltaChoice(index=number, delta=delta, logprobs=logprobs, finish_reason=None)
        return ChatCompletionChunk(**self._head(), choices=[choice])

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
        tokenizer = self._service.tokenizer
        return ChatLogprobs(
            content=[
                ChatLogprob(
                    token=tokenizer.name(one.token),
                    logprob=one.logprob,
                    bytes=list(tokenizer.raw(one.token)),
                    top_logprobs=[
                        TopLogprob(
                            token=tokenizer.name(token),
                            logprob=logprob,
                            bytes=list(tokenizer.raw(token)),
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
    """Return the router with POST /v1/chat/completions."""
    routes = APIRouter()
    responses: dict[int | str, dict[str, Any]] = {
        200: {"model": ChatCompletionResponse, "content": {STREAM: {}}}
    }

    @routes.post("/v1/chat/completions", responses=responses, response_model=None)
    async def chat(body: Annotated[ChatCompletionRequest, Body()], request: Request) -> Response:
        """Generate the next message of a conversation. `stream` returns server-sent events."""
        return await respond(service, ChatBuilder(service, body), request, body)

    return routes
