"""Experts in host memory, between their files and slots in a device's memory.

Owns the buffers: one for each expert that the table has a place for, its bytes laid out as in a
slot, taken when first needed and kept for the next expert of that size. An expert comes from its
file into a buffer and from there into the slot in one copy; while its buffer is there, the copy
alone. Thread-safe: readers fill different buffers at once, and nobody sees one half-filled.
Which expert is where is `host_table`'s to decide; knows nothing of residency or modes.
"""

import threading
from typing import Any, Protocol

from torch import Tensor

from moefit.serve.copies import CopyEngine
from moefit.serve.host_table import HostTable, Lease
from moefit.serve.slots import Slot


class Source(Protocol):
    """Whatever fills slots: the store, or a tier in front of it."""

    def read(self, block: str, expert: int, into: Slot) -> None:
        """Fill a slot. If it raises, the slot's content is undefined."""
        ...


class HostTier:
    """Fills slots from at most `limit` bytes of host memory, and that from `store`.

    A reader that finds every buffer in use waits for one, so with room for fewer experts than there
    are readers, reads queue.
    """

    def __init__(self, store: Source, engine: CopyEngine, *, limit: int):
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
