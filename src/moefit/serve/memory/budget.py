"""Memory budgets: the bytes of a served model by part, and the slots that fit beside them.

Pure Python, so that a budget can be printed before anything is loaded.
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
    """Return the bytes of a size such as `4.7GiB`, `512MB`, `3g`, `1048576` or an int.

    Raises:
        ConfigError: The text is not a size, or the size is not positive.

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
    """Return a size with three significant digits and a binary unit.

    >>> format_bytes(5046586573)
    '4.70 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.{_decimals(size)}f} {unit}"
        size /= 1024
    return f"{size:.{_decimals(size)}f} GiB"


def at_least(size: int) -> str:
    """Return a minimum size as text: exactly, and rounded up.

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
    """Return the limit of the host cache of experts in front of a GPU.

    Args:
        wanted: A size; None or 0 means one buffer per reader.
        largest: Bytes of the largest expert.
        readers: Number of threads that read experts.

    Raises:
        ConfigError: The size is smaller than the largest expert.

    >>> host_limit("1KiB", largest=1000, readers=6)
    1024
    """
    if wanted in (None, 0, "0"):
        return readers * largest
    assert wanted is not None
    limit = parse_bytes(wanted)
    if limit < largest:
        raise ConfigError(
            f"host memory of {format_bytes(limit)} cannot hold an expert, and every expert passes "
            f"through it; give {at_least(largest)}, or none for one buffer per reader"
        )
    return limit


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNeeds:
    """Sizes of one MoE block.

    Args:
        name: Of the block.
        num_experts: Its routed experts.
        slot_bytes: Bytes of a slot.
        min_slots: The smallest number of slots with which the block runs.
    """

    name: str
    num_experts: int
    slot_bytes: int
    min_slots: int

    @property
    def min_bytes(self) -> int:
        """Bytes of `min_slots` slots."""
        return self.min_slots * self.slot_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSlots:
    """Slots of a placement.

    Args:
        counts: Slots per block.
        nbytes: Bytes of all slots.
        spares: Bytes of spare slots that are needed only without the placement, because then the
            experts of any block may be swapped.
    """

    counts: tuple[int, ...]
    nbytes: int
    spares: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Bytes by part, of the memory of the model's device.

    Args:
        total: The budget; None means as much as it takes for all experts to be resident.
        process: Interpreter and libraries while serving, including `slack`.
        weights: Dense weights, with the probes that predict experts and the draft model.
        kv_cache: For `context` tokens.
        step_tokens: Tokens of the longest forward pass; None if no estimate was made.
        kv_dtype: Of the KV cache: a dtype, or int8; None if no estimate was made.
        workspace: Activations of a forward pass over `step_tokens` tokens.
        staging: Buffers between storage and slots, and spare slots.
        blocks: The MoE blocks.
        context: Tokens of all sequences together; None if no estimate was made.
        host: Limit of the host cache, which is not part of a GPU's budget; None on a CPU.
        planned: Slots of a placement, instead of equal shares, for totals in which they fit.
        format_totals: Where experts may differ in format, the bytes of all experts by format,
            smallest first. Slots are counted in the first format.
        tokenizer: The loaded tokenizer, with caches of its tokens.
        unused: Pages of libraries that serving does not use, beside `process` until loading starts
            and drops them.
        reading: Peak while the tokenizer is read, which happens before anything else is loaded.
        encoding: Dense weights before they are encoded, and the largest encoded matrix: what a
            process loads before slots, beside the tokenizer. 0 if nothing is encoded.
        slack: Part of `process` that only allows for a larger process than the measured one, since
            process sizes differ between runs.
        first_use: Part of `workspace` that only the first use of libraries touches, at most.
        probes: Part of `weights` that predicts experts.
        draft: Part of `weights` that drafts tokens: the draft model, with its KV cache and step.
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
    unused: int = 0
    reading: int = 0
    encoding: int = 0
    slack: int = 0
    first_use: int = 0
    probes: int = 0
    draft: int = 0
    kv_dtype: str | None = None
    step_tokens: int | None = None

    @property
    def fixed(self) -> int:
        """Everything but slots."""
        return sum(getattr(self, name) for name in PARTS)

    @property
    def planned_bytes(self) -> int:
        """Everything, with the slots of the placement, which must be planned."""
        assert self.planned is not None
        return self.fixed + self.planned.nbytes

    @property
    def min_bytes(self) -> int:
        """The minimum budget: the smallest total in which the model runs, placement aside."""
        return max(self._fewest_slots(), self._loading())

    def _fewest_slots(self) -> int:
        """Return the total with the fewest slots, once everything is loaded."""
        spares = 0 if self.planned is None else self.planned.spares
        return self.fixed + spares + sum(block.min_bytes for block in self.blocks)

    def _loading(self) -> int:
        """Return the largest total before slots are allocated."""
        encoding = self.encoding and self.tokenizer + self.encoding
        return self.process + max(self.unused, self.reading, encoding)

    @property
    def all_resident_bytes(self) -> int:
        """The total at which all experts are resident, in the first format."""
        slots = sum(block.num_experts * block.slot_bytes for block in self.blocks)
        return max(self.fixed + slots, self.min_bytes)

    @property
    def max_bytes(self) -> int:
        """The largest useful total: all experts resident in the best format."""
        return max([self.all_resident_bytes, *self.all_resident_bytes_in().values()])

    def all_resident_bytes_in(self) -> dict[str, int]:
        """Return by format the total at which all experts are resident in it."""
        return {name: self.fixed + nbytes for name, nbytes in self.format_totals}

    def with_total(self, total: int | None) -> "MemoryBudget":
        """Return the same parts with another total, without the placement if it does not fit."""
        plan = self.planned
        if plan is None or total is None or self.fixed + plan.nbytes <= total:
            return replace(self, total=total)
        return replace(self, total=total, planned=None, staging=self.staging + plan.spares)

    def without_slack(self) -> "MemoryBudget":
        """Return the same parts with less slack, if that makes the minimum fit in the total."""
        needed = self.min_bytes
        if self.planned is not None:
            needed = max(self.planned_bytes, self._loading())
        excess = 0 if self.total is None else needed - self.total
        if not 0 < excess <= self.slack:
            return self
        return replace(self, process=self.process - excess, slack=self.slack - excess)

    def slots(self) -> tuple[int, ...]:
        """Return the number of slots per block.

        Without a placement, blocks get equal numbers, and what remains goes one slot each to the
        first blocks.

        Raises:
            BudgetTooSmallError: The total is below the minimum budget, or below what the placement
                needs; the message names that size.
        """
        if self.planned is not None:
            return self._planned_slots(self.planned)
        counts = [block.min_slots for block in self.blocks]
        if self.total is None:
            return tuple(block.num_experts for block in self.blocks)
        if self.total < self.min_bytes:
            raise BudgetTooSmallError(self._too_small())
        left = self.total - self._fewest_slots()
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
        """Return the total with these numbers of slots per block."""
        if self.planned is not None and tuple(counts) == self.planned.counts:
            return self.planned_bytes
        pairs = zip(self.blocks, counts, strict=True)
        return self.fixed + sum(block.slot_bytes * count for block, count in pairs)

    def remaining_bytes(self) -> int:
        """Return the bytes left for better formats; zero unless all experts have slots.

        Without a total these are the bytes that the best formats take.
        """
        counts = self.slots()
        all_resident = all(
            count == block.num_experts for count, block in zip(counts, self.blocks, strict=True)
        )
        total = self.max_bytes if self.total is None else self.total
        return total - self.total_for_slots(counts) if all_resident else 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
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
        needed = max(self.planned_bytes, self.process + max(self.unused, self.reading))
        if self.total is not None and needed > self.total:
            raise BudgetTooSmallError(
                f"a budget of {format_bytes(self.total)} is too small for the plan, which takes "
                f"{format_bytes(planned.nbytes)} for experts and {format_bytes(self.fixed)} for "
                f"everything else; give {at_least(needed)}, or plan again for this budget"
            )
        return planned.counts

    def _too_small(self) -> str:
        parts = ", ".join(f"{format_bytes(getattr(self, name))} {PARTS[name]}" for name in PARTS)
        slots = sum(block.min_bytes for block in self.blocks)
        assert self.total is not None
        below = (
            f"a budget of {format_bytes(self.total)} is below this model's minimum of "
            f"{format_bytes(self.min_bytes)}"
        )
        if self.encoding and self._loading() == self.min_bytes:
            return (
                f"{below} ({format_bytes(self.process)} {PARTS['process']}, "
                f"{format_bytes(self.encoding)} of dense weights while they are being encoded); "
                f"give {at_least(self.min_bytes)}"
            )
        if self.process + self.unused == self.min_bytes:
            return f"{below}, which importing libraries takes; give {at_least(self.min_bytes)}"
        if self._loading() == self.min_bytes:
            return (
                f"{below} ({format_bytes(self.process)} {PARTS['process']}, "
                f"{format_bytes(self.reading)} while the tokenizer is read); give "
                f"{at_least(self.min_bytes)}"
            )
        draft = f", of which {format_bytes(self.draft)} draft model" if self.draft else ""
        other = ", no draft model" if self.draft else ""
        return (
            f"{below} ({parts}{draft}, {format_bytes(slots)} for one slot per block); "
            f"give {at_least(self.min_bytes)}{other}, or a shorter context"
        )


def part_label(name: str, kv_dtype: str | None) -> str:
    """Return what a table calls a part of the budget.

    >>> part_label("kv_cache", "int8"), part_label("staging", "int8")
    ('KV cache (int8)', 'staging')
    """
    return f"{PARTS[name]} ({kv_dtype})" if name == "kv_cache" and kv_dtype else PARTS[name]


PARTS = {
    "process": "interpreter and libraries",
    "tokenizer": "tokenizer",
    "weights": "dense weights",
    "kv_cache": "KV cache",
    "workspace": "workspace",
    "staging": "staging",
}
