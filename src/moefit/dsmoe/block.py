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

from moefit.dsmoe.config import PREVIOUS_AND_EMBEDDING, DsMoeConfig
from moefit.dsmoe.previous_token import Shift
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

EMBEDDING_WIDTH = 8  # hidden units per expert of what a router makes of the embedding


class DsMoeRouter(nn.Module):
    """A linear or two-layer router, computed in float32.

    In bfloat16 the choice between experts with similar logits would depend on the kernel.

    Args:
        config: The model's.
        num_experts: That it chooses among.
        embedding: Whether it also sees the embedding of the token, in passes with a shift: through
            two layers, since what token is there decides by which experts, and a linear map of the
            embedding does not tell tokens apart well enough.
        biased: Whether it has a bias that is added to scores for the choice alone.
    """

    e_score_correction_bias: Tensor | None
    load_E: Tensor | None
    """Choices of each expert in training, since whoever moves the bias has set it to 0."""

    def __init__(
        self,
        config: DsMoeConfig,
        num_experts: int,
        *,
        embedding: bool = False,
        biased: bool = False,
    ):
        super().__init__()
        self._add_bias(num_experts, biased=biased)
        hidden = config.router_hidden_size
        width = config.hidden_size if hidden is None else hidden
        self.hidden = None if hidden is None else nn.Linear(config.hidden_size, hidden)
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.embedding_weight = None
        if embedding:
            wide = EMBEDDING_WIDTH * num_experts
            self.embedding_up = nn.Parameter(torch.empty(wide, config.hidden_size))
            self.embedding_bias = nn.Parameter(torch.empty(wide))
            self.embedding_weight = nn.Parameter(torch.empty(num_experts, wide))

    def _add_bias(self, num_experts: int, *, biased: bool) -> None:
        names = {"e_score_correction_bias": True, "load_E": False}  # and whether it is saved
        for name, saved in names.items():
            zeros_E = torch.zeros(num_experts) if biased else None
            self.register_buffer(name, zeros_E, persistent=saved)

    def count(self, ids_TK: Tensor) -> None:
        """Count the choices of a pass in training, if there is a bias; E is no expert."""
        if self.training and self.load_E is not None:
            ids_R = ids_TK.flatten()
            ones_R = (ids_R < len(self.load_E)).to(self.load_E.dtype)
            self.load_E.scatter_add_(0, ids_R.clamp_max(len(self.load_E) - 1), ones_R)

    def forward(self, x_TD: Tensor, *, shift: Shift | None = None) -> Tensor:
        """Return logits [.., E] for x [.., D].

        Args:
            x_TD: What is routed.
            shift: From tokens' own logits [B, T, E] to those by which they are routed, which are
                then returned as [B * T, E]; None for their own.
        """
        logits_TE = self.logits(x_TD)
        if shift is None:
            return logits_TE
        logits_BTE = shift(logits_TE)
        if self.embedding_weight is not None:
            logits_BTE = logits_BTE + self.logits_of_embedding(shift.embedding_BTD)
        return logits_BTE.flatten(0, 1)

    def logits_of_embedding(self, embedding_TD: Tensor) -> Tensor:
        """Return what tokens' normed embeddings [.., D] add to their logits [.., E].

        Only routers that see the embedding have weights for it.
        """
        assert self.embedding_weight is not None
        with torch.autocast(device_type=embedding_TD.device.type, enabled=False):
            up, bias = map(at_least_float32, (self.embedding_up, self.embedding_bias))
            hidden = F.gelu(F.linear(at_least_float32(embedding_TD), up, bias))
            return F.linear(hidden, at_least_float32(self.embedding_weight))

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return each token's own logits [.., E]."""
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
        self._add_bias(config.num_experts, biased=config.score_correction_bias)
        self.num_experts = config.num_experts
        self.embedding_weight = None

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return each token's own logits [.., E]."""
        return grouped_average_pooling(at_least_float32(x_TD), self.num_experts)


class HashRouter(DsMoeRouter):
    """A router without weights whose `shift` knows the token ids, which alone decide."""

    def __init__(self, config: DsMoeConfig):
        nn.Module.__init__(self)
        self._add_bias(config.num_experts, biased=False)
        self.num_experts = config.num_experts
        self.embedding_weight = None

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return zeros [.., E]: of a hidden state it knows nothing."""
        return x_TD.new_zeros((*x_TD.shape[:-1], self.num_experts), dtype=torch.float32)


def _mlp_router(config: DsMoeConfig) -> DsMoeRouter | None:
    if config.num_experts == 1:
        return None
    if config.router_type == "grap":
        return GrapRouter(config)
    if config.router_type == "hash":
        return HashRouter(config)
    return DsMoeRouter(
        config,
        config.num_experts,
        embedding=config.pregated == PREVIOUS_AND_EMBEDDING,
        biased=config.score_correction_bias,
    )


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
        shift: Shift | None = None,
    ) -> Tensor:
        """Compute the block.

        Args:
            x_BTD: Hidden states.
            rule: Which experts are used.
            real_T: False for padding tokens; None if there are none.
            allowed_BE: False for experts that a sequence may not use; None to allow all.
            gate_BTD: What the router is given; None for the hidden states.
            shift: From a token's own logits to those by which it is routed; None for its own.

        Returns:
            Output [B, T, D].
        """
        x_TD = x_BTD.flatten(0, 1)
        if self.gate is None:
            ids_TK = x_TD.new_zeros((x_TD.shape[0], 1), dtype=torch.long)
            routing = Routing(ids_TK, x_TD.new_ones((x_TD.shape[0], 1)))
        elif allowed_BE is not None:
            allowed_TE = allowed_BE.repeat_interleave(x_BTD.shape[1], dim=0)
            logits_TE = self._logits(self.gate, x_BTD if gate_BTD is None else gate_BTD, shift)
            bias_E = self.gate.e_score_correction_bias
            routing = route_allowed(logits_TE, allowed_TE, rule, real_T, bias_E)
            routing = Routing(routing.ids_TK, routing.weights_TK * self.scale)
            self.gate.count(routing.ids_TK)
        else:
            logits_TE = self._logits(self.gate, x_BTD if gate_BTD is None else gate_BTD, shift)
            scores_TE = logits_TE.softmax(-1)
            if self.training and rule.kind == "threshold":
                # A shape that depends on scores would break torch.compile's graph in training.
                routing = masked_route(scores_TE, rule, real_T)
            else:
                routing = route(scores_TE, rule, real_T, self.gate.e_score_correction_bias)
                self.gate.count(routing.ids_TK)
            routing = Routing(routing.ids_TK, routing.weights_TK * self.scale)
        return self.experts(x_TD, routing.ids_TK, routing.weights_TK).view_as(x_BTD)

    @staticmethod
    def _logits(gate: DsMoeRouter, x_BTD: Tensor, shift: Shift | None) -> Tensor:
        """Return the logits by which tokens are routed [B * T, E]."""
        if shift is None:
            return gate(x_BTD.flatten(0, 1))
        return gate(x_BTD, shift=shift)
