"""Prefixes of an engine's requests: what each begins with, waits for, and leaves to others.

`RequestPrefixes` reserves a request's KV cache and skips what is there already. It holds requests
that are loaded from files or whose prefix another request is computing. All methods are called in
the engine's thread, except where noted.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moefit.engine.api import EngineSettings
from moefit.engine.invariance import Invariance
from moefit.engine.prefix.cache import BLOCK_TOKENS, PrefixStats
from moefit.engine.prefix.files import EngineParts, PrefixFiles
from moefit.engine.prefix.reuse import Coverage, PrefixReuse
from moefit.engine.prefix.store import DiskStats
from moefit.engine.prefix.waiting import Reading, WaitingForPrefix
from moefit.engine.request_state import RequestState
from moefit.engine.scheduler import ScheduledTokens

_LOG = logging.getLogger(__name__)


class RequestPrefixes:
    """Reuse of keys and values by the requests of an engine.

    Args:
        parts: Of the engine.
        settings: Of the engine.
        between_steps: See `Engine.between_steps`.

    Raises:
        CheckpointError: The folder for prefixes cannot be used.
        ConfigError: Another server uses it, or its limit is less than a file.
    """

    def __init__(
        self,
        parts: EngineParts,
        settings: EngineSettings,
        between_steps: Callable[[Callable[[], Any]], Any],
    ):
        self._parts, self._runner, self._scheduler = parts, parts.runner, parts.scheduler
        self._reuse = PrefixReuse(parts.served, parts.runner, settings.prefix_cache)
        self._waiting = WaitingForPrefix(BLOCK_TOKENS)
        self._files: PrefixFiles | None = None
        if settings.prefix_folder is not None:
            self._files = PrefixFiles.open(
                settings.prefix_folder, settings.prefix_disk_bytes, parts, between_steps
            )

    def coverage(self, invariance: Invariance) -> Coverage:
        """Return whether requests reuse keys and values in the mode in force. From any thread."""
        return self._reuse.coverage(invariance)

    def start(self) -> None:
        """Start reading and writing files. From any thread."""
        if self._files is not None:
            self._files.start()

    def shut_down(self) -> None:
        """Save what is waiting, and stop. From another thread, while the engine runs."""
        if self._files is not None:
            self._files.close()

    def settle(self, timeout: float) -> bool:
        """Wait, in another thread, until everything is saved; return whether it is."""
        return self._files is None or self._files.settle(timeout)

    def stats(self) -> tuple[PrefixStats | None, DiskStats | None]:
        """Return what is held in memory and in files. From any thread."""
        cache = self._runner.prefixes
        return (
            None if cache is None else cache.stats(),
            None if self._files is None else self._files.stats(),
        )

    def open(self, state: RequestState, invariance: Invariance) -> None:
        """Reserve KV cache for an admitted request, and skip the tokens that it holds already.

        Args:
            state: The request.
            invariance: Of the mode in force.
        """
        sampling = state.sampling
        if sampling.prompt_logprobs is None:  # those need all logits of the prompt
            state.prefix = self._reuse.prefix_of(state.prompt, sampling.cache_salt, invariance)
        tokens = len(state.prompt) + sampling.max_tokens
        self._skip(state, self._runner.open(state.name, tokens, state.prefix))
        if self._files is not None and self._files.load(state):
            self._scheduler.hold(state.name)
        else:
            self._wait(state)

    def advance(self, chunk: ScheduledTokens, state: RequestState) -> None:
        """Leave what a step has computed to other requests.

        If the mode or the formats of experts have changed since the request was opened, what it
        computes is neither of the former nor of the present ones, and is not kept.
        """
        self._leave_if_changed(state)
        self._runner.extend(chunk.request, state.tokens, chunk.stop)
        self._rejoin(self._waiting.computed(chunk.request, chunk.stop))

    def accept(self, state: RequestState, draft: Sequence[int]) -> None:
        """Leave drafted tokens to other requests that were right, and so are computed already."""
        tokens = [*state.tokens, *draft]
        self._runner.extend(state.name, tokens, len(tokens))

    def close(self, state: RequestState) -> None:
        """Free the KV cache of a request that has ended, whose tokens others may still reuse."""
        try:
            self._runner.close(state.name, keep=not state.failed)
            if self._files is not None:
                self._files.save(state)
        finally:
            self._rejoin(self._waiting.ended(state.name))

    def check(self) -> None:
        """Raise AssertionError if the state is inconsistent."""
        self._waiting.check()
        if self._runner.prefixes is not None:
            self._runner.prefixes.check()

    def _leave_if_changed(self, state: RequestState) -> None:
        """Neither keep nor reuse more of a request that began with another mode or formats."""
        prefix, cache = state.prefix, self._runner.prefixes
        if prefix is None or self._reuse.is_current(prefix, state.sampling.cache_salt):
            return
        state.prefix = None  # before its waiting requests look for another one to wait for
        if cache is not None:
            cache.stop(state.name)
        self._rejoin(self._waiting.ended(state.name))

    def _skip(self, state: RequestState, cached: int) -> None:
        state.cached_tokens = cached
        self._scheduler.skip(state.name, cached)

    def _wait(self, state: RequestState) -> None:
        """Hold a request if another one is computing more of its prefix."""
        if state.prefix is None:
            return
        requests = self._parts.requests
        others = [
            Reading(name=name, prefix=other.prefix, computed=computed)
            for name, computed in self._scheduler.prefilling()
            if name != state.name and (other := requests[name]).prefix is not None
        ]
        if self._waiting.begin(state.name, state.prefix, state.cached_tokens, others):
            self._scheduler.hold(state.name)

    def _rejoin(self, names: list[str]) -> None:
        """Let requests go on with what another one has computed; an error ends that one only."""
        for name in names:
            if (state := self._parts.requests.get(name)) is None:
                continue
            try:
                self._go_on(state)
            except BaseException as error:  # noqa: BLE001 - such as out of memory
                words = "request %s could not take over a prefix"
                _LOG.exception(words, state.label, extra=state.log_fields())
                state.finish("error", f"{type(error).__name__}: {error}")

    def _go_on(self, state: RequestState) -> None:
        self._scheduler.resume(state.name)
        self._leave_if_changed(state)
        if state.prefix is None:
            return
        with torch.inference_mode():
            self._skip(state, self._runner.join(state.name, state.prefix))
        self._wait(state)
