"""The one ledger: every byte that the process may hold on the model's device, by part.

Owns sizes as people write them, what each part needs, and how many slots the rest buys. Pure: it
can be printed before anything is loaded. Knows nothing of tensors or of how slots are used.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from moefit.errors import BudgetTooSmallError, ConfigError

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
}


def parse_bytes(text: str | int) -> int:
    """Bytes from `4.7GiB`, `512MB`, `3g`, `1048576` or an int.

    Raises ConfigError for anything else, for zero and for negative sizes.

    >>> parse_bytes("1.5KiB")
    1536
    """
    match = re.fullmatch(r"\s*([0-9]{0,20}\.?[0-9]{1,20})\s*([a-zA-Z]*)\s*", str(text))
    unit = match and _UNITS.get(match[2].lower())
    if not match or not unit or not (size := int(Fraction(match[1]) * unit)):
        raise ConfigError(
            f"{text!r} is not a size; write bytes or a number with a unit, such as 4.7GiB or 512MB"
        )
    return size


def format_bytes(size: float) -> str:
    """Three significant digits with a binary unit.

    >>> format_bytes(5046586573)
    '4.70 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.{_decimals(size)}f} {unit}"
        size /= 1024
    return f"{size:.{_decimals(size)}f} GiB"


def at_least(size: int) -> str:
    """Return a least size exactly, and rounded up as people give it.

    >>> at_least(625232664)
    'at least 625232664 bytes, such as 597MiB'
    """
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"at least {size} bytes, such as {-(-size // unit)}{name}"
    return f"at least {size} bytes"


def _decimals(size: float) -> int:
    return 2 if abs(size) < 10 else 1 if abs(size) < 100 else 0


def host_limit(wanted: str | int | None, *, largest: int, readers: int) -> int:
    """Bytes of host memory for experts on their way to a GPU; `largest` is the largest expert's.

    None or 0: no more than a buffer for each reader. Raises ConfigError below one expert.

    >>> host_limit("1KiB", largest=1000, readers=6)
    1024
    """
    if wanted in (None, 0, "0"):
        return readers * largest
    assert wanted is not None
    limit = parse_bytes(wanted)
    if limit < largest:
        raise ConfigError(
            f"host memory of {format_bytes(limit)} has no room for an expert, and every expert "
            f"goes through it; give {at_least(largest)}, or none for a buffer "
            "a reader"
        )
    return limit


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNeeds:
    """What one MoE block asks of the ledger: its experts, their size, and the fewest slots."""

    name: str
    num_experts: int
    slot_bytes: int
    min_slots: int

    @property
    def min_bytes(self) -> int:
        """Bytes of the fewest slots."""
        return self.min_slots * self.slot_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSlots:
    """Slots per block that a planner has chosen, and the bytes that they take together.

    spares: bytes by which staging grows without it, for then any block's experts may be swapped.
    """

    counts: tuple[int, ...]
    nbytes: int
    spares: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Bytes by part. `total` None means: as much as everything resident takes.

    `process` is what interpreter and libraries hold when loading begins; `weights` all that is no
    expert; `staging` buffers between storage and slots. `context` is how many tokens cache and
    workspace are reckoned for, over all sequences; None if nobody reckoned. `host` is no part of
    it: the bound of experts in host memory where the budget is a GPU's, else None. `planned` takes
    the place of equal shares in any total that it fits. `format_totals`: where experts differ in
    format, bytes of all of them in each that they may have, the best last; slots are reckoned in
    the first. `tokenizer` is what it holds once it is loaded, with what serving remembers of its
    tokens; `reading` what reading it takes at its peak, before anything else is loaded. `slack`:
    bytes of `process` that only provide for a process that is larger than the one that was
    measured, since no two runs of a command are of the same size to the page.
    """

    total: int | None
    process: int
    weights: int
    kv_cache: int
    workspace: int
    staging: int
    blocks: tuple[BlockNeeds, ...]
    context: int | None = None
    host: int | None = None
    planned: PlannedSlots | None = None
    format_totals: tuple[tuple[str, int], ...] = ()
    tokenizer: int = 0
    reading: int = 0
    slack: int = 0

    @property
    def fixed(self) -> int:
        """Everything but slots."""
        return sum(getattr(self, name) for name in PARTS)

    @property
    def min_bytes(self) -> int:
        """The least total that the model can run in, without the plan if there is one."""
        spares = 0 if self.planned is None else self.planned.spares
        slots = sum(block.min_bytes for block in self.blocks)
        return max(self.fixed + spares + slots, self.process + self.reading)

    @property
    def all_resident_bytes(self) -> int:
        """The total at which all experts are resident, where they differ in the first format."""
        slots = sum(block.num_experts * block.slot_bytes for block in self.blocks)
        return max(self.fixed + slots, self.min_bytes)

    @property
    def max_bytes(self) -> int:
        """The total beyond which nothing is gained: all experts in the best of their formats."""
        return max([self.all_resident_bytes, *self.all_resident_bytes_in().values()])

    def all_resident_bytes_in(self) -> dict[str, int]:
        """By format, the total at which all experts are resident in it, where they may differ."""
        return {name: self.fixed + nbytes for name, nbytes in self.format_totals}

    def with_total(self, total: int | None) -> "MemoryBudget":
        """The same parts under another total; a plan that does not fit it is forgotten."""
        plan = self.planned
        if plan is None or total is None or self.fixed + plan.nbytes <= total:
            return replace(self, total=total)
        return replace(self, total=total, planned=None, staging=self.staging + plan.spares)

    def without_slack(self) -> "MemoryBudget":
        """Return the same parts with as much less slack as the total is short of."""
        needed = self.min_bytes
        if self.planned is not None:
            needed = max(self.fixed + self.planned.nbytes, self.process + self.reading)
        short = 0 if self.total is None else needed - self.total
        if not 0 < short <= self.slack:
            return self
        return replace(self, process=self.process - short, slack=self.slack - short)

    def slots(self) -> tuple[int, ...]:
        """Slots per block: equal shares, what is left over one by one from the first block on.

        Raises BudgetTooSmallError, naming the floor, or what planned slots need.
        """
        if self.planned is not None:
            return self._planned_slots(self.planned)
        counts = [block.min_slots for block in self.blocks]
        if self.total is None:
            return tuple(block.num_experts for block in self.blocks)
        left = self.total - self.min_bytes
        if left < 0:
            raise BudgetTooSmallError(self._too_small())
        open_blocks = [i for i, block in enumerate(self.blocks) if counts[i] < block.num_experts]
        while open_blocks:
            round_bytes = sum(self.blocks[i].slot_bytes for i in open_blocks)
            rounds = min(
                left // round_bytes,
                min(self.blocks[i].num_experts - counts[i] for i in open_blocks),
            )
            for i in open_blocks:
                counts[i] += rounds
            left -= rounds * round_bytes
            if not rounds:
                for i in open_blocks:
                    if self.blocks[i].slot_bytes <= left:
                        counts[i] += 1
                        left -= self.blocks[i].slot_bytes
                break
            open_blocks = [i for i in open_blocks if counts[i] < self.blocks[i].num_experts]
        return tuple(counts)

    def total_for_slots(self, counts: Sequence[int]) -> int:
        """The total that these slots take."""
        if self.planned is not None and tuple(counts) == self.planned.counts:
            return self.fixed + self.planned.nbytes
        pairs = zip(self.blocks, counts, strict=True)
        return self.fixed + sum(block.slot_bytes * count for block, count in pairs)

    def remaining_bytes(self) -> int:
        """What is left for better formats once all experts have a slot; before that, nothing is.

        Without a total it is what the best formats take.
        """
        counts = self.slots()
        all_here = all(n == one.num_experts for n, one in zip(counts, self.blocks, strict=True))
        total = self.max_bytes if self.total is None else self.total
        return total - self.total_for_slots(counts) if all_here else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {
            "total": self.total,
            "context": self.context,
            **parts,
            "floor": self.min_bytes,
            "everything": self.all_resident_bytes,
            "most": self.max_bytes,
            "host": self.host,
        }

    def _planned_slots(self, planned: PlannedSlots) -> tuple[int, ...]:
        needed = max(self.fixed + planned.nbytes, self.process + self.reading)
        if self.total is not None and needed > self.total:
            raise BudgetTooSmallError(
                f"a budget of {format_bytes(self.total)} does not hold the plan, which takes "
                f"{format_bytes(planned.nbytes)} for experts and {format_bytes(self.fixed)} for "
                f"all else; give {at_least(needed)}, or plan anew for this budget"
            )
        return planned.counts

    def _too_small(self) -> str:
        parts = ", ".join(f"{format_bytes(getattr(self, name))} {PARTS[name]}" for name in PARTS)
        slots = sum(block.min_bytes for block in self.blocks)
        assert self.total is not None
        below = (
            f"a budget of {format_bytes(self.total)} is below this model's floor of "
            f"{format_bytes(self.min_bytes)}"
        )
        if self.process + self.reading == self.min_bytes:
            return (
                f"{below} ({format_bytes(self.process)} {PARTS['process']}, "
                f"{format_bytes(self.reading)} while the tokenizer is being read); give "
                f"{at_least(self.min_bytes)}"
            )
        return (
            f"{below} ({parts}, {format_bytes(slots)} for the fewest experts); "
            f"give {at_least(self.min_bytes)}, or a shorter context"
        )


PARTS = {
    "process": "interpreter and libraries",
    "tokenizer": "tokenizer",
    "weights": "weights that are no experts",
    "kv_cache": "KV cache",
    "workspace": "workspace",
    "staging": "staging",
}
