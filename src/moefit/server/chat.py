"""POST /v1/chat/completions: a conversation is answered, by the chat template of the model.

Owns the shape of the answers. Tools and other formats than text are refused by `asked`.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from moefit.engine.request import Event, Finished, Token, TokenLogprob
from moefit.server.answered import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    Delta,
    DeltaChoice,
    TopLogprob,
)
from moefit.server.asked import ChatAsked, Message, TokenizeAsked
from moefit.server.refusal import Refused
from moefit.server.replies import Replies
from moefit.server.service import FINGERPRINT, Service, Wish, new_id, numbered
from moefit.server.stream import STREAM, respond
from moefit.server.tally import Tally
from moefit.server.vocabulary import Vocabulary

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


def conversation_ids(words: Vocabulary, asked: ChatAsked | TokenizeAsked) -> list[int]:
    """Return a conversation's tokens. Raises Refused where the model knows none."""
    values = asked.chat_template_kwargs or {}
    if taken := sorted(values.keys() & _TAKEN):
        raise Refused(
            400,
            f"chat_template_kwargs.{taken[0]}: the server gives this to the template itself; "
            "kwargs are for its other variables, such as enable_thinking",
            param=f"chat_template_kwargs.{taken[0]}",
        )
    if not words.has_template:
        raise Refused(
            400,
            "this model has no chat template, so it does not know conversations; it continues "
            "text: use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    written = words.conversation(as_template_wants(asked.messages or ()), values)
    return words.ids(written, special=False)


class Job:
    """One request to /v1/chat/completions."""

    def __init__(self, service: Service, asked: ChatAsked):
        self._service, self._asked = service, asked
        self._id, self._n = new_id("chatcmpl"), asked.n or 1
        self._tally = Tally(self._n)

    def check(self) -> None:
        """Refuse what is not done."""
        asked = self._asked
        self._service.check_open()
        self._service.check_model(asked.model)
        self._service.check_answers(asked, 1)
        if asked.top_logprobs and not asked.logprobs:
            raise Refused(400, "top_logprobs is for logprobs=true alone", param="top_logprobs")
        if None not in (both := {asked.max_tokens, asked.max_completion_tokens}) and len(both) > 1:
            raise Refused(
                400, "max_tokens and max_completion_tokens say different things",
                param="max_tokens",
            )  # fmt: skip

    def wishes(self) -> list[Wish]:
        """What is asked of the engine; takes as long as reading the conversation does."""
        asked, service = self._asked, self._service
        ids = conversation_ids(service.words, asked)
        if not ids:
            raise Refused(400, "the conversation has no tokens", param="messages")
        room = max(1, service.engine.max_model_len - len(ids))
        most = asked.max_completion_tokens or asked.max_tokens
        sampling = service.sampling(
            asked,
            most or min(room, service.settings.chat_tokens),
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        )
        wishes = [Wish(prompt=ids, sampling=one) for one in numbered(sampling, self._n)]
        service.check_told(wishes)
        return wishes

    async def whole(self, replies: Replies) -> Chat:
        """All answers, once they have ended."""
        heard: list[list[Event]] = [[] for _ in range(self._n)]
        async for number, event in replies:
            heard[number].append(event)
            if isinstance(event, Finished):
                self._tally.add(number, event)
        return Chat(
            **self._head(),
            choices=[self._choice(number, events) for number, events in enumerate(heard)],
            usage=self._tally.usage(),
        )

    def _choice(self, index: int, events: Sequence[Event]) -> ChatChoice:
        last = events[-1]
        assert isinstance(last, Finished)
        assert last.reason in ("stop", "length"), "other ends are errors"
        tokens = [one for one in events if isinstance(one, Token)]
        text = "".join(one.text for one in tokens) + last.text
        told = self._told([one.logprob for one in tokens if one.logprob is not None])
        return ChatChoice(
            index=index,
            message=ChatMessage(content=text),
            logprobs=told if self._asked.logprobs else None,
            finish_reason=last.reason,
        )

    async def pieces(self, replies: Replies) -> AsyncIterator[ChatChunk]:
        """Answers as they come, and at the end, if asked for, the usage."""
        for number in range(self._n):
            yield self._chunk(number, Delta(role="assistant", content=""))
        async for number, event in replies:
            if isinstance(event, Token) and (event.text or self._asked.logprobs):
                told = self._told([event.logprob]) if event.logprob is not None else None
                yield self._chunk(number, Delta(content=event.text), told)
            elif isinstance(event, Finished):
                self._tally.add(number, event)
                if event.text:
                    yield self._chunk(number, Delta(content=event.text))
                yield self._end(number, event)
        if self.tells_usage:
            yield ChatChunk(**self._head(), choices=[], usage=self._tally.usage())

    def _end(self, number: int, event: Finished) -> ChatChunk:
        assert event.reason in ("stop", "length"), "other ends are errors"
        choice = DeltaChoice(index=number, delta=Delta(), logprobs=None, finish_reason=event.reason)
        return ChatChunk(**self._head(), choices=[choice])

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        options = self._asked.stream_options
        return bool(options and options.include_usage)

    def _chunk(self, number: int, delta: Delta, told: ChatLogprobs | None = None) -> ChatChunk:
        choice = DeltaChoice(index=number, delta=delta, logprobs=told, finish_reason=None)
        return ChatChunk(**self._head(), choices=[choice])

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
    answers: dict[int | str, dict[str, Any]] = {200: {"model": Chat, "content": {STREAM: {}}}}

    @routes.post("/v1/chat/completions", responses=answers, response_model=None)
    async def chat(asked: Annotated[ChatAsked, Body()], request: Request) -> Response:
        """Answer a conversation. With `stream`, server-sent events."""
        return await respond(service, Job(service, asked), request, stream=bool(asked.stream))

    return routes
