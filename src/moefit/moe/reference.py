"""The expert sum that anyone can check by eye: one token and one expert at a time.

The judge of every faster way in `experts.py`. Slow on purpose.
"""

import torch
from torch import Tensor

from moefit.moe.experts import ExpertWeights
from moefit.moe.routing import Routing


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
