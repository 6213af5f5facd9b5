"""Add and remove slots of a served model's blocks, and apply another placement.

Slots to be removed are freed first, in all blocks, so that the bytes held never exceed the larger
of the old and the new size. New slots are empty. Callers fill them, hold the lock of `SharedState`,
and have no swap in progress.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moefit.quant.format import Format
from moefit.serve.cache.slot import allocate_slot
from moefit.serve.cache.swaps import Spares
from moefit.serve.config import BlockPlacement, Placement
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.memory.estimate import SPARES
from moefit.serve.memory.release import return_freed_memory

Blocks = Mapping[str, VirtualExperts]


def grow(experts: VirtualExperts, slots: int, device: torch.device) -> None:
    """Add empty slots to a block. Raises OSError if there is no memory; none is added then."""
    specs = experts.block.layout.specs
    new = [allocate_slot(experts.format, specs, device) for _ in range(slots)]
    experts.slots.update(zip(experts.slot_table.grow(slots), new, strict=True))


def shrink(experts: VirtualExperts, slots: int) -> None:
    """Remove slots, empty ones first, then those of the experts that the policy selects."""
    for index in experts.slot_table.shrink(slots):
        del experts.slots[index]


def resize(blocks: Blocks, counts: Sequence[int], device: torch.device) -> Collection[str]:
    """Change the number of slots per block.

    Args:
        blocks: By name.
        counts: New numbers of slots, in the order of `blocks`.
        device: Where slots are allocated.

    Returns:
        Names of the blocks with new, empty slots.

    Raises:
        OSError: There is no memory; blocks then have as many slots as before.
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
        for name in grown:  # the new slots are still empty, and empty ones are removed first
            shrink(blocks[name], changes[name])
        for name, change in changes.items():
            if change < 0:
                grow(blocks[name], -change, device)
        raise
    return grown


def load_all_experts(
    experts: VirtualExperts, placement: BlockPlacement, device: torch.device
) -> None:
    """Allocate a slot for each expert of a block, in the expert's format, and load all of them."""
    for expert in range(experts.num_experts):
        _add_slot(experts, placement.format_of(expert), expert, device)
    experts.load_all(range(experts.num_experts))


def allocate_spares(
    blocks: Iterable[VirtualExperts], device: torch.device, *, placed: bool
) -> Spares:
    """Allocate spare slots for swaps.

    Args:
        blocks: All blocks of the model.
        device: Where slots are allocated.
        placed: Whether a placement is in force; blocks in which it makes all experts resident then
            get no spares, because their experts are never swapped.
    """
    spares: Spares = {}
    for experts in blocks:
        if experts.slot_table.num_slots == experts.num_experts and placed:
            continue
        if experts.spares_key not in spares:
            specs = experts.block.layout.specs
            slots = [allocate_slot(experts.format, specs, device) for _ in range(SPARES)]
            spares[experts.spares_key] = slots
    return spares


def apply_placement(
    blocks: Blocks, spares: Spares, placement: Placement, device: torch.device, *, placed: bool
) -> None:
    """Change the slots of all blocks to those of a placement.

    Experts whose format does not change stay resident; other slots are empty afterwards.

    Args:
        blocks: By name.
        spares: Replaced in place.
        placement: Slots and formats by block name.
        device: Where slots are allocated.
        placed: As for `allocate_spares`.

    Raises:
        OSError: There is no memory; blocks then have their previous slots, but empty.
    """
    before = {name: _SavedSlots.of(experts) for name, experts in blocks.items()}
    spares_before = [
        (key, len(slots), slots[0].format, slots[0].specs) for key, slots in spares.items() if slots
    ]
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
        for key, count, format, specs in spares_before:
            spares[key] = [allocate_slot(format, specs, device) for _ in range(count)]
        raise


@dataclass(frozen=True, slots=True)
class _SavedSlots:
    """Owner and format of each of a block's slots, to restore them."""

    format: Format
    slots: Sequence[tuple[int | None, Format]]

    @classmethod
    def of(cls, experts: VirtualExperts) -> "_SavedSlots":
        owner = experts.slot_table.owner
        return cls(
            experts.format, [(owner(index), slot.format) for index, slot in experts.slots.items()]
        )

    def restore(self, experts: VirtualExperts, device: torch.device) -> None:
        experts.format = self.format
        for owner, format in self.slots:
            _add_slot(experts, format, owner, device)


def _release_slots(experts: VirtualExperts, placement: BlockPlacement) -> None:
    """Remove the slots that a block's placement does not use; those that remain hold an expert."""
    slot_table = experts.slot_table
    for expert in list(slot_table.residents):
        if experts.slots[slot_table.slot(expert)].format != placement.format_of(expert):
            slot_table.evict(expert)
    shrink(experts, slot_table.empty)
    shrink(experts, max(0, slot_table.num_slots - placement.slots))
    experts.format = placement.largest(experts.block)


def _add_missing_slots(
    experts: VirtualExperts, placement: BlockPlacement, device: torch.device
) -> None:
    """Add the missing slots of a block's placement."""
    slot_table = experts.slot_table
    if not placement.by_expert:
        grow(experts, placement.slots - slot_table.num_slots, device)
        return
    for expert in range(experts.num_experts):
        if expert in slot_table.residents:
            slot_table.set_owner(expert, slot_table.slot(expert))
        else:
            _add_slot(experts, placement.format_of(expert), expert, device)


def _add_slot(
    experts: VirtualExperts, format: Format, owner: int | None, device: torch.device
) -> None:
    """Add one empty slot."""
    slot = allocate_slot(format, experts.block.layout.specs, device)
    (index,) = experts.slot_table.grow(1)
    experts.slots[index] = slot
    if owner is not None:
        experts.slot_table.set_owner(owner, index)
