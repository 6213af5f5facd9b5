"""An engine with the real one's interface whose tokens are computed from the prompt."""

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from time import sleep
from typing import Any

from moefit.engine.api import (
    EngineSettings,
    EngineStats,
    Event,
    FinishedEvent,
    Listener,
    PromptEvent,
    RequestProgress,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from moefit.engine.detokenize import IncrementalDetokenizer
from moefit.engine.invariance import Invariance
from moefit.engine.prefix.cache import PrefixStats
from moefit.engine.prefix.reuse import Coverage
from moefit.engine.prefix.store import DiskStats
from moefit.engine.request_state import Longest
from moefit.engine.speculation.drafts import SpeculationStats
from moefit.engine.speculation.requests import SpeculationCoverage
from moefit.errors import QueueFullError, RefusedError, RequestTooLargeError
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.model import ServedModel


def following(token: int, size: int) -> int:
    """Return the token after `token`, never a special token of the reference model."""
    return (token * 31 + 17) % (size - 1) + 1


class FakeEngine:
    """Generates tokens for all requests in turn.

    Args:
        pause: Seconds between turns.
        fail: Error messages by prompt; such requests fail after two tokens.
        tokens: Tokens to generate instead of computed ones.
        waits: Reported queue time in seconds.
    """

    def __init__(self, served: ServedModel, *, pause: float = 0.0):
        self.served, self.settings, self.max_model_len = served, EngineSettings(), 512
        self.pause, self.fail, self.waits = pause, {}, 0.0
        self.tokens: Callable[[Sequence[int]], Sequence[int]] | None = None
        self.cancelled: list[str] = []
        self.submitted: list[tuple[tuple[int, ...], SamplingParams]] = []
        self.labels: list[str | None] = []
        self._size = served.model.config.vocab_size
        self._names = (f"request-{n}" for n in count())
        self._going: dict[str, tuple[Iterator[Event], Listener]] = {}
        self._changed = threading.Condition()
        self._draining = self._closing = False
        self._thread: threading.Thread | None = None
        self.full = False
        self.failure: str | None = None
        self.steps_fail = False
        self.invariance = Invariance(not_covered=())
        self.prefix_coverage = Coverage(active=True)
        self.speculation_coverage = SpeculationCoverage(active=True, reason="by ngram")
        self.cached_tokens = 0

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self, timeout: float | None = None) -> bool:
        with self._changed:
            self._closing = self._draining = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        for _, listener in self._going.values():
            listener(FinishedEvent(reason="cancelled", prompt_tokens=1, completion_tokens=0))
        self._going.clear()
        return True

    def drain(self, timeout: float) -> bool:
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._going, timeout)

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        listener: Listener,
        *,
        label: str | None = None,
    ) -> str:
        wanted = len(prompt_ids) + sampling.max_tokens
        if wanted > self.max_model_len:
            raise RequestTooLargeError(f"{wanted} tokens, but {self.max_model_len} fit")
        if self.full:
            raise QueueFullError("1,024 requests wait")
        with self._changed:
            if self._draining:
                raise RefusedError("shutting down")
            name = next(self._names)
            self.submitted.append((tuple(prompt_ids), sampling))
            self.labels.append(label)
            self._going[name] = (self._events(tuple(prompt_ids), sampling), listener)
            self._changed.notify_all()
        return name

    def check_length(self, prompt: int, max_tokens: int) -> None:
        Longest(tokens=self.max_model_len).check(prompt, max_tokens)

    def set_memory(self, memory: str | int | None) -> MemoryBudget:
        return self.served.set_memory(memory)

    def least_memory(self) -> int:
        return self.served.budget.min_bytes

    def progress(self) -> dict[str, RequestProgress]:
        with self._changed:
            return {
                name: RequestProgress(
                    stage="answer", waits_for="", computed_tokens=3, cached_tokens=1,
                    generated_tokens=2,
                )
                for name in self._going
            }  # fmt: skip

    def cancel(self, request_id: str, message: str = "", *, code: str = "") -> None:
        with self._changed:
            if (going := self._going.pop(request_id, None)) is not None:
                self.cancelled.append(request_id)
            self._changed.notify_all()
        if going is not None:
            end = FinishedEvent(
                reason="cancelled", prompt_tokens=1, completion_tokens=0, message=message, code=code
            )
            going[1](end)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._going), waiting=0, kv_tokens_used=17, kv_tokens=2048,
            kv_tokens_reserved=1024, kv_tokens_most=8192,
            prompt_tokens_total=5, generation_tokens_total=7, tokens_per_second=1.5,
            steps=3, runner="fake",
            prefix_files=DiskStats(files=3, bytes=300, limit=1000, read=64, written=192),
            prefixes=PrefixStats(tokens=160, shared=32, queries=1000, hits=750, evicted=64),
            speculation=SpeculationStats(
                drafts=10, drafted=40, accepted=30, accepted_at=(10, 9, 6, 5), plain_steps=2
            ),
        )  # fmt: skip

    def between_steps(self, change: Callable[[], Any]) -> Any:
        return change()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or bool(self._going))
                if self._closing:
                    return
                turn = list(self._going.items())
            for name, (events, listener) in turn:
                with self._changed:
                    event = next(events) if name in self._going else None
                    if isinstance(event, FinishedEvent):
                        del self._going[name]
                        self._changed.notify_all()
                if event is not None:
                    listener(event)
            sleep(self.pause)

    def _events(self, prompt: tuple[int, ...], sampling: SamplingParams) -> Iterator[Event]:
        told = None
        if (top := sampling.prompt_logprobs) is not None:
            told = (None, *(self._logprob(token, top) for token in prompt[1:]))
        yield PromptEvent(logprobs=told, waited=self.waits)
        tokenizer = self.served.tokenizer
        text = IncrementalDetokenizer(
            tokenizer, sampling.stop, after=prompt, visible=sampling.visible
        )
        made, last = 0, prompt[-1] + (sampling.seed or 0)
        given = list(self.tokens(prompt)) if self.tokens else None
        for made in range(1, sampling.max_tokens + 1):
            last = given[made - 1] if given else following(last, self._size)
            if prompt in self.fail and made > 2:
                yield self._finished("error", prompt, made, message=self.fail[prompt])
                return
            logprob = None if sampling.logprobs is None else self._logprob(last, sampling.logprobs)
            yield TokenEvent(token=last, text=text.push(last), logprob=logprob)
            if text.stopped or last in sampling.stop_ids or (given and made == len(given)):
                yield self._finished("stop", prompt, made, text=text.finish())
                return
        yield self._finished("length", prompt, made, text=text.finish())

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        best = [following(token, self._size) + n for n in range(top)]
        likely = tuple((one % self._size, -0.25 * (n + 1)) for n, one in enumerate(best))
        return TokenLogprob(token=token, logprob=-1.5 - token / 8192, top=likely)

    def _finished(
        self, reason: Any, prompt: Sequence[int], made: int, **more: str
    ) -> FinishedEvent:
        return FinishedEvent(
            reason=reason, prompt_tokens=len(prompt), completion_tokens=made,
            cached_tokens=self.cached_tokens, **more,
        )  # fmt: skip
