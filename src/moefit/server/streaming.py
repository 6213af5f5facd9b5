"""Send the engine's events as an HTTP response: one JSON body, or server-sent events.

`EngineEvents` passes the events of one HTTP request from the engine's thread to the event loop, and
cancels when the client disconnects. `UsageCounter` counts tokens for `usage`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moefit.engine.api import Event, FinishedEvent, Listener
from moefit.engine.structured.grammar import UntriedError
from moefit.server.errors import APIError, convert_panics, error_json, http_error_of
from moefit.server.middleware import cache_salt
from moefit.server.openai_schema import GenerationRequest, PromptTokensDetails, Usage
from moefit.server.operation.request_id import (
    CLIENT_CLOSED_REQUEST,
    Client,
    client_of,
    current_request,
)
from moefit.server.operation.requests import Running
from moefit.server.operation.traces import TracedRequest
from moefit.server.service import EngineRequest, Service


class ClientGoneError(Exception):
    """The client has disconnected."""


class EngineEvents:
    """Events of one HTTP request. Iterate for (choice, event) to the end, then `close`.

    Args:
        service: The service.
        request: The HTTP request.
        salt: Its `cache_salt`, if any.
    """

    def __init__(self, service: Service, request: Request, salt: str | None):
        self._service, self._request = service, request
        self._salt = cache_salt(service.settings, request.headers, salt)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._open: dict[int, str] = {}
        self._watch: asyncio.Task[None] | None = None
        self._id, self._number = current_request.get() or "", 0

    async def submit(self, engine_requests: Sequence[EngineRequest]) -> None:
        """Submit all requests to the engine; if one is rejected, cancel the others.

        Raises:
            APIError: If they exceed the limits of the client's key.
            MoefitError: If the engine rejects one.
        """
        tokens = sum(len(item.prompt) for item in engine_requests)
        client = client_of(self._request.scope)
        reserved = self._service.limits.reserve(client.key, len(engine_requests), tokens)
        try:
            for number, item in enumerate(engine_requests):
                sampling = replace(item.sampling, cache_salt=self._salt)
                listener = reserved.listener(partial(self._on_event, number))
                self._open[number] = self._service.engine.submit(
                    item.prompt,
                    sampling,
                    self._measured(listener, client, sampling.max_tokens),
                    label=self._id,
                )
        except BaseException:
            reserved.release_unused(refused=1)
            self.close()
            raise
        self._number = self._service.requests.add(
            Running(
                request_id=self._id,
                client=client,
                path=self._request.url.path,
                names=tuple(self._open.values()),
                prompt_tokens=tokens,
                max_tokens=sum(item.sampling.max_tokens for item in engine_requests),
            )
        )
        self._watch = asyncio.create_task(self._watch_disconnect())

    def _measured(self, listener: Listener, client: Client, max_tokens: int) -> Listener:
        """Return a listener that also measures and, if wanted, traces a request."""
        service = self._service
        if service.traces is not None:
            request = TracedRequest(
                request_id=self._id,
                path=self._request.url.path,
                model=service.settings.name,
                key=client.key,
                max_tokens=max_tokens,
                traceparent=self._request.headers.get("traceparent"),
            )
            listener = service.traces.listener(listener, request)
        return service.telemetry.wrap_listener(listener)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self._open:
            item = await self._events.get()
            if item is None:
                raise ClientGoneError
            number, event = item
            if isinstance(event, FinishedEvent):
                del self._open[number]
                raise_if_failed(event)
            yield item

    def close(self) -> None:
        """Cancel unfinished requests."""
        if self._watch is not None:
            self._watch.cancel()
        self._service.requests.remove(self._number)
        for name in self._open.values():
            self._service.engine.cancel(name)
        self._open.clear()

    def _on_event(self, number: int, event: Event) -> None:
        """Pass an event to the event loop. Runs in the engine's thread."""
        if isinstance(event, FinishedEvent) and event.reason == "error" and not event.code:
            kind = event.message.partition(":")[0]  # what follows may have local paths
            self._service.history.failed(f"the model failed: {kind}", self._id)
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
        except RuntimeError:  # the event loop is closed
            return

    async def _watch_disconnect(self) -> None:
        """Wait until the client disconnects; an error while waiting counts as a disconnect."""
        try:
            while (await self._request.receive())["type"] != "http.disconnect":
                pass
        finally:
            self._events.put_nowait(None)


def raise_if_failed(event: FinishedEvent) -> None:
    """Raise APIError if a request failed or was cancelled.

    The error itself may contain local paths and is only logged.
    """
    if event.code:  # caused by the request; its message is for the client
        raise APIError(400, event.message, code=event.code)
    if event.reason == "error":
        raise APIError(500, "the model failed on this request; see the server's log", code="failed")
    if event.reason == "cancelled":
        why = event.message or "the server is shutting down"
        raise APIError(503, f"the request was cancelled: {why}", code="cancelled")


class UsageCounter:
    """Count tokens of finished choices; a prompt counts once for its `n` choices."""

    def __init__(self, n: int):
        self._n, self._prompt, self._completion, self._cached = n, 0, 0, 0

    def add(self, number: int, event: FinishedEvent) -> None:
        """Count a finished choice."""
        self._completion += event.completion_tokens
        if number % self._n == 0:
            self._prompt += event.prompt_tokens
            self._cached += event.cached_tokens

    def usage(self) -> Usage:
        """Return the usage of all finished choices."""
        total = self._prompt + self._completion
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            total_tokens=total,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached),
        )


STREAM = "text/event-stream"


class ResponseBuilder(Protocol):
    """Builds engine requests and responses for one HTTP request."""

    def check(self) -> None:
        """Raise APIError if the request is not supported."""
        ...

    def engine_requests(self) -> Sequence[EngineRequest]:
        """Return one engine request per choice; may be slow.

        Raises:
            UntriedError: If its grammar must be compiled first. It is called again then.
        """
        ...

    async def full_response(self, engine_events: EngineEvents) -> BaseModel:
        """Return the complete response."""
        ...

    def chunks(self, engine_events: EngineEvents) -> AsyncIterator[BaseModel]:
        """Yield response chunks as they are generated."""
        ...


async def respond(
    service: Service, builder: ResponseBuilder, request: Request, body: GenerationRequest
) -> Response:
    """Run a request and return its response.

    Args:
        service: The service.
        builder: Builds engine requests and responses.
        request: HTTP request, watched for a disconnect.
        body: Its parameters.

    Raises:
        APIError: If the request is rejected.
    """
    builder.check()
    service.limits.check(client_of(request.scope).key)
    engine_events = EngineEvents(service, request, body.cache_salt)
    await engine_events.submit(await _engine_requests(service, builder))
    if body.stream:
        chunks = builder.chunks(engine_events)
        return EventStream(chunks, engine_events, usage=body.streams_usage)
    try:
        return JSONResponse((await builder.full_response(engine_events)).model_dump())
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        engine_events.close()


async def _engine_requests(service: Service, builder: ResponseBuilder) -> Sequence[EngineRequest]:
    """Return the engine requests, after a new grammar has been compiled on its own thread."""
    try:
        return await service.run_in_thread(builder.engine_requests)
    except UntriedError as untried:
        await service.trials.prepare(untried)
    return await service.run_in_thread(builder.engine_requests)


class StreamEvent(BaseModel):
    """An event with a name, as the Responses API sends them; `type` is the name."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class EventStream(StreamingResponse):
    """Server-sent events, which cancel the engine's requests when the stream ends."""

    def __init__(
        self, chunks: AsyncIterator[BaseModel], engine_events: EngineEvents, *, usage: bool
    ):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_frames(chunks, usage=usage), media_type=STREAM, headers=headers)
        self._engine_events = engine_events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._engine_events.close()


async def _frames(chunks: AsyncIterator[BaseModel], *, usage: bool) -> AsyncIterator[str]:
    hidden = None if usage else {"usage"}
    try:
        with convert_panics():
            async for chunk in chunks:
                name = f"event: {chunk.type}\n" if isinstance(chunk, StreamEvent) else ""
                yield f"{name}data: {chunk.model_dump_json(exclude=hidden)}\n\n"
    except ClientGoneError:
        return
    except Exception as error:  # noqa: BLE001 - sent as the stream's last event
        yield f"data: {json.dumps(error_json(http_error_of(error)))}\n\n"
    yield "data: [DONE]\n\n"
