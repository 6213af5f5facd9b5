"""Compute one MoE block from its slots: SwapMoE's Expert Invoker.

Computes resident experts while missing ones are being read, and sums each token's outputs in the
order of its choice. `FusedExperts` runs many experts in one kernel call, from slots of any format.

Shapes: T tokens, D model width, E experts, K chosen per token, R routed rows.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moefit.moe.families import Layout, MoeBlock
from moefit.moe.routing import Routing
from moefit.quant.backend import Backend, backend
from moefit.quant.cpu_kernels import NATIVE_DTYPES, KernelMlp
from moefit.quant.format import expert_output
from moefit.serve.cache.slot import Slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.io.loads import PendingLoad, Transfer, end_all
from moefit.serve.stats import Counters


class FusedExperts:
    """The kernels' side of one block."""

    def __init__(self, layout: Layout, compiled: Backend):
        assert layout.mlp is not None
        self._layout, self._shape, self._kernels = layout, layout.mlp, compiled
        self._mlps: WeakKeyDictionary[Slot, KernelMlp] = WeakKeyDictionary()

    def use_kernels(self, slots: Collection[Slot]) -> bool:
        """Whether a step over these slots is to go this way."""
        dtype = self._layout.specs[self._shape.w_in].dtype
        return any(slot.format.prefers_kernels(dtype) for slot in slots)

    def one_token(self, x_1D: Tensor, placed: Mapping[int, Slot], y_KD: Tensor) -> None:
        """Each expert's output into its row of y_KD, float32; given as row and slot."""
        self._kernels.one_token(x_1D, [self._mlp(one) for one in placed.values()], [*placed], y_KD)

    def weighted_sum(
        self, y_RD: Tensor, weights_TK: Tensor, dtype: torch.dtype, *, energy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Each token's y_TD, and if asked for what each output adds, as squares."""
        return self._kernels.weighted_sum(y_RD, weights_TK, dtype, energy=energy)

    def outputs(
        self, x_TD: Tensor, batch: Sequence[tuple[Slot, Tensor]], num_choices: int, y_RD: Tensor
    ) -> None:
        """Fill y_RD for experts given as slot and rows of the flattened choice."""
        few: list[tuple[Slot, Tensor]] = []
        for slot, rows_R in batch:
            if len(rows_R) <= slot.format.max_kernel_rows(self._kernels):
                few.append((slot, rows_R))
                continue
            made_RD = expert_output(
                self._layout, slot.format, slot.tensors, x_TD[rows_R // num_choices]
            )
            y_RD[rows_R] = made_RD.to(y_RD.dtype)
        if few:
            tokens = [rows_R // num_choices for _, rows_R in few]
            made_RD = self._kernels.experts(x_TD, [self._mlp(slot) for slot, _ in few], tokens)
            y_RD[torch.cat([rows_R for _, rows_R in few])] = made_RD.to(y_RD.dtype)

    def _mlp(self, slot: Slot) -> KernelMlp:
        if (known := self._mlps.get(slot)) is not None:
            return known
        shape = self._shape
        self._mlps[slot] = KernelMlp(
            w_in=slot.tensors[shape.w_in],
            w_out=slot.tensors[shape.w_out],
            activation=shape.activation,
            gated=shape.gated,
        )
        return self._mlps[slot]


def fused_experts(layout: Layout, device: torch.device) -> FusedExperts | None:
    """The kernels' side of a block; None if there are no kernels, or none for such experts."""
    compiled, shape = backend(device), layout.mlp
    if compiled is None or shape is None:
        return None
    matrices = layout.specs[shape.w_in], layout.specs[shape.w_out]
    known = all(spec.dtype in NATIVE_DTYPES for spec in matrices)
    return FusedExperts(layout, compiled) if known else None


_Ready = tuple[int, Slot]
"""An expert and the slot that it is in."""


class ExpertInvoker:
    """Computes y_TD = sum over a token's experts of weight * expert(x), from slots.

    `slots` is the block's own, by slot index; it is read at every step, so it may grow and shrink
    between steps.
    """

    def __init__(
        self,
        block: MoeBlock,
        slot_table: SlotTable,
        slots: Mapping[int, Slot],
        transfer: Transfer,
        counters: Counters,
    ):
        self._block, self._residency, self._slots = block, slot_table, slots
        self._transfer, self._counters = transfer, counters
        self._fused: FusedExperts | None = None
        self._device: torch.device | None = None  # that `_fused` is for
        self.collect_stats = False
        self.energy_R: Tensor | None = None  # |weight * output|^2 by choice, while listening

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D]. Raises CheckpointError if an expert cannot be read."""
        fused = self._fused_on(x_TD.device)
        if fused and fused.use_kernels(self._slots.values()):
            step = self._kernel_token if x_TD.shape[0] == 1 else self._kernel_step
            return step(fused, x_TD, routing)
        if x_TD.shape[0] == 1:
            return self._one_token(x_TD, routing)
        rows = _rows_by_expert(routing, self._block.num_experts)
        token_R = torch.arange(len(x_TD), device=x_TD.device).repeat_interleave(
            routing.ids_TK.shape[1]
        )
        padded = sum(len(one) for one in rows.values()) < len(token_R)
        y_RD = x_TD.new_zeros if padded else x_TD.new_empty
        y_RD = y_RD((len(token_R), x_TD.shape[1]))
        for [(expert, slot)] in self._batches(list(rows), together=False):
            at_R = rows[expert]
            y_RD[at_R] = self._output(slot, x_TD[token_R[at_R]]).to(y_RD.dtype)
        return self._weighted_sum(y_RD, routing).to(x_TD.dtype)

    def _fused_on(self, device: torch.device) -> FusedExperts | None:
        if device != self._device:
            self._device, self._fused = device, fused_experts(self._block.layout, device)
        return self._fused

    def _kernel_step(self, fused: FusedExperts, x_TD: Tensor, routing: Routing) -> Tensor:
        """Residents in one call, those that had to be read as they come."""
        rows = _rows_by_expert(routing, self._block.num_experts)
        y_RD = x_TD.new_zeros(routing.ids_TK.numel(), x_TD.shape[1])
        for batch in self._batches(list(rows), together=True):
            work = [(slot, rows[expert]) for expert, slot in batch]
            fused.outputs(x_TD, work, routing.ids_TK.shape[1], y_RD)
        return self._fused_sum(fused, x_TD, y_RD, routing)

    def _kernel_token(self, fused: FusedExperts, x_1D: Tensor, routing: Routing) -> Tensor:
        """Decoding: no grouping; all experts that are there in one call."""
        ids = routing.ids_TK[0].tolist()
        row: dict[int, int] = {}
        for number, expert in enumerate(ids):
            if expert < self._block.num_experts:
                row.setdefault(expert, number)
        new = x_1D.new_empty if len(row) == len(ids) else x_1D.new_zeros
        y_KD = new((len(ids), x_1D.shape[1]), dtype=torch.float32)
        for batch in self._batches(list(row), together=True):
            fused.one_token(x_1D, {row[expert]: slot for expert, slot in batch}, y_KD)
        for number, expert in enumerate(ids):
            if row.get(expert, number) != number:  # chosen twice
                y_KD[number] = y_KD[row[expert]]
        return self._fused_sum(fused, x_1D, y_KD, routing)

    def _fused_sum(
        self, fused: FusedExperts, x_TD: Tensor, y_RD: Tensor, routing: Routing
    ) -> Tensor:
        weights_TK, collect_stats = routing.weights_TK, self.collect_stats
        y_TD, energy_R = fused.weighted_sum(y_RD, weights_TK, x_TD.dtype, energy=collect_stats)
        if collect_stats:
            self.energy_R = energy_R
        return y_TD

    def _one_token(self, x_1D: Tensor, routing: Routing) -> Tensor:
        """Decoding: no grouping, no scatter."""
        ids = routing.ids_TK[0].tolist()
        needed = list(dict.fromkeys(e for e in ids if e < self._block.num_experts))
        outputs = {
            expert: self._output(slot, x_1D)
            for [(expert, slot)] in self._batches(needed, together=False)
        }
        nothing_1D = torch.zeros_like(x_1D)
        y_KD = torch.cat([outputs.get(expert, nothing_1D) for expert in ids])
        return self._weighted_sum(y_KD, routing).to(x_1D.dtype)

    def _weighted_sum(self, y_RD: Tensor, routing: Routing) -> Tensor:
        weighted_RD = y_RD * routing.weights_TK.reshape(-1, 1)
        if self.collect_stats:
            self.energy_R = weighted_RD.float().square().sum(-1)
        return weighted_RD.view(*routing.ids_TK.shape, y_RD.shape[1]).sum(1)

    def _output(self, slot: Slot, x_RD: Tensor) -> Tensor:
        return expert_output(self._block.layout, slot.format, slot.tensors, x_RD)

    def _batches(self, needed: Sequence[int], *, together: bool) -> Iterator[list[_Ready]]:
        """Experts with their slots, residents first, if `together` all of them at once.

        A slot is good until the next batch is asked for. Loads begin as early as slots allow: an
        empty one, or one whose expert this step no longer needs.
        """
        residents = self._residency.residents
        left = deque(sorted(needed, key=lambda expert: expert not in residents))
        waiting = deque(expert for expert in left if expert not in residents)
        here = len(left) - len(waiting)
        self._counters.fetches += len(waiting)
        self._counters.hits += here
        loads: dict[int, PendingLoad] = {}
        try:
            while left:
                self._begin(waiting, loads, protected=set(left))
                batch = [left.popleft() for _ in range(max(1, here) if together else 1)]
                here = 0
                for expert in batch:
                    if expert in loads:
                        loads.pop(expert).commit(self._residency, self._counters)
                yield [(expert, self._slots[self._residency.slot(expert)]) for expert in batch]
        finally:  # empty unless something went wrong: no slot stays half-filled
            end_all(partial(one.commit, self._residency, self._counters) for one in loads.values())

    def _begin(
        self, waiting: deque[int], loads: dict[int, PendingLoad], protected: set[int]
    ) -> None:
        while waiting and len(loads) < 2 * self._transfer.readers:
            slot = self._residency.reserve(waiting[0], protected)
            if slot is None:
                return
            expert = waiting.popleft()
            done = self._transfer.load(self._block.name, expert, self._slots[slot])
            loads[expert] = PendingLoad(slot, done)


def _rows_by_expert(routing: Routing, num_experts: int) -> dict[int, Tensor]:
    """Per expert in use, its rows of the flattened choice, in order."""
    ids_R = routing.ids_TK.flatten()
    counts = torch.bincount(ids_R, minlength=num_experts + 1).tolist()
    groups = ids_R.argsort(stable=True).split(counts)
    return {e: rows for e, rows in enumerate(groups[:num_experts]) if len(rows)}
