"""One MoE block over its slots: SwapMoE's Expert Invoker.

Owns the order of work within a block: experts that are there first, while the missing ones are
being read into slots that this step no longer needs, and better copies of experts last. Whatever
the order, a token's outputs are summed in the order of its choice, so the result does not depend on
what was resident. Knows nothing of modes: an absent expert that the routing names is fetched.

Shapes: T tokens, D model width, K chosen per token, R routed rows (token-expert pairs).
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from moefit.formats.format import expert_output
from moefit.moe.families import MoeBlock
from moefit.moe.routing import Routing
from moefit.serve.better_copies import Again
from moefit.serve.coming import Coming
from moefit.serve.counters import Counters
from moefit.serve.fused import FusedExperts, fused_experts
from moefit.serve.residency import Residency
from moefit.serve.slots import Slot
from moefit.serve.transfer import Transfer

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
        residency: Residency,
        slots: Mapping[int, Slot],
        transfer: Transfer,
        counters: Counters,
    ):
        self._block, self._residency, self._slots = block, residency, slots
        self._transfer, self._counters = transfer, counters
        self._fused: FusedExperts | None = None
        self._again: Again | None = None  # of the step under way
        self._device: torch.device | None = None  # that `_fused` is for
        self.listening = False
        self.energy_R: Tensor | None = None  # |weight * output|^2 by choice, while listening

    def __call__(self, x_TD: Tensor, routing: Routing, again: Again | None = None) -> Tensor:
        """[T, D] -> [T, D]. Raises CheckpointError if an expert cannot be read.

        again: experts that are computed from better copies, whatever is in their slots.
        """
        self._again = again
        fused = self._fused_on(x_TD.device)
        if fused and fused.pays(self._slots.values()):
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
        weights_TK, listening = routing.weights_TK, self.listening
        y_TD, energy_R = fused.weighted_sum(y_RD, weights_TK, x_TD.dtype, energy=listening)
        if listening:
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
        if self.listening:
            self.energy_R = weighted_RD.float().square().sum(-1)
        return weighted_RD.view(*routing.ids_TK.shape, y_RD.shape[1]).sum(1)

    def _output(self, slot: Slot, x_RD: Tensor) -> Tensor:
        return expert_output(self._block.layout, slot.tensors, x_RD)

    def _batches(self, needed: Sequence[int], *, together: bool) -> Iterator[list[_Ready]]:
        """Experts with what they are computed from, better copies one by one behind the others.

        These are being read meanwhile.
        """
        if (again := self._again) is None or not again.experts:
            yield from self._own(needed, together=together)
            return
        here = sum(one in self._residency.residents or again.holds(one) for one in again.experts)
        self._counters.hits += here
        self._counters.fetches += len(again.experts) - here
        copies = again.begin()
        own = [expert for expert in needed if expert not in again.experts]
        yield from self._own(own, together=together)
        for ready in copies:
            yield [ready]

    def _own(self, needed: Sequence[int], *, together: bool) -> Iterator[list[_Ready]]:
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
        loads: dict[int, Coming] = {}
        try:
            while left:
                self._begin(waiting, loads, protected=set(left))
                batch = [left.popleft() for _ in range(max(1, here) if together else 1)]
                here = 0
                for expert in batch:
                    if expert in loads:
                        loads.pop(expert).arrive(self._residency, self._counters)
                yield [(expert, self._slots[self._residency.slot(expert)]) for expert in batch]
        finally:  # empty unless something went wrong: no slot stays half-filled
            for load in loads.values():
                with suppress(Exception):
                    load.arrive(self._residency, self._counters)

    def _begin(self, waiting: deque[int], loads: dict[int, Coming], protected: set[int]) -> None:
        while waiting and len(loads) < 2 * self._transfer.readers:
            slot = self._residency.reserve(waiting[0], protected)
            if slot is None:
                return
            expert = waiting.popleft()
            done = self._transfer.load(self._block.name, expert, self._slots[slot])
            loads[expert] = Coming(slot, done)


def _rows_by_expert(routing: Routing, num_experts: int) -> dict[int, Tensor]:
    """Per expert in use, its rows of the flattened choice, in order."""
    ids_R = routing.ids_TK.flatten()
    counts = torch.bincount(ids_R, minlength=num_experts + 1).tolist()
    groups = ids_R.argsort(stable=True).split(counts)
    return {e: rows for e, rows in enumerate(groups[:num_experts]) if len(rows)}
