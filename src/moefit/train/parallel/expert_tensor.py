"""Divide the experts of every layer among processes that see the same tokens.

The natural layout of dense training: each process of a group computes its part of the experts for
all tokens of the group, and one all-reduce per layer adds the outputs (tensor parallelism over the
experts' axis). No token travels. Implemented as an experts implementation of transformers, so the
model has no code of its own.

Shapes: T tokens of a group, D model width, E experts, K chosen per token, P processes of a group.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from moefit.dsmoe.block import compute_experts
from moefit.errors import ConfigError
from moefit.moe.experts import expert_weights
from moefit.moe.routing import Routing
from moefit.train.parallel.clock import Clock

EXPERT_TENSOR = "moefit_expert_tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTensor:
    """A group of processes that share the experts of every layer.

    Attributes:
        mesh: One dimension: the group.
        clock: Measures all-reduces.
    """

    mesh: DeviceMesh
    clock: Clock

    def total(self, parts: Tensor) -> Tensor:
        """Return the sum over the group."""
        group = self.mesh.get_group()
        if torch.compiler.is_compiling():  # a compiled function cannot look at the clock
            return funcol.wait_tensor(funcol.all_reduce(parts, "sum", group))
        total = parts.contiguous().clone()
        with self.clock.running():
            dist.all_reduce(total, group=group)
        return total

    def equalise(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients outside the experts by their mean over the group; in place.

        All processes of the group compute them, and would drift apart if they rounded differently.

        Args:
            parameters: Those that have gradients.
        """
        parts = [
            _local(p.grad)
            for p in parameters
            if "tensor" not in (cast(DTensor, p).device_mesh.mesh_dim_names or ())
        ]
        if not parts:
            return
        means = self.total(torch.cat([part.flatten() for part in parts])) / self.mesh.size()
        for part, mean in zip(parts, means.split([part.numel() for part in parts]), strict=True):
            part.copy_(mean.view_as(part))


def _local(tensor: Tensor | None) -> Tensor:
    return cast(DTensor, tensor).to_local()


class _Copied(torch.autograd.Function):
    """Give a tensor to all processes of a group, which has it already; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ExpertTensor) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.group.total(gradients[0]), None


class _Summed(torch.autograd.Function):
    """Add the parts of a group; the gradient of the sum is that of each part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ExpertTensor) -> Tensor:
        return group.total(part)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def divide_experts(model: PreTrainedModel, group: ExpertTensor) -> None:
    """Keep this process's part of every layer's experts, before FSDP shards the model.

    Args:
        model: Built alike in every process; its experts are replaced in place.
        group: Processes that share the experts.
    """
    ExpertsInterface.register(EXPERT_TENSOR, experts_of_group)
    for module in _expert_modules(model):
        for name, whole in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(whole.data, group.mesh, [Shard(0)], src_data_rank=None)
            parameter = nn.Parameter(part, requires_grad=whole.requires_grad)
            module.register_parameter(name, parameter)
        module.group = group
    model.set_experts_implementation(EXPERT_TENSOR)


def _expert_modules(model: PreTrainedModel) -> Iterator[Any]:
    for layer in model.get_submodule("model.layers").children():
        yield layer.get_submodule("mlp.experts")


def check_divisible(num_experts: int, processes: int) -> None:
    """Raise ConfigError for models whose experts cannot be divided.

    Args:
        num_experts: E.
        processes: P.
    """
    if num_experts < 2:
        raise ConfigError(
            f"parallel.expert_tensor={processes} divides experts among processes, but the model is "
            f"dense (model.num_experts={num_experts}); give parallel.expert_tensor=1, or "
            f"model.num_experts={processes} or a multiple of it"
        )
    if num_experts % processes:
        fits = max(n for n in range(1, min(num_experts, processes) + 1) if num_experts % n == 0)
        raise ConfigError(
            f"model.num_experts={num_experts} do not divide among the {processes} processes of "
            f"parallel.expert_tensor; the nearest that works is parallel.expert_tensor={fits}"
        )


def experts_of_group(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the chosen experts of all processes, as transformers' `ExpertsInterface` requires.

    Args:
        experts: A module of `divide_experts`.
        hidden_states: x_TD, the same in all processes of the group.
        top_k_index: ids_TK, the same.
        top_k_weights: weights_TK, the same.

    Returns:
        y_TD, the same.
    """
    group: ExpertTensor = experts.group
    weights = expert_weights(experts)
    w_in_EID, w_out_EDF = (
        cast(DTensor, whole).to_local() for whole in (weights.w_in_EID, weights.w_out_EDF)
    )
    own = len(w_in_EID)
    first = group.mesh.get_local_rank() * own
    is_own_TK = (top_k_index >= first) & (top_k_index < first + own)
    ids_TK = (top_k_index - first).where(is_own_TK, own)  # as the id of padding
    routing = Routing(ids_TK, _Copied.apply(top_k_weights, group))
    part_TD = compute_experts(
        _Copied.apply(hidden_states, group),
        routing,
        replace(weights, w_in_EID=w_in_EID, w_out_EDF=w_out_EDF),
        training=experts.training,
        dense=top_k_index.shape[1] == own * group.mesh.size(),
    )
    return _Summed.apply(part_TD, group)
