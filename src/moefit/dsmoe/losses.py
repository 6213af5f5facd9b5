"""Losses on router logits: the mutual-information loss, and the baselines' balance and z losses.

Owns what is averaged over: p(e) is the mean over the real (unpadded) tokens of one forward pass,
that is of one micro-batch, in one layer, for one router. Nothing is averaged across layers,
accumulation steps or processes. Knows nothing of models.

Shapes: T tokens, E experts, K chosen per token.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def entropies(logits_TE: Tensor, real_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """H(e) of the mean routing and the mean of H(e|x), in nats; both differentiable scalars.

    DS-MoE eq. 5-6. Padding (real_T False) counts neither in the sums nor in the divisor.
    """
    if real_T is not None:
        logits_TE = logits_TE[real_T]
    log_p_TE = F.log_softmax(logits_TE.float(), dim=-1)
    p_TE = log_p_TE.exp()
    count = max(1, p_TE.shape[0])  # a batch of nothing but padding has no entropy, not NaN
    conditional = -(p_TE * log_p_TE).sum() / count
    p_E = p_TE.sum(0) / count
    # The floor keeps 0 * log 0 at 0 and its gradient finite; it is below float32's smallest p.
    marginal = -(p_E * p_E.clamp_min(torch.finfo(p_E.dtype).tiny).log()).sum()
    return marginal, conditional


def mutual_information_loss(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """L_MI = -H(e) + mean H(e|x) = -I(x; e), between -ln E and 0 (DS-MoE eq. 4)."""
    marginal, conditional = entropies(logits_TE, real_T)
    return conditional - marginal


def load_balancing_loss(logits_TE: Tensor, k: int, real_T: Tensor | None = None) -> Tensor:
    """Switch Transformer's E * sum_i f_i P_i (arXiv 2101.03961, eq. 4-6), f over top-k choices.

    Equals k when both are uniform.
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
    """Mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    if real_T is not None:
        logits_TE = logits_TE[real_T]
    return logits_TE.float().logsumexp(-1).square().sum() / max(1, logits_TE.shape[0])
