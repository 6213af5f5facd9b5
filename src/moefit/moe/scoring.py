"""Reproduce a router's choice from its logits, and find by example which rule a router follows.

A `ScoringRule` turns logits into chosen experts and weights, so that the choice can be repeated
over a subset of the experts. `identify` tries the known rules on one recorded example of logits,
chosen experts and weights. Nothing is looked up by family name.

Shapes: T tokens, E experts, K chosen per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.moe.routing import Routing

Score = Literal["softmax", "sigmoid", "sqrt_softplus", "given"]
Weighting = Literal["kept", "normalised", "softmax", "sparsemixer"]
GroupScore = Literal["max", "top_2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Group-limited choice (DeepSeek-V2, V3): only the best `kept` of `number` groups compete."""

    number: int
    kept: int
    score: GroupScore


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRule:
    """From logits to weights.

    - `score` maps logits to scores.
    - The choice is made by these, or `by_logits`; a per-expert bias may be added for it alone.
    - `chosen` says what becomes of the K scores: kept, divided by their sum, a softmax over their
      logits, or SparseMixer's (arXiv 2310.00811): each one's softmax among what no earlier choice
      took and what is within `tolerance` of the best of that.
    - `scale` multiplies the weights (routed scaling factor), and so does `factor_E`, if any.
    - `rounded`: scores are rounded to the logits' dtype, so that in bfloat16 many tie.
    """

    score: Score
    chosen: Weighting
    scale: float = 1.0
    biased: bool = False
    by_logits: bool = False
    groups: Groups | None = None
    tolerance: float = 0.0
    factor_E: Tensor | None = field(default=None, compare=False, repr=False)
    rounded: bool = False

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Scores in float32, whatever the dtype of the logits."""
        scores_TE = self._scores(logits_TE.float())
        return scores_TE.to(logits_TE.dtype).float() if self.rounded else scores_TE

    def _scores(self, logits_TE: Tensor) -> Tensor:
        match self.score:
            case "softmax":
                return logits_TE.softmax(-1)
            case "sigmoid":
                return logits_TE.sigmoid()
            case "sqrt_softplus":
                return F.softplus(logits_TE).sqrt()
            case "given":
                return logits_TE

    def preference(self, logits_TE: Tensor, bias_E: Tensor | None) -> Tensor:
        """What the choice is made by: scores, biased and with lost groups at minus infinity."""
        preferred_TE = logits_TE.float() if self.by_logits else self.scores(logits_TE)
        if self.biased and bias_E is not None:
            preferred_TE = preferred_TE + bias_E.float()
        if self.groups is not None:
            lost_TE = ~_in_kept_groups(preferred_TE, self.groups)
            preferred_TE = preferred_TE.masked_fill(lost_TE, -torch.inf)
        return preferred_TE

    def weights(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """The weights of chosen experts; the padding id E has weight zero."""
        num_experts = logits_TE.shape[-1]
        real_TK = ids_TK < num_experts
        safe_TK = ids_TK.clamp(max=num_experts - 1)
        if self.chosen == "sparsemixer":
            precise_TE = logits_TE if self.rounded else logits_TE.float()
            weights_TK = _sparsemixed(precise_TE, safe_TK, self.tolerance).float() * real_TK
        elif self.chosen == "softmax":
            logits_TK = logits_TE.float().gather(-1, safe_TK).masked_fill(~real_TK, -torch.inf)
            weights_TK = logits_TK.softmax(-1)
        else:
            weights_TK = self.scores(logits_TE).gather(-1, safe_TK) * real_TK
            if self.chosen == "normalised":
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        if self.factor_E is not None:
            weights_TK = weights_TK * self.factor_E.float()[safe_TK]
        return torch.nan_to_num(weights_TK * self.scale)

    def route(
        self,
        logits_TE: Tensor,
        like: Routing,
        bias_E: Tensor | None = None,
        allowed_E: Tensor | None = None,
    ) -> Routing:
        """As many experts for each token as `like` has, the best of the `allowed_E` if given.

        Fewer allowed than wanted is padded with E.

        Restricting happens before the choice and before weights are made ("masked gating",
        SwapMoE section 3), so that a rule that normalises does so over the experts left. A softmax
        over all experts is not taken again over fewer: weights keep the scale that the model was
        trained with. SparseMixer's is: it compares with the best that can still be had.
        """
        preferred_TE = self.preference(logits_TE, bias_E)
        if allowed_E is not None:
            preferred_TE = preferred_TE.masked_fill(~allowed_E, -torch.inf)
            if self.groups is not None:  # all kept groups may be absent: any expert then
                everywhere_TE = self.scores(logits_TE).masked_fill(~allowed_E, -torch.inf)
                lost_T1 = preferred_TE.isneginf().all(-1, keepdim=True)
                preferred_TE = torch.where(lost_T1, everywhere_TE, preferred_TE)
        num_experts, k = logits_TE.shape[-1], like.ids_TK.shape[-1]
        best_TK, ids_TK = preferred_TE.topk(min(k, num_experts), dim=-1)
        count_T1 = (like.ids_TK < num_experts).sum(-1, keepdim=True)
        beyond_TK = torch.arange(ids_TK.shape[-1], device=ids_TK.device) >= count_T1
        ids_TK = ids_TK.masked_fill(beyond_TK | best_TK.isneginf(), num_experts)
        if allowed_E is not None and self.chosen == "sparsemixer":
            logits_TE = logits_TE.masked_fill(~allowed_E, -torch.inf)
        return Routing(ids_TK, self.weights(logits_TE, ids_TK))


def _in_kept_groups(preferred_TE: Tensor, groups: Groups) -> Tensor:
    num_tokens, num_experts = preferred_TE.shape
    grouped_TGE = preferred_TE.view(num_tokens, groups.number, -1)
    if groups.score == "max":
        score_TG = grouped_TGE.amax(-1)
    else:
        score_TG = grouped_TGE.topk(min(2, grouped_TGE.shape[-1]), dim=-1).values.sum(-1)
    kept = score_TG.topk(groups.kept, dim=-1).indices
    mask_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(1, kept, True)
    return mask_TG.unsqueeze(-1).expand_as(grouped_TGE).reshape(num_tokens, num_experts)


def _sparsemixed(logits_TE: Tensor, ids_TK: Tensor, tolerance: float) -> Tensor:
    left_TE, weights = logits_TE, []
    for ids_T1 in ids_TK.split(1, dim=-1):
        best_T1 = left_TE.amax(-1, keepdim=True)
        distance_TE = (best_T1 - logits_TE) / torch.maximum(logits_TE.abs(), best_T1)
        near_TE = left_TE.masked_fill(distance_TE > tolerance, -torch.inf)
        weights.append(near_TE.softmax(-1).gather(-1, ids_T1))
        left_TE = left_TE.scatter(-1, ids_T1, -torch.inf)
    return torch.cat(weights, dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterExample:
    """What a family's router did: its logits, its choice, and per-expert vectors that may matter.

    A vector may be a bias of the choice or a factor of the weights.
    """

    logits_TE: Tensor
    routing: Routing
    vectors: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownForms:
    """What a configuration says of its router: forms that are possible, not that they are used."""

    groups: tuple[Groups, ...] = ()
    tolerances: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentifiedRule:
    """A rule, and which of the example's vectors is its bias (None: none)."""

    rule: ScoringRule
    bias: int | None


def identify(example: RouterExample, known: KnownForms = KnownForms()) -> IdentifiedRule | None:
    """The simplest rule that chooses and weighs as the example does; None if no known rule does."""
    for rule, bias in _candidates(example, known):
        if (matching := _matching(rule, example, bias)) is not None:
            return IdentifiedRule(rule=matching, bias=bias)
    return None


def _candidates(
    example: RouterExample, known: KnownForms
) -> Iterator[tuple[ScoringRule, int | None]]:
    low = example.logits_TE.dtype.itemsize < torch.float32.itemsize
    for rounded in (False, True) if low else (False,):
        for rule, bias in _forms(example, known):
            yield replace(rule, rounded=rounded), bias


def _forms(example: RouterExample, known: KnownForms) -> Iterator[tuple[ScoringRule, int | None]]:
    scores: tuple[Score, ...] = ("softmax", "sigmoid", "sqrt_softplus", "given")
    weighings: tuple[Weighting, ...] = ("kept", "normalised", "softmax")
    vectors = (None, *range(len(example.vectors)))
    forms = product(vectors, vectors, (*known.groups, None), (False, True), scores, weighings)
    for factor, bias, groups, by_logits, score, chosen in forms:
        if (by_logits and bias is None) or (factor is not None and factor == bias):
            continue  # as without; or one vector for two purposes
        rule = ScoringRule(
            score=score,
            chosen=chosen,
            biased=bias is not None,
            by_logits=by_logits,
            groups=groups,
            factor_E=None if factor is None else example.vectors[factor],
        )
        yield rule, bias
    for tolerance in known.tolerances:
        yield ScoringRule(score="given", chosen="sparsemixer", tolerance=tolerance), None


def _matching(rule: ScoringRule, example: RouterExample, bias: int | None) -> ScoringRule | None:
    """The rule with the scale that the example's weights show; None if it doesn't do the same."""
    bias_E = None if bias is None else example.vectors[bias]
    found = rule.route(example.logits_TE, example.routing, bias_E)
    decided_T = _decided(rule, rule.preference(example.logits_TE, bias_E), example.routing)
    theirs = _dense(example.routing, example)[decided_T]
    ours = _dense(found, example)[decided_T]
    if len(ours) < len(decided_T) / 2 or not torch.equal(theirs != 0, ours != 0):
        return None
    scale = float(theirs.sum() / ours.sum().clamp_min(1e-20))
    low = example.routing.weights_TK.dtype in (torch.bfloat16, torch.float16)
    tolerance = 2e-2 if low else 1e-4
    if abs(scale - 1) < tolerance / 10:
        scale = 1.0
    if not torch.allclose(ours * scale, theirs, rtol=tolerance, atol=tolerance * 1e-2):
        return None
    return replace(rule, scale=scale)


def _decided(rule: ScoringRule, preferred_TE: Tensor, routing: Routing) -> Tensor:
    """Which tokens' choice is no matter of a tie, which everyone breaks differently."""
    k = routing.ids_TK.shape[-1]
    best_TK = preferred_TE.topk(min(k + 1, preferred_TE.shape[-1]), dim=-1).values.cpu()
    ahead_TK = best_TK[:, :-1] > best_TK[:, 1:]
    matters = slice(None) if rule.chosen == "sparsemixer" else slice(k - 1, k)  # is order weighed?
    return ahead_TK[:, matters].all(-1)


def _dense(routing: Routing, example: RouterExample) -> Tensor:
    """Weights by expert [T, E]."""
    num_tokens, num_experts = example.logits_TE.shape
    weights_TE1 = torch.zeros(num_tokens, num_experts + 1)
    ids_TK = routing.ids_TK.cpu().clamp(max=num_experts)
    weights_TE1.scatter_add_(1, ids_TK, routing.weights_TK.float().cpu())
    return weights_TE1[:, :num_experts]
