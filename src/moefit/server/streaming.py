"""The response to a request for answers: one JSON, or server-sent events as OpenAI sends them.

Owns the frames (`data: {...}`, and `data: [DONE]` at the end), and that whatever happens, the
answers behind them are closed. Knows nothing of what is in them.
"""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moefit.server.refusal import body_for, of_any, without_panics
from moefit.server.replies import ClientGoneError, Replies
from moefit.server.service import Service, Wish

STREAM = "text/event-stream"
NOBODY_THERE = 499  # nginx's word for a client that has gone


class Job(Protocol):
    """One request: what it asks of the engine, and what it makes of the replies."""

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        ...

    def check(self) -> None:
        """Refuse what is not done."""
        ...

    def wishes(self) -> Sequence[Wish]:
        """What is asked of the engine; may take long."""
        ...

    async def whole(self, replies: Replies) -> BaseModel:
        """All answers at once."""
        ...

    def pieces(self, replies: Replies) -> AsyncIterator[BaseModel]:
        """Answers as they come."""
        ...


async def respond(service: Service, job: Job, request: Request, *, stream: bool) -> Response:
    """Carry a job out."""
    job.check()
    replies = Replies(service, request)
    await replies.begin(await service.aside(job.wishes))
    if stream:
        return EventStream(job.pieces(replies), replies, usage=job.tells_usage)
    try:
        return JSONResponse((await job.whole(replies)).model_dump())
    except ClientGoneError:
        return Response(status_code=NOBODY_THERE)
    finally:
        replies.close()


class EventStream(StreamingResponse):
    """Sends pieces as they come, and closes `replies` when it ends, however it does."""

    def __init__(self, pieces: AsyncIterator[BaseModel], replies: Replies, *, usage: bool):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_frames(pieces, usage=usage), media_type=STREAM, headers=headers)
        self._replies = replies

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
        yield f"data: {json.dumps(body_for(of_any(error)))}\n\n"
    yield "data: [DONE]\n\n"
