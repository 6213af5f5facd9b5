"""Every expert at the precision it deserves, while the model runs: `--precision auto`.

Owns carrying out what `allocate.py` decides. All slots begin in the smallest format; what the
budget leaves over buys larger ones, one expert after the other: a slot of the new format is filled
beside the old one and takes its place at a step border, whole. Nothing goes up before others have
gone down far enough, so that the bytes held never exceed the budget; slots that are being filled
lie in the ledger's staging. Whoever calls holds the lock of a step.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from moefit.quant.format import FORMATS
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.io.loads import Transfer, wait_for_load
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.precision.allocate import (
    ExpertKey,
    FormatChoice,
    Ladder,
    allocate,
    by_expert,
    initial_choices,
    smoothed,
    weighted_error,
)

PRIOR = 0.05  # of the mean sensitivity, for experts that no token has used lately
EVERY = 32  # steps between two looks at the whole
GAIN = 0.02  # least share of the error that a change of plan must take away
MAX_PENDING = 2  # slots on their way


@dataclass(frozen=True, slots=True)
class _PendingUpgrade:
    key: ExpertKey
    choice: FormatChoice
    slot: Slot
    done: Future[float]


class Upgrades:
    """Formats of all resident experts, and the bytes that they take beyond the smallest format's.

    `room` is how many such bytes there may be; `set_capacity` changes it.
    """

    def __init__(
        self,
        blocks: Mapping[str, VirtualExperts],
        ladders: Mapping[str, Sequence[Ladder]],
        transfer: Transfer,
        device: torch.device,
    ):
        self._blocks, self._transfer, self._device = blocks, transfer, device
        self._ladders = by_expert(ladders)
        self.room = 0
        for experts in blocks.values():
            experts.enable_stats()
        self._plan: list[tuple[ExpertKey, FormatChoice]] = []
        self._pending: list[_PendingUpgrade] = []
        self._steps = 0

    def fill(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Load every expert into slots that are still empty, at formats that treat all alike.

        progress hears how many of how many have come.
        """
        wanted = initial_choices(self._ladders, self.room)
        coming: deque[tuple[str, int, Future[float]]] = deque()
        for number, (name, expert) in enumerate(wanted):
            slot_table, slots = self._blocks[name].slot_table, self._blocks[name].slots
            index = slot_table.reserve(expert)
            assert index is not None, "there is an empty slot for each"
            slots[index] = self._allocate(name, wanted[name, expert])
            coming.append((name, index, self._transfer.load(name, expert, slots[index])))
            if len(coming) > 2 * self._transfer.readers:
                self._arrive(*coming.popleft())
                progress(number + 1 - len(coming), len(wanted))
        while coming:
            self._arrive(*coming.popleft())
            progress(len(wanted) - len(coming), len(wanted))

    def _arrive(self, name: str, index: int, done: Future[float]) -> None:
        wait_for_load(done)
        self._blocks[name].slot_table.publish(index)

    def step(self) -> None:
        """A step border: publish what has come, and now and then plan anew, in the background."""
        self._publish(wait=False)
        self._steps += 1
        if self._steps % EVERY == 0 and not self._plan:
            self._plan = self._changes()
        if self._plan:
            self._begin()

    def set_capacity(self, room: int) -> None:
        """Take at most this many bytes from now on: what must shrink has shrunk on return."""
        self._publish(wait=True)
        self.room, self._plan = room, []
        if self.extra_bytes > room:
            self._shrink()
        self._plan = self._changes()

    def settle(self) -> None:
        """Carry the plan out to its end."""
        self._publish(wait=True)
        self._plan = self._changes()
        while self._begin():
            self._publish(wait=True)

    @property
    def extra_bytes(self) -> int:
        """Bytes that resident experts take beyond the smallest format's."""
        return sum(
            slot.nbytes - self._smallest(name)
            for name, experts in self._blocks.items()
            for slot in experts.slots.values()
        )

    def check(self) -> None:
        """Raise AssertionError if more bytes are taken than there may be."""
        held = self.extra_bytes + self._reserved()
        assert held <= self.room, f"{held} bytes beyond the smallest formats, {self.room} may be"

    def _smallest(self, block: str) -> int:
        return self._ladders[block, 0][0].nbytes

    def _residents(self) -> list[ExpertKey]:
        return [
            (name, expert)
            for name, experts in self._blocks.items()
            for expert in sorted(experts.slot_table.residents)
        ]

    def _changes(self) -> list[tuple[ExpertKey, FormatChoice]]:
        """What leads to the best formats, going down first; nothing if little is to be gained."""
        keys = self._residents()
        sensitivity = self._sensitivity()
        ladders = {key: self._ladders[key] for key in keys}
        smallest = sum(self._smallest(name) for name, _ in keys)
        wanted = allocate(ladders, sensitivity, smallest + self.room)
        now = {key: self._now(key) for key in keys}
        before, after = weighted_error(now, sensitivity), weighted_error(wanted, sensitivity)
        if before - after <= GAIN * before and self.extra_bytes <= self.room:
            return []
        changes = [(key, wanted[key]) for key in keys if wanted[key] != now[key]]
        gain = {key: sensitivity[key] * (now[key].error - choice.error) for key, choice in changes}
        return sorted(changes, key=lambda one: -abs(gain[one[0]]))

    def _sensitivity(self) -> dict[ExpertKey, float]:
        return {
            (name, expert): value
            for name, experts in self._blocks.items()
            for expert, value in enumerate(smoothed(experts.output_energy.scores(), PRIOR))
        }

    def _now(self, key: ExpertKey) -> FormatChoice:
        """What the expert has; a slot that it got by chance may have a format off its ladder."""
        slot = self._slot(key)
        for choice in self._ladders[key]:
            if choice.format == slot.format.name:
                return choice
        error = slot.format.expected_error
        return FormatChoice(format=slot.format.name, nbytes=slot.nbytes, error=error)

    def _slot(self, key: ExpertKey) -> Slot:
        experts = self._blocks[key[0]]
        return experts.slots[experts.slot_table.slot(key[1])]

    def _begin(self) -> int:
        """Start what the plan has and fits now; returns how many are on their way.

        The way down makes room for the way up, so both go side by side.
        """
        for key, choice in list(self._plan):
            if len(self._pending) >= MAX_PENDING:
                break
            if not self._resident(key):
                self._plan.remove((key, choice))
                continue
            growth = choice.nbytes - self._slot(key).nbytes
            if growth > 0 and growth > self.room - self.extra_bytes - self._reserved():
                continue
            self._plan.remove((key, choice))
            self._pending.append(self._load(key, choice))
        if not self._pending:
            self._plan = []  # nothing of it fits; the next look may find other ways
        return len(self._pending)

    def _reserved(self) -> int:
        """Bytes by which loads under way will grow their slots."""
        return sum(
            max(0, one.choice.nbytes - self._slot(one.key).nbytes)
            for one in self._pending
            if self._resident(one.key)
        )

    def _resident(self, key: ExpertKey) -> bool:
        return key[1] in self._blocks[key[0]].slot_table.residents

    def _allocate(self, name: str, choice: FormatChoice) -> Slot:
        specs = self._blocks[name].block.layout.specs
        return allocate_slot(FORMATS[choice.format], specs, self._device)

    def _load(self, key: ExpertKey, choice: FormatChoice) -> _PendingUpgrade:
        name, expert = key
        slot = self._allocate(name, choice)
        done = self._transfer.load(name, expert, slot, background=True)
        return _PendingUpgrade(key, choice, slot, done)

    def _publish(self, *, wait: bool) -> None:
        for pending in list(self._pending):
            if not (wait or pending.done.done()):
                continue
            self._pending.remove(pending)
            if pending.done.exception() is None:
                self._replace(pending)

    def _replace(self, pending: _PendingUpgrade) -> None:
        name, expert = pending.key
        if self._resident(pending.key):
            experts = self._blocks[name]
            experts.slots[experts.slot_table.slot(expert)] = pending.slot

    def _shrink(self) -> None:
        """Go down until the room is kept, waiting for each; slots without an expert first."""
        for name, experts in self._blocks.items():
            for index in experts.slot_table.empty_slots:
                if experts.slots[index].nbytes > self._smallest(name):
                    experts.slots[index] = self._allocate(name, self._ladders[name, 0][0])
        for key, choice in self._changes():
            if self.extra_bytes <= self.room:
                return
            if choice.nbytes < self._slot(key).nbytes:
                pending = self._load(key, choice)
                wait_for_load(pending.done)
                self._replace(pending)
