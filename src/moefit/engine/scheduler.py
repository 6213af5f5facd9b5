"""Select which requests run and which of their tokens are computed in the next step.

Requests are admitted in order of arrival while sequences and KV cache tokens are available. Each
step contains one token of every decoding request and a bounded number of prompt tokens, divided
evenly among the requests in prefill. Long prompts therefore do not delay decoding, and all prompts
progress in every step. No tensors, text or threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from moefit.errors import QueueFullError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits shared by all requests.

    Attributes:
        tokens: KV cache tokens, for prompts and completions at their maximum length; `resize`
            changes them.
        max_concurrency: Requests that run at the same time.
        prefill_chunk: Prompt tokens per step.
        max_waiting: Requests in the queue.
        whole_prompts: Process each prompt in one step and one prompt per step, for encoders and
            families whose prefill cannot be split.
        fixed_chunks: Process one prompt per step, in chunks that do not depend on other requests.
    """

    tokens: int
    max_concurrency: int
    prefill_chunk: int
    max_waiting: int
    whole_prompts: bool = False
    fixed_chunks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledTokens:
    """Tokens `start` to `stop` of a request, to be computed in a step.

    Attributes:
        request: Request id.
        start: First token.
        stop: End of the range, exclusive.
        last: Whether no known tokens follow, so that the step's logits give the next token.
    """

    request: str
    start: int
    stop: int
    last: bool


@dataclass(slots=True)
class _Request:
    """Progress of a request: `computed` of `num_tokens` tokens."""

    name: str
    prompt: int
    max_len: int  # prompt and completion, in tokens
    max_chunk: int | None  # prompt tokens per step, shared by all requests with this limit
    num_tokens: int
    computed: int = 0
    held: bool = False

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt


class Scheduler:
    """Queue of waiting requests and set of running requests.

    Attributes:
        tokens: KV cache tokens now.
        most: Tokens that the KV cache may hold if requests need them, at least `tokens`.
        reserved: Tokens of running requests.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.tokens = self.most = limits.tokens
        self._waiting: dict[str, _Request] = {}
        self._running: dict[str, _Request] = {}
        self.reserved = 0

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of running requests, in the order of admission."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Ids of waiting requests, in the order of arrival."""
        return tuple(self._waiting)

    def submit(
        self, name: str, *, prompt: int, max_new_tokens: int, max_chunk: int | None = None
    ) -> None:
        """Queue a request. The caller checks that it fits into `most`; later see `excessive`.

        Args:
            name: Request id.
            prompt: Prompt tokens.
            max_new_tokens: Tokens to generate at most.
            max_chunk: Limit on prompt tokens per step, shared by all requests that have one.

        Raises:
            QueueFullError: If too many requests are waiting.
        """
        assert prompt > 0, "a prompt has tokens"
        assert name not in self._waiting and name not in self._running, name
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFullError(
                f"{len(self._waiting):,} requests are waiting, the maximum; try again later, or "
                "start with a larger max_waiting"
            )
        max_chunk = None if max_chunk is None else max(1, max_chunk)
        self._waiting[name] = _Request(name, prompt, prompt + max_new_tokens, max_chunk, prompt)

    def admit(self) -> tuple[str, ...]:
        """Start the longest waiting requests while there is capacity, and return their ids."""
        admitted: list[str] = []
        for name, request in list(self._waiting.items()):
            if not self._fits(request, self.tokens):
                break  # keep the order of arrival
            self._running[name] = self._waiting.pop(name)
            self.reserved += request.max_len
            admitted.append(name)
        return tuple(admitted)

    def _fits(self, request: _Request, tokens: int) -> bool:
        full = len(self._running) >= self.limits.max_concurrency
        return not full and self.reserved + request.max_len <= tokens

    def resize(self, tokens: int) -> None:
        """Change the KV cache tokens, at least those that are reserved."""
        assert self.reserved <= tokens
        self.tokens, self.most = tokens, max(tokens, self.most)

    def allow(self, most: int) -> tuple[str, ...]:
        """Change `most`, and return waiting requests that are larger: they could never run."""
        self.most = max(self.tokens, most)
        return tuple(name for name, one in self._waiting.items() if one.max_len > self.most)

    def wanted(self) -> int:
        """Return the tokens of running requests and of those that could start beside them.

        These are the longest waiting ones, as many as concurrency allows and `most` holds, without
        those that `allow` names, which the engine refuses before it starts any.
        """
        wanted, places = self.reserved, self.limits.max_concurrency - len(self._running)
        able = (one for one in self._waiting.values() if one.max_len <= self.most)
        for request in islice(able, max(0, places)):
            if wanted + request.max_len > self.most:
                break
            wanted += request.max_len
        return wanted

    def computed(self, name: str) -> int:
        """Return how many tokens of a request have been computed."""
        running = self._running.get(name)
        return 0 if running is None else running.computed

    def waits(self) -> dict[str, str]:
        """Return what requests wait for, in words, for those of which no step computes anything."""
        held = "a prefix that another request computes, or that is read from files"
        found = {one.name: held for one in self._running.values() if one.held}
        for place, request in enumerate(self._waiting.values()):
            if place:
                before = "1 request" if place == 1 else f"{place:,} requests"
                found[request.name] = f"{before} before it"
            elif len(self._running) >= self.limits.max_concurrency:
                found[request.name] = f"one of {self.limits.max_concurrency:,} places to run"
            else:
                free = self.most - self.reserved
                found[request.name] = f"{request.max_len:,} tokens of KV cache; {free:,} are free"
        return found

    @property
    def has_work(self) -> bool:
        """Whether a step can compute, or a waiting request can start, or can never start."""
        if any(not request.held for request in self._running.values()):
            return True
        first = next(iter(self._waiting.values()), None)
        if first is None:
            return False
        return first.max_len > self.most or self._fits(first, self.most)

    def prefilling(self) -> tuple[tuple[str, int], ...]:
        """Return requests in prefill that are not held, with their computed tokens."""
        return tuple(
            (request.name, request.computed)
            for request in self._running.values()
            if request.prefilling and not request.held
        )

    def hold(self, name: str) -> None:
        """Schedule no tokens of a running request until `resume`."""
        self._running[name].held = True

    def resume(self, name: str) -> None:
        """Schedule a request's tokens again."""
        self._running[name].held = False

    def plan(self) -> tuple[ScheduledTokens, ...]:
        """Return the tokens of the next step, decoding requests first. Changes no state."""
        running = [request for request in self._running.values() if not request.held]
        scheduled = [_scheduled_tokens(one, 1) for one in running if not one.prefilling]
        prefilling = [request for request in running if request.prefilling]
        if self.limits.whole_prompts or self.limits.fixed_chunks:
            first = prefilling[:1]
            return (*scheduled, *(_scheduled_tokens(one, self._own_chunk(one)) for one in first))
        shares = split_evenly(self.limits.prefill_chunk, _prompt_shares(prefilling))
        scheduled += [
            _scheduled_tokens(request, share)
            for request, share in zip(prefilling, shares, strict=True)
            if share
        ]
        return tuple(scheduled)

    def _own_chunk(self, request: _Request) -> int:
        """Return how many tokens of a prompt a step computes if it computes no other prompt."""
        if self.limits.whole_prompts:
            return request.prompt
        most = min(self.limits.prefill_chunk, request.prompt - request.computed)
        return most if request.max_chunk is None else min(most, request.max_chunk)

    def skip(self, name: str, tokens: int) -> None:
        """Record that the first tokens of a request need no computing, before its first step."""
        request = self._running[name]
        assert request.computed <= tokens < request.prompt, "one token is left to compute"
        request.computed = tokens

    def advance(self, chunk: ScheduledTokens) -> None:
        """Record that these tokens have been computed."""
        request = self._running[chunk.request]
        assert request.computed == chunk.start, "chunks are computed in order"
        request.computed = chunk.stop

    def append_token(self, name: str) -> None:
        """Record a generated token, which the next step will compute."""
        self.append_tokens(name, 1)

    def append_tokens(self, name: str, number: int) -> None:
        """Record generated tokens, all but the last of which this step has computed as a draft."""
        request = self._running[name]
        request.num_tokens += number
        request.computed += number - 1

    def remove(self, name: str) -> bool:
        """Remove a waiting or running request; return False if there is none of this name."""
        if (request := self._running.pop(name, None)) is not None:
            self.reserved -= request.max_len
            return True
        return self._waiting.pop(name, None) is not None

    def check(self) -> None:
        """Raise AssertionError if a limit is exceeded or a request's counts are inconsistent."""
        limits = self.limits
        assert len(self._running) <= limits.max_concurrency
        assert len(self._waiting) <= limits.max_waiting
        assert not self._running.keys() & self._waiting.keys()
        assert self.reserved == sum(request.max_len for request in self._running.values())
        assert self.reserved <= self.tokens <= self.most
        for request in self._running.values():
            assert 0 <= request.computed <= request.num_tokens <= request.max_len, request
            assert request.num_tokens >= request.prompt, request
            assert request.prefilling or request.num_tokens - request.computed <= 1, request
        for request in self._waiting.values():
            assert request.computed == 0 and request.num_tokens == request.prompt, request


def _prompt_shares(prefilling: Sequence[_Request]) -> list[int]:
    """Return how many prompt tokens each request may process in a step."""
    wanted, used = [], 0
    for request in prefilling:
        want = request.prompt - request.computed
        if request.max_chunk is not None:
            want = min(want, max(0, request.max_chunk - used))
            used += want
        wanted.append(want)
    return wanted


def _scheduled_tokens(request: _Request, tokens: int) -> ScheduledTokens:
    stop = min(request.num_tokens, request.computed + tokens)
    return ScheduledTokens(
        request=request.name, start=request.computed, stop=stop, last=stop == request.num_tokens
    )


def split_evenly(total: int, limits: Sequence[int]) -> list[int]:
    """Divide `total` evenly, giving each entry at most its limit; the first get the remainder.

    >>> split_evenly(10, [2, 9, 9])
    [2, 4, 4]
    >>> split_evenly(3, [5, 5])
    [2, 1]
    """
    shares = [0] * len(limits)
    left, unsatisfied = total, list(range(len(limits)))
    while left and unsatisfied:
        each = max(1, left // len(unsatisfied))
        for index in unsatisfied:
            given = min(each, limits[index] - shares[index], left)
            shares[index] += given
            left -= given
        unsatisfied = [index for index in unsatisfied if shares[index] < limits[index]]
    return shares
