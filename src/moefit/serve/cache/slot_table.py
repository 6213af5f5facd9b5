"""Track which experts of one MoE block are in which slots.

Every slot is empty, being filled, or holds one expert, and no expert is in two slots. Where experts
differ in format, each may own the slot of its format. An eviction policy selects the expert to
evict. Pure Python and not thread-safe: callers hold a lock.
"""

from collections.abc import Collection, Mapping

from moefit.serve.cache.eviction import EvictionPolicy


class SlotTable:
    """The slot table of one block. Slot indices may have gaps after `shrink`.

    Args:
        num_experts: Experts of the block.
        slots: Number of slots to begin with, all empty.
        policy: Selects the expert to evict.
    """

    def __init__(self, num_experts: int, slots: int, policy: EvictionPolicy):
        self.num_experts = num_experts
        self._policy = policy
        self._slot_of: dict[int, int] = {}
        self._filling: dict[int, int] = {}  # slot -> expert
        self._empty: list[int] = list(range(slots))[::-1]
        self._next = slots
        self._own: dict[int, int] = {}  # expert -> slot

    @property
    def residents(self) -> Collection[int]:
        """Experts that can be used now."""
        return self._slot_of.keys()

    @property
    def slot_of(self) -> Mapping[int, int]:
        """The slot of each resident expert."""
        return self._slot_of

    @property
    def num_slots(self) -> int:
        """Number of all slots."""
        return len(self._slot_of) + len(self._filling) + len(self._empty)

    @property
    def empty(self) -> int:
        """Number of empty slots, those being filled excluded."""
        return len(self._empty)

    @property
    def empty_slots(self) -> Collection[int]:
        """Indices of the empty slots."""
        return tuple(self._empty)

    @property
    def filling(self) -> Collection[int]:
        """Experts that are being loaded."""
        return self._filling.values()

    def slot(self, expert: int) -> int:
        """Return the slot of a resident expert."""
        return self._slot_of[expert]

    def slots_of(self, experts: Collection[int]) -> list[int] | None:
        """Return the slots of these experts; None unless all are resident."""
        try:
            return [self._slot_of[expert] for expert in experts]
        except KeyError:
            return None

    def reserve(self, expert: int, protected: Collection[int] = ()) -> int | None:
        """Reserve a slot for an expert to be loaded, evicting another one if no slot is empty.

        Args:
            expert: Neither resident nor being loaded.
            protected: Residents that must not be evicted.

        Returns:
            The slot, preferably the one that the expert owns; None if every slot is protected or
            being filled.
        """
        assert expert not in self._slot_of and expert not in self._filling.values(), expert
        if not self._empty:
            evictable = [one for one in self._slot_of if one not in protected]
            if not evictable:
                return None
            self.evict(self._policy.victim(self._slot_of.keys(), protected))
        if (slot := self._own.get(expert)) in self._empty:
            self._empty.remove(slot)
        else:
            slot = self._empty.pop()
        self._filling[slot] = expert
        return slot

    def publish(self, slot: int) -> None:
        """Make the expert of a reserved slot resident, once it is loaded completely."""
        self._slot_of[self._filling.pop(slot)] = slot

    def abandon(self, slot: int) -> None:
        """Empty a reserved slot whose load failed."""
        del self._filling[slot]
        self._empty.append(slot)

    def restore(self, slot: int, expert: int) -> None:
        """Make the previous expert of a reserved slot resident again; nothing was written to it."""
        assert expert not in self._slot_of and expert not in self._filling.values(), expert
        del self._filling[slot]
        self._slot_of[expert] = slot

    def evict(self, expert: int) -> int:
        """Evict a resident expert; return its slot, now empty."""
        slot = self._slot_of.pop(expert)
        self._empty.append(slot)
        return slot

    def set_owner(self, expert: int, slot: int) -> None:
        """Make an expert the only owner of a slot; `reserve` then prefers that slot for it."""
        assert slot in {*self._slot_of.values(), *self._filling, *self._empty}, slot
        self._own = {one: own for one, own in self._own.items() if own != slot} | {expert: slot}

    def owner(self, slot: int) -> int | None:
        """Return the expert that owns a slot, if there is one."""
        return next((expert for expert, own in self._own.items() if own == slot), None)

    def grow(self, slots: int) -> list[int]:
        """Add empty slots; return their indices."""
        new = list(range(self._next, self._next + slots))
        self._next += slots
        self._empty.extend(reversed(new))
        return new

    def shrink(self, slots: int) -> list[int]:
        """Remove slots, empty ones first, then those of the experts that the policy selects.

        Returns:
            Indices of the removed slots: fewer than requested where slots are being filled.
        """
        removed: list[int] = []
        for _ in range(slots):
            if not self._empty:
                if not self._slot_of:
                    break
                self.evict(self._policy.victim(self._slot_of.keys(), ()))
            removed.append(self._empty.pop())
        self._own = {expert: slot for expert, slot in self._own.items() if slot not in removed}
        return removed

    def check(self) -> None:
        """Raise AssertionError if a slot is used twice or an expert is in two slots."""
        slots = [*self._slot_of.values(), *self._filling, *self._empty]
        assert len(set(slots)) == len(slots), f"a slot is in two states: {slots}"
        experts = [*self._slot_of, *self._filling.values()]
        assert len(set(experts)) == len(experts), f"an expert is in two slots: {experts}"
        assert all(0 <= expert < self.num_experts for expert in experts), experts
        assert all(0 <= slot < self._next for slot in slots), slots
        own = list(self._own.values())
        assert len(set(own)) == len(own) and set(own) <= set(slots), f"wrong owners: {self._own}"
