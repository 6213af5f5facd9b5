"""Which requests run, and which of their tokens go into the next step.

Owns the order of service: first come, first served into a bounded number of places and of tokens;
in every step one token of each request that is decoding, and a bounded number of prompt tokens,
shared evenly among those still reading. So decoding never waits for a long prompt, and every
prompt goes on in every step. Pure: knows nothing of tensors, texts or threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moefit.errors import QueueFullError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What all requests share. tokens: of all that run, prompts and answers, at their longest.

    whole_prompts: a prompt is read in one step (an encoder, or a family that can't go on reading),
    one prompt a step.
    """

    tokens: int
    max_concurrency: int
    prefill_chunk: int
    max_waiting: int
    whole_prompts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledTokens:
    """Tokens `start` to `stop` of a request's text are read in a step.

    last: they are the last that are known, so that the step gives the next one.
    """

    request: str
    start: int
    stop: int
    last: bool


@dataclass(slots=True)
class _Request:
    """`read` tokens of `known` have been through the model; the first `prompt` were given."""

    name: str
    prompt: int
    most: int  # tokens, prompt and answer
    piece: int | None  # tokens that one step may read of its prompt and all others that have one
    known: int
    read: int = 0

    @property
    def reading(self) -> bool:
        return self.read < self.prompt


class Scheduler:
    """Waiting and running requests."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._waiting: dict[str, _Request] = {}
        self._running: dict[str, _Request] = {}
        self.reserved = 0  # tokens, of those that run

    @property
    def running(self) -> tuple[str, ...]:
        """The requests that have a place, in the order in which they got it."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[str, ...]:
        """The requests that wait for a place, in the order in which they came."""
        return tuple(self._waiting)

    def submit(self, name: str, *, prompt: int, answer: int, piece: int | None = None) -> None:
        """Let a request of so many tokens wait. piece: the most of its prompt in one
        step, and of the prompts of all that have such a limit together.

        Raises QueueFullError. That it fits in at all is the caller's to see to.
        """
        assert prompt > 0, "a prompt has tokens"
        assert prompt + answer <= self.limits.tokens, "it would wait for ever"
        assert name not in self._waiting and name not in self._running, name
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFullError(
                f"{len(self._waiting):,} requests are waiting, as many as may; try again later, or "
                "start with a larger max_waiting"
            )
        piece = None if piece is None else max(1, piece)
        self._waiting[name] = _Request(name, prompt, prompt + answer, piece, prompt)

    def admit(self) -> tuple[str, ...]:
        """Give places to those that have waited longest, as far as places and tokens go."""
        admitted: list[str] = []
        for name, request in list(self._waiting.items()):
            full = len(self._running) >= self.limits.max_concurrency
            if full or self.reserved + request.most > self.limits.tokens:
                break  # who came later does not overtake
            self._running[name] = self._waiting.pop(name)
            self.reserved += request.most
            admitted.append(name)
        return tuple(admitted)

    def plan(self) -> tuple[ScheduledTokens, ...]:
        """The next step, decoding first; changes nothing."""
        pieces = [
            _scheduled_tokens(request, 1)
            for request in self._running.values()
            if not request.reading
        ]
        reading = [request for request in self._running.values() if request.reading]
        if self.limits.whole_prompts:
            return (
                *pieces,
                *(_scheduled_tokens(request, request.prompt) for request in reading[:1]),
            )
        shares = shared(self.limits.prefill_chunk, _wanted(reading))
        pieces += [
            _scheduled_tokens(request, share)
            for request, share in zip(reading, shares, strict=True)
            if share
        ]
        return tuple(pieces)

    def done(self, piece: ScheduledTokens) -> None:
        """That piece has been through the model."""
        request = self._running[piece.request]
        assert request.read == piece.start, "pieces are read in order"
        request.read = piece.stop

    def grow(self, name: str) -> None:
        """The request's text has one more token, which has been through no step yet."""
        self._running[name].known += 1

    def remove(self, name: str) -> bool:
        """Forget a request, whatever its state; False if there is none such."""
        if (request := self._running.pop(name, None)) is not None:
            self.reserved -= request.most
            return True
        return self._waiting.pop(name, None) is not None

    def check(self) -> None:
        """Raise AssertionError if the limits or a request's counts don't hold."""
        limits = self.limits
        assert len(self._running) <= limits.max_concurrency
        assert len(self._waiting) <= limits.max_waiting
        assert not self._running.keys() & self._waiting.keys()
        assert self.reserved == sum(request.most for request in self._running.values())
        assert self.reserved <= limits.tokens
        for request in self._running.values():
            assert 0 <= request.read <= request.known <= request.most, request
            assert request.known >= request.prompt, request
            assert request.reading or request.known - request.read <= 1, request
        for request in self._waiting.values():
            assert request.read == 0 and request.known == request.prompt, request


def _wanted(reading: Sequence[_Request]) -> list[int]:
    """Prompt tokens that each may read in a step; those with a limit have one together."""
    wanted, used = [], 0
    for request in reading:
        want = request.prompt - request.read
        if request.piece is not None:
            want = min(want, max(0, request.piece - used))
            used += want
        wanted.append(want)
    return wanted


def _scheduled_tokens(request: _Request, tokens: int) -> ScheduledTokens:
    stop = min(request.known, request.read + tokens)
    return ScheduledTokens(
        request=request.name, start=request.read, stop=stop, last=stop == request.known
    )


def shared(total: int, wants: Sequence[int]) -> list[int]:
    """`total` divided evenly among those who want so much; none gets more than it wants.

    What can't be divided goes to the first.

    >>> shared(10, [2, 9, 9])
    [2, 4, 4]
    >>> shared(3, [5, 5])
    [2, 1]
    """
    shares = [0] * len(wants)
    left, hungry = total, list(range(len(wants)))
    while left and hungry:
        each = max(1, left // len(hungry))
        for index in hungry:
            given = min(each, wants[index] - shares[index], left)
            shares[index] += given
            left -= given
        hungry = [index for index in hungry if shares[index] < wants[index]]
    return shares
