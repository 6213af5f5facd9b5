"""What training minimises: next-token cross-entropy plus the weighted router losses.

Owns how losses of single routers add up to one number: summed over layers, one weight per kind.
The same code serves our own model and transformers' OLMoE class. Knows nothing of either.

Shapes: B sequences, T tokens, V vocabulary, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.dsmoe.losses import load_balancing_loss, mutual_information_loss, z_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLossWeights:
    """Weights of the router losses; zero switches a loss off.

    `mlp_mi` and `attention_mi` are the paper's alpha. `load_balancing` and `z` act on the MLP
    routers; `k` is the number of experts that load balancing counts as chosen.
    """

    mlp_mi: float = 0.0
    attention_mi: float = 0.0
    load_balancing: float = 0.0
    z: float = 0.0
    k: int = 1


def language_model_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats; a label of -100 is not predicted."""
    logits_RV = logits_BTV[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits_RV.float(), labels_BT[:, 1:].flatten())


def router_loss(
    mlp_logits: Sequence[Tensor],
    attention_logits: Sequence[Tensor],
    weights: RouterLossWeights,
    real_T: Tensor | None = None,
    mi_scale: Tensor | float = 1.0,
) -> Tensor:
    """The weighted router losses of all layers, a scalar; zero without routers.

    mlp_logits, attention_logits: one [.., E] per layer, tokens in the order of real_T, which is
    False where a token is padding. mi_scale multiplies both MI weights (a schedule's business).
    """
    total = torch.zeros((), device=mlp_logits[0].device if mlp_logits else None)
    for logits in mlp_logits:
        logits_TE = logits.flatten(0, -2)
        if weights.mlp_mi:
            total = total + weights.mlp_mi * mi_scale * mutual_information_loss(logits_TE, real_T)
        if weights.load_balancing:
            balance = load_balancing_loss(logits_TE, weights.k, real_T)
            total = total + weights.load_balancing * balance
        if weights.z:
            total = total + weights.z * z_loss(logits_TE, real_T)
    if weights.attention_mi:
        for logits in attention_logits:
            loss = mutual_information_loss(logits.flatten(0, -2), real_T)
            total = total + weights.attention_mi * mi_scale * loss
    return total
