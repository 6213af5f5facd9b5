"""POST /v1/completions: continue prompts.

Builds the responses, including echo and log-probabilities. Encoder-decoder models are supported;
their completion does not continue the prompt.
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
from moefit.server.service import FINGERPRINT, EngineRequest, Service, new_id, sampling_per_choice
from moefit.server.streaming import STREAM, EngineEvents, UsageCounter, respond
from moefit.server.structured.request import answer_form, compiled_form
from moefit.server.tokenizer import RequestTokenizer

MAX_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionPrompt:
    """A prompt as token ids, and its text, which only echo needs."""

    ids: Sequence[int]
    text: str


class ChoiceWriter:
    """Convert the events of one completion to response chunks."""

    def __init__(
        self,
        index: int,
        tokenizer: RequestTokenizer,
        body: CompletionRequest,
        start: CompletionPrompt,
    ):
        self._index, self._tokenizer, self._body, self._start = index, tokenizer, body, start
        self._offset = 0  # in characters
        backend = tokenizer.backend
        self._offsets = (
            IncrementalDetokenizer(backend) if backend and body.logprobs is not None else None
        )

    def write(self, event: Event) -> CompletionChoice:
        """Return the chunk for an event; it may be empty."""
        if isinstance(event, PromptEvent):
            return self._prompt(event)
        if isinstance(event, FinishedEvent):
            assert event.reason in ("stop", "length"), "other finish reasons raise errors"
            return self._choice(event.text, finish=event.reason)
        logprobs = None if event.logprob is None else [event.logprob]
        return self._choice(event.text, self._logprobs([event.token], logprobs))

    def _prompt(self, event: PromptEvent) -> CompletionChoice:
        if not self._body.echo:
            self._skip_prompt()
            return self._choice("")
        logprobs = self._logprobs(self._start.ids, event.logprobs)
        if self._body.logprobs is not None:
            self._offset = len(self._start.text)
        return self._choice(self._start.text, logprobs)

    def _skip_prompt(self) -> None:
        """Count offsets from the completion on; the prompt decides about its leading space."""
        if self._offsets is not None and self._tokenizer.backend is not None:
            self._offsets = IncrementalDetokenizer(self._tokenizer.backend, after=self._start.ids)

    def _logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None] | None
    ) -> Logprobs | None:
        if self._body.logprobs is None or logprobs is None:
            return None
        name, offsets = self._tokenizer.name, []
        for token in tokens:
            offsets.append(self._offset)
            if self._offsets is not None:
                self._offset += len(self._offsets.push(token))
        return Logprobs(
            tokens=[name(token) for token in tokens],
            token_logprobs=[None if one is None else one.logprob for one in logprobs],
            top_logprobs=[None if one is None else self._top(one) for one in logprobs],
            text_offset=offsets,
        )

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        """Return the most probable tokens, and the token itself if it is not one of them."""
        name = self._tokenizer.name
        top = {name(token): logprob for token, logprob in one.top}
        top.setdefault(name(one.token), one.logprob)
        return top

    def _choice(
        self, text: str, logprobs: Logprobs | None = None, finish: Finish | None = None
    ) -> CompletionChoice:
        return CompletionChoice(
            index=self._index, text=text, logprobs=logprobs, finish_reason=finish
        )


class MergedChoice:
    """Merge the chunks of one choice into a complete choice."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._logprobs: Logprobs | None = None
        self._last: CompletionChoice | None = None

    def add(self, chunk: CompletionChoice) -> None:
        """Append a chunk."""
        self._last = chunk
        if chunk.text:
            self._texts.append(chunk.text)
        if (more := chunk.logprobs) is None:
            return
        if (logprobs := self._logprobs) is None:
            self._logprobs = more
            return
        logprobs.tokens.extend(more.tokens)
        logprobs.token_logprobs.extend(more.token_logprobs)
        logprobs.top_logprobs.extend(more.top_logprobs)
        logprobs.text_offset.extend(more.text_offset)

    def full_response(self) -> CompletionChoice:
        """Return the complete choice, with the finish reason of the last chunk."""
        assert self._last is not None, "a choice ends with a FinishedEvent"
        content = {"text": "".join(self._texts), "logprobs": self._logprobs}
        return self._last.model_copy(update=content)


class CompletionBuilder:
    """Build engine requests and responses for one request to /v1/completions."""

    def __init__(self, service: Service, body: CompletionRequest):
        self._service, self._body = service, body
        self._id, self._usage = new_id("cmpl"), UsageCounter(body.n or 1)
        self._writers: list[ChoiceWriter] = []

    def check(self) -> None:
        """Raise APIError if the request is not supported or the server cannot accept it."""
        body = self._body
        self._service.check_open()
        self._service.check_model(body.model)
        self._service.check_choices(body, len(_prompts(body)))
        if body.best_of not in (None, body.n or 1):
            raise APIError(
                400, "best_of is supported only if it equals n", param="best_of", code="unsupported"
            )
        if body.echo and not self._service.decoder_only:
            raise APIError(
                400,
                "echo is not supported: this encoder-decoder model does not continue its prompt",
                param="echo",
                code="unsupported",
            )

    def engine_requests(self) -> list[EngineRequest]:
        """Return one engine request per choice. Tokenizes the prompts, which may be slow."""
        body, service = self._body, self._service
        starts = [self._start(prompt) for prompt in _prompts(body)]
        max_tokens = MAX_TOKENS if body.max_tokens is None else body.max_tokens
        form = answer_form(body)
        for start in starts if form is not None else ():
            service.check_length(start.ids, max_tokens)
        sampling = service.sampling(
            body,
            max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            grammar=compiled_form(service.grammars, form),
        )
        engine_requests: list[EngineRequest] = []
        for start in starts:
            for each in sampling_per_choice(sampling, body.n or 1):
                self._writers.append(
                    ChoiceWriter(len(engine_requests), service.tokenizer, body, start)
                )
                engine_requests.append(EngineRequest(prompt=start.ids, sampling=each))
        service.check_logprobs(engine_requests)
        return engine_requests

    def _start(self, prompt: str | Sequence[int]) -> CompletionPrompt:
        tokenizer = self._service.tokenizer
        if isinstance(prompt, str):
            ids, text = tokenizer.ids(prompt), prompt
        else:
            tokenizer.check_ids(prompt)
            ids, text = list(prompt), tokenizer.text(prompt) if self._body.echo else ""
        if not ids:
            raise APIError(400, "the prompt is empty; give at least one token", param="prompt")
        return CompletionPrompt(ids=ids, text=text)

    async def full_response(self, engine_events: EngineEvents) -> CompletionResponse:
        """Return the response with all choices, after all have finished."""
        joined = [MergedChoice() for _ in self._writers]
        async for number, event in engine_events:
            joined[number].add(self._writers[number].write(event))
            if isinstance(event, FinishedEvent):
                self._usage.add(number, event)
        answer = self._frame([one.full_response() for one in joined])
        return answer.model_copy(update={"usage": self._usage.usage()})

    async def chunks(self, engine_events: EngineEvents) -> AsyncIterator[CompletionResponse]:
        """Yield response chunks as they are generated, then the usage if requested."""
        async for number, event in engine_events:
            chunk = self._writers[number].write(event)
            if isinstance(event, FinishedEvent):
                self._usage.add(number, event)
            if chunk.text or chunk.logprobs or chunk.finish_reason:
                yield self._frame([chunk])
        if self._body.streams_usage:
            yield self._frame([]).model_copy(update={"usage": self._usage.usage()})

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
    """Return the router with POST /v1/completions."""
    routes = APIRouter()
    responses: dict[int | str, dict[str, Any]] = {
        200: {"model": CompletionResponse, "content": {STREAM: {}}}
    }

    @routes.post("/v1/completions", responses=responses, response_model=None)
    async def completions(body: Annotated[CompletionRequest, Body()], request: Request) -> Response:
        """Continue prompts, with `n` completions each. `stream` returns server-sent events."""
        return await respond(service, CompletionBuilder(service, body), request, body)

    return routes
