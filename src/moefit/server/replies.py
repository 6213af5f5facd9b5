"""The engine's events of one HTTP request, brought to the event loop.

Owns the requests in the engine that one HTTP request is made of: that they begin together, end
when the client goes away, and that each event finds its answer. Knows nothing of what is made of
them.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

from starlette.requests import Request

from moefit.engine.request import Event, Finished
from moefit.server.refusal import Refused
from moefit.server.service import Service, Wish


class ClientGoneError(Exception):
    """Nobody is there any more to be answered."""


class Replies:
    """Answers on their way. Iterate for (number, event) until all have finished; then `close`."""

    def __init__(self, service: Service, request: Request):
        self._service, self._request = service, request
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._open: dict[int, str] = {}
        self._watch: asyncio.Task[None] | None = None

    async def begin(self, wishes: Sequence[Wish]) -> None:
        """Ask the engine for all answers, or, if one can't be had, for none."""
        listen = self._service.telemetry.listen
        try:
            for number, wish in enumerate(wishes):
                self._open[number] = self._service.engine.submit(
                    wish.prompt, wish.sampling, listen(partial(self._hear, number))
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
            if isinstance(event, Finished):
                del self._open[number]
                refuse_failure(event)
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


def refuse_failure(event: Finished) -> None:
    """Raise Refused for an answer that did not come to its end.

    What failed may name our files, and stays in the log.
    """
    if event.reason == "error":
        raise Refused(
            500, "the model failed at this request; the server's log says why", code="failed"
        )
    if event.reason == "cancelled":
        why = event.message or "the server is shutting down"
        raise Refused(503, f"the answer was given up: {why}", code="cancelled")
