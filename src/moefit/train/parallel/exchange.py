"""Ways of rows to the experts of other processes and back: directly, or machine by machine.

Both compute the same sums in the same order: the outputs of a token's experts are added up machine
by machine, and so are the gradients of the token.

- `flat`: each process sends each row to the process of its expert.
- `hierarchical`: for each machine that has some of a token's experts, a process sends one copy to
  its counterpart there, which passes rows on to the other processes of that machine, adds up what
  they return, and sends back the sum. Between machines a process talks to its counterparts only.

Shapes: T tokens of this process, D model width, E experts, R rows (pairs of a token and one of its
experts), C copies (pairs of a token and a machine with some of its experts), P processes, N
machines.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moefit.moe.locmoe import capacity
from moefit.moe.routing import at_least_float32
from moefit.train.parallel.clock import Clock
from moefit.train.parallel.processes import TIMEOUT_SECONDS

Compute = Callable[[Tensor, Tensor], Tensor]
"""Computes experts of this process, counted from 0, for rows: y_RD of rows_RD and ids_R."""


@dataclass(slots=True)
class Traffic:
    """What this process sent since the last report.

    Attributes:
        counts: Rows by expert, of each call of a MoE layer.
        dropped: Rows beyond the capacity.
        sent: Bytes to other processes, both ways and in both passes.
        sent_away: Those to other machines.
        messages_away: Messages to processes of other machines that contained anything.
    """

    counts: list[Tensor] = field(default_factory=list)
    dropped: int = 0
    sent: int = 0
    sent_away: int = 0
    messages_away: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Processes that exchange rows.

    Attributes:
        ranks: Their numbers among all that share the experts, in the order of the group.
        handle: torch's group of them.
    """

    ranks: tuple[int, ...]
    handle: dist.ProcessGroup


@dataclass(slots=True, kw_only=True)
class Wire:
    """Exchanges rows with other processes, and counts them.

    Attributes:
        rank: Of this process among those that share the experts.
        own_machine: Per process, whether it is on this machine.
        clock: Measures all-to-all.
        waiting: If given, measures a barrier before each all-to-all, so that `clock` does not
            contain waiting for others.
        counting: Whether traffic is counted: in training.
        traffic: Since the last report.
    """

    rank: int
    own_machine: tuple[bool, ...]
    clock: Clock
    waiting: Clock | None = None
    counting: bool = True
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def per_machine(self) -> int:
        """Processes of one machine."""
        return sum(self.own_machine)

    @property
    def machines(self) -> int:
        """N."""
        return len(self.own_machine) // self.per_machine

    def exchange(
        self, rows_RD: Tensor, group: Group, sizes: list[int], received: list[int]
    ) -> Tensor:
        """Send consecutive rows to the processes of a group; return what they send, in order."""
        out = rows_RD.new_empty(sum(received), *rows_RD.shape[1:])
        rows_RD = rows_RD.contiguous()
        if not self.counting:
            dist.all_to_all_single(out, rows_RD, received, sizes, group=group.handle)
            return out
        if self.waiting is not None:
            with self.waiting.running():
                dist.barrier(group=group.handle)
        with self.clock.running():
            dist.all_to_all_single(out, rows_RD, received, sizes, group=group.handle)
        width = rows_RD.shape[1:].numel() * rows_RD.element_size()
        for rank, size in zip(group.ranks, sizes, strict=True):
            away = not self.own_machine[rank]
            self.traffic.sent += width * size * (rank != self.rank)
            self.traffic.sent_away += width * size * away
            self.traffic.messages_away += bool(size) and away
        return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, wire: Wire, group: Group, sizes: list[int], received: list[int]
    ) -> Tensor:
        ctx.ways = wire, group, received, sizes
        return wire.exchange(rows_RD, group, sizes, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        wire, group, sizes, received = ctx.ways
        return wire.exchange(gradients[0], group, sizes, received), None, None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a process sends in one call of a MoE layer; rows are in the order of experts.

    Attributes:
        x_CD: Copies of tokens, in the order of machines.
        copy_R: The copy of each row.
        expert_R: Its expert.
        weight_R1: Its weight in the token's sum.
        num_experts: E.
        dtype: What travels is rounded to it.
    """

    x_CD: Tensor
    copy_R: Tensor
    expert_R: Tensor
    weight_R1: Tensor
    num_experts: int
    dtype: torch.dtype

    def expanded(self) -> Tensor:
        """Return the copy of each row, rounded; gradients of a copy are summed before rounding."""
        return at_least_float32(self.x_CD).index_select(0, self.copy_R).to(self.dtype)

    def summed(self, y_RD: Tensor) -> Tensor:
        """Return for each copy the weighted sum of its rows [C, D], in the order of experts."""
        weighted_RD = at_least_float32(y_RD) * self.weight_R1
        shape = len(self.x_CD), y_RD.shape[1]
        return weighted_RD.new_zeros(shape).index_add(0, self.copy_R, weighted_RD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """Sends each row to the process of its expert."""

    everyone: Group

    def sums(self, rows: Rows, wire: Wire, compute: Compute) -> Tensor:
        """Return the weighted sum of the outputs of each copy's experts [C, D].

        Args:
            rows: What is sent.
            wire: Sends it.
            compute: Computes the experts of this process.
        """
        counts_E = torch.bincount(rows.expert_R, minlength=rows.num_experts)
        processes = len(self.everyone.ranks)
        equal = [rows.num_experts // processes] * processes
        received_E = wire.exchange(counts_E, self.everyone, equal, equal)  # by process and expert
        sizes, received = (c.view(processes, -1).sum(1).tolist() for c in (counts_E, received_E))
        own_R = torch.arange(equal[0], device=counts_E.device).repeat(processes)
        own_R = own_R.repeat_interleave(received_E)
        rows_RD = _AllToAll.apply(rows.expanded(), wire, self.everyone, sizes, received)
        y_RD = compute(rows_RD, own_R)
        return rows.summed(_AllToAll.apply(y_RD, wire, self.everyone, received, sizes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchical:
    """Sends one copy of a token to each machine with some of its experts.

    Attributes:
        counterparts: The processes of the same number on all machines.
        machine: The processes of this machine.
    """

    counterparts: Group
    machine: Group

    def sums(self, rows: Rows, wire: Wire, compute: Compute) -> Tensor:
        """Return the weighted sum of the outputs of each copy's experts [C, D]; see `Flat`.

        The sums of each machine, also of this one, are rounded to the dtype that travels.
        """
        experts = rows.num_experts // wire.machines  # of a machine
        first_C = rows.copy_R.new_zeros(len(rows.x_CD)).scatter(0, rows.copy_R, rows.expert_R)
        copies_N, rows_N = (
            torch.bincount(expert // experts, minlength=wire.machines)
            for expert in (first_C, rows.expert_R)
        )
        equal = [1] * wire.machines
        both_N2 = torch.stack([copies_N, rows_N], dim=1)
        came_N2 = wire.exchange(both_N2, self.counterparts, equal, equal)
        (copies, sizes), (copies_in, sizes_in) = both_N2.T.tolist(), came_N2.T.tolist()

        def sent(part: Tensor) -> Tensor:
            return _AllToAll.apply(part, wire, self.counterparts, sizes, sizes_in)

        x_CD = _AllToAll.apply(rows.x_CD.to(rows.dtype), wire, self.counterparts, copies, copies_in)
        weight_R1 = sent(rows.weight_R1)
        begin_N = copies_N.cumsum(0) - copies_N
        local_R = rows.copy_R - begin_N.repeat_interleave(rows_N)
        plan_R2 = torch.stack([rows.expert_R % experts, local_R], dim=1).int()
        expert_R, copy_R = sent(plan_R2).long().unbind(1)
        begin_N = came_N2[:, 0].cumsum(0) - came_N2[:, 0]
        machine_R = torch.arange(wire.machines, device=expert_R.device)
        machine_R = machine_R.repeat_interleave(came_N2[:, 1])
        order_R = expert_R.argsort(stable=True)
        passed = Rows(
            x_CD=x_CD,
            copy_R=(copy_R + begin_N[machine_R])[order_R],
            expert_R=expert_R[order_R],
            weight_R1=weight_R1.index_select(0, order_R),
            num_experts=experts,
            dtype=rows.dtype,
        )
        sums_CD = self._within(passed, machine_R[order_R], wire, compute).to(rows.dtype)
        return _AllToAll.apply(sums_CD, wire, self.counterparts, copies_in, copies)

    def _within(self, rows: Rows, machine_R: Tensor, wire: Wire, compute: Compute) -> Tensor:
        """Return the sums of copies from all machines, by the processes of this machine.

        Args:
            rows: In the order of experts, then of the machines they come from.
            machine_R: Those machines.
            wire: Sends rows.
            compute: Computes the experts of this process.
        """
        processes, machines = len(self.machine.ranks), wire.machines
        # Rows are told apart by expert and machine, so that their order does not depend on the way.
        kinds = rows.num_experts * machines
        counts = torch.bincount(rows.expert_R * machines + machine_R, minlength=kinds)
        equal = [kinds // processes] * processes
        came = wire.exchange(counts, self.machine, equal, equal)
        sizes, received = (c.view(processes, -1).sum(1).tolist() for c in (counts, came))
        kind_R = torch.arange(equal[0], device=came.device).repeat(processes)
        kind_R = kind_R.repeat_interleave(came)
        order_R = kind_R.argsort(stable=True)
        rows_RD = _AllToAll.apply(rows.expanded(), wire, self.machine, sizes, received)
        y_RD = compute(rows_RD.index_select(0, order_R), kind_R[order_R] // machines)
        y_RD = y_RD.index_select(0, order_R.argsort())
        return rows.summed(_AllToAll.apply(y_RD, wire, self.machine, received, sizes))


Way = Flat | Hierarchical


def way_of(wire: Wire, everyone: dist.ProcessGroup, *, hierarchical: bool) -> Way:
    """Return the way of rows among processes; all of them call it, and join groups.

    Args:
        wire: Sends the rows.
        everyone: All processes that share the experts.
        hierarchical: Whether rows go through one process per machine.
    """
    if not hierarchical:
        return Flat(everyone=Group(ranks=tuple(range(len(wire.own_machine))), handle=everyone))
    known = dist.get_process_group_ranks(everyone)
    machine, number = divmod(wire.rank, wire.per_machine)

    def group(ranks: range) -> Group:
        members = [known[rank] for rank in ranks]
        wait = timedelta(seconds=TIMEOUT_SECONDS)
        handle = dist.new_group(members, timeout=wait, use_local_synchronization=True)
        return Group(ranks=tuple(ranks), handle=cast(dist.ProcessGroup, handle))

    return Hierarchical(
        counterparts=group(range(number, len(wire.own_machine), wire.per_machine)),
        machine=group(range(machine * wire.per_machine, (machine + 1) * wire.per_machine)),
    )


def sent_rows(ids_R: Tensor, num_experts: int, factor: float | None) -> Tensor:
    """Return the rows that are sent, in the order of experts: the first ones, up to capacity.

    Args:
        ids_R: Experts; the id E is padding, which is not sent.
        num_experts: E.
        factor: c_f of `capacity`; None for no limit.
    """
    order_R = ids_R.argsort(stable=True)
    sorted_R = ids_R[order_R]
    kept_R = sorted_R < num_experts
    if factor is not None:
        counts_E = torch.bincount(sorted_R, minlength=num_experts + 1)
        first_E = counts_E.cumsum(0) - counts_E
        place_R = torch.arange(len(sorted_R), device=sorted_R.device) - first_E[sorted_R]
        kept_R &= place_R < capacity(len(ids_R), num_experts, factor)
    return order_R[kept_R]


def combined(  # noqa: PLR0913 - a MoE layer, and how it is spread
    x_TD: Tensor,
    expert_R: Tensor,
    token_R: Tensor,
    weight_R1: Tensor,
    *,
    num_experts: int,
    way: Way,
    wire: Wire,
    compute: Compute,
) -> Tensor:
    """Return the weighted sums of the outputs of tokens' experts [T, D].

    Args:
        x_TD: Tokens.
        expert_R: In ascending order.
        token_R: The token of each row.
        weight_R1: Its weight, in float32 or more.
        num_experts: E.
        way: Of the rows.
        wire: Sends them.
        compute: Computes the experts of this process.
    """
    machine_R = expert_R // (num_experts // wire.machines)
    key_C, copy_R = (machine_R * len(x_TD) + token_R).unique(return_inverse=True)
    token_C = key_C % max(1, len(x_TD))
    rows = Rows(
        x_CD=x_TD.index_select(0, token_C),
        copy_R=copy_R,
        expert_R=expert_R,
        weight_R1=weight_R1,
        num_experts=num_experts,
        # Experts round to the dtype of autocast anyway; rounded before, that is what travels.
        dtype=_matmul_dtype(x_TD),
    )
    sums_CD = at_least_float32(way.sums(rows, wire, compute))
    y_TD = sums_CD.new_zeros(x_TD.shape).index_add(0, token_C, sums_CD)
    return y_TD.to(x_TD.dtype)


def _matmul_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
