"""Send the engine's events as an HTTP response: one JSON body, or server-sent events.

`EngineEvents` brings the events of one HTTP request from the engine's thread to the event loop, and
cancels when the client has gone. `TokenCounts` sums up tokens for `usage`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Protocol

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moefit.engine.api import Event, FinishedEvent
from moefit.server.errors import APIError, body_from, from_exception, without_panics
from moefit.server.openai_schema import Usage
from moefit.server.service import EngineRequest, Service


class ClientGoneError(Exception):
    """Nobody is there any more to be answered."""


class EngineEvents:
    """Answers on their way. Iterate for (number, event) until all have finished; then `close`."""

    def __init__(self, service: Service, request: Request):
        self._service, self._request = service, request
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._open: dict[int, str] = {}
        self._watch: asyncio.Task[None] | None = None

    async def begin(self, engine_requests: Sequence[EngineRequest]) -> None:
        """Ask the engine for all answers, or, if one can't be had, for none."""
        listen = self._service.telemetry.listen
        try:
            for number, item in enumerate(engine_requests):
                self._open[number] = self._service.engine.submit(
                    item.prompt, item.sampling, listen(partial(self._hear, number))
                )
        except BaseException:
            self.close()
            raise
        self._watch = asyncio.create_task(self._until_gone())

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self._open:
            heard = await self._events.get()
            if heard is None:
                raise ClientGoneError
            number, event = heard
            if isinstance(event, FinishedEvent):
                del self._open[number]
                raise_failure(event)
            yield heard

    def close(self) -> None:
        """Cancel what has not finished."""
        if self._watch is not None:
            self._watch.cancel()
        for name in self._open.values():
            self._service.engine.cancel(name)
        self._open.clear()

    def _hear(self, number: int, event: Event) -> None:
        """Called in the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
        except RuntimeError:  # the loop has ended, and everybody has gone
            return

    async def _until_gone(self) -> None:
        """Wait for the client to go; if it can't be watched any more, it counts as gone."""
        try:
            while (await self._request.receive())["type"] != "http.disconnect":
                pass
        finally:
            self._events.put_nowait(None)


def raise_failure(event: FinishedEvent) -> None:
    """Raise APIError for an answer that did not come to its end.

    What failed may name our files, and stays in the log.
    """
    if event.reason == "error":
        raise APIError(
            500, "the model failed at this request; the server's log says why", code="failed"
        )
    if event.reason == "cancelled":
        why = event.message or "the server is shutting down"
        raise APIError(503, f"the answer was given up: {why}", code="cancelled")


class TokenCounts:
    """Counts as answers end; of the `n` to a prompt, the prompt's tokens count once."""

    def __init__(self, n: int):
        self._n, self._prompt, self._made = n, 0, 0

    def add(self, number: int, event: FinishedEvent) -> None:
        """Answer `number` has ended."""
        self._made += event.completion_tokens
        if number % self._n == 0:
            self._prompt += event.prompt_tokens

    def usage(self) -> Usage:
        """All that have ended."""
        total = self._prompt + self._made
        return Usage(prompt_tokens=self._prompt, completion_tokens=self._made, total_tokens=total)


STREAM = "text/event-stream"
CLIENT_CLOSED_REQUEST = 499  # nginx's word for a client that has gone


class ResponseBuilder(Protocol):
    """One request: what it asks of the engine, and what it makes of the replies."""

    @property
    def streams_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        ...

    def check(self) -> None:
        """Refuse what is not done."""
        ...

    def engine_requests(self) -> Sequence[EngineRequest]:
        """What is asked of the engine; may take long."""
        ...

    async def full_response(self, engine_events: EngineEvents) -> BaseModel:
        """All answers at once."""
        ...

    def chunks(self, engine_events: EngineEvents) -> AsyncIterator[BaseModel]:
        """Answers as they come."""
        ...


async def respond(
    service: Service, job: ResponseBuilder, request: Request, *, stream: bool
) -> Response:
    """Carry a job out."""
    job.check()
    engine_events = EngineEvents(service, request)
    await engine_events.begin(await service.run_in_thread(job.engine_requests))
    if stream:
        return EventStream(job.chunks(engine_events), engine_events, usage=job.streams_usage)
    try:
        return JSONResponse((await job.full_response(engine_events)).model_dump())
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        engine_events.close()


class EventStream(StreamingResponse):
    """Sends pieces as they come, and closes `replies` when it ends, however it does."""

    def __init__(
        self, pieces: AsyncIterator[BaseModel], engine_events: EngineEvents, *, usage: bool
    ):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_frames(pieces, usage=usage), media_type=STREAM, headers=headers)
        self._replies = engine_events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As every response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._replies.close()


async def _frames(pieces: AsyncIterator[BaseModel], *, usage: bool) -> AsyncIterator[str]:
    hidden = None if usage else {"usage"}
    try:
        with without_panics():
            async for piece in pieces:
                yield f"data: {piece.model_dump_json(exclude=hidden)}\n\n"
    except ClientGoneError:
        return
    except Exception as error:  # noqa: BLE001 - the answer has begun, so its end says what went wrong
        yield f"data: {json.dumps(body_from(from_exception(error)))}\n\n"
    yield "data: [DONE]\n\n"
