"""Compute one MoE block from its slots: SwapMoE's Expert Invoker.

Resident experts are computed while missing ones are being read. Each token's outputs are summed in
the order of the router's choice, whatever order they were computed in. `FusedExperts` computes many
experts in one kernel call, from slots of any format.

Shapes: T tokens, D model width, E experts, K chosen per token, R routed rows.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from moefit.moe.families import Layout, MoeBlock
from moefit.moe.routing import Routing
from moefit.quant.backend import Backend, backend
from moefit.quant.cpu_kernels import ACTIVATION_DTYPES, NATIVE_DTYPES, KernelMlp, Kernels
from moefit.quant.format import DECODED, Format, expert_output
from moefit.quant.layers.decoder_layers import ExpertAddresses
from moefit.serve.cache.slot import Slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.io.loads import PendingLoad, Transfer, end_all
from moefit.serve.stats import Counters

MAX_ROWS = 1024  # that one kernel call computes


class FusedExperts:
    """Kernel calls for the experts of one block.

    Args:
        layout: The layout of the block's experts, which must be an MLP.
        kernels: The kernels of the device that the slots are on.
    """

    def __init__(self, layout: Layout, kernels: Backend):
        assert layout.mlp is not None
        self._layout, self._shape, self.kernels = layout, layout.mlp, kernels
        self._mlps: WeakKeyDictionary[Slot, KernelMlp] = WeakKeyDictionary()

    def one_token(self, x_1D: Tensor, slot_of_row: Mapping[int, Slot], y_KD: Tensor) -> None:
        """Write each expert's output for one token into its row of y_KD (float32)."""
        mlps = [self._mlp(slot) for slot in slot_of_row.values()]
        self.kernels.one_token(x_1D, mlps, [*slot_of_row], y_KD)

    def token(
        self, x_1D: Tensor, slots: Sequence[Slot], weights_1K: Tensor, *, energy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the weighted sum of the outputs of one token's experts, and their energies."""
        mlps = [self._mlp(slot) for slot in slots]
        return self.kernels.token(x_1D, mlps, weights_1K, energy=energy)

    def addresses(self, slots: Mapping[int, Slot], number: int) -> ExpertAddresses | None:
        """Return the addresses of experts in slots; None for kernels of another device.

        Args:
            slots: The slot of each resident expert; at least one.
            number: E.
        """
        if not isinstance(self.kernels, Kernels):
            return None
        mlps = {expert: self._mlp(slot) for expert, slot in slots.items()}
        return ExpertAddresses(mlps, number)

    def outputs(
        self, x_TD: Tensor, batch: Sequence[tuple[Slot, Tensor]], num_choices: int, y_RD: Tensor
    ) -> None:
        """Write the outputs of several experts into y_RD.

        Args:
            x_TD: Inputs.
            batch: Each expert's slot and its rows of the flattened choice.
            num_choices: K, the number of experts per token.
            y_RD: Output, one row per choice.
        """
        for part in _limit_rows(batch):
            tokens = [rows_R // num_choices for _, rows_R in part]
            mlps = [self._mlp(slot) for slot, _ in part]
            output_RD = self.kernels.experts(x_TD, mlps, tokens)
            y_RD[torch.cat([rows_R for _, rows_R in part])] = output_RD.to(y_RD.dtype)

    def _mlp(self, slot: Slot) -> KernelMlp:
        if (cached := self._mlps.get(slot)) is not None:
            return cached
        shape = self._shape
        self._mlps[slot] = KernelMlp(
            w_in=slot.tensors[shape.w_in],
            w_out=slot.tensors[shape.w_out],
            activation=shape.activation,
            gated=shape.gated,
            biases=self._biases(slot),
        )
        return self._mlps[slot]

    def _biases(self, slot: Slot) -> tuple[Tensor, Tensor] | None:
        if self._shape.biases is None:
            return None
        first, second = (slot.tensors[name] for name in self._shape.biases)
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        return first, second

    def computes(self, slots: Iterable[Slot]) -> bool:
        """Return whether all of these slots hold their matrices with output units in rows.

        Codes are held so in every family; values as the family has them.
        """
        shape, specs = self._shape, self._layout.specs
        turned = [name for name in (shape.w_in, shape.w_out) if specs[name].inputs_first]
        return not any(isinstance(slot.tensors[name], Tensor) for slot in slots for name in turned)

    def computes_format(self, format: Format) -> bool:
        """Return whether slots of this format hold matrices with output units in rows."""
        spec = self._layout.specs[self._shape.w_in]
        held = spec.stored is not None and format != DECODED
        return not spec.inputs_first or format.is_encoded or held


def _limit_rows(batch: Sequence[tuple[Slot, Tensor]]) -> Iterator[list[tuple[Slot, Tensor]]]:
    """Yield parts of at most `MAX_ROWS` rows, which limits the memory of hidden units."""
    part, number = list[tuple[Slot, Tensor]](), 0
    for slot, rows_R in batch:
        for some_R in rows_R.split(MAX_ROWS):
            if part and number + len(some_R) > MAX_ROWS:
                yield part
                part, number = [], 0
            part.append((slot, some_R))
            number += len(some_R)
    if part:
        yield part


def fused_experts(layout: Layout, device: torch.device) -> FusedExperts | None:
    """Return the fused experts of a layout; None if no kernels support it on this device."""
    kernels, shape = backend(device), layout.mlp
    if kernels is None or shape is None or (shape.biases and device.type != "cpu"):
        return None
    matrices = layout.specs[shape.w_in], layout.specs[shape.w_out]
    biases = [layout.specs[name] for name in shape.biases or ()]
    supported = all(spec.dtype in NATIVE_DTYPES for spec in matrices)
    supported &= all(spec.dtype in ACTIVATION_DTYPES for spec in biases)
    return FusedExperts(layout, kernels) if supported else None


class ExpertInvoker:
    """Compute y_TD = sum over a token's experts of weight * expert(x), from slots.

    Args:
        block: The MoE block.
        slot_table: Which expert is in which slot.
        slots: The block's slots by index. They are looked up at every step, so slots may be added
            and removed between steps.
        transfer: Loads missing experts.
        counters: Counts hits and fetches.
        take: Returns those of the given experts that are being loaded already, with their loads.

    Attributes:
        when_read: Called in a step once no read is left to wait for.
        collect_stats: Whether steps set `output_energy_R`.
        output_energy_R: |weight * output|^2 of each choice of the last step.
    """

    def __init__(
        self,
        block: MoeBlock,
        slot_table: SlotTable,
        slots: Mapping[int, Slot],
        transfer: Transfer,
        counters: Counters,
        take: Callable[[Collection[int]], dict[int, PendingLoad]] = lambda experts: {},
    ):
        self._block, self._slot_table, self._slots = block, slot_table, slots
        self._transfer, self._counters, self._take = transfer, counters, take
        self.when_read: Callable[[], None] | None = None
        self._fused: FusedExperts | None = None
        self._device: torch.device | None = None  # the device of `_fused`
        self.collect_stats = False
        self.output_energy_R: Tensor | None = None
        self._addresses: ExpertAddresses | None = None
        self._addresses_of: tuple[list[Any], ...] = ()

    def addresses(self) -> ExpertAddresses | None:
        """Return the addresses of residents; None unless kernels of a CPU compute them."""
        slot_of, slots = self._slot_table.slot_of, self._slots
        if not slot_of or self._block.weighs_inputs:
            return None
        # Lists compare faster than mappings, and this is asked of every layer of every step.
        made_of = [*slots], [*map(ref, slots.values())], [*slot_of], [*slot_of.values()]
        if self._addresses_of != made_of:
            fused = self._fused_on(torch.device("cpu"))
            computes = fused is not None and fused.computes(slots.values())
            residents = {expert: slots[slot] for expert, slot in slot_of.items()}
            self._addresses = (
                fused.addresses(residents, self._block.num_experts) if fused and computes else None
            )
            self._addresses_of = made_of
        return self._addresses

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Compute the block's output.

        Args:
            x_TD: Inputs.
            routing: Experts and weights of each token.

        Returns:
            y_TD in the dtype of `x_TD`.

        Raises:
            CheckpointError: An expert cannot be read.
        """
        fused = self._fused_on(x_TD.device)
        if fused and fused.computes(self._slots.values()):
            compute = self._fused_token if x_TD.shape[0] == 1 else self._fused_tokens
            return compute(fused, x_TD, routing)
        if x_TD.shape[0] == 1:
            return self._one_token(x_TD, routing)
        rows = _rows_by_expert(routing, self._block.num_experts)
        token_R = torch.arange(len(x_TD), device=x_TD.device).repeat_interleave(
            routing.ids_TK.shape[1]
        )
        has_padding = sum(map(len, rows.values())) < len(token_R)
        allocate = x_TD.new_zeros if has_padding else x_TD.new_empty
        y_RD = allocate((len(token_R), x_TD.shape[1]))
        for [(expert, slot)] in self._batches(list(rows), together=False):
            rows_R = rows[expert]
            y_RD[rows_R] = self._output(slot, x_TD[token_R[rows_R]]).to(y_RD.dtype)
        return self._weighted_sum(y_RD, routing).to(x_TD.dtype)

    def _fused_on(self, device: torch.device) -> FusedExperts | None:
        if device != self._device:
            self._device, self._fused = device, fused_experts(self._block.layout, device)
        return self._fused

    def _fused_tokens(self, fused: FusedExperts, x_TD: Tensor, routing: Routing) -> Tensor:
        """Compute residents in one kernel call, and missing experts as they are read."""
        rows = _rows_by_expert(routing, self._block.num_experts)
        y_RD = x_TD.new_zeros(routing.ids_TK.numel(), x_TD.shape[1])
        for batch in self._batches(list(rows), together=True):
            slots_and_rows = [(slot, rows[expert]) for expert, slot in batch]
            fused.outputs(x_TD, slots_and_rows, routing.ids_TK.shape[1], y_RD)
        return self._fused_sum(fused, x_TD, y_RD, routing)

    def _fused_token(self, fused: FusedExperts, x_1D: Tensor, routing: Routing) -> Tensor:
        """Compute one token: no grouping by expert, all residents in one kernel call."""
        ids = routing.ids_TK[0].tolist()
        if ids and (found := self._slot_table.slots_of(ids)) is not None:
            self._counters.hits += len(set(ids))
            if self.when_read is not None:
                self.when_read()
            y_1D, self.output_energy_R = fused.token(
                x_1D,
                [self._slots[slot] for slot in found],
                routing.weights_TK,
                energy=self.collect_stats,
            )
            return y_1D
        row_of: dict[int, int] = {}
        for row, expert in enumerate(ids):
            if expert < self._block.num_experts:
                row_of.setdefault(expert, row)
        allocate = x_1D.new_empty if len(row_of) == len(ids) else x_1D.new_zeros
        y_KD = allocate((len(ids), x_1D.shape[1]), dtype=torch.float32)
        for batch in self._batches(list(row_of), together=True):
            fused.one_token(x_1D, {row_of[expert]: slot for expert, slot in batch}, y_KD)
        for row, expert in enumerate(ids):
            if row_of.get(expert, row) != row:  # chosen twice
                y_KD[row] = y_KD[row_of[expert]]
        return self._fused_sum(fused, x_1D, y_KD, routing)

    def _fused_sum(
        self, fused: FusedExperts, x_TD: Tensor, y_RD: Tensor, routing: Routing
    ) -> Tensor:
        y_TD, energy_R = fused.kernels.weighted_sum(
            y_RD, routing.weights_TK, x_TD.dtype, energy=self.collect_stats
        )
        if self.collect_stats:
            self.output_energy_R = energy_R
        return y_TD

    def _one_token(self, x_1D: Tensor, routing: Routing) -> Tensor:
        """Compute one token without kernels: no grouping by expert, no scatter."""
        ids = routing.ids_TK[0].tolist()
        needed = list(dict.fromkeys(e for e in ids if e < self._block.num_experts))
        outputs = {
            expert: self._output(slot, x_1D)
            for [(expert, slot)] in self._batches(needed, together=False)
        }
        zeros_1D = torch.zeros_like(x_1D)  # for padding
        y_KD = torch.cat([outputs.get(expert, zeros_1D) for expert in ids])
        return self._weighted_sum(y_KD, routing).to(x_1D.dtype)

    def _weighted_sum(self, y_RD: Tensor, routing: Routing) -> Tensor:
        weighted_RD = y_RD * routing.weights_TK.reshape(-1, 1)
        if self.collect_stats:
            self.output_energy_R = weighted_RD.float().square().sum(-1)
        return weighted_RD.view(*routing.ids_TK.shape, y_RD.shape[1]).sum(1)

    def _output(self, slot: Slot, x_RD: Tensor) -> Tensor:
        return expert_output(self._block.layout, slot.format, slot.tensors, x_RD)

    def _batches(
        self, needed: Sequence[int], *, together: bool
    ) -> Iterator[list[tuple[int, Slot]]]:
        """Yield batches of experts with their slots, residents first.

        A slot is valid until the next batch is requested. Loads start as early as slots allow: into
        an empty slot, or one whose expert this step has already computed or does not need.

        Args:
            needed: The experts of this step.
            together: Yield all residents as one batch instead of one by one.
        """
        loads = self._take(needed)
        try:
            residents = self._slot_table.residents
            remaining = deque(
                sorted(needed, key=lambda one: (one not in residents, one not in loads))
            )
            to_load = deque(one for one in remaining if one not in residents and one not in loads)
            num_resident = len(remaining) - len(to_load) - len(loads)
            self._counters.fetches += len(to_load) + len(loads)
            self._counters.hits += num_resident
            when_read = self.when_read
            while remaining:
                self._start_loads(to_load, loads, protected=set(remaining))
                size = max(1, num_resident) if together else 1
                batch = [remaining.popleft() for _ in range(size)]
                num_resident = 0
                for expert in batch:
                    if expert in loads:
                        loads.pop(expert).commit(self._slot_table, self._counters)
                if when_read is not None and not loads and not to_load:
                    when_read()
                    when_read = None
                yield [(expert, self._slots[self._slot_table.slot(expert)]) for expert in batch]
        finally:  # after an error, no slot may stay reserved
            end_all(partial(one.commit, self._slot_table, self._counters) for one in loads.values())

    def _start_loads(
        self, to_load: deque[int], loads: dict[int, PendingLoad], protected: set[int]
    ) -> None:
        while to_load and len(loads) < 2 * self._transfer.readers:
            slot = self._slot_table.reserve(to_load[0], protected)
            if slot is None:
                return
            expert = to_load.popleft()
            done = self._transfer.load(self._block.name, expert, self._slots[slot])
            loads[expert] = PendingLoad(slot, done)


def _rows_by_expert(routing: Routing, num_experts: int) -> dict[int, Tensor]:
    """Return each chosen expert's rows of the flattened choice, in ascending order."""
    ids_R = routing.ids_TK.flatten()
    counts = torch.bincount(ids_R, minlength=num_experts + 1).tolist()
    groups = ids_R.argsort(stable=True).split(counts)
    return {e: rows for e, rows in enumerate(groups[:num_experts]) if len(rows)}
