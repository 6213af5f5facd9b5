"""Losses of language model and routers, and the router statistics that are logged.

Shapes: T tokens, E experts, B sequences, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.moe.routing import Rule, active_experts, at_least_float32


def identity(sums: Tensor) -> Tensor:
    """Return the sums of one process, which are those of the whole batch."""
    return sums


Total = Callable[[Tensor], Tensor]
"""Adds a tensor of sums over all processes that share a batch; differentiable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSums:
    """Sums over tokens of what the losses of one router depend on.

    A loss of a batch that several processes share is computed from the total of their sums.

    Attributes:
        p_E: Probability of each expert.
        conditional: Entropy of the routing of a token, in nats.
        chosen_E: Whether an expert is among the token's k best; zeros if not asked for.
        square: Squared log-sum-exp of the logits.
        count: Number of tokens.
    """

    p_E: Tensor
    conditional: Tensor
    chosen_E: Tensor
    square: Tensor
    count: Tensor

    @classmethod
    def of(cls, logits_TE: Tensor, real_T: Tensor | None = None, k: int = 0) -> "RouterSums":
        """Return the sums over the real tokens of a batch; k is of `chosen_E`."""
        if real_T is not None:
            logits_TE = logits_TE[real_T]
        logits_TE = at_least_float32(logits_TE)
        log_p_TE = F.log_softmax(logits_TE, dim=-1)
        p_TE = log_p_TE.exp()
        experts = p_TE.shape[-1]
        chosen = p_TE.topk(k, dim=-1).indices.flatten()
        return cls(
            p_E=p_TE.sum(0),
            conditional=-(p_TE * log_p_TE).sum(),
            # Not bincount, at which torch.compile divides the graph.
            chosen_E=p_TE.new_zeros(experts).scatter_add(
                0, chosen, torch.ones_like(chosen, dtype=p_TE.dtype)
            ),
            square=logits_TE.logsumexp(-1).square().sum(),
            count=p_TE.new_tensor(float(p_TE.shape[0])),
        )

    def flat(self) -> Tensor:
        """Return all sums as one vector [2 E + 3]."""
        rest = torch.stack([self.conditional, self.square, self.count])
        return torch.cat([self.p_E, self.chosen_E, rest])

    @classmethod
    def unflat(cls, sums: Tensor) -> "RouterSums":
        """Return the sums of a vector that `flat` made."""
        num_experts = (len(sums) - 3) // 2
        p_E, chosen_E, rest = sums.split([num_experts, num_experts, 3])
        conditional, square, count = rest.unbind()
        return cls(
            p_E=p_E, conditional=conditional, chosen_E=chosen_E.detach(), square=square,
            count=count.detach(),
        )  # fmt: skip

    @property
    def tokens(self) -> Tensor:
        """The divisor of means: a batch of padding alone has entropy 0, not NaN."""
        return self.count.clamp_min(1)

    def entropies(self) -> tuple[Tensor, Tensor]:
        """Return H(e) of the mean routing and the mean of H(e|x) in nats (DS-MoE eq. 5-6)."""
        p_E = self.p_E / self.tokens
        # Clamping keeps 0 * log 0 at 0 and its gradient finite.
        marginal = -(p_E * p_E.clamp_min(torch.finfo(p_E.dtype).tiny).log()).sum()
        return marginal, self.conditional / self.tokens

    def mutual_information_loss(self) -> Tensor:
        """Return -H(e) + mean H(e|x) (DS-MoE eq. 4)."""
        marginal, conditional = self.entropies()
        return conditional - marginal

    def load_balancing_loss(self) -> Tensor:
        """Return E * sum_i f_i P_i (Switch Transformer, arXiv 2101.03961, eq. 4-6)."""
        f_E = self.chosen_E / self.tokens
        return len(f_E) * (f_E * self.p_E / self.tokens).sum()

    def z_loss(self) -> Tensor:
        """Return the mean squared log-sum-exp (ST-MoE, arXiv 2202.08906, eq. 5)."""
        return self.square / self.tokens


def entropies(logits_TE: Tensor, real_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return H(e) of the mean routing and the mean of H(e|x) in nats (DS-MoE eq. 5-6).

    Args:
        logits_TE: Router logits.
        real_T: False for padding tokens, which do not count; None if there are none.

    Returns:
        Two differentiable scalars.
    """
    return RouterSums.of(logits_TE, real_T).entropies()


def mutual_information_loss(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Return -H(e) + mean H(e|x) = -I(x; e), between -ln E and 0 (DS-MoE eq. 4)."""
    return RouterSums.of(logits_TE, real_T).mutual_information_loss()


def load_balancing_loss(logits_TE: Tensor, k: int, real_T: Tensor | None = None) -> Tensor:
    """Return Switch Transformer's E * sum_i f_i P_i (arXiv 2101.03961, eq. 4-6).

    f counts the top-k choices; the loss is k if f and P are uniform.
    """
    return RouterSums.of(logits_TE, real_T, k).load_balancing_loss()


def z_loss(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Return the mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return RouterSums.of(logits_TE, real_T).z_loss()


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
    return F.cross_entropy(at_least_float32(logits_RV), labels_BT[:, 1:].flatten())


def router_loss(
    mlp_logits: Sequence[Tensor],
    attention_logits: Sequence[Tensor],
    weights: RouterLossWeights,
    real_T: Tensor | None = None,
    mi_scale: Tensor | float = 1.0,
    total: Total = identity,
) -> Tensor:
    """Return the weighted sum of the router losses of all layers; zero without routers.

    Args:
        mlp_logits: [.., E] by layer.
        attention_logits: [.., E] by layer.
        weights: Weights of the losses.
        real_T: False for padding tokens, in the order of the logits; None if there are none.
        mi_scale: Factor on both MI weights.
        total: Called once, with the sums of all routers of this process.
    """
    loss = torch.zeros((), device=mlp_logits[0].device if mlp_logits else None)
    needs_mlp = weights.mlp_mi or weights.load_balancing or weights.z
    k = weights.k if weights.load_balancing else 0
    mlp = [RouterSums.of(x.flatten(0, -2), real_T, k) for x in mlp_logits if needs_mlp]
    attention = [
        RouterSums.of(x.flatten(0, -2), real_T) for x in attention_logits if weights.attention_mi
    ]
    if not mlp and not attention:
        return loss
    vectors = [sums.flat() for sums in (*mlp, *attention)]
    parts = total(torch.cat(vectors)).split([len(vector) for vector in vectors])
    for index, part in enumerate(parts):
        sums = RouterSums.unflat(part)
        if index >= len(mlp):
            loss = loss + weights.attention_mi * mi_scale * sums.mutual_information_loss()
            continue
        if weights.mlp_mi:
            loss = loss + weights.mlp_mi * mi_scale * sums.mutual_information_loss()
        if weights.load_balancing:
            loss = loss + weights.load_balancing * sums.load_balancing_loss()
        if weights.z:
            loss = loss + weights.z * sums.z_loss()
    return loss


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
