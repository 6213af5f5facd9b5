"""A bounded cache of experts in pinned host memory, between the files and a GPU's slots.

`HostTable` decides which expert is in which buffer, without tensors; `HostCache` reads and copies.
A buffer that is being copied from is never reused, and a half-read expert is never found.
"""

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from math import inf, log2
from typing import Any, Protocol

from torch import Tensor

from moefit.serve.cache.slot import Slot
from moefit.serve.io.device_copy import CopyEngine

Key = Hashable
HALF_LIFE = 4.0  # of a request, in requests for each expert that is held


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Leave to use a place until it is released; several may share a whole one.

    `fresh`: the place has no content yet, and the holder must `complete` or `abandon` it.
    `dropped`: places that are no more; their memory must go before that of this one is taken.
    """

    key: Key
    place: int
    fresh: bool
    dropped: tuple[int, ...] = ()


@dataclass(slots=True)
class _Entry:
    place: int
    nbytes: int
    leases: int = 1
    whole: bool = False


class HostTable:
    """At most `limit` bytes of experts. `hits` counts what was there, `reads` what was filled."""

    def __init__(self, limit: int):
        self.limit = limit
        self.hits = self.reads = 0
        self._entries: dict[Key, _Entry] = {}
        self._next = 0
        self._now = 0.0  # half-lives since the beginning
        self._asked: dict[Key, float] = {}  # log2 of the decayed count, undecayed to the beginning

    @property
    def held(self) -> int:
        """Bytes of all places."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def places(self) -> dict[int, int]:
        """Bytes by place."""
        return {entry.place: entry.nbytes for entry in self._entries.values()}

    def lease(self, key: Key, nbytes: int) -> Lease | None:
        """The place of this expert, or a fresh one for it.

        None: not now, because another reader is filling it, or all that could make room is in use.
        Worth asking again after any `complete`, `abandon` or `release`.
        """
        assert nbytes <= self.limit, f"{nbytes} bytes never fit into {self.limit}"
        entry = self._entries.get(key)
        if entry is None:
            return self._fresh(key, nbytes)
        if not entry.whole:
            return None
        entry.leases += 1
        self.hits += 1
        self._count(key)
        return Lease(key=key, place=entry.place, fresh=False)

    def _fresh(self, key: Key, nbytes: int) -> Lease | None:
        room, leaving = self.limit - self.held, list[Key]()
        for other in self._idle() if room < nbytes else ():
            leaving.append(other)
            room += self._entries[other].nbytes
            if room >= nbytes:
                break
        if room < nbytes:
            return None
        gone = [self._entries.pop(other) for other in leaving]
        # Memory that fits is taken over as it is: pinning takes longer than copying.
        place = next((entry.place for entry in gone if entry.nbytes == nbytes), self._next)
        if place == self._next:
            self._next += 1
        self._entries[key] = _Entry(place, nbytes)
        self._count(key)
        dropped = tuple(entry.place for entry in gone if entry.place != place)
        return Lease(key=key, place=place, fresh=True, dropped=dropped)

    def _idle(self) -> list[Key]:
        """What could make room, the least asked for first."""
        idle = [key for key, entry in self._entries.items() if not entry.leases]
        return sorted(idle, key=lambda key: self._asked.get(key, -inf))

    def _count(self, key: Key) -> None:
        """One request. Sums of powers of two, in logarithms: nothing decays, nothing overflows."""
        self._now += 1 / (HALF_LIFE * len(self._entries))
        before = self._asked.get(key, -inf)
        self._asked[key] = self._now + log2(1 + 2.0 ** (before - self._now))

    def complete(self, lease: Lease) -> None:
        """A fresh place holds its expert; others may share the lease from now on."""
        self._entries[lease.key].whole = True
        self.reads += 1

    def abandon(self, lease: Lease) -> None:
        """A fresh place could not be filled. It holds nobody, and is the first to be taken over."""
        entry = self._entries.pop(lease.key)
        assert not entry.whole
        entry.leases = 0
        self._entries[object()] = entry

    def release(self, lease: Lease) -> None:
        """The holder of a lease on a whole place no longer needs it."""
        self._entries[lease.key].leases -= 1

    def check(self) -> None:
        """Raise AssertionError if the bound, a place or a lease is not as it should be."""
        assert self.held <= self.limit, f"{self.held} bytes held, {self.limit} may be"
        places = [entry.place for entry in self._entries.values()]
        assert len(set(places)) == len(places), f"a place holds two experts: {places}"
        for key, entry in self._entries.items():
            assert 0 <= entry.place < self._next, (key, entry)
            assert entry.leases >= 0 and (entry.whole or entry.leases <= 1), (key, entry)


class ExpertReader(Protocol):
    """Whatever fills slots: the store, or a tier in front of it."""

    def read(self, block: str, expert: int, into: Slot) -> None:
        """Fill a slot. If it raises, the slot's content is undefined."""
        ...


class HostCache:
    """Fills slots from at most `limit` bytes of host memory, and that from `store`.

    A reader that finds every buffer in use waits for one, so with room for fewer experts than there
    are readers, reads queue.
    """

    def __init__(self, store: ExpertReader, engine: CopyEngine, *, limit: int):
        self._store, self._engine = store, engine
        self._table = HostTable(limit)
        self._buffers: dict[int, Tensor] = {}
        self._changed = threading.Condition()

    def read(self, block: str, expert: int, into: Slot) -> None:
        """Fill a slot, of any device that the engine copies to. Raises what the store raises."""
        lease = self._lease((block, expert, into.format.name), into.nbytes)
        if lease.fresh:
            self._fill(lease, block, expert, into)
        try:
            self._engine.copy(self._buffers[lease.place], into.buffer_B)
        finally:
            with self._changed:
                self._table.release(lease)
                self._changed.notify_all()

    def _lease(self, key: tuple[str, int, str], nbytes: int) -> Lease:
        with self._changed:
            while (lease := self._table.lease(key, nbytes)) is None:
                self._changed.wait()
            for place in lease.dropped:
                self._buffers.pop(place, None)  # absent if there was no memory for it
            return lease

    def _fill(self, lease: Lease, block: str, expert: int, like: Slot) -> None:
        end = self._table.abandon
        try:
            self._store.read(block, expert, like.over(self._buffer(lease.place, like.nbytes)))
            end = self._table.complete
        finally:
            with self._changed:
                end(lease)
                self._changed.notify_all()

    def _buffer(self, place: int, size: int) -> Tensor:
        if place not in self._buffers:
            buffer_B = self._engine.buffer(size)  # may take milliseconds, so not under the lock
            with self._changed:
                self._buffers[place] = buffer_B
        return self._buffers[place]

    def report(self) -> dict[str, Any]:
        """Bytes held and allowed; experts that were there, and that came from storage.

        `host_pinned` False on a GPU: the system refused to pin memory, and copies are slow.
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
        """Raise AssertionError if buffers and table don't agree. Holds at any moment."""
        with self._changed:
            self._table.check()
            places = self._table.places
            for place, buffer_B in self._buffers.items():
                assert places.get(place) == buffer_B.nbytes, (place, buffer_B.nbytes, places)

    def close(self) -> None:
        """Give all memory back. No read may be under way; none can follow."""
        with self._changed:
            self._buffers.clear()
