"""Serve many requests with one model, one step at a time.

`Engine` runs a thread that admits requests, runs the model over the tokens selected by the
scheduler, samples, and sends events to listeners. Changes requested by other threads are queued and
applied between two steps.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from threading import Condition, Thread, current_thread
from time import monotonic
from typing import Any, TypeVar

import torch
from torch import Tensor

from moefit.engine.api import (
    EngineSettings,
    EngineStats,
    FinishReason,
    Listener,
    RequestProgress,
    SamplingParams,
    TokenRate,
)
from moefit.engine.commands import CommandQueue
from moefit.engine.context.growth import EngineSizes, KvGrowth
from moefit.engine.invariance import Invariance, of_policy
from moefit.engine.prefix.files import EngineParts
from moefit.engine.prefix.requests import RequestPrefixes
from moefit.engine.prefix.reuse import Coverage
from moefit.engine.request_state import RequestState, model_limits
from moefit.engine.runner_probe import prepared
from moefit.engine.sampler import Choice, Failure, sample_drafts
from moefit.engine.scheduler import Limits, ScheduledTokens, Scheduler
from moefit.engine.speculation.drafts import DraftedRequest, Drafter
from moefit.engine.speculation.requests import Speculation, SpeculationCoverage, drafter_of
from moefit.errors import RefusedError
from moefit.serve.config import Mode, Policy
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.model import ServedModel

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_DEFAULT_CONTEXT = 2048  # tokens, if the budget does not set it
_FAILED_MESSAGE = "the engine has failed; restart the process (see the log for the error)"
FAILED_STEPS = 3  # consecutive failed steps after which `steps_fail` is True
FAILED_SECONDS = 60.0  # after the last failed step, until requests may try again
PROMPT_LOGITS_BYTES = 16 << 20  # prompt logits of one step, if requested


class Engine:
    """Continuous-batching engine for one model. Thread-safe.

    While the engine runs, no other code may compute with the model.

    Args:
        served: Model to serve, loaded with `moefit.load`.
        settings: Limits on concurrency, request length and prompt chunks; the defaults if None.
        drafter: Where drafts come from; None follows `settings.speculate`.

    Attributes:
        speculation: Which drafts steps verify.
    """

    def __init__(
        self,
        served: ServedModel,
        settings: EngineSettings | None = None,
        *,
        drafter: Drafter | None = None,
    ):
        self.served, self.settings = served, settings or EngineSettings()
        self.settings.check()
        context = served.budget.context or self.settings.max_model_len or _DEFAULT_CONTEXT
        self._limits = model_limits(served)
        whole = min(self.settings.max_model_len or context, self._limits.own or context, context)
        self._runner, self._invariance = prepared(served, self.settings, context, whole)
        longest = self.settings.step_tokens
        if self._runner.whole_prompts:
            longest = whole + self.settings.logit_rows
        served.reserve_steps(min(longest, context))
        self._scheduler = Scheduler(
            Limits(
                tokens=context,
                max_concurrency=self.settings.max_concurrency,
                prefill_chunk=self.settings.prefill_chunk,
                max_waiting=self.settings.max_waiting,
                whole_prompts=self._runner.whole_prompts,
                fixed_chunks=self._invariance.deterministic and not self._invariance.covered,
            )
        )
        self._changed = Condition()  # guards all attributes above and below
        self._growth = KvGrowth(
            served, self._runner, self._scheduler, self.settings,
            EngineSizes(own=self._limits.own, step=longest), self._changed,
        )  # fmt: skip
        self._requests: dict[str, RequestState] = {}
        self._prefixes = RequestPrefixes(
            EngineParts(served, self._runner, self._scheduler, self._requests),
            self.settings,
            self.between_steps,
        )
        drafter = drafter or drafter_of(self.settings.speculate, served, context, self._runner)
        self.speculation = Speculation(served, drafter, packed=self._runner.packs)
        self._cancelled: dict[str, tuple[str, str]] = {}  # messages and codes
        self._commands = CommandQueue()
        self._names = (f"request-{number}" for number in count(1))
        self._thread: Thread | None = None
        self._draining = self._closing = False
        self._failure: str | None = None
        self._failed_steps = (0, 0.0)  # consecutive failures, time of the last one
        self._steps = self._prompt_tokens = 0
        self._rate = TokenRate()

    def start(self) -> None:
        """Start the engine's thread. Raises RefusedError if the engine has been closed."""
        with self._changed:
            if self._closing:
                raise RefusedError("the engine is closed; create a new one")
            if self._thread is None:
                self._thread = Thread(target=self._thread_main, name="moefit-engine", daemon=True)
                self._thread.start()
                self._prefixes.start()

    @property
    def failure(self) -> str | None:
        """Error message if the engine's thread ended unexpectedly; None otherwise.

        After a failure the engine rejects every request until the process is restarted.
        """
        return self._failure

    @property
    def max_model_len(self) -> int:
        """The most tokens of a request in the budget in force."""
        return self._growth.longest().tokens

    def check_length(self, prompt: int, max_tokens: int) -> None:
        """Raise RequestTooLargeError if so many tokens of prompt and completion never fit now."""
        self._growth.longest().check(prompt, max_tokens)

    def least_memory(self) -> int:
        """Return the smallest budget for the requests that run now."""
        return self._growth.least_memory()

    @property
    def invariance(self) -> Invariance:
        """Whether answers depend on other requests, in the mode in force."""
        also = of_policy(self.served.policy, adapts=self.served.adapts_precision)
        return replace(self._invariance, not_covered=(*also, *self._invariance.not_covered))

    @property
    def prefix_coverage(self) -> Coverage:
        """Whether requests reuse keys and values of earlier ones, in the mode in force."""
        return self._prefixes.coverage(self.invariance)

    @property
    def speculation_coverage(self) -> SpeculationCoverage:
        """Whether steps verify drafted tokens, in the mode in force."""
        return self.speculation.coverage(self.invariance)

    @property
    def steps_fail(self) -> bool:
        """Whether several steps in a row have failed, the last one recently.

        Returns to False after `FAILED_SECONDS` without a step, because only another step can show
        whether the error persists, and clients that rely on this must be able to try again.
        """
        count, failed_at = self._failed_steps
        return count >= FAILED_STEPS and monotonic() - failed_at < FAILED_SECONDS

    def close(self, timeout: float | None = None) -> bool:
        """Stop after the current step and cancel all remaining requests.

        Args:
            timeout: Seconds to wait for the current step; None waits until it ends.

        Returns:
            Whether the engine's thread has ended. If False, the model is still computing and only
                ending the process stops it.
        """
        self._prefixes.shut_down()
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify_all()
        thread = self._thread
        if thread not in (None, current_thread()):
            thread.join(timeout)
        self._finish_all("cancelled")
        self._commands.fail_all(RefusedError("the engine was closed"))
        if ended := thread in (None, current_thread()) or not thread.is_alive():
            self._growth.close()
        return ended

    def drain(self, timeout: float) -> bool:
        """Reject new requests and wait until the current ones have finished.

        Returns:
            Whether all requests have finished.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._requests, timeout)

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        listener: Listener,
        *,
        label: str | None = None,
    ) -> str:
        """Queue a request and return its id.

        Args:
            prompt_ids: Token ids of the prompt.
            sampling: Sampling parameters.
            listener: Called in the engine's thread with each event of the request.
            label: Id by which logs name the request; None uses the returned one.

        Returns:
            The request id, as `cancel` takes it.

        Raises:
            RequestTooLargeError: If prompt and completion exceed `max_model_len`.
            QueueFullError: If too many requests are waiting.
            RefusedError: If the engine is shutting down or has failed.
            ConfigError: If a parameter or token id is invalid.
        """
        self._limits.check(prompt_ids, sampling, self._growth.longest())
        with self._changed:
            self._check_alive()
            if self._draining:
                raise RefusedError("the server is shutting down and accepts no more requests")
            name = next(self._names)
            state = RequestState(
                name, prompt_ids, sampling, self._limits.decoding, listener, self._remove
            )
            state.label = label or name
            max_chunk = None if sampling.prompt_logprobs is None else self._prompt_logits_rows()
            self._scheduler.submit(
                name,
                prompt=len(prompt_ids),
                max_new_tokens=sampling.max_tokens,
                max_chunk=max_chunk,
            )
            self._requests[name] = state
            self._changed.notify_all()
        return name

    def cancel(self, request_id: str, message: str = "", *, code: str = "") -> None:
        """Cancel a request before the next step; unknown ids are ignored.

        Args:
            request_id: As `submit` returned it.
            message: Why, for its last event.
            code: Name of that reason, if the message may be shown.
        """
        with self._changed:
            if request_id in self._requests:
                self._cancelled.setdefault(request_id, (message, code))
                self._changed.notify_all()

    def set_memory(self, memory: str | int | None) -> MemoryBudget:
        """Change the budget between two steps; see `ServedModel.set_memory`.

        Where a KV cache that has grown leaves too little room, it gives back what is unused.
        """
        return self.between_steps(lambda: self._growth.set_memory(memory))

    def set_mode(self, mode: Mode, **settings: Any) -> Policy:
        """Call `ServedModel.set_mode` between two steps."""
        return self.between_steps(lambda: self.served.set_mode(mode, **settings))

    def between_steps(self, change: Callable[[], T]) -> T:
        """Run a function between two steps and return its result.

        Args:
            change: Function to run; its exceptions propagate to the caller.

        Raises:
            RefusedError: If the engine is closed or fails before the function runs. Once its thread
                has ended the function runs at once.
        """
        with self._changed:
            self._check_alive()
            thread = self._thread
            direct = thread in (None, current_thread()) or not thread.is_alive()
            if self._closing and not direct:  # its last step must keep its slots and KV cache
                raise RefusedError("the engine is shutting down, and its last step still runs")
            future = None if direct else self._commands.submit(change)
            self._changed.notify_all()
        return change() if future is None else future.result()

    def stats(self) -> EngineStats:
        """Return current load and totals."""
        prefixes, prefix_files = self._prefixes.stats()
        with self._changed:
            return EngineStats(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                kv_tokens_used=self._scheduler.reserved,
                kv_tokens=self._scheduler.tokens,
                kv_tokens_reserved=self._growth.base,
                kv_tokens_most=self._growth.most(),
                prompt_tokens_total=self._prompt_tokens,
                generation_tokens_total=self._rate.total,
                tokens_per_second=self._rate.per_second(),
                steps=self._steps,
                runner=self._runner.name,
                prefixes=prefixes,
                prefix_files=prefix_files,
                speculation=self.speculation.stats(),
            )

    def progress(self) -> dict[str, RequestProgress]:
        """Return how far each request is, by the ids that `submit` returned."""
        with self._changed:
            waits, waiting = self._scheduler.waits(), {*self._scheduler.waiting}
            return {
                name: RequestProgress(
                    stage="waiting" if name in waiting else state.stage,
                    waits_for=waits.get(name, ""),
                    computed_tokens=self._scheduler.computed(name),
                    cached_tokens=state.cached_tokens,
                    generated_tokens=state.num_generated,
                )
                for name, state in self._requests.items()
            }

    def check(self) -> None:
        """Raise AssertionError if scheduler and engine hold different requests."""
        self._growth.check()
        with self._changed:
            self._scheduler.check()
            known = {*self._scheduler.running, *self._scheduler.waiting}
            assert known == self._requests.keys(), known ^ self._requests.keys()
            if not known:
                self._prefixes.check()

    def _prompt_logits_rows(self) -> int:
        """Return how many prompt tokens may have their logits in memory at once."""
        return PROMPT_LOGITS_BYTES // (self._limits.vocabulary * self.served.model.dtype.itemsize)

    def _thread_main(self) -> None:
        """Run the engine's thread; if it ends by an error, finish all requests with that error."""
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - such as out of memory while handling an error
            self._fail(_error_text(error))
            _LOG.critical("the engine's thread ended", exc_info=error)

    def _fail(self, message: str) -> None:
        with self._changed:
            self._failure, self._draining = message, True
            self._changed.notify_all()
        self._finish_all("error", message)
        self._commands.fail_all(RefusedError(_FAILED_MESSAGE))

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RefusedError(_FAILED_MESSAGE)

    def _run(self) -> None:
        """Step until the engine is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._closing
                        or self._commands
                        or self._cancelled
                        or self._scheduler.has_work
                    ),
                    self._growth.wait(),
                )
                if self._closing:
                    return
            try:
                self._iterate()
            except BaseException as error:  # noqa: BLE001 - a panic in a Rust library is not an Exception
                _LOG.exception("the engine failed between steps")
                self._finish_all("error", _error_text(error))

    def _iterate(self) -> None:
        """Run queued commands, finish cancelled requests, admit waiting ones, then run one step."""
        self._commands.run_all()
        with self._changed:
            cancelled, self._cancelled = self._cancelled, {}
        for name, (message, code) in cancelled.items():
            self._finish(name, "cancelled", message, code)
        for name, message in self._growth.adjust():
            self._finish(name, "error", message, "context_length_exceeded")
        with self._changed:
            admitted = [self._requests[name] for name in self._scheduler.admit()]
        for state in admitted:  # without the lock, which callers of `submit` wait for
            self._begin(state)
        with self._changed:
            scheduled = self._scheduler.plan()
        if scheduled:
            self._step(scheduled)

    def _begin(self, state: RequestState) -> None:
        """Reserve KV cache for an admitted request, and skip the tokens that it holds already."""
        state.mark_admitted()
        state.bytes_read_before = self.served.bytes_read
        self._isolated(state, lambda: self._prefixes.open(state, self.invariance))
        if not state.finished:
            about = DraftedRequest(
                tokens=len(state.prompt) + state.sampling.max_tokens,
                prefix=state.prefix,
                foreseen=lambda: state.sampler.foreseen(),
            )
            self.speculation.open(state.name, about, sampled=not state.sampler.greedy)
        if _LOG.isEnabledFor(logging.INFO):
            fields = {"prompt_tokens": len(state.prompt), "cached_tokens": state.cached_tokens}
            _LOG.info("request %s runs", state.label, extra=state.log_fields(**fields))

    def _step(self, scheduled: Sequence[ScheduledTokens]) -> None:
        """Run one forward pass and sample; an error finishes the requests of this step only."""
        states = [self._requests[chunk.request] for chunk in scheduled]
        drafts, began = self._drafts(scheduled, states), monotonic()
        inputs = [
            state.runner_input(chunk, drafts.get(state.name, ()))
            for state, chunk in zip(states, scheduled, strict=True)
        ]
        try:
            with torch.inference_mode():
                rows = self._runner.step(inputs).split([one.num_logits for one in inputs])
                self.speculation.computed(inputs)
                self._process_logits(scheduled, states, rows, drafts)
            if all(map(_decodes, states, scheduled)):  # in prefill, steps are of other lengths
                tokens = sum(len(one.tokens) for one in inputs)
                self.speculation.stepped(tokens, monotonic() - began)
            self._failed_steps = (0, 0.0)
        except BaseException as error:  # noqa: BLE001 - any error in a model's code or files
            self._failed_steps = (self._failed_steps[0] + 1, monotonic())
            labels = [state.label for state in states]
            fields = {"fields": {"request_ids": labels}}
            _LOG.exception("a step of %d requests failed", len(scheduled), extra=fields)
            for chunk in scheduled:
                self._finish(chunk.request, "error", _error_text(error))

    def _drafts(
        self, scheduled: Sequence[ScheduledTokens], states: Sequence[RequestState]
    ) -> dict[str, tuple[int, ...]]:
        """Return what the step verifies besides its tokens, for requests that decode."""
        if not self.speculation.enabled:
            return {}
        decoding = {
            state.name: (state.tokens, state.drafts_at_most)
            for state, chunk in zip(states, scheduled, strict=True)
            if _decodes(state, chunk)
        }
        tokens = sum(chunk.stop - chunk.start for chunk in scheduled)
        return self.speculation.propose(decoding, tokens, self.invariance) if decoding else {}

    def _process_logits(
        self,
        scheduled: Sequence[ScheduledTokens],
        states: Sequence[RequestState],
        rows: Sequence[Tensor],
        drafts: Mapping[str, Sequence[int]],
    ) -> None:
        """Report prompt progress and append sampled tokens to requests without further input."""
        self._record_progress(scheduled, states)
        sampled: list[tuple[RequestState, Tensor]] = []
        for chunk, state, rows_NV in zip(scheduled, states, rows, strict=True):
            if chunk.start < len(state.prompt):
                self._isolated(state, lambda: state.on_prompt_chunk(chunk, rows_NV))  # noqa: B023 - called here
            if chunk.last and not state.finished:
                needed = 1 + len(drafts.get(state.name, ()))
                sampled.append((state, rows_NV[-needed:]))
        if not sampled:
            return
        logits_NV = torch.cat([row for _, row in sampled]) if len(sampled) > 1 else sampled[0][1]
        chosen = sample_drafts(
            logits_NV, [(state.sampler, drafts.get(state.name, ())) for state, _ in sampled]
        )
        for (state, _), run in zip(sampled, chosen, strict=True):
            draft = drafts.get(state.name, ())
            self._isolated(state, lambda: self._append(state, run, draft))  # noqa: B023 - called here

    def _append(
        self, state: RequestState, run: Sequence[Choice | Failure], draft: Sequence[int]
    ) -> None:
        """Append what was sampled for a request in this step, up to where it ends."""
        tokens = [one[0] for one in run if not isinstance(one, Exception)]
        self.speculation.observe(state.name, tokens, len(draft))
        with self._changed:
            self._scheduler.append_tokens(state.name, len(run))
            if len(run) > 1:
                self._prefixes.accept(state, draft[: len(run) - 1])
        for left, choice in zip(range(len(run) - 1, -1, -1), run, strict=True):
            if state.finished:  # such as by a text that stops
                return
            with self._changed:
                self._rate.add(1)
            _append_token(state, choice, more=left > 0)

    def _isolated(self, state: RequestState, act: Callable[[], None]) -> None:
        """Run a function for one request; an error finishes that request only."""
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - such as a panic in a tokenizer
            _LOG.exception("request %s failed", state.label, extra=state.log_fields())
            state.finish("error", _error_text(error))

    def _record_progress(
        self, scheduled: Sequence[ScheduledTokens], states: Sequence[RequestState]
    ) -> None:
        with self._changed:
            self._steps += 1
            for chunk, state in zip(scheduled, states, strict=True):
                self._scheduler.advance(chunk)
                self._prefixes.advance(chunk, state)
                read = min(chunk.stop, len(state.prompt)) - chunk.start
                self._prompt_tokens += max(0, read)

    def _finish_all(self, reason: FinishReason, message: str = "") -> None:
        for name in list(self._requests):
            self._finish(name, reason, message)

    def _finish(self, name: str, reason: FinishReason, message: str = "", code: str = "") -> None:
        """Send a request's last event, if it is still open, and free its KV cache."""
        if (state := self._requests.get(name)) is not None:
            state.finish(reason, message, code=code)

    def _remove(self, name: str) -> None:
        with self._changed:
            if (state := self._requests.pop(name, None)) is None:
                return
            running = name in self._scheduler.running
            self._scheduler.remove(name)
            self.speculation.close(name)
            self._changed.notify_all()
            if running:
                self._release(state)
        self._log_end(state, running)

    def _log_end(self, state: RequestState, running: bool) -> None:
        """Log how a request went, with what all steps have read since it was admitted."""
        if not _LOG.isEnabledFor(logging.INFO):
            return
        summary = state.summary()
        if running:
            summary["expert_bytes_read"] = self.served.bytes_read - state.bytes_read_before
        words = "request %s ended: %s"
        _LOG.info(words, state.label, state.reason, extra=state.log_fields(**summary))

    def _release(self, state: RequestState) -> None:
        """Free a request's KV cache; an error must not prevent its last event."""
        try:
            self._prefixes.close(state)
        except BaseException:  # noqa: BLE001 - any error in a runner
            _LOG.exception(
                "the KV cache of request %s could not be freed",
                state.label,
                extra=state.log_fields(),
            )


def _decodes(state: RequestState, chunk: ScheduledTokens) -> bool:
    """Return whether a chunk is beyond its request's prompt."""
    return chunk.start >= len(state.prompt)


def _append_token(state: RequestState, choice: Choice | Failure, *, more: bool) -> None:
    if isinstance(choice, Exception):
        state.finish("error", str(choice), code=getattr(choice, "code", ""))
    else:
        state.append(*choice, more=more)


def _error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
