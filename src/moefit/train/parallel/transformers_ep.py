"""Ways of tokens for transformers' own expert parallelism, without moefit's trainer.

After `register_expert_parallelism()`, any model with a plan for expert parallelism (OLMoE,
Qwen3-MoE, Mixtral and others) takes `DistributedConfig(ep_size=P, ep_implementation=...)` with
`moefit_flat` or `moefit_hierarchical`, see `exchange`; transformers divides the experts, and
`fully_shard` is its own.

Shapes: T tokens of this process, D model width, K chosen per token, R rows (pairs of a token and
one of its experts).
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from moefit.errors import ConfigError
from moefit.moe.routing import at_least_float32
from moefit.train.parallel.clock import Clock
from moefit.train.parallel.exchange import Way, Wire, combined, sent_rows, way_of

FLAT, HIERARCHICAL = "moefit_flat", "moefit_hierarchical"


def register_expert_parallelism(
    *, capacity_factor: float | None = None, processes_per_machine: int | None = None
) -> tuple[str, str]:
    """Register both ways with transformers and return their names; may be called repeatedly.

    Args:
        capacity_factor: In training, the most tokens that a process sends to an expert, in units of
            an even share; what is beyond has no output of the layer. None is no limit.
        processes_per_machine: Consecutive processes; None for what torchrun says.

    Raises:
        ConfigError: The factor is not a finite number above 0, or there are no processes.
    """
    if capacity_factor is not None and not 0 < capacity_factor < math.inf:
        raise ConfigError(
            f"capacity_factor={capacity_factor:g} is not a number of even shares; give one above "
            "0, or None for no limit"
        )
    if processes_per_machine is not None and processes_per_machine < 1:
        raise ConfigError(
            f"processes_per_machine={processes_per_machine} leaves no process on a machine; give 1 "
            "or more, or None for what torchrun says"
        )
    for name in (FLAT, HIERARCHICAL):
        made = _Implementations(
            hierarchical=name == HIERARCHICAL,
            capacity_factor=capacity_factor,
            processes_per_machine=processes_per_machine,
        )
        EPImplementationInterface.register(name, made)
    return FLAT, HIERARCHICAL


@dataclass(frozen=True, slots=True, kw_only=True)
class _Implementations:
    """Makes the implementation of each layer; layers share the groups of processes."""

    hierarchical: bool
    capacity_factor: float | None
    processes_per_machine: int | None
    ways: dict[Any, tuple[Wire, Way]] = field(default_factory=dict)

    def __call__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> "TokensTravel":
        """Return the implementation of a layer, as transformers calls `EPImplementation`.

        All processes of the run make a layer's implementation together.

        Raises:
            ConfigError: In all of them: the processes are not divided among machines equally, or
                share a batch.
        """
        if tp_mesh.size() > 1:
            name = HIERARCHICAL if self.hierarchical else FLAT
            raise ConfigError(
                f"ep_implementation={name!r} needs tokens of its own in each process, but tp_size="
                f'{tp_mesh.size()}; give tp_size=1, or ep_implementation="all_to_all"'
            )
        group = ep_mesh.get_group()
        if group not in self.ways:
            self.ways[group] = self._way(group)
        wire, way = self.ways[group]
        return TokensTravel(experts, ep_mesh, tp_mesh, wire, way, self.capacity_factor)

    def _way(self, group: dist.ProcessGroup) -> tuple[Wire, Way]:
        ranks = dist.get_process_group_ranks(group)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        everyone: list[Any] = [None] * dist.get_world_size()
        # All look at what all have, so that none begins to train while another has failed.
        dist.all_gather_object(everyone, (self.processes_per_machine or local, ranks))
        per_machine = _processes_per_machine([count for count, _ in everyone])
        for _, members in everyone:
            _check_members(members, per_machine)
        machine = [rank // per_machine for rank in ranks]
        rank = dist.get_rank(group)
        wire = Wire(
            rank=rank,
            own_machine=tuple(one == machine[rank] for one in machine),
            clock=Clock(torch.device("cpu")),
            counting=False,
        )
        return wire, way_of(wire, group, hierarchical=self.hierarchical)


def _processes_per_machine(counts: Sequence[int]) -> int:
    """Return how many processes a machine has, as each of them says it.

    Raises:
        ConfigError: They say different numbers.
    """
    different = sorted(set(counts))
    if len(different) > 1:
        raise ConfigError(
            f"machines have different numbers of processes ({', '.join(map(str, different))}), so "
            "experts and tokens cannot be divided among machines equally; give torchrun "
            f"--nproc-per-node {different[0]} on all, or one processes_per_machine"
        )
    return different[0]


def _check_members(ranks: Sequence[int], per_machine: int) -> None:
    """Raise ConfigError if processes that share experts are not equally many on each machine."""
    machine = [rank // per_machine for rank in ranks]
    if machine != sorted(machine) or len(set(Counter(machine).values())) > 1:
        raise ConfigError(
            f"the {len(machine)} processes that share the experts are on machines "
            f"{', '.join(map(str, machine))}, not equally many consecutive ones on each; give "
            f"an ep_size that divides the {per_machine} processes of a machine, or a multiple "
            "of them"
        )


class TokensTravel(EPImplementation):
    """Sends the tokens of one MoE layer to their experts and brings the outputs back.

    Args:
        experts: The module, with this process's part of the experts.
        ep_mesh: The processes that share the experts.
        tp_mesh: This process.
        wire: Sends rows.
        way: Of rows.
        capacity_factor: As for `register_expert_parallelism`.
    """

    def __init__(
        self,
        experts: Any,
        ep_mesh: DeviceMesh,
        tp_mesh: DeviceMesh,
        wire: Wire,
        way: Way,
        capacity_factor: float | None,
    ):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts, self.wire, self.way = experts, wire, way
        self.capacity_factor = capacity_factor
        self.num_experts = cast(int, self.num_local_experts) * ep_mesh.size()

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sums of the outputs of tokens' experts.

        Args:
            hidden_states: x_TD.
            top_k_index: ids_TK, of all experts.
            top_k_weights: weights_TK.

        Returns:
            y_TD, 0 for tokens beyond the capacity of their experts.
        """
        ids_R, weights_R = top_k_index.flatten(), top_k_weights.flatten()
        factor = self.capacity_factor if self.experts.training else None
        order_R = sent_rows(ids_R, self.num_experts, factor)
        return combined(
            hidden_states,
            ids_R[order_R],
            order_R // top_k_index.shape[1],
            at_least_float32(weights_R[order_R].unsqueeze(1)),
            num_experts=self.num_experts,
            way=self.way,
            wire=self.wire,
            compute=self._computed,
        )

    def _computed(self, rows_RD: Tensor, ids_R: Tensor) -> Tensor:
        """Return the outputs of this process's experts."""
        if not len(rows_RD):  # the backward pass must exchange gradients and reduce them too
            one_1D, ids_1 = rows_RD.sum(0, keepdim=True), ids_R.new_zeros(1)
            return self._computed(one_1D, ids_1)[:0]
        ids_R1 = ids_R.unsqueeze(1)
        return self.experts_forward(rows_RD, ids_R1, torch.ones_like(ids_R1, dtype=rows_RD.dtype))
