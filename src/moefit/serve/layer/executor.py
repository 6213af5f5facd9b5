"""Compute one MoE block: SwapMoE's Expert Invoker.

Resident experts are computed while missing ones are being read. Where host memory holds further
experts, part of the missing ones are computed there at the same time (`HostExperts`). Each token's
outputs are summed in the order of the router's choice, whatever order and place they were computed
in.

Shapes: T tokens, D model width, E experts, K chosen per token, R routed rows.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, takewhile
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from moefit.moe.families import MoeBlock
from moefit.moe.routing import Routing
from moefit.quant.layers.decoder_layers import ExpertAddresses
from moefit.serve.cache.slot import Slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.hybrid.host_experts import Demand, HostExperts, HostWork
from moefit.serve.io.loads import PendingLoad, Transfer, end_all
from moefit.serve.layer.expert_executor import ExpertExecutor, FusedExperts
from moefit.serve.stats import Counters


class ExpertInvoker:
    """Compute y_TD = sum over a token's experts of weight * expert(x).

    Args:
        block: The MoE block.
        slot_table: Which expert is in which slot.
        slots: The block's slots by index. They are looked up at every step, so slots may be added
            and removed between steps.
        transfer: Loads missing experts.
        counters: Counts hits and fetches.
        take: Returns those of the given experts that are being loaded already, with their loads.

    Attributes:
        host: Computes missing experts in host memory; None where all of them are fetched.
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
        self.host: HostExperts | None = None
        self.when_read: Callable[[], None] | None = None
        self._executor: ExpertExecutor | None = None
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
            fused = self._executor_on(torch.device("cpu")).fused(slots.values())
            residents = {expert: slots[slot] for expert, slot in slot_of.items()}
            self._addresses = fused.addresses(residents, self._block.num_experts) if fused else None
            self._addresses_of = made_of
        return self._addresses

    def begin_loads(self, ids: Sequence[int]) -> "StepLoads | None":
        """Begin to load the absent experts of a step for a call that reads `addresses`.

        Args:
            ids: The chosen expert of each row.

        Returns:
            None where they cannot all be resident at once, or part of them is computed elsewhere.
        """
        chosen, table = set(ids), self._slot_table
        if (
            self.host is not None
            or len(chosen) > table.num_slots - len(table.filling)
            or not 0 <= min(chosen) <= max(chosen) < self._block.num_experts
        ):
            return None
        return StepLoads(self, chosen)

    def start_loads(
        self, to_load: deque[int], loads: dict[int, PendingLoad], protected: set[int]
    ) -> None:
        """Start as many loads as slots and readers allow.

        Args:
            to_load: Absent experts; those whose loads start are removed.
            loads: Loads in progress, which become more.
            protected: Experts that must not be evicted.
        """
        while to_load and len(loads) < 2 * self._transfer.readers:
            slot = self._slot_table.reserve(to_load[0], protected)
            if slot is None:
                return
            expert = to_load.popleft()
            try:
                done = self._transfer.load(self._block.name, expert, self._slots[slot])
            except BaseException:  # such as a device that has disappeared
                self._slot_table.abandon(slot)
                raise
            loads[expert] = PendingLoad(slot, done)

    def commit(self, load: PendingLoad) -> None:
        """Wait for a load and make its expert resident."""
        load.commit(self._slot_table, self._counters)

    def _commit_ended(self, loads: dict[int, PendingLoad]) -> None:
        """Make experts resident whose loads have ended, so that others can be read meanwhile."""
        for expert in [one for one, load in loads.items() if load.done.done()]:
            self.commit(loads.pop(expert))

    def absent(self, experts: Iterable[int]) -> list[int]:
        """Return those that are not resident, and count them as fetched."""
        residents = self._slot_table.residents
        found = [expert for expert in experts if expert not in residents]
        self._counters.fetches += len(found)
        return found

    def update_addresses(self) -> None:
        """Write changes of the residents into the addresses that a call in progress reads."""
        addresses = self._addresses
        fused = self._executor_on(torch.device("cpu")).fused(self._slots.values())
        assert addresses is not None and fused is not None, "no call reads addresses"
        slots, made_of, experts, places = self._addresses_of
        slot_of = self._slot_table.slot_of
        changed = dict(zip(experts, places, strict=True)).items() ^ slot_of.items()
        for expert in {one for one, _ in changed}:
            slot = slot_of.get(expert)
            addresses.set(expert, None if slot is None else fused.mlp(self._slots[slot]))
        self._addresses_of = slots, made_of, [*slot_of], [*slot_of.values()]

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Compute the block's output.

        Args:
            x_TD: Inputs.
            routing: Experts and weights of each token.

        Returns:
            y_TD in the dtype of `x_TD`.

        Raises:
            CheckpointError: An expert cannot be read.
            DeviceError: The device does not take experts any more.
        """
        executor = self._executor_on(x_TD.device)
        fused = executor.fused(self._slots.values())
        if x_TD.shape[0] == 1:
            return self._one_token(executor, fused, x_TD, routing)
        rows, num_choices = (
            _rows_by_expert(routing, self._block.num_experts),
            routing.ids_TK.shape[1],
        )
        y_RD = x_TD.new_zeros(routing.ids_TK.numel(), x_TD.shape[1])
        demand = Demand(x_TD, rows, num_choices, y_RD)
        for batch in self._batches(demand, together=fused is not None):
            slots_and_rows = [(slot, rows[expert]) for expert, slot in batch]
            executor.outputs(x_TD, slots_and_rows, num_choices, y_RD)
        return self._sum(fused, x_TD, y_RD, routing)

    def _executor_on(self, device: torch.device) -> ExpertExecutor:
        if self._executor is None or device != self._executor.device:
            self._executor = ExpertExecutor(self._block.layout, device)
        return self._executor

    def _one_token(
        self, executor: ExpertExecutor, fused: FusedExperts | None, x_1D: Tensor, routing: Routing
    ) -> Tensor:
        """Compute one token: no grouping by expert, all residents in one kernel call."""
        ids = routing.ids_TK[0].tolist()
        if fused and ids and (found := self._slot_table.slots_of(ids)) is not None:
            return self._resident_token(fused, x_1D, found, routing)
        row_of: dict[int, int] = {}
        for row, expert in enumerate(ids):
            if expert < self._block.num_experts:
                row_of.setdefault(expert, row)
        allocate = x_1D.new_empty if len(row_of) == len(ids) else x_1D.new_zeros
        dtype = torch.float32 if fused else x_1D.dtype
        y_KD = allocate((len(ids), x_1D.shape[1]), dtype=dtype)
        demand = Demand(x_1D, {expert: [row] for expert, row in row_of.items()}, len(ids), y_KD)
        for batch in self._batches(demand, together=fused is not None):
            if fused:
                fused.one_token(x_1D, {row_of[expert]: slot for expert, slot in batch}, y_KD)
                continue
            for expert, slot in batch:
                y_KD[row_of[expert]] = executor.output(slot, x_1D)[0]
        for row, expert in enumerate(ids):
            if row_of.get(expert, row) != row:  # chosen twice
                y_KD[row] = y_KD[row_of[expert]]
        return self._sum(fused, x_1D, y_KD, routing)

    def _resident_token(
        self, fused: FusedExperts, x_1D: Tensor, found: Sequence[int], routing: Routing
    ) -> Tensor:
        self._counters.hits += len(set(found))
        if self.when_read is not None:
            self.when_read()
        y_1D, self.output_energy_R = fused.token(
            x_1D,
            [self._slots[slot] for slot in found],
            routing.weights_TK,
            energy=self.collect_stats,
        )
        return y_1D

    def _sum(
        self, fused: FusedExperts | None, x_TD: Tensor, y_RD: Tensor, routing: Routing
    ) -> Tensor:
        """Return the weighted sum over each token's experts, in the order of its choice."""
        if fused:
            y_TD, energy_R = fused.kernels.weighted_sum(
                y_RD, routing.weights_TK, x_TD.dtype, energy=self.collect_stats
            )
            if self.collect_stats:
                self.output_energy_R = energy_R
            return y_TD
        weighted_RD = y_RD * routing.weights_TK.reshape(-1, 1)
        if self.collect_stats:
            self.output_energy_R = weighted_RD.float().square().sum(-1)
        y_TD = weighted_RD.view(*routing.ids_TK.shape, y_RD.shape[1]).sum(1)
        return y_TD.to(x_TD.dtype)

    def _batches(self, demand: Demand, *, together: bool) -> Iterator[list[tuple[int, Slot]]]:
        """Yield batches of experts with their slots, residents first.

        A slot is valid until the next batch is requested. Loads start as early as slots allow: into
        an empty slot, or one whose expert this step has already computed or does not need. Experts
        that are computed in host memory are not yielded; their outputs are written at the end.

        Args:
            demand: The experts of this step.
            together: Yield all residents as one batch instead of one by one; a few at a time while
                loads wait for slots or for readers.
        """
        loads = self._take(demand.rows)
        work: HostWork | None = None
        try:
            residents = self._slot_table.residents
            here = [one for one in demand.rows if one in residents]
            absent = [one for one in demand.rows if one not in residents and one not in loads]
            if self.host is not None and absent:
                absent, work = self.host.begin(demand, absent, self._slots, loading=bool(loads))
            remaining, to_load = deque([*here, *loads, *absent]), deque(absent)
            self._counters.fetches += len(to_load) + len(loads)
            self._counters.hits += len(here)
            when_read = self.when_read
            while remaining:
                self._commit_ended(loads)
                self.start_loads(to_load, loads, protected=set(remaining))
                size = 1
                if together:
                    ready = takewhile(self._slot_table.residents.__contains__, remaining)
                    # Further loads start between batches, so that reading never pauses.
                    most = self._transfer.readers if to_load else len(remaining)
                    size = max(1, sum(1 for _ in islice(ready, most)))
                batch = [remaining.popleft() for _ in range(size)]
                for expert in batch:
                    if expert in loads:
                        self.commit(loads.pop(expert))
                if when_read is not None and not loads and not to_load:
                    when_read()
                    when_read = None
                yield [(expert, self._slots[self._slot_table.slot(expert)]) for expert in batch]
            if work is not None:
                if when_read is not None and not demand.rows.keys() - work.experts:
                    when_read()
                self._counters.computed_on_host += len(work.experts)
                work.collect(demand.y_RD)
        finally:  # after an error, no slot may stay reserved, and nothing may compute any more
            if work is not None:
                work.cancel()
            ends = [partial(one.commit, self._slot_table, self._counters) for one in loads.values()]
            end_all(ends if work is None else [*ends, work.end])


class StepLoads:
    """The absent experts of one step, loaded while resident ones are computed.

    Args:
        invoker: Of the block; its addresses are updated.
        chosen: All experts of the step; there are slots for all.

    Attributes:
        number: How many were absent.
    """

    def __init__(self, invoker: ExpertInvoker, chosen: set[int]):
        self._invoker, self._chosen = invoker, chosen
        self._loads: dict[int, PendingLoad] = {}
        self._to_load = deque(invoker.absent(chosen))
        self.number = len(self._to_load)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        """Wait until all are resident.

        Raises:
            CheckpointError: An expert cannot be read.
        """
        try:
            while self._loads:
                expert = next(iter(self._loads))
                self._invoker.commit(self._loads[expert])
                del self._loads[expert]  # after it, so that `close` ends it if this is interrupted
                if self._to_load:
                    self._start()
        finally:
            self.close()

    def close(self) -> None:
        """End what is being loaded still, and tell the kernels which experts are resident."""
        self._to_load.clear()
        ends = [partial(self._invoker.commit, one) for one in self._loads.values()]
        self._loads.clear()
        end_all(ends)
        self._invoker.update_addresses()

    def _start(self) -> None:
        self._invoker.start_loads(self._to_load, self._loads, self._chosen)
        self._invoker.update_addresses()  # experts were evicted


def _rows_by_expert(routing: Routing, num_experts: int) -> dict[int, Tensor]:
    """Return each chosen expert's rows of the flattened choice, in ascending order."""
    ids_R = routing.ids_TK.flatten()
    counts = torch.bincount(ids_R, minlength=num_experts + 1).tolist()
    groups = ids_R.argsort(stable=True).split(counts)
    return {e: rows for e, rows in enumerate(groups[:num_experts]) if len(rows)}
