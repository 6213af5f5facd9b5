"""Losses of language model and routers, and the router statistics that are logged.

Shapes: T tokens, E experts, B sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.moe.routing import Rule, active_experts


def entropies(logits_TE: Tensor, real_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return H(e) of the mean routing and the mean of H(e|x) in nats (DS-MoE eq. 5-6).

    Args:
        logits_TE: Router logits.
        real_T: False for padding tokens, which do not count; None if there are none.

    Returns:
        Two differentiable scalars.
    """
    if real_T is not None:
        logits_TE = logits_TE[real_T]
    log_p_TE = F.log_softmax(logits_TE.float(), dim=-1)
    p_TE = log_p_TE.exp()
    count = max(1, p_TE.shape[0])  # a batch of padding alone has entropy 0, not NaN
    conditional = -(p_TE * log_p_TE).sum() / count
    p_E = p_TE.sum(0) / count
    # Clamping keeps 0 * log 0 at 0 and its gradient finite.
    marginal = -(p_E * p_E.clamp_min(torch.finfo(p_E.dtype).tiny).log()).sum()
    return marginal, conditional


def mutual_information_loss(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Return -H(e) + mean H(e|x) = -I(x; e), between -ln E and 0 (DS-MoE eq. 4)."""
    marginal, conditional = entropies(logits_TE, real_T)
    return conditional - marginal


def load_balancing_loss(logits_TE: Tensor, k: int, real_T: Tensor | None = None) -> Tensor:
    """Return Switch Transformer's E * sum_i f_i P_i (arXiv 2101.03961, eq. 4-6).

    f counts the top-k choices; the loss is k if f and P are uniform.
    """
    if real_T is not None:
        logits_TE = logits_TE[real_T]
    p_TE = logits_TE.float().softmax(-1)
    chosen_TK = p_TE.topk(k, dim=-1).indices
    num_experts = p_TE.shape[-1]
    count = max(1, p_TE.shape[0])
    f_E = torch.bincount(chosen_TK.flatten(), minlength=num_experts) / count
    return num_experts * (f_E * p_TE.sum(0) / count).sum()


def z_loss(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Return the mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    if real_T is not None:
        logits_TE = logits_TE[real_T]
    return logits_TE.float().logsumexp(-1).square().sum() / max(1, logits_TE.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLossWeights:
    """Weights of the router losses; zero disables a loss.

    Attributes:
        mlp_mi: alpha of the DS-MoE paper for MLP routers.
        attention_mi: The same for attention routers.
        load_balancing: For MLP routers.
        z: For MLP routers.
        k: Experts that load balancing counts as chosen.
    """

    mlp_mi: float = 0.0
    attention_mi: float = 0.0
    load_balancing: float = 0.0
    z: float = 0.0
    k: int = 1


def language_model_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean next-token cross-entropy in nats; labels of -100 are ignored."""
    logits_RV = logits_BTV[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits_RV.float(), labels_BT[:, 1:].flatten())


def router_loss(
    mlp_logits: Sequence[Tensor],
    attention_logits: Sequence[Tensor],
    weights: RouterLossWeights,
    real_T: Tensor | None = None,
    mi_scale: Tensor | float = 1.0,
) -> Tensor:
    """Return the weighted sum of the router losses of all layers; zero without routers.

    Args:
        mlp_logits: [.., E] by layer.
        attention_logits: [.., E] by layer.
        weights: Weights of the losses.
        real_T: False for padding tokens, in the order of the logits; None if there are none.
        mi_scale: Factor on both MI weights.
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


def router_statistics(logits: Sequence[Tensor], epsilon: float) -> dict[str, float]:
    """Return statistics of one batch, averaged over layers; empty without routers.

    - `h_e`, `h_e_given_x`: entropies H(e) and H(e|x) divided by ln E; 1 is uniform.
    - `mi`: their difference, I(x; e) / ln E.
    - `active`: fraction of experts with E * S > epsilon.
    - `dead`: fraction of experts whose mean score is below a tenth of 1 / E.

    Args:
        logits: Router logits [.., E] by layer.
        epsilon: Threshold of `active`.
    """
    if not logits:
        return {}
    rows = [_layer_statistics(layer.detach().flatten(0, -2), epsilon) for layer in logits]
    names = ("h_e", "h_e_given_x", "mi", "active", "dead")
    return dict(zip(names, torch.stack(rows).mean(0).tolist(), strict=True))


def _layer_statistics(logits_TE: Tensor, epsilon: float) -> Tensor:
    num_experts = logits_TE.shape[-1]
    scale = torch.log(torch.tensor(float(num_experts), device=logits_TE.device))
    marginal, conditional = (h / scale for h in entropies(logits_TE))
    scores_TE = logits_TE.float().softmax(-1)
    active = active_experts(scores_TE, Rule(kind="threshold", epsilon=epsilon)).float().mean()
    dead = (scores_TE.mean(0) < 0.1 / num_experts).float().mean()
    return torch.stack([marginal, conditional, marginal - conditional, active, dead])
