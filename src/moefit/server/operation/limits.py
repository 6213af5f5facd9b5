"""Limits per API key: requests at once, and tokens per minute.

Tokens are counted as they are computed, in a bucket that fills at the key's rate and holds one
minute's worth. A request is admitted while the bucket is not empty; what it then takes may leave a
debt, which later requests wait for. So requests that start at once may take more together than a
minute's worth: a limit of requests bounds that.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil
from time import monotonic

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moefit.engine.api import Event, FinishedEvent, Listener, TokenEvent
from moefit.server.errors import APIError
from moefit.server.operation.keys import Key, Keys

_MINUTE = 60.0
_MAX_RETRY_SECONDS = 3600


@dataclass(slots=True)
class TokenBucket:
    """Tokens that may be used, refilled at a constant rate; negative after a debt.

    Args:
        rate: Tokens per minute.
        at: The time in seconds.
    """

    rate: int
    at: float
    level: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = float(self.rate)

    def refill(self, rate: int, at: float) -> None:
        """Add what has come since the last call, at a rate that may have changed."""
        self.level = min(float(rate), self.level + (at - self.at) * rate / _MINUTE)
        self.rate, self.at = rate, at

    def seconds_until_open(self) -> float:
        """Return the seconds until the bucket is not empty any more; 0 if it is not."""
        return 0.0 if self.level > 0 else (1.0 - self.level) * _MINUTE / self.rate


@dataclass(slots=True)
class KeyUse:
    """What one key has used."""

    running: int = 0
    accepted: int = 0
    limited: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    bucket: TokenBucket | None = None


class KeyLimits:
    """Counts what keys use, and refuses requests beyond their limits. Thread-safe.

    Use is counted by the key's name, so that a key that is replaced keeps its limits.

    Args:
        keys: The keys in force.
        clock: Returns the time in seconds.
    """

    def __init__(self, keys: Keys, clock: Callable[[], float] = monotonic):
        self._keys, self._clock = keys, clock
        self._lock = threading.Lock()
        self._uses: dict[str, KeyUse] = {}

    def reserve(self, name: str | None, requests: int, prompt_tokens: int) -> "Reservation":
        """Count requests that are about to be queued, until they end.

        Args:
            name: Name of their key; None without keys.
            requests: Their number.
            prompt_tokens: Tokens of their prompts.

        Raises:
            APIError: If they exceed the key's limits; with `Retry-After` if they would fit later.
        """
        if name is None:
            return Reservation(self, None, 0, 0)
        with self._lock:
            use = self._admitted(name, requests)
            use.running += requests
            use.accepted += 1
            use.prompt_tokens += prompt_tokens
            if use.bucket is not None:
                use.bucket.level -= prompt_tokens
        return Reservation(self, name, requests, prompt_tokens)

    def check(self, name: str | None) -> None:
        """Raise APIError if a key may not even send one request, before slow work for it."""
        if name is not None:
            with self._lock:
                self._admitted(name, 1)

    def used(self, name: str, *, generated: int = 0, ended: int = 0) -> None:
        """Count generated tokens, or requests that have ended."""
        with self._lock:
            if (use := self._uses.get(name)) is None:
                return
            use.running -= ended
            use.generated_tokens += generated
            if use.bucket is not None:
                use.bucket.level -= generated

    def give_back(self, name: str, *, requests: int, prompt_tokens: int, all_of_them: bool) -> None:
        """Undo the counts of requests that were never queued."""
        with self._lock:
            if (use := self._uses.get(name)) is None:
                return
            use.running -= requests
            use.prompt_tokens -= prompt_tokens
            use.accepted -= all_of_them
            if use.bucket is not None:
                use.bucket.level += prompt_tokens

    def check_counts(self) -> None:
        """Raise AssertionError if a count is negative."""
        with self._lock:
            assert all(use.running >= 0 for use in self._uses.values()), self._uses

    def uses(self) -> dict[str, KeyUse]:
        """Return what each key in force has used."""
        names = self._keys.by_name()
        with self._lock:
            self._forget(names)
            return {name: self._uses.get(name, KeyUse()) for name in names}

    def _forget(self, names: Mapping[str, Key]) -> None:
        """Forget keys that are gone, as soon as nothing of theirs runs."""
        for name, use in list(self._uses.items()):
            if name not in names and not use.running:
                del self._uses[name]

    def _admitted(self, name: str, requests: int) -> KeyUse:
        key, use = self._keys.by_name().get(name), self._uses.setdefault(name, KeyUse())
        if key is None:  # removed since the request arrived
            return use
        try:
            _check_number(key, use, requests)
            self._check_tokens(key, use)
        except APIError:
            use.limited += 1
            raise
        return use

    def _check_tokens(self, key: Key, use: KeyUse) -> None:
        rate = key.tokens_per_minute
        if rate is None:
            use.bucket = None
            return
        now = self._clock()
        use.bucket = use.bucket or TokenBucket(rate, now)
        use.bucket.refill(rate, now)
        if seconds := use.bucket.seconds_until_open():
            wait = min(_MAX_RETRY_SECONDS, ceil(seconds))
            raise APIError(
                429,
                f"the key {key.name!r} has used its {rate:,} tokens per minute; try again in "
                f"{wait} s",
                code="tokens_per_minute",
                retry_after=wait,
            )


def _check_number(key: Key, use: KeyUse, requests: int) -> None:
    if key.requests is None or use.running + requests <= key.requests:
        return
    if requests > key.requests:
        raise APIError(
            400,
            f"this is {requests} requests (n times the number of prompts), but the key "
            f"{key.name!r} may run {key.requests} at once",
            code="too_many_answers",
        )
    raise APIError(
        429,
        f"{use.running} requests of the key {key.name!r} are running or waiting, and it may have "
        f"{key.requests} at once; try again when one has ended",
        code="requests_at_once",
        retry_after=1,
    )


class Reservation:
    """Requests that count towards a key's limits until they end.

    Args:
        limits: Where they count.
        name: Name of the key; None counts nothing.
        requests: Their number.
        prompt_tokens: Tokens of their prompts.
    """

    def __init__(self, limits: KeyLimits, name: str | None, requests: int, prompt_tokens: int):
        self._limits, self._name, self._unused = limits, name, requests
        self._requests, self._prompt_tokens = requests, prompt_tokens

    def listener(self, listener: Listener) -> Listener:
        """Return a listener of one of the requests, which counts its tokens and its end."""
        self._unused -= 1
        name = self._name
        if name is None:
            return listener

        def on_event(event: Event) -> None:
            if isinstance(event, TokenEvent):
                self._limits.used(name, generated=1)
            elif isinstance(event, FinishedEvent):
                self._limits.used(name, ended=1)
            listener(event)

        return on_event

    def release_unused(self, *, refused: int = 0) -> None:
        """End those requests that were never queued, and give back their share of the prompts.

        Args:
            refused: How many of those with a listener the engine refused.
        """
        if self._name is not None and (ended := self._unused + refused) > 0:
            self._limits.give_back(
                self._name,
                requests=ended,
                prompt_tokens=self._prompt_tokens * ended // self._requests,
                all_of_them=ended == self._requests,
            )
        self._unused = 0


class KeyCollector:
    """Prometheus collector of what keys use; its labels are the names of keys in force."""

    def __init__(self, model: str, limits: KeyLimits, keys: Keys, prefix: str):
        self._model, self._limits, self._keys, self._prefix = model, limits, keys, prefix

    def describe(self) -> list[Metric]:
        """Return no descriptions, so that registering reads no values."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; none on a server without keys."""
        if not self._keys.required:
            return
        labels = ["model_name", "key"]
        running = GaugeMetricFamily(
            f"{self._prefix}key_requests_running", "Running and waiting requests", labels=labels
        )
        requests = CounterMetricFamily(
            f"{self._prefix}key_requests", "Requests by outcome", labels=[*labels, "outcome"]
        )
        tokens = CounterMetricFamily(
            f"{self._prefix}key_tokens", "Tokens by kind", labels=[*labels, "kind"]
        )
        for name, use in self._limits.uses().items():
            running.add_metric([self._model, name], use.running)
            requests.add_metric([self._model, name, "accepted"], use.accepted)
            requests.add_metric([self._model, name, "limited"], use.limited)
            tokens.add_metric([self._model, name, "prompt"], use.prompt_tokens)
            tokens.add_metric([self._model, name, "generated"], use.generated_tokens)
        yield from (running, requests, tokens)
        reloads = CounterMetricFamily(
            f"{self._prefix}key_file_reloads",
            "Times the file of keys was read again, by result",
            labels=["model_name", "result"],
        )
        for result, count in self._keys.reloads.items():
            reloads.add_metric([self._model, result], count)
        yield reloads
