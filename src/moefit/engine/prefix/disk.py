"""Save keys and values of finished requests to files, and load them for new ones.

`PrefixDisk` has a thread of its own, which reads and writes files while the engine computes. Only
copies between the KV pool and a buffer of one chunk happen between two steps of the engine. Loading
goes before saving.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from moefit.engine.prefix.store import DiskStats, PrefixStore
from moefit.engine.prefix.tree import Prefix
from moefit.errors import RefusedError

_LOG = logging.getLogger(__name__)
_MOST_SAVES = 256  # texts that wait to be saved
_MOST_SAVED_TOKENS = 1 << 20  # of these texts, unless one is longer
CHUNK_BYTES = 4 << 20  # of a file at most, unless one block is larger
CHUNK_TOKENS = 64
BUFFERS_BYTES = 4 * CHUNK_BYTES  # chunks in memory, with their files' content
"""Memory that the disk's thread needs, for the estimate."""


def chunk_tokens(block: int, bytes_per_token: int) -> int:
    """Return the tokens per file: whole blocks, at most `CHUNK_TOKENS` or `CHUNK_BYTES`.

    >>> chunk_tokens(16, 1024), chunk_tokens(16, 128 << 10), chunk_tokens(16, 1 << 20)
    (64, 32, 16)
    """
    fits = CHUNK_BYTES // max(1, bytes_per_token)
    return max(block, min(CHUNK_TOKENS, fits) // block * block)


class Pool(Protocol):
    """The engine's side; each method is called between two steps."""

    def copy_out(self, prefix: Prefix, start: int, stop: int) -> bytearray | None:
        """Return keys and values of a text's tokens; None if they are not there any more."""
        ...

    def copy_in(self, request: str, start: int, content: bytearray) -> bool:
        """Set keys and values of a request from a token on; False if it has ended."""
        ...

    def loaded(self, request: str) -> None:
        """Let a request be computed, from what was copied in on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    request: str
    keys: Sequence[str]
    first: int  # chunk


class PrefixDisk:
    """Thread between the engine and a store.

    Args:
        store: Files of this model.
        chunk: Tokens per file.
        nbytes: Bytes of a chunk.
        pool: The engine's side.
        between_steps: Runs a function between two steps of the engine and returns its result.
    """

    def __init__(
        self,
        store: PrefixStore,
        chunk: int,
        nbytes: int,
        pool: Pool,
        between_steps: Callable[[Callable[[], object]], object],
    ):
        self._store, self._chunk, self._nbytes = store, chunk, nbytes
        self._pool, self._between_steps = pool, between_steps
        self._loads: deque[_Load] = deque()
        self._saves: deque[Prefix] = deque(maxlen=_MOST_SAVES)
        self._changed = threading.Condition()  # guards the queues; never held during a read
        self._busy = self._closing = False
        self._read = self._written = 0
        self._thread = threading.Thread(target=self._run, name="moefit-prefixes", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def save(self, prefix: Prefix) -> None:
        """Save what is in the pool of a text, in the background."""
        with self._changed:
            self._saves.append(prefix)
            while len(self._saves) > 1 and self._tokens_to_save() > _MOST_SAVED_TOKENS:
                self._saves.popleft()
            self._changed.notify_all()

    def load(self, request: str, prefix: Prefix, cached: int) -> bool:
        """Begin to load keys and values of a request, if there are files of them.

        Args:
            request: Request id.
            prefix: Its prompt, of which at least one token is left to compute.
            cached: Tokens whose keys and values it has already.

        Returns:
            Whether loading has begun; `Pool.loaded` is called at its end.
        """
        text = replace(prefix, tokens=prefix.tokens[: len(prefix.tokens) - 1])
        keys, first = self._store.keys(text, self._chunk), cached // self._chunk
        keys = keys[: first + self._store.known(keys[first:])]
        if len(keys) == first:
            return False
        with self._changed:
            if self._closing:
                return False
            self._loads.append(_Load(request=request, keys=keys, first=first))
            self._changed.notify_all()
        return True

    def stats(self) -> DiskStats:
        """Return what the files hold, and totals."""
        known = self._store.stats()
        return replace(known, read=self._read, written=self._written)

    def settle(self, timeout: float) -> bool:
        """Wait until everything is saved; return whether it is."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or not self._unfinished(), timeout)
            return not self._unfinished()

    def _tokens_to_save(self) -> int:
        return sum(len(one.tokens) for one in self._saves)

    def _unfinished(self) -> bool:
        return bool(self._busy or self._saves or self._loads)

    def close(self, timeout: float) -> None:
        """Save what is waiting, for at most `timeout` seconds, and stop the thread."""
        if self._thread.is_alive():
            self.settle(timeout)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._store.close()

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None:
                try:
                    work()
                except RefusedError:  # the engine has ended
                    return
                except Exception:  # noqa: BLE001 - such as of a file system; requests go on
                    _LOG.exception("prefixes could not be read or written")
        finally:
            with self._changed:  # nobody waits for what is not done any more
                self._closing, self._busy = True, False
                self._changed.notify_all()

    def _next(self) -> Callable[[], None] | None:
        """Wait for work and return it; None when closing."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closing or self._loads or self._saves)
            if self._closing:
                return None
            self._busy = True
            if self._loads:
                return partial(self._load, self._loads.popleft())
            return partial(self._save, self._saves.popleft())

    def _load(self, load: _Load) -> None:
        try:
            for index in range(load.first, len(load.keys)):
                content = self._store.read(load.keys[index], self._nbytes)
                if content is None or not self._copy_in(load.request, index, content):
                    break
                self._read += self._chunk
        finally:
            self._between_steps(lambda: self._pool.loaded(load.request))
        self._store.use(load.keys)

    def _copy_in(self, request: str, index: int, content: bytearray) -> bool:
        start = index * self._chunk
        return bool(self._between_steps(lambda: self._pool.copy_in(request, start, content)))

    def _save(self, prefix: Prefix) -> None:
        keys = self._store.keys(prefix, self._chunk)[: self._store.capacity(self._nbytes)]
        self._store.use(keys)  # room for the others is not made by removing these
        for index, key in enumerate(keys):
            with self._changed:
                if self._loads:  # they go first
                    self._saves.append(prefix)
                    return
                if self._closing:
                    return
            if self._store.known([key]):
                continue
            content = self._copy_out(prefix, index)
            if content is None:
                keys = keys[:index]
                break
            if not self._store.write(key, content):
                return
            self._written += self._chunk
        self._store.use(keys)

    def _copy_out(self, prefix: Prefix, index: int) -> bytearray | None:
        start = index * self._chunk
        content = self._between_steps(
            lambda: self._pool.copy_out(prefix, start, start + self._chunk)
        )
        assert content is None or isinstance(content, bytearray)
        return content
