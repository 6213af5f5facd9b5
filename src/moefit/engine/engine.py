"""Serve many requests with one model, one step at a time.

Owns the thread that steps: it admits requests, runs the model over the tokens that the scheduler
selected, samples, and sends events to listeners. Changes from other threads are queued and run
between two steps.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from threading import Condition, Thread, current_thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from moefit.engine.api import (
    EngineSettings,
    EngineStats,
    FinishReason,
    Listener,
    SamplingParams,
    TokenRate,
)
from moefit.engine.request_state import RequestState, limits_of
from moefit.engine.runner_probe import choose_runner
from moefit.engine.sampler import NO_NUMBERS, Choice, sample
from moefit.engine.scheduler import Limits, ScheduledTokens, Scheduler
from moefit.errors import RefusedError
from moefit.serve.config import Mode, Policy
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.model import ServedModel

T = TypeVar("T")


class CommandQueue:
    """Asked for from any thread, carried out by one."""

    def __init__(self):
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def ask(self, command: Callable[[], T]) -> Future[T]:
        """Put it behind the others; the result is what it returns or raises."""
        future: Future[T] = Future()
        self._waiting.append((command, future))
        return future

    def carry_out(self) -> None:
        """Do all that wait, those too that are asked for meanwhile."""
        while self._waiting:
            command, future = self._waiting.popleft()
            try:
                future.set_result(command())
            except BaseException as error:  # noqa: BLE001 - whoever asked hears it
                future.set_exception(error)

    def refuse(self, error: Exception) -> None:
        """Do none of them: everyone who waits gets this error."""
        while self._waiting:
            self._waiting.popleft()[1].set_exception(error)


T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_CONTEXT = 2048  # tokens, where nobody has reckoned with a number of them
_FAILED = "the engine has failed and must be started again; the log says why"
PROMPT_LOGITS = 16 << 20  # bytes of prompts' logits in one step, where they are asked for


class Engine:
    """Thread-safe. While it is started, the model is its own: nobody else computes with it."""

    def __init__(self, served: ServedModel, settings: EngineSettings | None = None):
        self.served, self.settings = served, settings or EngineSettings()
        self.settings.check()
        context = served.budget.context or self.settings.max_model_len or _CONTEXT
        self._abilities = limits_of(served, self.settings.max_model_len, context)
        self.max_model_len = self._abilities.max_model_len
        self._runner = choose_runner(served, context)
        self._scheduler = Scheduler(
            Limits(
                tokens=context,
                max_concurrency=self.settings.max_concurrency,
                prefill_chunk=self.settings.prefill_chunk,
                max_waiting=self.settings.max_waiting,
                whole_prompts=self._runner.whole_prompts,
            )
        )
        self._answers: dict[str, RequestState] = {}
        self._cancelled: set[str] = set()
        self._commands = CommandQueue()
        self._names = (f"request-{number}" for number in count(1))
        self._changed = Condition()  # guards all of this
        self._thread: Thread | None = None
        self._refusing = self._closing = False
        self._failure: str | None = None
        self._steps = self._prompt_tokens = 0
        self._pace = TokenRate()

    def start(self) -> None:
        """Begin to step. Raises RefusedError if the engine has been closed."""
        with self._changed:
            if self._closing:
                raise RefusedError("the engine has been closed; make another")
            if self._thread is None:
                self._thread = Thread(target=self._live, name="moefit-engine", daemon=True)
                self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why the engine's thread ended although nobody closed the engine; None while it runs.

        An engine that has failed refuses every request; only a new process serves again.
        """
        return self._failure

    def close(self, timeout: float | None = None) -> bool:
        """Stop after the step under way; every request that is left hears that it is cancelled.

        Args:
            timeout: Seconds to wait for that step; None waits for as long as it takes.

        Returns:
            Whether the engine's thread has ended. If not, the model is still being computed with,
            and only the end of the process stops that.
        """
        with self._changed:
            self._refusing = self._closing = True
            self._changed.notify_all()
        thread = self._thread
        if thread not in (None, current_thread()):
            thread.join(timeout)
        self._end_all("cancelled")
        self._commands.refuse(RefusedError("the engine was closed"))
        return thread in (None, current_thread()) or not thread.is_alive()

    def drain(self, timeout: float) -> bool:
        """Take no more requests, and wait for those that are there; False if some are left."""
        with self._changed:
            self._refusing = True
            return self._changed.wait_for(lambda: not self._answers, timeout)

    def submit(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, listener: Listener
    ) -> str:
        """Ask for an answer; the listener hears of it. Returns the request's name.

        Raises RequestTooLargeError for one that can never be held, QueueFullError, RefusedError
        while closing, ConfigError for values that cannot be.
        """
        self._abilities.check(prompt_ids, sampling)
        with self._changed:
            self._refuse_failed()
            if self._refusing:
                raise RefusedError("the server is shutting down and takes no more requests")
            name = next(self._names)
            answer = RequestState(name, prompt_ids, sampling, listener, self._forget)
            answer.set_decoding(self._abilities.language)
            piece = None if sampling.prompt_logprobs is None else self._rows_at_once()
            self._scheduler.submit(
                name, prompt=len(prompt_ids), answer=sampling.max_tokens, piece=piece
            )
            self._answers[name] = answer
            self._changed.notify_all()
        return name

    def cancel(self, request_id: str) -> None:
        """End a request before the next step. One that is not there any more is left alone."""
        with self._changed:
            if request_id in self._answers:
                self._cancelled.add(request_id)
                self._changed.notify_all()

    def set_memory(self, memory: str | int | None) -> MemoryBudget:
        """As `ServedModel.set_memory`, between two steps."""
        return self.between_steps(lambda: self.served.set_memory(memory))

    def set_mode(self, mode: Mode, **settings: Any) -> Policy:
        """As `ServedModel.set_mode`, between two steps."""
        return self.between_steps(lambda: self.served.set_mode(mode, **settings))

    def between_steps(self, change: Callable[[], T]) -> T:
        """Do it when no step is under way, and return, or raise, what it does.

        Raises RefusedError if the engine is closed, or has failed, before its turn comes.
        """
        with self._changed:
            self._refuse_failed()
            direct = self._thread in (None, current_thread()) or self._closing
            future = None if direct else self._commands.ask(change)
            self._changed.notify_all()
        return change() if future is None else future.result()

    def stats(self) -> EngineStats:
        """What is going on."""
        with self._changed:
            return EngineStats(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                kv_tokens_used=self._scheduler.reserved,
                kv_tokens=self._scheduler.limits.tokens,
                prompt_tokens_total=self._prompt_tokens,
                generation_tokens_total=self._pace.total,
                tokens_per_second=self._pace.per_second(),
                steps=self._steps,
                runner=self._runner.name,
            )

    def check(self) -> None:
        """Raise AssertionError if the scheduler's requests are not the engine's."""
        with self._changed:
            self._scheduler.check()
            known = {*self._scheduler.running, *self._scheduler.waiting}
            assert known == self._answers.keys(), known ^ self._answers.keys()

    def _rows_at_once(self) -> int:
        """Tokens of prompts whose logits may be held together."""
        return PROMPT_LOGITS // (self._abilities.vocabulary * self.served.model.dtype.itemsize)

    def _live(self) -> None:
        """Run the engine's thread. However it ends, nobody is left waiting for it."""
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - such as no memory to handle an error with
            self._fail(_public_error(error))
            _LOG.critical("the engine's thread ended", exc_info=error)

    def _fail(self, message: str) -> None:
        with self._changed:
            self._failure, self._refusing = message, True
            self._changed.notify_all()
        self._end_all("error", message)
        self._commands.refuse(RefusedError(_FAILED))

    def _refuse_failed(self) -> None:
        if self._failure is not None:
            raise RefusedError(_FAILED)

    def _run(self) -> None:
        """Step until the engine is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(self._due)
                if self._closing:
                    return
            try:
                self._turn()
            except BaseException as error:  # noqa: BLE001 - a panic in a library is no Exception
                _LOG.exception("the engine failed between steps")
                self._end_all("error", _public_error(error))

    def _due(self) -> bool:
        return bool(self._closing or self._commands or self._cancelled or self._answers)

    def _turn(self) -> None:
        """What was asked for since the last step, and the next step."""
        self._commands.carry_out()
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
        for name in cancelled:
            self._end(name, "cancelled")
        with self._changed:
            for name in self._scheduler.admit():
                self._open(self._answers[name])
            pieces = self._scheduler.plan()
        if pieces:
            self._step(pieces)

    def _open(self, answer: RequestState) -> None:
        """Make room for a request that has got its place."""
        answer.begin()
        tokens = len(answer.prompt) + answer.sampling.max_tokens
        self._alone(answer, lambda: self._runner.open(answer.name, tokens))

    def _step(self, pieces: Sequence[ScheduledTokens]) -> None:
        """Through the model with these; what goes wrong there is theirs alone."""
        answers = [self._answers[piece.request] for piece in pieces]
        works = [answer.work(piece) for answer, piece in zip(answers, pieces, strict=True)]
        try:
            with torch.inference_mode():
                logits_NV = self._runner.step(works)
                self._take(pieces, answers, logits_NV.split([work.wants for work in works]))
        except BaseException as error:  # noqa: BLE001 - whatever a model's code or a file does
            _LOG.exception("a step of %d requests failed", len(pieces))
            for piece in pieces:
                self._end(piece.request, "error", _public_error(error))

    def _take(
        self,
        pieces: Sequence[ScheduledTokens],
        answers: Sequence[RequestState],
        rows: Sequence[Tensor],
    ) -> None:
        """What the step gave: prompts read, and the next token of each whose text is at its end."""
        self._count_read(pieces, answers)
        going: list[tuple[RequestState, Tensor]] = []
        for piece, answer, rows_NV in zip(pieces, answers, rows, strict=True):
            if piece.start < len(answer.prompt):
                self._alone(answer, lambda: answer.read(piece, rows_NV))  # noqa: B023 - called here
            if piece.last and not answer.finished:
                going.append((answer, rows_NV[-1:]))
        if not going:
            return
        logits_NV = torch.cat([row for _, row in going]) if len(going) > 1 else going[0][1]
        chosen = sample(logits_NV, [answer.chooser for answer, _ in going])
        with self._changed:
            self._pace.add(len(going))
            for answer, _ in going:
                self._scheduler.grow(answer.name)
        for (answer, _), choice in zip(going, chosen, strict=True):
            self._alone(answer, lambda: _goes_on(answer, choice))  # noqa: B023 - called here

    def _alone(self, answer: RequestState, act: Callable[[], None]) -> None:
        """Do what concerns one answer; its failure is no other's."""
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - a tokenizer that panics, for example
            _LOG.exception("request %s failed", answer.name)
            answer.finish("error", _public_error(error))

    def _count_read(
        self, pieces: Sequence[ScheduledTokens], answers: Sequence[RequestState]
    ) -> None:
        with self._changed:
            self._steps += 1
            for piece, answer in zip(pieces, answers, strict=True):
                self._scheduler.done(piece)
                read = min(piece.stop, len(answer.prompt)) - piece.start
                self._prompt_tokens += max(0, read)

    def _end_all(self, reason: FinishReason, message: str = "") -> None:
        for name in list(self._answers):
            self._end(name, reason, message)

    def _end(self, name: str, reason: FinishReason, message: str = "") -> None:
        """A request's last event, if it has not had it, and its places free."""
        if (answer := self._answers.get(name)) is not None:
            answer.finish(reason, message)

    def _forget(self, name: str) -> None:
        with self._changed:
            if self._answers.pop(name, None) is None:
                return
            running = name in self._scheduler.running
            self._scheduler.remove(name)
            self._changed.notify_all()
            if running:
                self._free(name)

    def _free(self, name: str) -> None:
        """Give a request's places back. What fails there must not keep its last event back."""
        try:
            self._runner.close(name)
        except BaseException:  # noqa: BLE001 - whatever a runner does
            _LOG.exception("the places of request %s could not be given back", name)


def _goes_on(answer: RequestState, choice: Choice | None) -> None:
    if choice is None:
        answer.finish("error", NO_NUMBERS)
    else:
        answer.add(*choice)


def _public_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
