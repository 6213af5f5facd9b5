"""The mathematics of LocMoE (arXiv 2401.13920): a router without weights, capacity, locality loss.

Shapes: T tokens, D model width, E experts.
"""

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

OTHER_NODES = 1e-3
"""Probability mass of all experts of other machines in the localised distribution, above 0 so that
its logarithm is finite. The paper leaves it open."""


def grouped_average_pooling(x_TD: Tensor, num_experts: int) -> Tensor:
    """Return the logits [.., E] of the GrAP router: means of E slices of a token, not below 0.

    LocMoE eq. 2-4, with a bias of 0. The rows of the gate that this stands for are orthogonal.

    Args:
        x_TD: Tokens [.., D]; E divides D.
        num_experts: E.

    >>> grouped_average_pooling(torch.tensor([[1.0, 3.0, -4.0, 2.0]]), 2)
    tensor([[2., 0.]])
    """
    return x_TD.unflatten(-1, (num_experts, -1)).mean(-1).relu()


def capacity(tokens: int, num_experts: int, factor: float) -> int:
    """Return the most tokens that one process sends to one expert: ceil(T c_f / E).

    >>> capacity(tokens=100, num_experts=16, factor=1.25)
    8
    >>> capacity(tokens=100, num_experts=10, factor=1.1)  # 12 in floating point
    11
    """
    exact = Fraction(factor).limit_denominator(10**6)
    return math.ceil(tokens * exact / num_experts)


def least_capacity(width: int, num_experts: int, delta: float | None = None) -> float:
    """Return LocMoE's lower bound of the capacity, 1 / (E p) (theorem 1), in tokens.

    p is the probability that a random direction has a cosine of at least delta, in magnitude, with
    the row of an expert: the tokens that carry its class. On average the bound lets one of them
    reach the expert; training needs far more, see `capacity`.

    Args:
        width: D.
        num_experts: E.
        delta: Least cosine; by default 1 / sqrt(D), the standard deviation of random directions.

    >>> round(least_capacity(5120, 16), 2)
    0.2
    >>> round(least_capacity(5120, 16, delta=0.03), 2)
    1.96
    """
    delta = 1 / math.sqrt(width) if delta is None else delta
    # 1 - I_{delta^2}(1/2, (D - 1)/2), the regularised incomplete beta function, by integrating the
    # density (1 - t^2)^((D - 3)/2) of a cosine t.
    nodes, weights = np.polynomial.legendre.leggauss(64)
    t = delta * (nodes + 1) / 2
    log_beta = math.lgamma(0.5) + math.lgamma((width - 1) / 2) - math.lgamma(width / 2)
    density = np.exp((width - 3) / 2 * np.log1p(-(t**2)) - log_beta)
    probability = 1 - delta * float(weights @ density)
    return 1 / (num_experts * probability)


def of_best_machines(logits_TE: Tensor, machines: int, most: int, k: int) -> Tensor:
    """Return True for experts of the machines that node-limited routing lets a token use.

    Those with the largest sums of their k / most largest scores, rounded up (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2).

    Args:
        logits_TE: Router logits [.., E] of experts in the order of machines.
        machines: Of which each has an equal number of experts.
        most: Machines that a token may use.
        k: Experts that it chooses.

    >>> of_best_machines(torch.tensor([[3.0, 0.0, 2.0, 2.0]]), machines=2, most=1, k=1)
    tensor([[ True,  True, False, False]])
    """
    scores_TNE = logits_TE.float().softmax(-1).unflatten(-1, (machines, -1))
    counted = min(math.ceil(k / most), scores_TNE.shape[-1])
    sums_TN = scores_TNE.topk(counted, dim=-1).values.sum(-1)
    best_TM = sums_TN.topk(most, dim=-1).indices
    kept_TN = torch.zeros_like(sums_TN, dtype=torch.bool).scatter(-1, best_TM, True)
    return kept_TN.repeat_interleave(scores_TNE.shape[-1], dim=-1)


def localised(own_E: Tensor) -> Tensor:
    """Return D_l: uniform over the experts of the own machine, and almost nothing elsewhere.

    Args:
        own_E: True for experts of the own machine; some, but not all.
    """
    own, others = own_E.sum(), (~own_E).sum()
    return torch.where(own_E, (1 - OTHER_NODES) / own, OTHER_NODES / others)


def locality_loss(logits_TE: Tensor, own_E: Tensor) -> Tensor:
    """Return KL(P || D_l) in nats (LocMoE eq. 6), 0 if all tokens stay on their machine.

    P is the mean routing probability of the tokens: their numbers per expert, which the paper
    writes, have no gradient.

    Args:
        logits_TE: Router logits of tokens of one machine.
        own_E: True for its experts.
    """
    p_E = logits_TE.float().softmax(-1).mean(0)
    tiny = torch.finfo(p_E.dtype).tiny
    return (p_E * (p_E.clamp_min(tiny).log() - localised(own_E).log())).sum()
