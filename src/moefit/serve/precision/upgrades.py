"""Change the formats of resident experts while the model runs: `--precision auto`.

All slots start in the smallest format, and bytes that the budget leaves buy larger formats, as
`allocate.py` decides. An expert is loaded in its new format into a new slot, which replaces the old
one at a step border. Upgrades wait until downgrades have freed enough bytes, so the budget holds at
all times; the slots being filled are part of the estimate's staging. Callers hold the step lock.
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

PRIOR = 0.05  # share of the mean sensitivity that is added to each expert's
PLAN_INTERVAL = 32  # steps
MIN_GAIN = 0.02  # share of the total error that a new plan must save
MAX_PENDING = 2  # loads at a time


@dataclass(frozen=True, slots=True)
class _PendingUpgrade:
    key: ExpertKey
    choice: FormatChoice
    slot: Slot
    done: Future[float]


class Upgrades:
    """Manages the formats of all resident experts.

    Args:
        blocks: The served blocks by name.
        ladders: Each block's ladders, one per expert.
        transfer: Loads experts.
        device: The device of the slots.

    Attributes:
        capacity: Bytes that slots may take beyond the smallest format; see `set_capacity`.
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
        self.capacity = 0
        for experts in blocks.values():
            experts.enable_stats()
        self._plan: list[tuple[ExpertKey, FormatChoice]] = []
        self._pending: list[_PendingUpgrade] = []
        self._steps = 0

    def fill(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Load every expert into the empty slots, in the formats of `initial_choices`.

        Args:
            progress: Callback with the number of experts loaded and in total.
        """
        choices = initial_choices(self._ladders, self.capacity)
        pending: deque[tuple[str, int, Future[float]]] = deque()
        for number, (name, expert) in enumerate(choices):
            slot_table, slots = self._blocks[name].slot_table, self._blocks[name].slots
            index = slot_table.reserve(expert)
            assert index is not None, "no empty slot"
            slots[index] = self._allocate(name, choices[name, expert])
            pending.append((name, index, self._transfer.load(name, expert, slots[index])))
            if len(pending) > 2 * self._transfer.readers:
                self._commit(*pending.popleft())
                progress(number + 1 - len(pending), len(choices))
        while pending:
            self._commit(*pending.popleft())
            progress(len(choices) - len(pending), len(choices))

    def _commit(self, name: str, index: int, done: Future[float]) -> None:
        wait_for_load(done)
        self._blocks[name].slot_table.publish(index)

    def step(self) -> None:
        """Publish finished loads, and every `PLAN_INTERVAL` steps make a new plan.

        Called at each step border. Loads run in the background.
        """
        self._publish(wait=False)
        self._steps += 1
        if self._steps % PLAN_INTERVAL == 0 and not self._plan:
            self._plan = self._make_plan()
        if self._plan:
            self._start_loads()

    def set_capacity(self, capacity: int) -> None:
        """Set the bytes beyond the smallest format, and downgrade experts until they fit."""
        self._publish(wait=True)
        self.capacity, self._plan = capacity, []
        if self.extra_bytes > capacity:
            self._shrink()
        self._plan = self._make_plan()

    def settle(self) -> None:
        """Make a new plan, carry it out completely and wait for it."""
        self._publish(wait=True)
        self._plan = self._make_plan()
        while self._start_loads():
            self._publish(wait=True)

    def ignore_use(self) -> None:
        """Let plans follow from the experts' weights alone from now on."""
        for experts in self._blocks.values():
            experts.reset_stats()

    @property
    def extra_bytes(self) -> int:
        """Return the bytes that slots take beyond the smallest format."""
        return sum(
            slot.nbytes - self._smallest(name)
            for name, experts in self._blocks.items()
            for slot in experts.slots.values()
        )

    def check(self) -> None:
        """Raise AssertionError if slots and pending loads take more than `capacity`."""
        held = self.extra_bytes + self._reserved()
        assert held <= self.capacity, f"{held} extra bytes, {self.capacity} allowed"

    def _smallest(self, block: str) -> int:
        return self._ladders[block, 0][0].nbytes

    def _residents(self) -> list[ExpertKey]:
        return [
            (name, expert)
            for name, experts in self._blocks.items()
            for expert in sorted(experts.slot_table.residents)
        ]

    def _make_plan(self) -> list[tuple[ExpertKey, FormatChoice]]:
        """Return changes that lead to the best formats, largest first; none if they save little."""
        keys = self._residents()
        sensitivity = self._sensitivity()
        ladders = {key: self._ladders[key] for key in keys}
        smallest = sum(self._smallest(name) for name, _ in keys)
        wanted = allocate(ladders, sensitivity, smallest + self.capacity)
        current = {key: self._current_choice(key) for key in keys}
        error, new_error = weighted_error(current, sensitivity), weighted_error(wanted, sensitivity)
        if error - new_error <= MIN_GAIN * error and self.extra_bytes <= self.capacity:
            return []
        changes = [(key, wanted[key]) for key in keys if wanted[key] != current[key]]
        gain = {
            key: sensitivity[key] * (current[key].error - choice.error) for key, choice in changes
        }
        return sorted(changes, key=lambda change: -abs(gain[change[0]]))

    def _sensitivity(self) -> dict[ExpertKey, float]:
        return {
            (name, expert): value
            for name, experts in self._blocks.items()
            for expert, value in enumerate(smoothed(experts.output_energy.scores(), PRIOR))
        }

    def _current_choice(self, key: ExpertKey) -> FormatChoice:
        """Return the expert's current format, which may be one that its ladder leaves out."""
        slot = self._slot(key)
        for choice in self._ladders[key]:
            if choice.format == slot.format.name:
                return choice
        error = slot.format.expected_error
        return FormatChoice(format=slot.format.name, nbytes=slot.nbytes, error=error)

    def _slot(self, key: ExpertKey) -> Slot:
        experts = self._blocks[key[0]]
        return experts.slots[experts.slot_table.slot(key[1])]

    def _start_loads(self) -> int:
        """Start the changes of the plan that fit now.

        Downgrades free bytes for upgrades, so the plan is rescanned at every step.

        Returns:
            The number of pending loads.
        """
        for key, choice in list(self._plan):
            if len(self._pending) >= MAX_PENDING:
                break
            if not self._is_resident(key):
                self._plan.remove((key, choice))
                continue
            growth = choice.nbytes - self._slot(key).nbytes
            if growth > 0 and growth > self.capacity - self.extra_bytes - self._reserved():
                continue
            self._plan.remove((key, choice))
            self._pending.append(self._load(key, choice))
        if not self._pending:
            self._plan = []  # nothing fits; wait for the next plan
        return len(self._pending)

    def _reserved(self) -> int:
        """Return the bytes by which pending loads will grow their slots."""
        return sum(
            max(0, load.choice.nbytes - self._slot(load.key).nbytes)
            for load in self._pending
            if self._is_resident(load.key)
        )

    def _is_resident(self, key: ExpertKey) -> bool:
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
        if self._is_resident(pending.key):
            experts = self._blocks[name]
            experts.slots[experts.slot_table.slot(expert)] = pending.slot

    def _shrink(self) -> None:
        """Downgrade until the capacity holds, empty slots first; waits for each load."""
        for name, experts in self._blocks.items():
            for index in experts.slot_table.empty_slots:
                if experts.slots[index].nbytes > self._smallest(name):
                    experts.slots[index] = self._allocate(name, self._ladders[name, 0][0])
        for key, choice in self._make_plan():
            if self.extra_bytes <= self.capacity:
                return
            if choice.nbytes < self._slot(key).nbytes:
                pending = self._load(key, choice)
                wait_for_load(pending.done)
                self._replace(pending)
