"""POST /v1/completions: prompts are continued.

Owns the shape of the answers, with echo and log-probabilities. Encoder-decoder models answer here
too; their answers do not go on from the prompt.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from moefit.engine.api import Event, FinishedEvent, PromptEvent, TokenLogprob
from moefit.engine.detokenize import IncrementalDetokenizer
from moefit.server.errors import APIError
from moefit.server.openai_schema import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    Finish,
    Logprobs,
)
from moefit.server.service import FINGERPRINT, EngineRequest, Service, new_id, numbered
from moefit.server.streaming import STREAM, EngineEvents, TokenCounts, respond
from moefit.server.tokenizer import RequestTokenizer

MAX_TOKENS = 16  # OpenAI's, where a request does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionStart:
    """A prompt as it was given; `text` is wanted for echo alone."""

    ids: Sequence[int]
    text: str


class ChoiceWriter:
    """Writes one answer, piece by piece."""

    def __init__(
        self, index: int, words: RequestTokenizer, body: CompletionRequest, start: CompletionStart
    ):
        self._index, self._words, self._asked, self._start = index, words, body, start
        self._at = 0  # characters before the next token
        tokenizer = words.tokenizer
        self._offsets = (
            IncrementalDetokenizer(tokenizer) if tokenizer and body.logprobs is not None else None
        )

    def write(self, event: Event) -> CompletionChoice:
        """What the event adds to the answer; may be nothing."""
        if isinstance(event, PromptEvent):
            return self._prompt(event)
        if isinstance(event, FinishedEvent):
            assert event.reason in ("stop", "length"), "other ends are errors"
            return self._choice(event.text, finish=event.reason)
        told = None if event.logprob is None else [event.logprob]
        return self._choice(event.text, self._logprobs([event.token], told))

    def _prompt(self, event: PromptEvent) -> CompletionChoice:
        if not self._asked.echo:
            self._skip_prompt()
            return self._choice("")
        told = self._logprobs(self._start.ids, event.logprobs)
        if self._asked.logprobs is not None:
            self._at = len(self._start.text)
        return self._choice(self._start.text, told)

    def _skip_prompt(self) -> None:
        """Offsets count from the answer on; its first word may have a space because of these."""
        if self._offsets is not None and self._words.tokenizer is not None:
            self._offsets = IncrementalDetokenizer(self._words.tokenizer, after=self._start.ids)

    def _logprobs(
        self, tokens: Sequence[int], told: Sequence[TokenLogprob | None] | None
    ) -> Logprobs | None:
        if self._asked.logprobs is None or told is None:
            return None
        name, offsets = self._words.name, []
        for token in tokens:
            offsets.append(self._at)
            if self._offsets is not None:
                self._at += len(self._offsets.push(token))
        return Logprobs(
            tokens=[name(token) for token in tokens],
            token_logprobs=[None if one is None else one.logprob for one in told],
            top_logprobs=[None if one is None else self._top(one) for one in told],
            text_offset=offsets,
        )

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        """The most probable tokens and, last, the one that is there, unless it is one of them."""
        name = self._words.name
        top = {name(token): logprob for token, logprob in one.top}
        top.setdefault(name(one.token), one.logprob)
        return top

    def _choice(
        self, text: str, logprobs: Logprobs | None = None, finish: Finish | None = None
    ) -> CompletionChoice:
        return CompletionChoice(
            index=self._index, text=text, logprobs=logprobs, finish_reason=finish
        )


class JoinedChoices:
    """One choice of its pieces, of which nothing but their content is kept."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._logprobs: Logprobs | None = None
        self._last: CompletionChoice | None = None

    def add(self, piece: CompletionChoice) -> None:
        """One more piece."""
        self._last = piece
        if piece.text:
            self._texts.append(piece.text)
        if (more := piece.logprobs) is None:
            return
        if (told := self._logprobs) is None:
            self._logprobs = more
            return
        told.tokens.extend(more.tokens)
        told.token_logprobs.extend(more.token_logprobs)
        told.top_logprobs.extend(more.top_logprobs)
        told.text_offset.extend(more.text_offset)

    def full_response(self) -> CompletionChoice:
        """The choice, whose last piece says why it ended."""
        assert self._last is not None, "every answer has an end"
        content = {"text": "".join(self._texts), "logprobs": self._logprobs}
        return self._last.model_copy(update=content)


class CompletionBuilder:
    """One request to /v1/completions."""

    def __init__(self, service: Service, body: CompletionRequest):
        self._service, self._asked = service, body
        self._id, self._tally = new_id("cmpl"), TokenCounts(body.n or 1)
        self._writers: list[ChoiceWriter] = []

    def check(self) -> None:
        """Refuse what is not done."""
        body = self._asked
        self._service.check_open()
        self._service.check_model(body.model)
        self._service.check_choices(body, len(_prompts(body)))
        if body.best_of not in (None, body.n or 1):
            raise APIError(
                400, "best_of is done only where it equals n", param="best_of", code="unsupported"
            )
        if body.echo and not self._service.continues:
            raise APIError(
                400,
                "echo is not possible: this model's answer does not go on from the prompt",
                param="echo",
                code="unsupported",
            )

    def engine_requests(self) -> list[EngineRequest]:
        """What is asked of the engine; takes as long as reading the prompts does."""
        body, service = self._asked, self._service
        sampling = service.sampling(
            body,
            MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        engine_requests: list[EngineRequest] = []
        for prompt in _prompts(body):
            start = self._start(prompt)
            for each in numbered(sampling, body.n or 1):
                self._writers.append(ChoiceWriter(len(engine_requests), service.words, body, start))
                engine_requests.append(EngineRequest(prompt=start.ids, sampling=each))
        service.check_logprobs(engine_requests)
        return engine_requests

    def _start(self, prompt: str | Sequence[int]) -> CompletionStart:
        words = self._service.words
        if isinstance(prompt, str):
            ids, text = words.ids(prompt), prompt
        else:
            words.check_ids(prompt)
            ids, text = list(prompt), words.text(prompt) if self._asked.echo else ""
        if not ids:
            raise APIError(400, "the prompt is empty; give at least one token", param="prompt")
        return CompletionStart(ids=ids, text=text)

    async def full_response(self, engine_events: EngineEvents) -> CompletionResponse:
        """All answers, once they have ended."""
        joined = [JoinedChoices() for _ in self._writers]
        async for number, event in engine_events:
            joined[number].add(self._writers[number].write(event))
            if isinstance(event, FinishedEvent):
                self._tally.add(number, event)
        answer = self._frame([one.full_response() for one in joined])
        return answer.model_copy(update={"usage": self._tally.usage()})

    async def chunks(self, engine_events: EngineEvents) -> AsyncIterator[CompletionResponse]:
        """Answers as they come, and at the end, if asked for, the usage."""
        async for number, event in engine_events:
            piece = self._writers[number].write(event)
            if isinstance(event, FinishedEvent):
                self._tally.add(number, event)
            if piece.text or piece.logprobs or piece.finish_reason:
                yield self._frame([piece])
        if self.streams_usage:
            yield self._frame([]).model_copy(update={"usage": self._tally.usage()})

    @property
    def streams_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        options = self._asked.stream_options
        return bool(options and options.include_usage)

    def _frame(self, choices: list[CompletionChoice]) -> CompletionResponse:
        settings = self._service.settings
        return CompletionResponse(
            id=self._id,
            created=self._service.now(),
            model=settings.name,
            system_fingerprint=FINGERPRINT,
            choices=choices,
        )


def _prompts(body: CompletionRequest) -> Sequence[str | Sequence[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]  # pyright: ignore[reportReturnType]
    return prompt  # pyright: ignore[reportReturnType]


def router(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()
    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": CompletionResponse, "content": {STREAM: {}}}
    }

    @routes.post("/v1/completions", responses=answers, response_model=None)
    async def completions(body: Annotated[CompletionRequest, Body()], request: Request) -> Response:
        """Continue prompts. With `stream`, server-sent events; `n` answers to each prompt."""
        return await respond(
            service, CompletionBuilder(service, body), request, stream=bool(body.stream)
        )

    return routes
