"""Slots of a model's blocks: adding them, taking them away, another placement while it is served.

Owns the order of it: what has to go goes first, from all blocks, so that the bytes held never
exceed the larger of what was and what shall be. New slots are empty, and whoever calls fills them;
it holds the lock of a step, and no swap is under way.
"""

import ctypes
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from moefit.moe.families import TensorSpec
from moefit.quant.format import Format
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.cache.swaps import Spares
from moefit.serve.config import BlockPlacement, Placement
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.memory.estimate import SPARES

Blocks = Mapping[str, VirtualExperts]


def grow(experts: VirtualExperts, slots: int, device: torch.device) -> None:
    """Add empty slots to a block: all of them, or none if there is no memory."""
    specs = experts.block.layout.specs
    new = [allocate_slot(experts.format, specs, device) for _ in range(slots)]
    experts.slots.update(zip(experts.slot_table.grow(slots), new, strict=True))


def shrink(experts: VirtualExperts, slots: int) -> None:
    """Take slots away, empty ones first, then those of the eviction policy's victims."""
    for index in experts.slot_table.shrink(slots):
        del experts.slots[index]


def resize(blocks: Blocks, counts: Sequence[int], device: torch.device) -> Collection[str]:
    """Give blocks so many slots each; the names of those that have new ones.

    Raises OSError if there is no memory; blocks then have as many as before.
    """
    changes = {
        name: count - experts.slot_table.num_slots
        for (name, experts), count in zip(blocks.items(), counts, strict=True)
    }
    for name, change in changes.items():
        if change < 0:
            shrink(blocks[name], -change)
    return_freed_memory()
    grown: list[str] = []
    try:
        for name, change in changes.items():
            if change > 0:
                grow(blocks[name], change, device)
                grown.append(name)
    except BaseException:
        for name in grown:  # empty still, and empty ones go first
            shrink(blocks[name], changes[name])
        for name, change in changes.items():
            if change < 0:
                grow(blocks[name], -change, device)
        raise
    return grown


def load_all_experts(
    experts: VirtualExperts, placement: BlockPlacement, device: torch.device
) -> None:
    """Give each of a block's experts a slot of its own format, and load it there."""
    for expert in range(experts.num_experts):
        _add_slot(experts, placement.format_of(expert), expert, device)
    experts.load_all(range(experts.num_experts))


def allocate_spares(
    blocks: Iterable[VirtualExperts], device: torch.device, *, placed: bool
) -> Spares:
    """For swaps; where a placement seats all experts of a block, none of them is ever swapped."""
    spares: Spares = {}
    for experts in blocks:
        if experts.slot_table.num_slots == experts.num_experts and placed:
            continue
        if experts.spares_key not in spares:
            specs = experts.block.layout.specs
            some = [allocate_slot(experts.format, specs, device) for _ in range(SPARES)]
            spares[experts.spares_key] = some
    return spares


def apply_placement(
    blocks: Blocks, spares: Spares, placement: Placement, device: torch.device, *, placed: bool
) -> None:
    """Give blocks the slots of this placement; experts stay where their format is the wanted one.

    placed: as of `allocate_spares`.
    Raises OSError if there is no memory; blocks then have the slots that they had, though empty.
    """
    before = {name: _SavedSlots.of(experts) for name, experts in blocks.items()}
    kinds = [(key, len(some), *_slot_kind(some)) for key, some in spares.items() if some]
    spares.clear()
    for name, experts in blocks.items():
        _release_slots(experts, placement[name])
    return_freed_memory()
    try:
        for name, experts in blocks.items():
            _add_missing_slots(experts, placement[name], device)
        spares.update(allocate_spares(blocks.values(), device, placed=placed))
    except BaseException:
        spares.clear()
        for experts in blocks.values():
            shrink(experts, experts.slot_table.num_slots)
        for name, experts in blocks.items():
            before[name].restore(experts, device)
        for key, number, format, specs in kinds:
            spares[key] = [allocate_slot(format, specs, device) for _ in range(number)]
        raise


def _slot_kind(slots: Sequence[Slot]) -> tuple[Format, Mapping[str, TensorSpec]]:
    return slots[0].format, slots[0].specs


@dataclass(frozen=True, slots=True)
class _SavedSlots:
    """A block's slots: whose own each is, and its format."""

    format: Format
    slots: Sequence[tuple[int | None, Format]]

    @classmethod
    def of(cls, experts: VirtualExperts) -> "_SavedSlots":
        owner = experts.slot_table.owner
        return cls(experts.format, [(owner(at), slot.format) for at, slot in experts.slots.items()])

    def restore(self, experts: VirtualExperts, device: torch.device) -> None:
        experts.format = self.format
        for owner, format in self.slots:
            _add_slot(experts, format, owner, device)


def _release_slots(experts: VirtualExperts, one: BlockPlacement) -> None:
    """Take away every slot that a placement has no use for; what stays holds an expert."""
    slot_table = experts.slot_table
    for expert in list(slot_table.residents):
        if experts.slots[slot_table.slot(expert)].format != one.format_of(expert):
            slot_table.evict(expert)
    shrink(experts, slot_table.empty)
    shrink(experts, max(0, slot_table.num_slots - one.slots))
    experts.format = one.largest(experts.block)


def _add_missing_slots(experts: VirtualExperts, one: BlockPlacement, device: torch.device) -> None:
    """Add the slots of a placement that are missing, empty."""
    slot_table = experts.slot_table
    if not one.by_expert:
        grow(experts, one.slots - slot_table.num_slots, device)
        return
    for expert in range(experts.num_experts):
        if expert in slot_table.residents:
            slot_table.set_owner(expert, slot_table.slot(expert))
        else:
            _add_slot(experts, one.format_of(expert), expert, device)


def _add_slot(
    experts: VirtualExperts, format: Format, owner: int | None, device: torch.device
) -> None:
    """One empty slot more."""
    slot = allocate_slot(format, experts.block.layout.specs, device)
    (index,) = experts.slot_table.grow(1)
    experts.slots[index] = slot
    if owner is not None:
        experts.slot_table.set_owner(owner, index)


def return_freed_memory() -> None:
    """Slots are mappings and gone at once; what else was freed may still lie in the C heap.

    Weights that were encoded do, for one: the heap keeps blocks of a few MiB for itself.
    """
    with suppress(OSError, AttributeError):  # another C library: nothing to ask it for
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
