"""Swaps of one block: experts that are loaded in the background and published at a step border.

A swap takes a spare slot, its expert is read while the model runs, and at a step border the expert
becomes resident and the slot of the one that leaves becomes a spare. `SharedState` holds what all
blocks of a model share: policy, manager, transfer, counters, spare slots and the lock of a step.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import RLock

from moefit.serve.cache.scores import Swap, VirtualExpertManager
from moefit.serve.cache.slot import Slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.config import Policy
from moefit.serve.io.loads import Transfer
from moefit.serve.stats import Counters

Spares = dict[tuple[str, int], list[Slot]]
"""Slots for swaps, by format and size: experts of all blocks with such slots take turns."""


@dataclass(slots=True)
class SharedState:
    """Changed between steps, under `lock`; the objects behind the names stay, but for two.

    `policy` and `manager` are replaced as a whole, so they are asked for at every step.
    """

    policy: Policy
    manager: VirtualExpertManager
    transfer: Transfer
    counters: Counters = field(default_factory=Counters)
    lock: RLock = field(default_factory=RLock)
    spares: Spares = field(default_factory=dict)
    on_step: Callable[[], None] | None = None  # at the first block's step borders

    @property
    def spare_bytes(self) -> int:
        """Bytes of all spare slots that no swap has taken."""
        return sum(slot.nbytes for spares in self.spares.values() for slot in spares)


@dataclass(frozen=True, slots=True)
class _PendingSwap:
    """A swap whose expert is on its way into slot `slot`."""

    swap: Swap
    slot: int
    done: Future[float]


class Swaps:
    """Those of block `block`, whose slot table and slots these are; whoever calls holds the lock.

    `residency` and `slots` are the block's own: a swap adds one of the spare slots to both, and
    takes one out of both when it ends.
    """

    def __init__(
        self, block: str, shared: SharedState, slot_table: SlotTable, slots: dict[int, Slot]
    ):
        self._block, self._shared = block, shared
        self._slot_table, self._slots = slot_table, slots
        self._pending: list[_PendingSwap] = []

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._pending)

    def begin(self, scores: Sequence[float], kind: tuple[str, int], *, fill: bool = False) -> int:
        """Start what the manager plans by these scores, one an expert; returns how many began.

        kind: of the spare slots (see `Spares`), as many as which may go at once.
        fill: only into slots that are empty; nobody leaves.
        """
        spares = self._shared.spares.get(kind, [])
        begun = 0
        for swap in self._planned(scores):
            if swap.evict is not None:
                if fill or not spares:
                    break
                (index,) = self._slot_table.grow(1)
                self._slots[index] = spares.pop()
            self._start(swap)
            begun += 1
        return begun

    def fill(self, scores: Sequence[float], kind: tuple[str, int]) -> None:
        """Begin to load the best absent experts into all empty slots; arguments as of `begin`."""
        while self._slot_table.empty and len(self._slot_table.residents) + len(self) < len(scores):
            if not self.begin(scores, kind, fill=True):
                return

    def cancel(self, experts: Collection[int] | None = None) -> None:
        """Drop swaps that bring these experts, all if None, as far as reading has not begun."""
        for pending in self._pending:
            if experts is None or pending.swap.load in experts:
                pending.done.cancel()
        self.publish()

    def settle(self) -> None:
        """Wait for all that is under way, and publish it."""
        self.publish(wait_for=[pending.swap.load for pending in self._pending])

    def wait_for_first(self) -> None:
        """Wait for the swap that has been under way for longest, and publish it."""
        self.publish(wait_for=[self._pending[0].swap.load])

    def publish(self, *, wait_for: Collection[int] = ()) -> None:
        """Make finished swaps visible, and wait for those that bring one of these experts."""
        for pending in list(self._pending):
            if pending.swap.load in wait_for or pending.done.done():
                self._end(pending)

    def check(self) -> None:
        """Raise AssertionError if a swap's expert is not being loaded, or its slot is missing."""
        coming = [pending.swap.load for pending in self._pending]
        assert sorted(coming) == sorted(self._slot_table.filling), "filling, but by no swap"
        assert all(pending.slot in self._slots for pending in self._pending), "no such slot"
        leaving = self._leaving()
        assert len(set(leaving)) == len(leaving), f"an expert leaves twice: {leaving}"

    def _planned(self, scores: Sequence[float]) -> Sequence[Swap]:
        leaving = self._leaving()
        return self._shared.manager.plan(
            [expert for expert in self._slot_table.residents if expert not in leaving],
            scores,
            empty=self._slot_table.empty,
            filling=[*self._slot_table.filling, *leaving],
        )

    def _leaving(self) -> list[int]:
        return [one.swap.evict for one in self._pending if one.swap.evict is not None]

    def _start(self, swap: Swap) -> None:
        slot = self._slot_table.reserve(swap.load, protected=self._slot_table.residents)
        assert slot is not None, "there is an empty one"
        done = self._shared.transfer.load(
            self._block, swap.load, self._slots[slot], background=True
        )
        self._pending.append(_PendingSwap(swap, slot, done))

    def _end(self, pending: _PendingSwap) -> None:
        """Wait for a swap, and publish it; one that was cancelled has failed."""
        failed = pending.done.cancelled() or (
            pending.done.exception() is not None  # may wait, and be interrupted
        )
        self._pending.remove(pending)
        if failed:
            # Nobody waits for this expert; the next plan may try again. What is resident stays.
            self._slot_table.abandon(pending.slot)
        else:
            self._slot_table.publish(pending.slot)
            self._shared.counters.swaps += 1
            if (old := pending.swap.evict) is not None and old in self._slot_table.residents:
                self._slot_table.evict(old)
        if pending.swap.evict is not None:
            self._return_spare()

    def _return_spare(self) -> None:
        """One slot goes back to the spares: an empty one, else that of the least important."""
        for index in self._slot_table.shrink(1):
            slot = self._slots.pop(index)
            kind = slot.format.name, slot.nbytes
            self._shared.spares.setdefault(kind, []).append(slot)
