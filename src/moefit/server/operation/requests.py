"""The requests that run or wait: how far each is, and cancelling one.

One HTTP request may have several choices, each a request of the engine. Ids may occur twice, since
clients choose them; a number of ours tells requests apart.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import monotonic, time_ns
from typing import Literal

from pydantic import BaseModel

from moefit.engine.api import RequestProgress
from moefit.engine.engine import Engine
from moefit.server.operation.request_id import Client

MAX_SHOWN = 100
CANCELLED = "cancelled_by_operator"
RequestState = Literal["waiting", "prompt", "answer", "ended"]


class RequestView(BaseModel):
    """One request that runs or waits.

    Attributes:
        number: Tells requests apart; what cancelling takes.
        request_id: Its id, which need not be unique.
        key: Name of its key, if any.
        path: Its endpoint.
        seconds: Time since it was queued.
        choices: How many answers it has, prompts times `n`.
        state: Whether it waits, its prompt is read, it is being answered, or all has been computed.
        waits_for: What it waits for, in words; may be empty.
        prompt_tokens: Tokens of its prompts.
        computed_tokens: Those of them, and of answers, that have been computed.
        cached_tokens: Those of the prompts that were reused.
        generated_tokens: Tokens of its answers so far.
        max_tokens: Those of them at most.
    """

    number: int
    request_id: str
    key: str | None
    path: str
    seconds: float
    choices: int
    state: RequestState
    waits_for: str
    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int
    generated_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A request of which the engine has all choices.

    Attributes:
        names: The engine's ids of the choices.
    """

    request_id: str
    client: Client
    path: str
    names: Sequence[str]
    prompt_tokens: int
    max_tokens: int
    began: float = field(default_factory=monotonic)

    def view(self, number: int, engine: Mapping[str, RequestProgress], now: float) -> RequestView:
        """Return the state of its choices together."""
        known = [engine[name] for name in self.names if name in engine]
        stages = {one.stage for one in known}
        state: RequestState = "ended"
        for one in ("answer", "prompt", "waiting"):
            if one in stages:
                state = one
                break
        waits = {one.waits_for for one in known if one.stage == state}
        return RequestView(
            number=number,
            request_id=self.request_id,
            key=self.client.key,
            path=self.path,
            seconds=round(now - self.began, 3),
            choices=len(self.names),
            state=state,
            waits_for="" if "" in waits else min(waits, default=""),
            prompt_tokens=self.prompt_tokens,
            computed_tokens=sum(one.computed_tokens for one in known),
            cached_tokens=sum(one.cached_tokens for one in known),
            generated_tokens=sum(one.generated_tokens for one in known),
            max_tokens=self.max_tokens,
        )


class RequestTable:
    """Requests that run or wait. Thread-safe.

    Args:
        engine: Computes them.
    """

    def __init__(self, engine: Engine):
        self._engine, self._lock = engine, threading.Lock()
        # A server that takes over, or another one at the same socket, has other numbers.
        self._numbers = count(time_ns() // 1000)
        self._running: dict[int, Running] = {}

    def add(self, request: Running) -> int:
        """Add a request and return its number."""
        with self._lock:
            number = next(self._numbers)
            self._running[number] = request
            return number

    def remove(self, number: int) -> None:
        """Remove a request that has been answered."""
        with self._lock:
            self._running.pop(number, None)

    def views(self, client: Client) -> tuple[list[RequestView], int]:
        """Return the first requests that a client may see, and how many there are."""
        with self._lock:
            seen = [(number, one) for number, one in self._running.items() if _sees(client, one)]
        progress, now = self._engine.progress(), monotonic()
        return [one.view(number, progress, now) for number, one in seen[:MAX_SHOWN]], len(seen)

    def cancel(self, number: int, client: Client) -> bool:
        """Cancel a request, and return whether there was one that the client may cancel."""
        with self._lock:
            found = self._running.get(number)
        if found is None or not _sees(client, found):
            return False
        for name in found.names:
            self._engine.cancel(name, "an operator cancelled this request", code=CANCELLED)
        return True


def _sees(client: Client, request: Running) -> bool:
    return client.operator or client.key == request.client.key
