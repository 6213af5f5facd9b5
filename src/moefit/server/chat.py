"""POST /v1/chat/completions: generate the next message of a conversation.

Renders the conversation and the tools with the model's chat template, and builds the responses:
text, reasoning and calls of tools, as the model's parsers find them.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
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
    Delta,
    DeltaChoice,
    Message,
    TokenizeRequest,
    TopLogprob,
)
from moefit.server.service import FINGERPRINT, EngineRequest, Service, new_id, sampling_per_choice
from moefit.server.streaming import STREAM, EngineEvents, UsageCounter, respond
from moefit.server.structured.request import answer_form
from moefit.server.tokenizer import RequestTokenizer
from moefit.server.tools.message import MessageWriter
from moefit.server.tools.request import answer_grammar, answer_parser, tool_use

_RESERVED_KWARGS = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize", "return_assistant_tokens_mask",
}  # fmt: skip


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages in the form that chat templates expect; `developer` becomes `system`."""
    plain = []
    names = {call.id: call.function.name for one in messages for call in one.tool_calls or ()}
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content = [{"type": "text", "text": text} for text in message.texts]
        calls = [one.model_dump(exclude={"index"}) for one in message.tool_calls or ()]
        more = {
            "name": message.name or names.get(message.tool_call_id or ""),
            "reasoning_content": message.thoughts,
            "tool_calls": calls or None,
            "tool_call_id": message.tool_call_id,
        }
        given = {name: value for name, value in more.items() if value is not None}
        plain.append({"role": role, "content": content, **given})
    return plain


def conversation_text(
    tokenizer: RequestTokenizer,
    body: ChatCompletionRequest | TokenizeRequest,
    tools: Sequence[Mapping[str, Any]] | None,
) -> str:
    """Return a conversation as the chat template renders it.

    Args:
        tokenizer: The model's tokenizer.
        body: Request with messages and `chat_template_kwargs`.
        tools: Definitions of tools, as templates expect them.

    Raises:
        APIError: If the model has no chat template, a reserved variable is given, or the template
            has no reasoning_effort.
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
    if isinstance(body, ChatCompletionRequest) and body.reasoning_effort is not None:
        if "reasoning_effort" not in tokenizer.template:
            raise APIError(
                400,
                "this model's chat template has no reasoning_effort; omit it, or "
                "reasoning.effort in /v1/responses (some templates have enable_thinking in "
                "chat_template_kwargs)",
                param="reasoning_effort",
                code="unsupported_by_model",
            )
        values = {"reasoning_effort": body.reasoning_effort, **values}
    return tokenizer.conversation(template_messages(body.messages or ()), values, tools)


def conversation_ids(service: Service, body: TokenizeRequest) -> list[int]:
    """Return the token ids of a conversation. Raises like `conversation_text`."""
    use = tool_use(body.tools, None, None, service.dialect())
    text = conversation_text(service.tokenizer, body, use.for_template())
    return service.tokenizer.ids(text, special=False)


class ChatBuilder:
    """Build engine requests and responses for one request to /v1/chat/completions."""

    def __init__(self, service: Service, body: ChatCompletionRequest):
        self._service, self._body = service, body
        self._id, self._n = new_id("chatcmpl"), body.n or 1
        self._usage = UsageCounter(self._n)
        self._writers: list[MessageWriter] = []

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
        dialect = service.dialect()
        use = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls, dialect)
        prompt = conversation_text(service.tokenizer, body, use.for_template())
        ids = service.tokenizer.ids(prompt, special=False)
        if not ids:
            raise APIError(
                400, "the conversation is empty; give at least one token", param="messages"
            )
        available = max(1, service.engine.max_model_len - len(ids))
        max_tokens = body.max_completion_tokens or body.max_tokens
        max_tokens = max_tokens or min(available, service.settings.chat_tokens)
        form = answer_form(body)
        if use.tools or form is not None:
            service.check_length(ids, max_tokens)
        sampling = service.sampling(
            body,
            max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=answer_grammar(service.grammars, dialect, use, form, prompt),
            visible=dialect.visible(calls=bool(use.tools)),
        )
        engine_requests = [
            EngineRequest(prompt=ids, sampling=one)
            for one in sampling_per_choice(sampling, self._n)
        ]
        self._writers = [
            MessageWriter(answer_parser(dialect, use, prompt)) for _ in engine_requests
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
        last, writer = events[-1], self._writers[index]
        assert isinstance(last, FinishedEvent)
        tokens = [one for one in events if isinstance(one, TokenEvent)]
        writer.finish("".join(one.text for one in tokens) + last.text)
        logprobs = self._logprobs([one.logprob for one in tokens if one.logprob is not None])
        return ChatChoice(
            index=index,
            message=writer.message(),
            logprobs=logprobs if self._body.logprobs else None,
            finish_reason=writer.reason(last.reason),
        )

    async def chunks(self, engine_events: EngineEvents) -> AsyncIterator[ChatCompletionChunk]:
        """Yield response chunks as they are generated, then the usage if requested."""
        for number in range(self._n):
            yield self._chunk(number, Delta(role="assistant", content=""))
        async for number, event in engine_events:
            if isinstance(event, TokenEvent):
                for chunk in self._token_chunks(number, event):
                    yield chunk
            elif isinstance(event, FinishedEvent):
                self._usage.add(number, event)
                for delta in self._writers[number].finish(event.text):
                    yield self._chunk(number, delta)
                yield self._end(number, event)
        if self._body.streams_usage:
            yield ChatCompletionChunk(**self._head(), choices=[], usage=self._usage.usage())

    def _token_chunks(self, number: int, event: TokenEvent) -> list[ChatCompletionChunk]:
        """Return the chunks for a token; its log-probability is in the first."""
        deltas = self._writers[number].push(event.text)
        logprobs = None if event.logprob is None else self._logprobs([event.logprob])
        if not deltas and logprobs is not None:
            deltas = [Delta(content="")]
        return [
            self._chunk(number, delta, logprobs if first else None)
            for first, delta in zip([True, *[False] * len(deltas)], deltas, strict=False)
        ]

    def _end(self, number: int, event: FinishedEvent) -> ChatCompletionChunk:
        reason = self._writers[number].reason(event.reason)
        choice = DeltaChoice(index=number, delta=Delta(), logprobs=None, finish_reason=reason)
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
