"""What the routers are doing, as a few numbers.

Owns the statistics that a training log carries, however many layers and experts there are. Knows
nothing of training.

Shapes: T tokens, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moefit.dsmoe.losses import entropies
from moefit.moe.routing import Rule, active_experts


def router_state(logits: Sequence[Tensor], epsilon: float) -> dict[str, float]:
    """Means over layers of the routers' statistics on one batch; empty without routers.

    - `h_e`, `h_e_given_x`: entropies H(e) and H(e|x) divided by ln E: 1 is uniform.
    - `mi`: their difference, I(x; e) / ln E: 1 is balanced and decided.
    - `active`: share of experts with E * S > epsilon.
    - `dead`: share of experts whose mean score is below a tenth of the uniform 1 / E.
    """
    if not logits:
        return {}
    rows = torch.stack([_one(layer.detach().flatten(0, -2), epsilon) for layer in logits])
    names = ("h_e", "h_e_given_x", "mi", "active", "dead")
    return dict(zip(names, rows.mean(0).tolist(), strict=True))


def _one(logits_TE: Tensor, epsilon: float) -> Tensor:
    num_experts = logits_TE.shape[-1]
    scale = torch.log(torch.tensor(float(num_experts), device=logits_TE.device))
    marginal, conditional = (h / scale for h in entropies(logits_TE))
    scores_TE = logits_TE.float().softmax(-1)
    active = active_experts(scores_TE, Rule(kind="threshold", epsilon=epsilon)).float().mean()
    dead = (scores_TE.mean(0) < 0.1 / num_experts).float().mean()
    return torch.stack([marginal, conditional, marginal - conditional, active, dead])
