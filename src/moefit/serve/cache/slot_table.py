"""Which experts of one MoE block are in memory, slot by slot.

Owns the bookkeeping: every slot is empty, being filled, or holds one expert, and no expert is in
two slots. A slot may be one expert's own, being of that expert's format. Who goes is asked of an
eviction policy. Pure: knows nothing of tensors, files or threads; whoever uses it from several
threads holds a lock.
"""

from collections.abc import Collection

from moefit.serve.cache.eviction import EvictionPolicy


class SlotTable:
    """The slot table of one block. `num_slots` counts slots; their indices may have gaps."""

    def __init__(self, num_experts: int, slots: int, policy: EvictionPolicy):
        self.num_experts = num_experts
        self._policy = policy
        self._slot_of: dict[int, int] = {}
        self._filling: dict[int, int] = {}  # slot -> expert
        self._empty: list[int] = list(range(slots))[::-1]
        self._next = slots
        self._own: dict[int, int] = {}  # expert -> the slot that is its own

    @property
    def residents(self) -> Collection[int]:
        """Experts that can be used now."""
        return self._slot_of.keys()

    @property
    def num_slots(self) -> int:
        """Slots in all."""
        return len(self._slot_of) + len(self._filling) + len(self._empty)

    @property
    def empty(self) -> int:
        """Slots that hold nothing and wait for nothing."""
        return len(self._empty)

    @property
    def empty_slots(self) -> Collection[int]:
        """Their indices."""
        return tuple(self._empty)

    @property
    def filling(self) -> Collection[int]:
        """Experts on their way."""
        return self._filling.values()

    def slot(self, expert: int) -> int:
        """The slot of a resident expert."""
        return self._slot_of[expert]

    def reserve(self, expert: int, protected: Collection[int] = ()) -> int | None:
        """A slot for an expert that is to be loaded; None if all are protected or being filled.

        Takes an empty slot, its own if that is one, else that of the policy's victim, which is no
        resident from now on.
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
        """The slot's expert is whole and may be used."""
        self._slot_of[self._filling.pop(slot)] = slot

    def abandon(self, slot: int) -> None:
        """The slot's load failed; the slot is empty again."""
        del self._filling[slot]
        self._empty.append(slot)

    def evict(self, expert: int) -> int:
        """Empty the slot of an expert; returns the slot."""
        slot = self._slot_of.pop(expert)
        self._empty.append(slot)
        return slot

    def set_owner(self, expert: int, slot: int) -> None:
        """Make the slot the expert's own, and no other's: it goes there whenever that is empty."""
        assert slot in {*self._slot_of.values(), *self._filling, *self._empty}, slot
        self._own = {one: its for one, its in self._own.items() if its != slot} | {expert: slot}

    def owner(self, slot: int) -> int | None:
        """The expert whose own the slot is."""
        return next((expert for expert, own in self._own.items() if own == slot), None)

    def grow(self, slots: int) -> list[int]:
        """Add empty slots; returns their indices."""
        new = list(range(self._next, self._next + slots))
        self._next += slots
        self._empty.extend(reversed(new))
        return new

    def shrink(self, slots: int) -> list[int]:
        """Give up slots, empty ones first, then those of the policy's victims; returns them.

        Slots that are being filled stay, so fewer may go than asked for.
        """
        gone: list[int] = []
        for _ in range(slots):
            if not self._empty:
                if not self._slot_of:
                    break
                self.evict(self._policy.victim(self._slot_of.keys(), ()))
            gone.append(self._empty.pop())
        self._own = {expert: slot for expert, slot in self._own.items() if slot not in gone}
        return gone

    def check(self) -> None:
        """Raise AssertionError if a slot is twice in use or an expert twice in memory."""
        slots = [*self._slot_of.values(), *self._filling, *self._empty]
        assert len(set(slots)) == len(slots), f"a slot is in two states: {slots}"
        experts = [*self._slot_of, *self._filling.values()]
        assert len(set(experts)) == len(experts), f"an expert is in two slots: {experts}"
        assert all(0 <= expert < self.num_experts for expert in experts), experts
        assert all(0 <= slot < self._next for slot in slots), slots
        own = list(self._own.values())
        assert len(set(own)) == len(own) and set(own) <= set(slots), f"not an expert's own: {own}"
