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

from moefit.moe.routing import Routing, at_least_float32


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Stacked matrices in transformers' layout: w_in_EID [E, I, D], w_out_EDF [E, D, F]."""

    w_in_EID: Tensor
    w_out_EDF: Tensor
    activation: Callable[[Tensor], Tensor]
    gated: bool

    def activate(self, h_I: Tensor) -> Tensor:
        """Return act(h), or act(gate) * up for gated experts; [..., I] -> [..., F]."""
        if not self.gated:
            return self.activation(h_I)
        gate_F, up_F = h_I.chunk(2, dim=-1)
        return self.activation(gate_F) * up_F


def expert_weights(module: Any) -> ExpertWeights:
    """Return the weights of a module decorated with transformers' `use_experts_implementation`.

    Transposed or interleaved matrices and biases are not supported here;
    `dsmoe/dense_experts.py` rejects them.
    """
    return ExpertWeights(
        w_in_EID=module.gate_up_proj if module.has_gate else module.up_proj,
        w_out_EDF=module.down_proj,
        activation=module.act_fn,
        gated=module.has_gate,
    )


def wide_experts(x_TD: Tensor, scores_TE: Tensor | None, weights: ExpertWeights) -> Tensor:
    """Compute all experts as one MLP of width E * F.

    The score of an expert multiplies its hidden units between activation and down projection,
    which equals summing score * output because the down projection is linear and has no bias
    (DenseMoE of IBM/dolomite-engine, DS-MoE section 3.2). Outputs per expert are never stored.

    Args:
        x_TD: Inputs.
        scores_TE: Weights of the experts; None for all ones, a plain MLP.
        weights: The experts' matrices.

    Returns:
        Outputs [T, D].
    """
    num_experts, rows, width = weights.w_in_EID.shape
    h_TEI = F.linear(x_TD, weights.w_in_EID.view(num_experts * rows, width))
    h_TEF = weights.activate(h_TEI.view(-1, num_experts, rows))
    if scores_TE is not None:
        h_TEF = h_TEF * scores_TE.to(h_TEF.dtype).unsqueeze(-1)
    w_out_DEF = weights.w_out_EDF.transpose(0, 1)
    return F.linear(h_TEF.flatten(1), w_out_DEF.flatten(1))


def grouped_experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Compute only the selected experts, each over all of its tokens at once; return [T, D].

    Weighted outputs are summed in float32, or in float64 for such inputs.
    """
    num_experts = weights.w_in_EID.shape[0]
    ids_R = routing.ids_TK.flatten()
    counts_E = torch.bincount(ids_R, minlength=num_experts + 1)[:num_experts].tolist()
    routed = sum(counts_E)  # padding ids are sorted to the end and dropped
    order_R = ids_R.argsort(stable=True)[:routed]
    token_R = order_R // routing.ids_TK.shape[1]
    weight_R1 = at_least_float32(routing.weights_TK.flatten()[order_R].unsqueeze(1))
    # One gather, one unbind and one scatter need one backward pass over whole tensors each;
    # indexing rows and weights per expert would need E times as many.
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
    if not outputs:
        outputs = [_no_rows(x_TD, weights)]
    y_TD = torch.zeros_like(at_least_float32(x_TD))
    y_TD = y_TD.index_add(0, token_R, at_least_float32(torch.cat(outputs)) * weight_R1)
    return y_TD.to(x_TD.dtype)


def _no_rows(x_TD: Tensor, weights: ExpertWeights) -> Tensor:
    """Return no rows [0, D] that depend on the weights: their gradients are 0, not missing.

    In training by several processes, all must have gradients of the same weights.
    """
    w_in_EID, w_out_EDF = weights.w_in_EID, weights.w_out_EDF
    return x_TD[:0] + w_in_EID[:0].sum() + w_out_EDF[:0].sum()


def scattered_scores(routing: Routing, num_experts: int) -> Tensor:
    """Return the weights of a routing as [T, E], 0 for experts not selected; differentiable."""
    num_tokens = routing.ids_TK.shape[0]
    scores_TE1 = routing.weights_TK.new_zeros(num_tokens, num_experts + 1)
    return scores_TE1.scatter_add(1, routing.ids_TK, routing.weights_TK)[:, :num_experts]


def reference_experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Return y[t] = sum over k of weight[t, k] * expert[id[t, k]](x[t]); skip the id E."""
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
