"""Swap experts of one block in the background.

A swap takes a spare slot and reads its expert while the model runs. At a later step border the
expert becomes resident, and the slot of the evicted expert becomes a spare. `SharedState` is the
state that all blocks of a model share.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import RLock
from typing import Protocol

from torch import Tensor

from moefit.moe.routing import Routing
from moefit.quant.format import slot_kind
from moefit.serve.cache.scores import Swap, VirtualExpertManager
from moefit.serve.cache.slot import Slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.config import Policy
from moefit.serve.io.loads import PendingLoad, Transfer
from moefit.serve.stats import Counters

Spares = dict[tuple[str, int], list[Slot]]
"""Spare slots by (format name, bytes), shared by all blocks with such slots."""


class StepWatcher(Protocol):
    """Follows the steps of all blocks in exact mode, under the lock of `SharedState`."""

    def chosen(self, block: int, routing: Routing) -> None:
        """Take the router's choice of a step, before its experts are computed.

        Args:
            block: Index of the block.
            routing: The choice.
        """
        ...

    def read(self, block: int, x_TD: Tensor) -> None:
        """Continue once no read of this step is left to wait for.

        Args:
            block: Index of the block.
            x_TD: Inputs of its experts.
        """
        ...

    def computed(self, block: int) -> None:
        """Continue once the step of a block is complete."""
        ...


@dataclass(slots=True)
class SharedState:
    """State shared by all blocks of a model; change it only while holding `lock`.

    Args:
        policy: How misses are handled; replaced as a whole, so read it anew in each step.
        manager: Plans swaps in the virtual mode; replaced likewise.
        transfer: Loads experts into slots.
        counters: Statistics for `report()`.
        lock: Held during each step of a block and each change.
        spares: Slots for swaps.
        on_step: Called before each step of the model's first block.
        watcher: Follows steps in exact mode, such as to prefetch.
    """

    policy: Policy
    manager: VirtualExpertManager
    transfer: Transfer
    counters: Counters = field(default_factory=Counters)
    lock: RLock = field(default_factory=RLock)
    spares: Spares = field(default_factory=dict)
    on_step: Callable[[], None] | None = None
    watcher: StepWatcher | None = None

    @property
    def spare_bytes(self) -> int:
        """Bytes of the spare slots that no swap uses."""
        return sum(slot.nbytes for spares in self.spares.values() for slot in spares)


@dataclass(frozen=True, slots=True)
class _PendingSwap:
    """A swap whose expert is being loaded into slot `slot`.

    Attributes:
        guessed: Whether it is a prefetch.
        displaced: The expert whose slot a prefetch took; it is still there until reading starts.
    """

    swap: Swap
    slot: int
    done: Future[float]
    guessed: bool = False
    displaced: int | None = None


class Swaps:
    """The swaps of one block. Callers hold the lock of `SharedState`.

    Args:
        block: Name of the block.
        shared: State of the model.
        slot_table: The block's; a swap adds a spare slot and removes one when it ends.
        slots: The block's, by index; changed together with `slot_table`.
    """

    def __init__(
        self, block: str, shared: SharedState, slot_table: SlotTable, slots: dict[int, Slot]
    ):
        self._block, self._shared = block, shared
        self._slot_table, self._slots = slot_table, slots
        self._pending: list[_PendingSwap] = []
        self._guesses: list[tuple[int, Future[float]]] = []

    def __len__(self) -> int:
        """Number of swaps in progress."""
        return len(self._pending)

    @property
    def loading(self) -> int:
        """Number of swaps whose reading has not ended."""
        return sum(not pending.done.done() for pending in self._pending)

    def begin(self, scores: Sequence[float], kind: tuple[str, int], *, fill: bool = False) -> int:
        """Start the swaps that the manager plans.

        Args:
            scores: By expert.
            kind: Key into `Spares`; each eviction needs one spare slot.
            fill: Load into empty slots only, without evictions.

        Returns:
            How many swaps were started.
        """
        spares = self._shared.spares.get(kind, [])
        started = 0
        for swap in self._planned(scores):
            if swap.evict is not None:
                if fill or not spares:
                    break
                (index,) = self._slot_table.grow(1)
                self._slots[index] = spares.pop()
            self._start(swap)
            started += 1
        return started

    def fill(self, scores: Sequence[float], kind: tuple[str, int]) -> None:
        """Start loading the best absent experts into all empty slots; arguments as for `begin`."""
        while self._slot_table.empty and len(self._slot_table.residents) + len(self) < len(scores):
            if not self.begin(scores, kind, fill=True):
                return

    def prefetch(self, expert: int, protected: Collection[int]) -> bool:
        """Start loading an expert that is only guessed to be needed.

        Args:
            expert: Neither resident nor being loaded.
            protected: Residents that it must not displace.

        Returns:
            False if there is no slot for it.
        """
        before = set(self._slot_table.residents)
        slot = self._slot_table.reserve(expert, protected)
        if slot is None:
            return False
        displaced = next(iter(before.difference(self._slot_table.residents)), None)
        try:
            done = self._shared.transfer.load(
                self._block, expert, self._slots[slot], background=True
            )
        except BaseException:
            self._release(slot, displaced)
            raise
        swap = Swap(load=expert, evict=None)
        self._pending.append(_PendingSwap(swap, slot, done, guessed=True, displaced=displaced))
        self._guesses.append((expert, done))
        return True

    @property
    def guessed(self) -> bool:
        """Whether there are prefetches since `end_guesses`."""
        return bool(self._guesses)

    def withdraw_guesses(self) -> None:
        """Cancel prefetches whose reading has not started; the others go on."""
        if self._guesses:
            self._guesses = [one for one in self._guesses if not one[1].cancel()]
            self.publish()

    def end_guesses(self, needed: Collection[int]) -> None:
        """Cancel prefetches whose reading has not started, and count the others.

        Steps read experts that they need with more threads, and before guesses.

        Args:
            needed: The experts that the step needs.
        """
        counters = self._shared.counters
        for expert, done in self._guesses:
            if done.cancel():
                continue
            used = expert in needed
            counters.prefetches += 1
            counters.prefetches_used += used
            if (slot := self._slot_of(expert)) is not None:
                counters.prefetched_bytes += slot.nbytes
                counters.prefetch_wasted_bytes += 0 if used else slot.nbytes
        self._guesses.clear()
        self.publish()

    def _slot_of(self, expert: int) -> Slot | None:
        """Return the slot of an expert that is resident or being loaded."""
        for pending in self._pending:
            if pending.swap.load == expert:
                return self._slots[pending.slot]
        residents = self._slot_table.residents
        return self._slots[self._slot_table.slot(expert)] if expert in residents else None

    def take(self, experts: Collection[int]) -> dict[int, PendingLoad]:
        """Return the loads of these experts that are in progress; the caller commits them.

        Loads that have ended are published, and so are those that return a spare slot, after
        waiting for them.
        """
        wanted = [one for one in self._pending if one.swap.load in experts]
        for pending in wanted:  # first, since waiting may be interrupted
            if pending.done.done() or pending.swap.evict is not None:
                self._end(pending)
        taken = [one for one in wanted if one in self._pending]
        self._pending = [one for one in self._pending if one not in taken]
        return {one.swap.load: PendingLoad(one.slot, one.done) for one in taken}

    def cancel(self, experts: Collection[int] | None = None) -> None:
        """Cancel swaps that load these experts (None: all), unless reading has started."""
        for pending in self._pending:
            if experts is None or pending.swap.load in experts:
                pending.done.cancel()
        self.publish()

    def settle(self) -> None:
        """Wait for all swaps in progress, and publish them."""
        self.publish(wait_for=[pending.swap.load for pending in self._pending])

    def wait_for_first(self) -> None:
        """Wait for the oldest swap in progress, and publish it."""
        self.publish(wait_for=[self._pending[0].swap.load])

    def publish(self, *, wait_for: Collection[int] = ()) -> None:
        """Publish finished swaps, after waiting for those that load one of the given experts."""
        for pending in list(self._pending):
            if pending.swap.load in wait_for or pending.done.done():
                self._end(pending)

    def check(self) -> None:
        """Raise AssertionError if swaps and slot table disagree."""
        loading = [pending.swap.load for pending in self._pending]
        assert sorted(loading) == sorted(self._slot_table.filling), "a slot is filled by no swap"
        assert all(pending.slot in self._slots for pending in self._pending), "a slot is missing"
        evicting = self._evicting()
        assert len(set(evicting)) == len(evicting), f"an expert is evicted twice: {evicting}"

    def _planned(self, scores: Sequence[float]) -> Sequence[Swap]:
        evicting = self._evicting()
        return self._shared.manager.plan(
            [expert for expert in self._slot_table.residents if expert not in evicting],
            scores,
            empty=self._slot_table.empty,
            filling=[*self._slot_table.filling, *evicting],
        )

    def _evicting(self) -> list[int]:
        return [one.swap.evict for one in self._pending if one.swap.evict is not None]

    def _start(self, swap: Swap) -> None:
        slot = self._slot_table.reserve(swap.load, protected=self._slot_table.residents)
        assert slot is not None, "no slot is empty"
        done = self._shared.transfer.load(
            self._block, swap.load, self._slots[slot], background=True
        )
        self._pending.append(_PendingSwap(swap, slot, done))

    def _end(self, pending: _PendingSwap) -> None:
        """Wait for a swap, and publish it unless it failed or was cancelled."""
        failed = pending.done.cancelled() or (
            pending.done.exception() is not None  # waits; may be interrupted
        )
        self._pending.remove(pending)
        if failed:
            # No step needs this expert, so this is no error; a later plan may retry.
            self._release(pending.slot, pending.displaced if pending.done.cancelled() else None)
        else:
            self._slot_table.publish(pending.slot)
            self._shared.counters.swaps += not pending.guessed
            if (old := pending.swap.evict) is not None and old in self._slot_table.residents:
                self._slot_table.evict(old)
        if pending.swap.evict is not None:
            self._return_spare()

    def _release(self, slot: int, displaced: int | None) -> None:
        """End the reservation of a slot; `displaced` is the expert that it still holds."""
        present = {*self._slot_table.residents, *self._slot_table.filling}
        if displaced is None or displaced in present:
            self._slot_table.abandon(slot)
        else:
            self._slot_table.restore(slot, displaced)

    def _return_spare(self) -> None:
        """Move one slot to the spares: an empty one, else that of the expert the policy selects."""
        for index in self._slot_table.shrink(1):
            slot = self._slots.pop(index)
            kind = slot_kind(slot.format, slot.specs), slot.nbytes
            self._shared.spares.setdefault(kind, []).append(slot)
