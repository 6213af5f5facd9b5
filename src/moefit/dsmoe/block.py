"""The MoE block of DS-MoE: a router and its experts.

In training all experts are computed as one wide MLP; at inference tokens are grouped by expert.
Attention, whose heads are experts too, uses the same router class.

Shapes: B sequences, T tokens, D model width, E experts, F expert width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from moefit.dsmoe.config import DsMoeConfig
from moefit.moe.experts import (
    ExpertWeights,
    expert_weights,
    grouped_experts,
    scattered_scores,
    wide_experts,
)
from moefit.moe.locmoe import grouped_average_pooling
from moefit.moe.routing import (
    Routing,
    Rule,
    at_least_float32,
    masked_route,
    route,
    route_allowed,
)


class DsMoeRouter(nn.Module):
    """A linear or two-layer router, computed in float32.

    In bfloat16 the choice between experts with similar logits would depend on the kernel.
    """

    def __init__(self, config: DsMoeConfig, num_experts: int):
        super().__init__()
        hidden = config.router_hidden_size
        width = config.hidden_size if hidden is None else hidden
        self.hidden = None if hidden is None else nn.Linear(config.hidden_size, hidden)
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits [.., E] for x [.., D]."""
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            x_TD = at_least_float32(x_TD)
            if self.hidden is not None:
                weight, bias = map(at_least_float32, (self.hidden.weight, self.hidden.bias))
                x_TD = F.gelu(F.linear(x_TD, weight, bias))
            return F.linear(x_TD, at_least_float32(self.weight))

    def scores(self, x_TD: Tensor) -> Tensor:
        """Return the softmax over all experts [.., E]."""
        return self(x_TD).softmax(-1)


class GrapRouter(DsMoeRouter):
    """LocMoE's router without weights, grouped average pooling, computed in float32."""

    def __init__(self, config: DsMoeConfig):
        nn.Module.__init__(self)
        self.num_experts = config.num_experts

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits [.., E] for x [.., D]."""
        return grouped_average_pooling(at_least_float32(x_TD), self.num_experts)


def _mlp_router(config: DsMoeConfig) -> DsMoeRouter | None:
    if config.num_experts == 1:
        return None
    if config.router_type == "grap":
        return GrapRouter(config)
    return DsMoeRouter(config, config.num_experts)


WIDE_UP_TO = 256  # hidden units of one expert (benchmarks/training_cost.py)


def compute_experts(
    x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, training: bool, dense: bool
) -> Tensor:
    """Compute all experts as one wide MLP if every token uses them, else tokens by expert.

    In training, narrow experts are always computed as one wide MLP, with zero scores for those not
    chosen: one large product takes less time than many small ones.

    Args:
        x_TD: Inputs.
        routing: The chosen experts; the id E is none.
        weights: Of E experts.
        training: Whether the model is trained.
        dense: Whether every token uses all experts.

    Returns:
        Outputs [T, D].
    """
    num_experts, width = weights.w_in_EID.shape[0], weights.w_out_EDF.shape[2]
    if dense or (training and width <= WIDE_UP_TO):
        return wide_experts(x_TD, scattered_scores(routing, num_experts), weights)
    return grouped_experts(x_TD, routing, weights)


def _experts_forward(experts: Any, x_TD: Tensor, routing: Routing) -> Tensor:
    weights = expert_weights(experts)
    num_experts = weights.w_in_EID.shape[0]
    if num_experts == 1:
        return wide_experts(x_TD, None, weights)
    dense = routing.ids_TK.shape[1] == num_experts
    return compute_experts(x_TD, routing, weights, training=experts.training, dense=dense)


@use_experts_implementation
class DsMoeGatedExperts(nn.Module):
    """SwiGLU experts, stacked: gate and up [E, 2F, D], down [E, D, F]."""

    def __init__(self, config: DsMoeConfig):
        super().__init__()
        shape = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(shape[0], 2 * shape[2], shape[1]))
        self.down_proj = nn.Parameter(torch.empty(shape))
        self.act_fn = ACT2FN["silu"]

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs [T, D]."""
        return _experts_forward(self, x_TD, Routing(ids_TK, weights_TK))


@use_experts_implementation(has_gate=False)
class DsMoeExperts(nn.Module):
    """GELU experts of two matrices, as in the paper, stacked: up [E, F, D], down [E, D, F]."""

    def __init__(self, config: DsMoeConfig):
        super().__init__()
        shape = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts = config.num_experts
        self.up_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.down_proj = nn.Parameter(torch.empty(shape))
        self.act_fn = ACT2FN["gelu_pytorch_tanh"]

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs [T, D]."""
        return _experts_forward(self, x_TD, Routing(ids_TK, weights_TK))


class DsMoeBlock(nn.Module):
    """A router with its experts, or a single expert without a router."""

    def __init__(self, config: DsMoeConfig):
        super().__init__()
        self.gate = _mlp_router(config)
        self.scale = config.routed_scaling_factor
        self.experts = (DsMoeGatedExperts if config.mlp_type == "swiglu" else DsMoeExperts)(config)
        # Threshold rules use the padding id, which transformers skips only with this attribute.
        self.experts._is_expert_parallel = True  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        x_BTD: Tensor,
        rule: Rule,
        real_T: Tensor | None,
        allowed_BE: Tensor | None = None,
        gate_BTD: Tensor | None = None,
    ) -> Tensor:
        """Compute the block.

        Args:
            x_BTD: Hidden states.
            rule: Which experts are used.
            real_T: False for padding tokens; None if there are none.
            allowed_BE: False for experts that a sequence may not use; None to allow all.
            gate_BTD: What the router is given; None for the hidden states.

        Returns:
            Output [B, T, D].
        """
        x_TD = x_BTD.flatten(0, 1)
        gate_TD = x_TD if gate_BTD is None else gate_BTD.flatten(0, 1)
        if self.gate is None:
            ids_TK = x_TD.new_zeros((x_TD.shape[0], 1), dtype=torch.long)
            routing = Routing(ids_TK, x_TD.new_ones((x_TD.shape[0], 1)))
        elif allowed_BE is not None:
            allowed_TE = allowed_BE.repeat_interleave(x_BTD.shape[1], dim=0)
            routing = route_allowed(self.gate(gate_TD), allowed_TE, rule, real_T)
            routing = Routing(routing.ids_TK, routing.weights_TK * self.scale)
        else:
            # A shape that depends on scores would break torch.compile's graph in training.
            choose = masked_route if self.training and rule.kind == "threshold" else route
            routing = choose(self.gate.scores(gate_TD), rule, real_T)
            routing = Routing(routing.ids_TK, routing.weights_TK * self.scale)
        return self.experts(x_TD, routing.ids_TK, routing.weights_TK).view_as(x_BTD)
