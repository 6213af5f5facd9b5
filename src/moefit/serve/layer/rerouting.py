"""Change a router's choice towards resident experts, in the bounded and the virtual mode.

Virtual mode masks the router to resident experts (SwapMoE's masked gating). Bounded mode
substitutes absent experts of low weight by resident ones, under a bound on the substituted mass.
Both are functions from the router's logits and choice and the resident experts to a new `Routing`.

Shapes: T tokens, E experts, K chosen per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moefit.moe.routing import Routing
from moefit.moe.scoring import ScoringRule

_EPSILON = 1e-20  # avoids division by zero for tokens without weight
_BOUND_TOLERANCE = 1e-6  # shares that are rounded may sum to slightly more than one


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRouting:
    """A router's choice together with the logits, the bias and the rule it was made with."""

    rule: ScoringRule
    logits_TE: Tensor
    bias_E: Tensor | None
    routing: Routing

    @property
    def k(self) -> int:
        """Return K, the number of experts per token."""
        return self.routing.ids_TK.shape[-1]


def mask_absent(scored: ScoredRouting, resident_E: Tensor) -> Routing:
    """Return each token's K best resident experts (masked gating, SwapMoE section 3).

    Args:
        scored: The router's choice.
        resident_E: True for resident experts.
    """
    routing = scored.rule.route(scored.logits_TE, scored.routing, scored.bias_E, resident_E)
    return _with_router_dtype(routing, scored)


def substitute_absent(
    scored: ScoredRouting, resident_E: Tensor, *, bound: float, protected: int
) -> Routing:
    """Return the router's choice with absent experts of low weight replaced by resident ones.

    Of a token's absent experts the lightest are replaced, as long as their weights together are at
    most `bound` of the token's weight; the others are kept and must be fetched. A substitute is the
    resident expert with the highest score that the token does not use yet. Its weight follows from
    the family's rule.

    Args:
        scored: The router's choice.
        resident_E: True for resident experts.
        bound: Largest share of a token's router weight to substitute, 0 to 1.
        protected: Number of a token's heaviest experts that are never replaced.

    Returns:
        The new routing; `scored.routing` itself if nothing is replaced.
    """
    ids_TK = scored.routing.ids_TK
    num_experts = scored.logits_TE.shape[-1]
    replaced_TK = _replaceable(scored.routing, resident_E, bound=bound, protected=protected)
    if not replaced_TK.any():
        return scored.routing
    available_TE = _exclude(resident_E.expand(len(ids_TK), -1).clone(), ids_TK)
    preferred_TE = scored.rule.preference(scored.logits_TE, scored.bias_E)
    best_TK, candidates_TK = preferred_TE.masked_fill(~available_TE, -torch.inf).topk(
        min(scored.k, num_experts), dim=-1
    )
    order_TK = (replaced_TK.cumsum(-1) - 1).clamp(0, candidates_TK.shape[-1] - 1)
    substitutes_TK = candidates_TK.gather(-1, order_TK)
    found_TK = replaced_TK & ~best_TK.gather(-1, order_TK).isneginf()
    new_ids_TK = torch.where(found_TK, substitutes_TK, ids_TK)
    weights_TK = scored.rule.weights(scored.logits_TE, new_ids_TK)
    return _with_router_dtype(Routing(new_ids_TK, weights_TK), scored)


def rescale_weights(before: Routing, after: Routing) -> Routing:
    """Return `after` with each token's weights scaled to sum to what they did in `before`."""
    total_T1 = after.weights_TK.sum(-1, keepdim=True).clamp_min(_EPSILON)
    scale_T1 = before.weights_TK.sum(-1, keepdim=True) / total_T1
    return Routing(after.ids_TK, after.weights_TK * scale_T1)


def substituted_mass(before: Routing, after: Routing) -> float:
    """Return the share of router weight whose expert is in `before` but not in `after`."""
    kept_TKK = before.ids_TK.unsqueeze(-1) == after.ids_TK.unsqueeze(-2)
    lost_TK = before.weights_TK.float() * ~kept_TKK.any(-1)
    total = float(before.weights_TK.float().sum())
    return float(lost_TK.sum()) / total if total else 0.0


def _replaceable(routing: Routing, resident_E: Tensor, *, bound: float, protected: int) -> Tensor:
    """Return mask_TK, True for choices that may be replaced."""
    weights_TK = routing.weights_TK.float()
    resident_E1 = torch.cat([resident_E, resident_E.new_ones(1)])  # padding is never absent
    absent_TK = ~resident_E1[routing.ids_TK]
    rank_TK = weights_TK.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    candidates_TK = absent_TK & (rank_TK >= protected)
    shares_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(_EPSILON)
    ascending_TK = torch.where(candidates_TK, shares_TK, 0.0).sort(-1)
    within_TK = ascending_TK.values.cumsum(-1) <= bound + _BOUND_TOLERANCE
    light_TK = torch.zeros_like(candidates_TK).scatter(-1, ascending_TK.indices, within_TK)
    return candidates_TK & light_TK


def _exclude(mask_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Return `mask_TE` with False at a token's own experts; padding ids are ignored."""
    num_experts = mask_TE.shape[-1]
    mask_TE1 = torch.cat([mask_TE, mask_TE.new_zeros(len(mask_TE), 1)], dim=-1)
    return mask_TE1.scatter(-1, ids_TK.clamp(max=num_experts), False)[:, :num_experts]


def _with_router_dtype(routing: Routing, scored: ScoredRouting) -> Routing:
    return Routing(routing.ids_TK, routing.weights_TK.to(scored.routing.weights_TK.dtype))
