"""Routing that prefers what is resident: the tensors of the bounded and the virtual mode.

Owns masked gating (virtual) and substitution by live router score under a bound on lost weight
(bounded). Takes a family's rule, its logits and choice, and which experts are
resident; gives a routing. Knows nothing of slots or loads.

Shapes: T tokens, E experts, K chosen per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moefit.moe.routing import Routing
from moefit.moe.scoring import ScoringRule


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRouting:
    """What the family's router computed: its rule, logits, the bias of its choice, its choice."""

    rule: ScoringRule
    logits_TE: Tensor
    bias_E: Tensor | None
    routing: Routing

    @property
    def k(self) -> int:
        """K."""
        return self.routing.ids_TK.shape[-1]


def masked(scored: ScoredRouting, resident_E: Tensor) -> Routing:
    """Virtual mode: the K best residents (SwapMoE's masked gating)."""
    routing = scored.rule.route(scored.logits_TE, scored.routing, scored.bias_E, resident_E)
    return _typed(routing, scored)


def substituted(
    scored: ScoredRouting, resident_E: Tensor, *, bound: float, protected: int
) -> Routing:
    """Bounded mode: absent experts of little weight give way to the best residents left.

    Of each token's choice, the `protected` heaviest always stay. Of the others that are absent,
    the lightest are replaced, as long as their weights together are at most `bound` of the token's
    weight; the rest stay, to be fetched. A substitute is the resident with the highest live score
    that the token doesn't use yet, with that expert's own weight by the family's rule.
    """
    ids_TK = scored.routing.ids_TK
    num_experts = scored.logits_TE.shape[-1]
    lost_TK = _replaceable(scored.routing, resident_E, bound=bound, protected=protected)
    if not lost_TK.any():
        return scored.routing
    free_TE = resident_E.expand(len(ids_TK), -1).clone()
    free_TE = _without(free_TE, ids_TK)
    preferred_TE = scored.rule.preference(scored.logits_TE, scored.bias_E)
    best_TK, candidates_TK = preferred_TE.masked_fill(~free_TE, -torch.inf).topk(
        min(scored.k, num_experts), dim=-1
    )
    order_TK = (lost_TK.cumsum(-1) - 1).clamp(0, candidates_TK.shape[-1] - 1)
    new_TK = candidates_TK.gather(-1, order_TK)
    found_TK = lost_TK & ~best_TK.gather(-1, order_TK).isneginf()
    new_ids_TK = torch.where(found_TK, new_TK, ids_TK)
    return _typed(Routing(new_ids_TK, scored.rule.weights(scored.logits_TE, new_ids_TK)), scored)


def mass_kept(before: Routing, after: Routing) -> Routing:
    """`after` with each token's weights scaled to the sum that they had before."""
    total_T1 = after.weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
    scale_T1 = before.weights_TK.sum(-1, keepdim=True) / total_T1
    return Routing(after.ids_TK, after.weights_TK * scale_T1)


def substituted_mass(before: Routing, after: Routing) -> float:
    """Router weight whose expert is no longer chosen, as a share of all weight."""
    kept_TKK = before.ids_TK.unsqueeze(-1) == after.ids_TK.unsqueeze(-2)
    lost_TK = before.weights_TK.float() * ~kept_TKK.any(-1)
    total = float(before.weights_TK.float().sum())
    return float(lost_TK.sum()) / total if total else 0.0


def _replaceable(routing: Routing, resident_E: Tensor, *, bound: float, protected: int) -> Tensor:
    """Which choices may be given up, mask_TK."""
    weights_TK = routing.weights_TK.float()
    padded_E1 = torch.cat([resident_E, resident_E.new_ones(1)])  # padding is never missing
    absent_TK = ~padded_E1[routing.ids_TK]
    rank_TK = weights_TK.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    open_TK = absent_TK & (rank_TK >= protected)
    shares_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
    light_first_TK = torch.where(open_TK, shares_TK, 0.0).sort(-1)
    within_TK = light_first_TK.values.cumsum(-1) <= bound + 1e-6  # all shares may sum to more
    return open_TK & torch.zeros_like(open_TK).scatter(-1, light_first_TK.indices, within_TK)


def _without(free_TE: Tensor, ids_TK: Tensor) -> Tensor:
    num_experts = free_TE.shape[-1]
    padded_TE1 = torch.cat([free_TE, free_TE.new_zeros(len(free_TE), 1)], dim=-1)
    return padded_TE1.scatter(-1, ids_TK.clamp(max=num_experts), False)[:, :num_experts]


def _typed(routing: Routing, scored: ScoredRouting) -> Routing:
    return Routing(routing.ids_TK, routing.weights_TK.to(scored.routing.weights_TK.dtype))
