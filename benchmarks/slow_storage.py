"""Limit the rate at which experts are read, to measure as on a slower device."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from moefit.serve.io.reader import ExpertStore
from moefit.serve.memory.budget import parse_bytes


@contextmanager
def limited_to(rate: str | None) -> Iterator[None]:
    """Let all threads together read at most so many bytes of experts per second.

    A read returns when a device of this rate, which does one after the other, would be done.

    Args:
        rate: Such as `0.4GB`; None for no limit.
    """
    if rate is None:
        yield
        return
    per_second, lock, read = parse_bytes(rate), threading.Lock(), ExpertStore.read
    free_at = 0.0

    def slow(store: ExpertStore, block: str, expert: int, into: Any) -> None:
        nonlocal free_at
        asked = time.perf_counter()
        read(store, block, expert, into)
        with lock:
            free_at = max(free_at, asked) + into.nbytes / per_second
            ready = free_at
        time.sleep(max(0.0, ready - time.perf_counter()))

    with mock.patch.object(ExpertStore, "read", slow):
        yield
