"""Select experts from router logits, and identify the rule that a given router uses.

A `ScoringRule` maps logits to selected experts and weights, so that the selection can be repeated
over a subset of the experts. `identify` tries all known rules on recorded logits, selected experts
and weights; it does not depend on the name of the model family.

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
    """Group-limited selection, as in DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437).

    Attributes:
        number: Number of groups of equal size.
        kept: Number of groups with the highest score, to which the selection is limited.
        score: Score of a group: the largest score in it, or the sum of the two largest.
    """

    number: int
    kept: int
    score: GroupScore


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRule:
    """How a router maps logits to selected experts and their weights.

    Attributes:
        score: Function from logits to scores.
        chosen: Function from the K selected scores to weights: the scores themselves, the scores
            divided by their sum, a softmax over their logits, or SparseMixer (arXiv 2310.00811):
            the softmax of each selected logit over the experts that were not selected before and
            whose logit is within `tolerance` of the largest of these.
        scale: Factor of all weights (`routed_scaling_factor`).
        biased: Whether a per-expert bias is added for the selection, but not for the weights.
        by_logits: Whether experts are selected by logits instead of scores.
        groups: Groups that limit the selection, if any.
        tolerance: Relative distance in SparseMixer.
        factor_E: Per-expert factors of the weights, if any.
        rounded: Whether scores are rounded to the dtype of the logits; in bfloat16 many are then
            equal.
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
        """Return float32 scores [T, E] of logits of any dtype."""
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
        """Return the values [T, E] whose largest are selected; -inf for experts of other groups.

        Args:
            logits_TE: Router logits.
            bias_E: Added to the scores if the rule is `biased`.
        """
        selection_TE = logits_TE.float() if self.by_logits else self.scores(logits_TE)
        if self.biased and bias_E is not None:
            selection_TE = selection_TE + bias_E.float()
        if self.groups is not None:
            in_groups_TE = _in_kept_groups(selection_TE, self.groups)
            selection_TE = selection_TE.masked_fill(~in_groups_TE, -torch.inf)
        return selection_TE

    def weights(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """Return the weights [T, K] of selected experts; the padding id E has weight 0."""
        num_experts = logits_TE.shape[-1]
        is_expert_TK = ids_TK < num_experts
        index_TK = ids_TK.clamp(max=num_experts - 1)
        if self.chosen == "sparsemixer":
            value_TE = logits_TE if self.rounded else logits_TE.float()
            weights_TK = _sparsemixer_weights(value_TE, index_TK, self.tolerance).float()
            weights_TK = weights_TK * is_expert_TK
        elif self.chosen == "softmax":
            logits_TK = logits_TE.float().gather(-1, index_TK)
            weights_TK = logits_TK.masked_fill(~is_expert_TK, -torch.inf).softmax(-1)
        else:
            weights_TK = self.scores(logits_TE).gather(-1, index_TK) * is_expert_TK
            if self.chosen == "normalised":
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        if self.factor_E is not None:
            weights_TK = weights_TK * self.factor_E.float()[index_TK]
        return torch.nan_to_num(weights_TK * self.scale)

    def route(
        self,
        logits_TE: Tensor,
        like: Routing,
        bias_E: Tensor | None = None,
        allowed_E: Tensor | None = None,
    ) -> Routing:
        """Select as many experts for each token as a given routing has.

        Disallowed experts are masked before the selection and before weights are computed ("masked
        gating", SwapMoE section 3), so that a rule that normalises does so over the experts that
        remain. A softmax over all experts is not recomputed over fewer, so that weights keep the
        scale of training. SparseMixer is: it compares logits with the largest that remains.

        Args:
            logits_TE: Router logits.
            like: The routing whose number of experts per token is used.
            bias_E: Added to the scores if the rule is `biased`.
            allowed_E: Experts that may be selected; all if None.

        Returns:
            Expert ids and weights [T, K]. If fewer experts are allowed than `like` has, the others
            are the padding id E.
        """
        selection_TE = self.preference(logits_TE, bias_E)
        if allowed_E is not None:
            selection_TE = selection_TE.masked_fill(~allowed_E, -torch.inf)
            if self.groups is not None:  # if no allowed expert is in the groups, ignore groups
                ungrouped_TE = self.scores(logits_TE).masked_fill(~allowed_E, -torch.inf)
                none_left_T1 = selection_TE.isneginf().all(-1, keepdim=True)
                selection_TE = torch.where(none_left_T1, ungrouped_TE, selection_TE)
        num_experts, k = logits_TE.shape[-1], like.ids_TK.shape[-1]
        best_TK, ids_TK = selection_TE.topk(min(k, num_experts), dim=-1)
        count_T1 = (like.ids_TK < num_experts).sum(-1, keepdim=True)
        padding_TK = torch.arange(ids_TK.shape[-1], device=ids_TK.device) >= count_T1
        ids_TK = ids_TK.masked_fill(padding_TK | best_TK.isneginf(), num_experts)
        if allowed_E is not None and self.chosen == "sparsemixer":
            logits_TE = logits_TE.masked_fill(~allowed_E, -torch.inf)
        return Routing(ids_TK, self.weights(logits_TE, ids_TK))


def _in_kept_groups(selection_TE: Tensor, groups: Groups) -> Tensor:
    num_tokens, num_experts = selection_TE.shape
    grouped_TGE = selection_TE.view(num_tokens, groups.number, -1)
    if groups.score == "max":
        score_TG = grouped_TGE.amax(-1)
    else:
        score_TG = grouped_TGE.topk(min(2, grouped_TGE.shape[-1]), dim=-1).values.sum(-1)
    kept = score_TG.topk(groups.kept, dim=-1).indices
    mask_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(1, kept, True)
    return mask_TG.unsqueeze(-1).expand_as(grouped_TGE).reshape(num_tokens, num_experts)


def _sparsemixer_weights(logits_TE: Tensor, ids_TK: Tensor, tolerance: float) -> Tensor:
    remaining_TE, weights = logits_TE, []
    for ids_T1 in ids_TK.split(1, dim=-1):
        best_T1 = remaining_TE.amax(-1, keepdim=True)
        distance_TE = (best_T1 - logits_TE) / torch.maximum(logits_TE.abs(), best_T1)
        near_TE = remaining_TE.masked_fill(distance_TE > tolerance, -torch.inf)
        weights.append(near_TE.softmax(-1).gather(-1, ids_T1))
        remaining_TE = remaining_TE.scatter(-1, ids_T1, -torch.inf)
    return torch.cat(weights, dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterExample:
    """Recorded inputs and outputs of a router.

    Attributes:
        logits_TE: Router logits.
        routing: Selected experts and weights.
        vectors: Per-expert vectors [E] of the router, each of which may be a bias of the selection
            or a factor of the weights.
    """

    logits_TE: Tensor
    routing: Routing
    vectors: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownForms:
    """Groups and SparseMixer tolerances that a configuration mentions; the router may use none."""

    groups: tuple[Groups, ...] = ()
    tolerances: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentifiedRule:
    """A rule, and the index of the example's vector that is its bias, if any."""

    rule: ScoringRule
    bias: int | None


def identify(example: RouterExample, known: KnownForms = KnownForms()) -> IdentifiedRule | None:
    """Return the simplest rule that reproduces the example, or None if no known rule does."""
    for rule, bias in _candidates(example, known):
        if (matching := _match(rule, example, bias)) is not None:
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
    weightings: tuple[Weighting, ...] = ("kept", "normalised", "softmax")
    vectors = (None, *range(len(example.vectors)))
    forms = product(vectors, vectors, (*known.groups, None), (False, True), scores, weightings)
    for factor, bias, groups, by_logits, score, chosen in forms:
        if (by_logits and bias is None) or (factor is not None and factor == bias):
            continue  # the same rule as without, or one vector used twice
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


def _match(rule: ScoringRule, example: RouterExample, bias: int | None) -> ScoringRule | None:
    """Return the rule with the example's scale if it reproduces the example, else None."""
    bias_E = None if bias is None else example.vectors[bias]
    routing = rule.route(example.logits_TE, example.routing, bias_E)
    untied_T = _untied(rule, rule.preference(example.logits_TE, bias_E), example)
    expected = _dense(example.routing, example)[untied_T]
    found = _dense(routing, example)[untied_T]
    if len(found) < len(untied_T) / 2 or not torch.equal(expected != 0, found != 0):
        return None
    scale = float(expected.sum() / found.sum().clamp_min(1e-20))
    low = example.routing.weights_TK.dtype in (torch.bfloat16, torch.float16)
    tolerance = 2e-2 if low else 1e-4
    if abs(scale - 1) < tolerance / 10:
        scale = 1.0
    if not torch.allclose(found * scale, expected, rtol=tolerance, atol=tolerance * 1e-2):
        return None
    return replace(rule, scale=scale)


def _untied(rule: ScoringRule, selection_TE: Tensor, example: RouterExample) -> Tensor:
    """Return a mask [T] of tokens without ties, which implementations break differently.

    Scores that differ only before they are rounded to the dtype of the weights count as ties,
    because some routers round first and then select (Switch Transformers).
    """
    k, dtype = example.routing.ids_TK.shape[-1], example.routing.weights_TK.dtype
    if dtype.itemsize < example.logits_TE.dtype.itemsize:
        selection_TE = selection_TE.to(dtype)
    best_TK = selection_TE.topk(min(k + 1, selection_TE.shape[-1]), dim=-1).values.cpu()
    distinct_TK = best_TK[:, :-1] > best_TK[:, 1:]
    # The weights of SparseMixer depend on the order of all K, those of other rules on the set.
    relevant = slice(None) if rule.chosen == "sparsemixer" else slice(k - 1, k)
    return distinct_TK[:, relevant].all(-1)


def _dense(routing: Routing, example: RouterExample) -> Tensor:
    """Return the weights of all experts [T, E]."""
    num_tokens, num_experts = example.logits_TE.shape
    weights_TE1 = torch.zeros(num_tokens, num_experts + 1)
    ids_TK = routing.ids_TK.cpu().clamp(max=num_experts)
    weights_TE1.scatter_add_(1, ids_TK, routing.weights_TK.float().cpu())
    return weights_TE1[:, :num_experts]
