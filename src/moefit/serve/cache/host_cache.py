"""Cache experts in pinned host memory, between the checkpoint's files and a GPU's slots.

`HostTable` decides which expert is in which buffer, without tensors; `HostCache` allocates the
buffers, reads and copies. A buffer in use is never reused, and an expert is found only once it has
been read completely.
"""

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moefit.quant.format import Format
from moefit.serve.cache.scores import DecayedCounter
from moefit.serve.cache.slot import Slot
from moefit.serve.io.device_copy import CopyEngine

Key = Hashable
HALF_LIFE = 4.0  # requests per held expert after which a request counts half


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Permission to use a buffer until it is released; complete buffers may have several leases.

    Args:
        key: The expert.
        buffer: Index of the buffer.
        fresh: The buffer has no content yet, and the holder must `complete` or `abandon` it.
        dropped: Buffers to free before this one is allocated.
    """

    key: Key
    buffer: int
    fresh: bool
    dropped: tuple[int, ...] = ()


@dataclass(slots=True)
class _Entry:
    buffer: int
    nbytes: int
    leases: int = 1
    complete: bool = False


class HostTable:
    """Assign experts to host buffers of at most `limit` bytes together. Not thread-safe.

    Args:
        limit: Bytes of all buffers.

    Attributes:
        hits: Requests that found their expert in a buffer.
        reads: Buffers that were filled.
        largest: Bytes of the largest expert that was requested.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.hits = self.reads = self.largest = 0
        self._entries: dict[Key, _Entry] = {}
        self._next = 0
        self._requests = DecayedCounter[Key](HALF_LIFE)

    @property
    def held_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def buffers(self) -> dict[int, int]:
        """Bytes by buffer."""
        return {entry.buffer: entry.nbytes for entry in self._entries.values()}

    def lease(self, key: Key, nbytes: int) -> Lease | None:
        """Lease the buffer of an expert, or a fresh buffer for it.

        Returns:
            The lease; None if another reader is filling the expert's buffer, or too many buffers
            are in use. Retry after any `complete`, `abandon` or `release`.
        """
        assert nbytes <= self.limit, f"{nbytes} bytes never fit into {self.limit}"
        self.largest = max(self.largest, nbytes)
        entry = self._entries.get(key)
        if entry is None:
            return self._fresh(key, nbytes)
        if not entry.complete:
            return None
        entry.leases += 1
        self.hits += 1
        self._count(key)
        return Lease(key=key, buffer=entry.buffer, fresh=False)

    def _fresh(self, key: Key, nbytes: int) -> Lease | None:
        free, evicted = self.limit - self.held_bytes, list[Key]()
        for other in self._idle() if free < nbytes else ():
            evicted.append(other)
            free += self._entries[other].nbytes
            if free >= nbytes:
                break
        if free < nbytes:
            return None
        dropped = [self._entries.pop(other) for other in evicted]
        # Reuse a buffer of the right size: pinning new memory takes longer than copying.
        buffer = next((entry.buffer for entry in dropped if entry.nbytes == nbytes), self._next)
        if buffer == self._next:
            self._next += 1
        self._entries[key] = _Entry(buffer, nbytes)
        self._count(key)
        to_free = tuple(entry.buffer for entry in dropped if entry.buffer != buffer)
        return Lease(key=key, buffer=buffer, fresh=True, dropped=to_free)

    def _idle(self) -> list[Key]:
        """Return entries without a lease, the least requested first."""
        idle = [key for key, entry in self._entries.items() if not entry.leases]
        return sorted(idle, key=lambda key: self._requests.scaled.get(key, 0.0))

    def _count(self, key: Key) -> None:
        """Count one request; time passes by one request per held expert."""
        self._requests.add({key: 1.0}, 1 / len(self._entries))

    def has(self, key: Key) -> bool:
        """Return whether an expert is in a buffer, completely."""
        entry = self._entries.get(key)
        return entry is not None and entry.complete

    def complete(self, lease: Lease) -> None:
        """Mark a fresh buffer as filled, so that others can lease it."""
        self._entries[lease.key].complete = True
        self.reads += 1

    def abandon(self, lease: Lease) -> None:
        """Give back a fresh buffer that could not be filled; it is the first to be reused."""
        entry = self._entries.pop(lease.key)
        assert not entry.complete
        entry.leases = 0
        self._entries[object()] = entry  # a key without requests

    def release(self, lease: Lease) -> None:
        """End a lease of a complete buffer."""
        self._entries[lease.key].leases -= 1

    def check(self) -> None:
        """Raise AssertionError if the limit is exceeded or entries are inconsistent."""
        assert self.held_bytes <= self.limit, f"{self.held_bytes} bytes held, limit {self.limit}"
        buffers = [entry.buffer for entry in self._entries.values()]
        assert len(set(buffers)) == len(buffers), f"a buffer holds two experts: {buffers}"
        for key, entry in self._entries.items():
            assert 0 <= entry.buffer < self._next, (key, entry)
            assert entry.leases >= 0 and (entry.complete or entry.leases <= 1), (key, entry)


class ExpertReader(Protocol):
    """Fills slots with experts: the store of checkpoint files, or a cache in front of it."""

    def read(self, block: str, expert: int, into: Slot) -> None:
        """Fill a slot. If this raises, the slot's content is undefined."""
        ...


@dataclass(frozen=True, slots=True)
class HeldExpert:
    """An expert in host memory, which stays there until it is released."""

    slot: Slot
    lease: Lease


class HostCache:
    """Fill slots from a cache in host memory, and the cache from `store`. Thread-safe.

    A reader that finds every buffer in use waits for one, so reads queue if fewer experts fit into
    the cache than there are readers.

    Args:
        store: Reads experts into host memory.
        engine: Copies from host memory to the device of the slots.
        limit: Bytes of host memory; at least the largest expert.
    """

    def __init__(self, store: ExpertReader, engine: CopyEngine, *, limit: int):
        self._store, self._engine = store, engine
        self._table = HostTable(limit)
        self._buffers: dict[int, Tensor] = {}
        self._slots: dict[int, Slot] = {}  # over buffers, as they were last held
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        """Bytes of all buffers at most."""
        return self._table.limit

    def has(self, block: str, expert: int, format: Format) -> bool:
        """Return whether an expert of this format is in host memory now."""
        with self._changed:
            return self._table.has((block, expert, format.name))

    def hold(self, block: str, expert: int, like: Slot) -> HeldExpert | None:
        """Keep an expert in host memory until `release`, to compute it there.

        Args:
            block: Name of the MoE block.
            expert: Its index in the block.
            like: A slot of its format.

        Returns:
            None if it is not there. Nothing is read.
        """
        key = (block, expert, like.format.name)
        with self._changed:
            lease = self._table.lease(key, like.nbytes) if self._table.has(key) else None
            if lease is None:
                return None
            slot, buffer_B = self._slots.get(lease.buffer), self._buffers[lease.buffer]
            if slot is None or slot.buffer_B is not buffer_B or not _alike(slot, like):
                slot = self._slots[lease.buffer] = like.over(buffer_B)
            return HeldExpert(slot, lease)

    def holdable(self, nbytes: int) -> int:
        """Return how many experts of a size may be held while others are read through the cache."""
        with self._changed:
            return max(0, self.limit - max(self._table.largest, nbytes)) // nbytes

    def release(self, held: HeldExpert) -> None:
        """Let an expert that was held be evicted again."""
        with self._changed:
            self._table.release(held.lease)
            self._changed.notify_all()

    def warm(self, block: str, expert: int, like: Slot) -> None:
        """Read an expert into host memory without copying it on. Raises what the store raises."""
        lease = self._lease((block, expert, like.format.name), like.nbytes)
        if lease.fresh:
            self._fill(lease, block, expert, like)
        self.release(HeldExpert(like, lease))

    def read(self, block: str, expert: int, into: Slot) -> None:
        """Fill a slot on the engine's device. Raises what the store raises."""
        lease = self._lease((block, expert, into.format.name), into.nbytes)
        if lease.fresh:
            self._fill(lease, block, expert, into)
        try:
            self._engine.copy(self._buffers[lease.buffer], into.buffer_B)
        finally:
            with self._changed:
                self._table.release(lease)
                self._changed.notify_all()

    def _lease(self, key: tuple[str, int, str], nbytes: int) -> Lease:
        with self._changed:
            while (lease := self._table.lease(key, nbytes)) is None:
                self._changed.wait()
            for buffer in lease.dropped:
                self._buffers.pop(buffer, None)  # absent if its allocation failed
                self._slots.pop(buffer, None)
            return lease

    def _fill(self, lease: Lease, block: str, expert: int, like: Slot) -> None:
        finish = self._table.abandon
        try:
            self._store.read(block, expert, like.over(self._buffer(lease.buffer, like.nbytes)))
            finish = self._table.complete
        finally:
            with self._changed:
                finish(lease)
                self._changed.notify_all()

    def _buffer(self, index: int, size: int) -> Tensor:
        if index not in self._buffers:
            buffer_B = self._engine.buffer(size)  # takes milliseconds, hence outside the lock
            with self._changed:
                self._buffers[index] = buffer_B
        return self._buffers[index]

    def report(self) -> dict[str, Any]:
        """Return bytes in use and allowed, hits, and reads from storage, for JSON.

        `host_pinned` is False on a GPU if the system refused to pin memory; copies are slow then.
        """
        with self._changed:
            return {
                "host_bytes": sum(buffer_B.nbytes for buffer_B in self._buffers.values()),
                "host_budget": self._table.limit,
                "host_hits": self._table.hits,
                "host_reads": self._table.reads,
                "host_pinned": self._engine.pinned,
            }

    def check(self) -> None:
        """Raise AssertionError if buffers and table disagree. May be called at any time."""
        with self._changed:
            self._table.check()
            sizes = self._table.buffers
            for index, buffer_B in self._buffers.items():
                assert sizes.get(index) == buffer_B.nbytes, (index, buffer_B.nbytes, sizes)

    def close(self) -> None:
        """Free all memory. No read may be in progress or follow."""
        with self._changed:
            self._buffers.clear()
            self._slots.clear()


def _alike(one: Slot, other: Slot) -> bool:
    return one.format == other.format and one.specs is other.specs
