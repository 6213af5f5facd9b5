"""Spread the experts of a sparse model over processes; tokens travel to them and back.

Each process of a group has an equal part of every layer's experts; groups are copies of each other,
and one group of all processes is usual. A token is sent to the processes of its
experts by one all-to-all, and the outputs come back by another; gradients take the same ways.
Implemented as an experts implementation of transformers, so the model has no code of its own.

Shapes: T tokens of this process, D model width, E experts, K chosen per token, R rows (pairs of a
token and one of its experts), P processes.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from moefit.errors import ConfigError
from moefit.moe.experts import ExpertWeights, expert_weights, grouped_experts
from moefit.moe.locmoe import capacity, least_capacity
from moefit.moe.routing import Routing, at_least_float32
from moefit.train.parallel.exchange import Traffic, Way, Wire, combined, sent_rows, way_of

ALL_TO_ALL = "moefit_all_to_all"


@dataclass(slots=True, kw_only=True)
class Dispatch(Wire):
    """How tokens of one process reach the experts of its group.

    Attributes:
        mesh: `(expert,)`: processes that share the experts; or `(copy, expert)`, where processes
            of the same number in their groups have the same experts.
        shares: Processes with a part of the micro-batch: all.
        hierarchical: Whether tokens go through one process per machine; see `exchange`.
        capacity_factor: c_f of `capacity`; None for no limit.
        num_experts: E; set by `spread_experts`.
        way: Of tokens; set by `spread_experts`.
    """

    mesh: DeviceMesh
    shares: int
    hierarchical: bool = False
    capacity_factor: float | None
    num_experts: int = 0
    way: Way | None = None

    @property
    def per_process(self) -> int:
        """Experts of one process."""
        return self.num_experts // len(self.own_machine)

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes that share the experts."""
        return self.mesh.get_group(self.mesh.ndim - 1)

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of experts over groups, whose parts are already scaled for a mean.

        Args:
            parameters: Of the model.
        """
        if self.mesh.ndim == 1:
            return
        for parameter in parameters:
            is_expert = cast(DTensor, parameter).device_mesh == self.mesh
            if is_expert and parameter.grad is not None:
                gradient = cast(DTensor, parameter.grad).to_local()
                with self.clock.running():
                    dist.all_reduce(gradient, group=self.mesh.get_group(0))

    @property
    def own_E(self) -> Tensor:
        """True for experts of this machine."""
        return torch.tensor(self.own_machine).repeat_interleave(self.per_process)

    def report(self, steps: int) -> dict[str, float]:
        """Return the traffic of all processes since the last report; all call it.

        - `all_to_all_seconds`: mean over processes, per step, both ways and passes.
        - `cross_node_share`: of the tokens sent, those that went to another machine.
        - `all_to_all_bytes`, `cross_node_bytes`: of all processes together, per step.
        - `cross_node_messages`: of all processes together, per step.
        - `dropped_share`: of the tokens, those beyond the capacity.
        - `idle_experts`: fraction of experts without a token in a micro-batch.
        - `load_cv`: standard deviation of tokens per expert, divided by the mean.

        Args:
            steps: Optimizer steps since the last report.
        """
        found, self.traffic = self.traffic, Traffic()
        load_NE = torch.stack(found.counts).double()
        away = load_NE[:, ~self.own_E.to(load_NE.device)].sum()
        sums = [
            self.clock.seconds(), found.dropped, found.sent, found.sent_away, found.messages_away,
            float(away),
        ]  # fmt: skip
        total = torch.tensor(sums, dtype=torch.float64, device=load_NE.device)
        dist.all_reduce(total)
        dist.all_reduce(load_NE)
        seconds, dropped, sent, sent_away, messages_away, away = total.tolist()
        rows = float(load_NE.sum())
        uneven_N = load_NE.std(dim=1, correction=0) / load_NE.mean(dim=1).clamp_min(1e-9)
        return {
            "all_to_all_seconds": seconds / (steps * self.shares),
            "cross_node_share": away / max(1.0, rows),
            "all_to_all_bytes": sent / steps,
            "cross_node_bytes": sent_away / steps,
            "cross_node_messages": messages_away / steps,
            "dropped_share": dropped / max(1.0, rows + dropped),
            "idle_experts": float((load_NE == 0).double().mean()),
            "load_cv": float(uneven_N.mean()),
        }


def spread_experts(model: PreTrainedModel, dispatch: Dispatch) -> set[nn.Parameter]:
    """Keep this process's part of every layer's experts, and send tokens to the others'.

    Args:
        model: Built alike in every process; its experts are replaced in place.
        dispatch: How tokens travel.

    Returns:
        The experts' parameters, which FSDP leaves alone.
    """
    ExpertsInterface.register(ALL_TO_ALL, all_to_all_experts)
    parameters: set[nn.Parameter] = set()
    dispatch.num_experts = int(model.config.num_experts)
    dispatch.way = way_of(dispatch, dispatch.group, hierarchical=dispatch.hierarchical)
    placements = [Replicate()] * (dispatch.mesh.ndim - 1) + [Shard(0)]
    first = dispatch.rank * dispatch.per_process
    for module in _expert_modules(model):
        for name, whole in list(module.named_parameters(recurse=False)):
            part = whole.data[first : first + dispatch.per_process].clone()
            spread = DTensor.from_local(part, dispatch.mesh, placements, run_check=False)
            parameter = nn.Parameter(spread, requires_grad=whole.requires_grad)
            module.register_parameter(name, parameter)
            parameters.add(parameter)
        module.dispatch = dispatch
    model.set_experts_implementation(ALL_TO_ALL)
    return parameters


def _expert_modules(model: PreTrainedModel) -> Iterator[Any]:
    for layer in model.get_submodule("model.layers").children():
        yield layer.get_submodule("mlp.experts")


def check_spreadable(num_experts: int, processes: int, rule: str) -> None:
    """Raise ConfigError for models whose experts cannot be spread.

    Args:
        num_experts: E.
        processes: P, of one group.
        rule: The model's training rule.
    """
    if num_experts < 2 or not rule.startswith("top_k"):
        raise ConfigError(
            f"parallel.experts=all_to_all needs a sparse model, but this one has model.num_experts="
            f"{num_experts} and model.training_rule={rule}; give model.training_rule=top_k:1 and "
            "model.inference_rule=top_k:1, or parallel.experts=data"
        )
    if num_experts % processes:
        nearest = max(1, round(num_experts / processes)) * processes
        raise ConfigError(
            f"model.num_experts={num_experts} do not divide among {processes} processes; the "
            f"nearest that works is model.num_experts={nearest}"
        )


def capacity_line(config: Any, tokens: int, factor: float | None, delta: float | None) -> str:
    """Return one line on the capacity of experts, beside LocMoE's lower bound.

    Args:
        config: The model's configuration.
        tokens: Rows that one process sends per MoE layer.
        factor: c_f; None for no limit.
        delta: Least cosine of the bound; None for 1 / sqrt(D).
    """
    experts, width = int(config.num_experts), int(config.hidden_size)
    delta = 1 / math.sqrt(width) if delta is None else delta
    bound = least_capacity(width, experts, delta)
    limit = "no limit" if factor is None else f"{capacity(tokens, experts, factor)} tokens"
    return (
        f"capacity of an expert per process and layer: {limit}; an even share of {tokens} tokens "
        f"is {tokens / experts:.1f}, LocMoE's lower bound {bound:.2f} (with delta "
        f"{delta:.3g})"
    )


def all_to_all_experts(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the chosen experts where they are, as transformers' `ExpertsInterface` requires.

    Args:
        experts: A module of `spread_experts`.
        hidden_states: x_TD.
        top_k_index: ids_TK.
        top_k_weights: weights_TK.

    Returns:
        y_TD, 0 for tokens beyond the capacity of their experts.
    """
    dispatch: Dispatch = experts.dispatch
    assert dispatch.way is not None
    ids_R, weights_R = top_k_index.flatten(), top_k_weights.flatten()
    factor = dispatch.capacity_factor if experts.training else None
    order_R = sent_rows(ids_R, dispatch.num_experts, factor)
    dispatch.counting = experts.training
    if dispatch.counting:
        counts_E = torch.bincount(ids_R[order_R], minlength=dispatch.num_experts)
        dispatch.traffic.counts.append(counts_E)
        dispatch.traffic.dropped += len(ids_R) - len(order_R)
    return combined(
        hidden_states,
        ids_R[order_R],
        order_R // top_k_index.shape[1],
        at_least_float32(weights_R[order_R].unsqueeze(1)),
        num_experts=dispatch.num_experts,
        way=dispatch.way,
        wire=dispatch,
        compute=lambda rows_RD, own_R: _own_experts(experts, rows_RD, own_R, dispatch),
    )


def _own_experts(experts: Any, rows_RD: Tensor, own_R: Tensor, dispatch: Dispatch) -> Tensor:
    """Compute this process's experts for the rows of all processes."""
    ids_R1 = own_R.unsqueeze(1)
    ones_R1 = torch.ones_like(ids_R1, dtype=rows_RD.dtype)
    weights = _local_weights(expert_weights(experts), dispatch.shares, rows_RD.dtype)
    if not len(rows_RD):
        # Its backward pass must exchange gradients too, or others would wait for it.
        return rows_RD + 0 * (weights.w_in_EID.sum() + weights.w_out_EDF.sum())
    return grouped_experts(rows_RD, Routing(ids_R1, ones_R1), weights)


def _local_weights(weights: ExpertWeights, shares: int, dtype: torch.dtype) -> ExpertWeights:
    """Return this process's weights in the dtype of the rows that they multiply.

    Their gradients are means over all parts of a micro-batch, as FSDP's are.
    """

    def local(spread: Any) -> Tensor:
        part = spread.to_local()
        if part.requires_grad:
            part.register_hook(lambda gradient: gradient / shares)
        return part.to(dtype)

    return replace(weights, w_in_EID=local(weights.w_in_EID), w_out_EDF=local(weights.w_out_EDF))
