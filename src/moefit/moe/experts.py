"""Compute the experts of one MoE block from stacked weights.

`wide_experts` computes all experts as one wide MLP, `grouped_experts` only the chosen ones, grouped
by expert, and `reference_experts` one token and one expert at a time: the slow version that the
others are compared with.

Shapes: T tokens, D model width, E experts, K chosen per token, F expert width, I rows of an
expert's input matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.moe.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Stacked matrices in transformers' layout: w_in_EID [E, I, D], w_out_EDF [E, D, F]."""

    w_in_EID: Tensor
    w_out_EDF: Tensor
    activation: Callable[[Tensor], Tensor]
    gated: bool

    def activate(self, h_I: Tensor) -> Tensor:
        """act(h), or act(gate) * up for gated experts; [.., I] -> [.., F]."""
        if not self.gated:
            return self.activation(h_I)
        gate_F, up_F = h_I.chunk(2, dim=-1)
        return self.activation(gate_F) * up_F


def expert_weights(module: Any) -> ExpertWeights:
    """The weights of a module that transformers' `use_experts_implementation` decorates.

    Its attribute names are that interface's; matrices that are transposed or interleaved, or
    come with biases, aren't looked for here (`dsmoe/dense_experts.py` refuses them).
    """
    return ExpertWeights(
        w_in_EID=module.gate_up_proj if module.has_gate else module.up_proj,
        w_out_EDF=module.down_proj,
        activation=module.act_fn,
        gated=module.has_gate,
    )


def wide_experts(x_TD: Tensor, scores_TE: Tensor | None, weights: ExpertWeights) -> Tensor:
    """All experts as one MLP of width E * F, y_TD.

    The score of an expert multiplies its hidden units between activation and down projection,
    which equals summing score * output because the down projection is linear and without bias
    (IBM/dolomite-engine's DenseMoE, see DS-MoE section 3.2). No per-expert output ever exists.
    scores_TE None means all ones: a plain MLP.
    """
    num_experts, rows, width = weights.w_in_EID.shape
    h_TEI = F.linear(x_TD, weights.w_in_EID.view(num_experts * rows, width))
    h_TEF = weights.activate(h_TEI.view(-1, num_experts, rows))
    if scores_TE is not None:
        h_TEF = h_TEF * scores_TE.to(h_TEF.dtype).unsqueeze(-1)
    w_out_DEF = weights.w_out_EDF.transpose(0, 1)
    return F.linear(h_TEF.flatten(1), w_out_DEF.flatten(1))


def grouped_experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Only the chosen experts, each over all of its tokens at once, y_TD.

    Weighted outputs are added up in float32, whatever the dtype of x_TD.
    """
    num_experts = weights.w_in_EID.shape[0]
    ids_R = routing.ids_TK.flatten()
    counts_E = torch.bincount(ids_R, minlength=num_experts + 1)[:num_experts].tolist()
    routed = sum(counts_E)  # padding ids sort behind all experts and are cut off
    order_R = ids_R.argsort(stable=True)[:routed]
    token_R = order_R // routing.ids_TK.shape[1]
    weight_R1 = routing.weights_TK.flatten()[order_R].unsqueeze(1).float()
    # One gather, one unbind, one scatter: as many backward passes over whole tensors, not E times
    # as many as indexing each expert's rows and weights would take.
    parts = zip(
        x_TD[token_R].split(counts_E),
        weights.w_in_EID.unbind(),
        weights.w_out_EDF.unbind(),
        strict=True,
    )
    outputs = [
        F.linear(weights.activate(F.linear(x_RD, w_in_ID)), w_out_DF)
        for x_RD, w_in_ID, w_out_DF in parts
        if len(x_RD)
    ]
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    if outputs:
        y_TD = y_TD.index_add(0, token_R, torch.cat(outputs).float() * weight_R1)
    return y_TD.to(x_TD.dtype)


def scattered_scores(routing: Routing, num_experts: int) -> Tensor:
    """A routing as scores_TE, zero where an expert was not chosen; differentiable in weights."""
    num_tokens = routing.ids_TK.shape[0]
    scores_TE1 = routing.weights_TK.new_zeros(num_tokens, num_experts + 1)
    return scores_TE1.scatter_add(1, routing.ids_TK, routing.weights_TK)[:, :num_experts]


def reference_experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """y[t] = sum over k of weight[t, k] * expert[id[t, k]](x[t]); the id E is skipped."""
    num_experts = weights.w_in_EID.shape[0]
    rows = []
    for x_D, ids_K, weights_K in zip(x_TD, routing.ids_TK, routing.weights_TK, strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, weight in zip(ids_K.tolist(), weights_K, strict=True):
            if expert < num_experts:
                hidden_F = weights.activate(weights.w_in_EID[expert] @ x_D)
                y_D = y_D + weight * (weights.w_out_EDF[expert] @ hidden_F)
        rows.append(y_D)
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)
