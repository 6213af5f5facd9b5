"""Read an expert again in a better format for one step, where it carries much of a token's weight.

The decision is a pure function of the step's routing and of what is packed; `BetterCopies` reads
into two scratch slots that all blocks share, and keeps copies until another expert needs the slot.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from moefit.errors import ConfigError
from moefit.moe.families import MoeBlock
from moefit.moe.routing import Routing
from moefit.quant.error_model import expected_error
from moefit.quant.format import FORMATS, Format, NativeFormat
from moefit.serve.cache.eviction import LeastFrequentlyUsed
from moefit.serve.cache.slot import Slot, host_bytes
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.io.loads import PendingLoad, Transfer
from moefit.serve.packed.store import PackedStore
from moefit.serve.stats import Counters

SCRATCH_SLOTS = (
    2  # one is computed from while the other is filled; all experts' formats pay for more
)


def heavily_weighted(choices: Iterable[Mapping[int, float]], threshold: float) -> set[int]:
    """Experts that have at least the share `threshold` of some token's router weight.

    choices: of each token, its experts' weights, which need not add up to one.

    >>> sorted(heavy([{0: 3.0, 5: 1.0}, {2: 0.2, 5: 0.2}], 0.5))
    [0, 2, 5]
    """
    found: set[int] = set()
    for weights in choices:
        least = threshold * sum(weights.values())
        found |= {expert for expert, weight in weights.items() if weight >= least > 0}
    return found


def worth_reading(
    experts: Iterable[int], now: Callable[[int], Format], better: Format
) -> frozenset[int]:
    """Those of the experts whose format now is worse than the better one."""
    error = expected_error(better)
    return frozenset(expert for expert in experts if expected_error(now(expert)) > error)


def better_formats(blocks: Sequence[MoeBlock], packed: PackedStore) -> dict[str, Format]:
    """By block, the best format that it is packed in.

    Raises ConfigError if there is a block with none that is better than the smallest there is.
    """
    found = {block.name: _best_packed(block, packed) for block in blocks}
    without = [name for name, format in found.items() if format is None]
    if without:
        raise ConfigError(
            f"refetch reads experts again in a better format than their slots' from the packed "
            f"store, and {len(without)} of {len(blocks)} blocks ({without[0]}) are packed in none "
            "that could be better; run moefit pack MODEL --formats int8,int6,int5,int4,int3,int2, "
            "or leave refetch out"
        )
    return {name: format for name, format in found.items() if format is not None}


def _best_packed(block: MoeBlock, packed: PackedStore) -> Format | None:
    """None if it is the worst of all, for then nothing in a slot is worse."""
    encoded = [format for format in FORMATS.values() if not isinstance(format, NativeFormat)]
    worst = max(map(expected_error, encoded))
    some = [one for one in encoded if packed.has(block.name, one) and expected_error(one) < worst]
    return min(some, key=expected_error, default=None)


def largest_copy(blocks: Sequence[MoeBlock], formats: Mapping[str, Format]) -> int:
    """Bytes that a scratch slot must have, for it may hold any block's expert."""
    return max(formats[block.name].nbytes(block.layout.specs) for block in blocks)


HALF_LIFE = 24  # tokens; what exact serving's own eviction counts by


_Loads = dict[int, PendingLoad]
"""What one step is having read, by expert's number in the table."""


class BetterCopies:
    """Experts of all blocks in `formats`, by block name, as far as scratch slots reach."""

    def __init__(
        self,
        blocks: Sequence[MoeBlock],
        formats: Mapping[str, Format],
        transfer: Transfer,
        counters: Counters,
        device: torch.device,
    ):
        self._blocks, self._formats = {block.name: block for block in blocks}, formats
        self._transfer, self._counters = transfer, counters
        self._first: dict[str, int] = {}  # in the table a block's experts follow the last block's
        for block in blocks:
            self._first[block.name] = sum(self._blocks[name].num_experts for name in self._first)
        size, number = largest_copy(blocks, formats), sum(block.num_experts for block in blocks)
        self._used = LeastFrequentlyUsed(HALF_LIFE * len(blocks))
        self._table = SlotTable(number, SCRATCH_SLOTS, self._used)
        self._buffers = [_memory(size, device) for _ in range(SCRATCH_SLOTS)]
        self._slots: dict[int, Slot] = {}
        self._loads: _Loads = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the scratch slots, filled or not."""
        return sum(buffer_B.nbytes for buffer_B in self._buffers)

    def wanted(
        self, block: str, routing: Routing, threshold: float, now: Callable[[int], Format]
    ) -> "RefetchPlan":
        """What a block's step is to compute from better copies; `now`: an expert's own format."""
        number = self._blocks[block].num_experts
        experts = heavily_weighted(_choices(routing, number), threshold)
        return RefetchPlan(self, block, worth_reading(experts, now, self._formats[block]))

    def holds(self, block: str, expert: int) -> bool:
        """Whether the copy is there."""
        return self._first[block] + expert in self._table.residents

    def begin(self, block: str, experts: Collection[int]) -> Iterator[tuple[int, Slot]]:
        """Begin to read what is not there; gives every expert with its slot, in time.

        A slot is good until the next one is asked for. Raises CheckpointError when an expert cannot
        be read; nothing is being read any more when that reaches the caller.
        """
        self._give_up(self._loads)  # of a step that failed before it asked for its copies
        self._loads = {}
        first = self._first[block]
        keys = sorted(first + expert for expert in experts)
        residents = self._table.residents
        left = deque(sorted(keys, key=lambda key: key not in residents))
        waiting = deque(key for key in left if key not in residents)
        self._used.observe(dict.fromkeys(keys, 1.0))
        self._read(block, waiting, protected=keys)
        return self._in_turn(block, left, waiting)

    def check(self) -> None:
        """Raise AssertionError if table, slots and reads don't agree."""
        self._table.check()
        assert self._table.num_slots == len(self._buffers), self._table.num_slots
        first = self._first
        for key, load in self._loads.items():
            assert key in self._table.filling, f"{key} is being read into slot {load.slot}"
        for key in self._table.residents:
            name = max((name for name in first if first[name] <= key), key=first.__getitem__)
            slot, place = self._slots[self._table.slot(key)], self._table.slot(key)
            assert slot.format == self._formats[name], (name, slot.format.name)
            assert slot.buffer_B.data_ptr() == self._buffers[place].data_ptr(), place

    def _in_turn(
        self, block: str, left: deque[int], waiting: deque[int]
    ) -> Iterator[tuple[int, Slot]]:
        loads = self._loads  # its own: this may be closed when another step is under way
        try:
            while left:
                self._read(block, waiting, protected=left)
                key = left.popleft()
                if key in loads:
                    self._finish(loads, key)
                yield key - self._first[block], self._slots[self._table.slot(key)]
        finally:  # nothing, unless something went wrong
            self._give_up(loads)

    def _read(self, block: str, waiting: deque[int], protected: Collection[int]) -> None:
        while waiting:
            index = self._table.reserve(waiting[0], protected)
            if index is None:
                return
            key = waiting.popleft()
            slot = self._slots[index] = self._bound(block, index)
            done = self._transfer.load(block, key - self._first[block], slot)
            self._loads[key] = PendingLoad(index, done)

    def _bound(self, block: str, index: int) -> Slot:
        """The scratch slot's memory, laid out for this block's experts."""
        format, specs = self._formats[block], self._blocks[block].layout.specs
        buffer_B = self._buffers[index][: format.nbytes(specs)]
        return Slot(format, specs, buffer_B, format.bind(buffer_B, specs))

    def _give_up(self, loads: _Loads) -> None:
        for key in list(loads):
            with suppress(Exception):
                self._finish(loads, key)

    def _finish(self, loads: _Loads, key: int) -> None:
        load = loads.pop(key)
        load.commit(self._table, self._counters)
        self._counters.refetches += 1
        self._counters.refetch_bytes += self._slots[load.slot].nbytes


@dataclass(frozen=True, slots=True)
class RefetchPlan:
    """The experts of one step of a block that are computed from better copies."""

    copies: BetterCopies
    block: str
    experts: frozenset[int]

    def holds(self, expert: int) -> bool:
        """Whether the expert's copy is there already."""
        return self.copies.holds(self.block, expert)

    def begin(self) -> Iterator[tuple[int, Slot]]:
        """See `BetterCopies.begin`."""
        return self.copies.begin(self.block, self.experts)


def _choices(routing: Routing, num_experts: int) -> Iterator[dict[int, float]]:
    """Of each token, its experts' weights; padding is nobody's."""
    pairs = zip(routing.ids_TK.tolist(), routing.weights_TK.tolist(), strict=True)
    for ids, weights in pairs:
        sums: dict[int, float] = {}
        for expert, weight in zip(ids, weights, strict=True):
            if expert < num_experts:
                sums[expert] = sums.get(expert, 0.0) + abs(weight)
        yield sums


def _memory(size: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return host_bytes(size)
    return torch.empty(size, dtype=torch.uint8, device=device)
