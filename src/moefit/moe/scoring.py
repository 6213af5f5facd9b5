"""How a family's router makes a choice of its scores, so that the choice can be made again.

Owns the routing rules of off-the-shelf families as data (`ScoringRule`), and routing restricted to
some experts. Knows nothing of families (which of them has which rule is found by example, in
`identify.py`), of residency or of modes.

Shapes: T tokens, E experts, K chosen per token.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.moe.routing import Routing

Score = Literal["softmax", "sigmoid", "sqrt_softplus", "given"]
Weighing = Literal["kept", "normalised", "softmax", "sparsemixer"]
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
    chosen: Weighing
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
