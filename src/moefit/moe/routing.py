"""Select the experts of each token and their weights by the inference rules of DS-MoE.

The rules are those of arXiv 2404.05567, section 3.2. Input are router scores [T, E] that sum to one
over the experts; output is a `Routing`.

Shapes: T tokens, E experts, K chosen per token.
"""

from dataclasses import dataclass
from typing import Literal, Self, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import ConfigError

RuleKind = Literal["dense", "threshold", "top_k", "threshold_top_k"]
_Number = TypeVar("_Number", int, float)


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor of 16 bits in float32, and float32 or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class Routing:
    """Selected experts and their weights [T, K]. The id E is padding and has weight 0."""

    ids_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How many experts per token are active at inference.

    - `dense`: all experts.
    - `threshold`: experts with E * S > epsilon for their score S, and always the best one.
    - `top_k`: the k experts with the highest scores.
    - `threshold_top_k`: as `top_k`, with k the mean number of experts that `threshold` selects in
      the batch, rounded half up and at least 1.

    Weights are the scores themselves, as in the paper. With `renormalize` the selected scores are
    divided by their sum.

    >>> Rule.parse("top_k:4")
    Rule(kind='top_k', k=4, epsilon=None, renormalize=False)
    >>> str(Rule.parse("threshold:0.48:renormalize"))
    'threshold:0.48:renormalize'
    """

    kind: RuleKind
    k: int | None = None
    epsilon: float | None = None
    renormalize: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `dense`, `top_k:K`, `threshold:EPS` or `threshold_top_k:EPS`, and `:renormalize`.

        Raises:
            ConfigError: The text is none of these.
        """
        kind, *fields = text.split(":")
        renormalize = fields[-1:] == ["renormalize"]
        values = fields[:-1] if renormalize else fields
        if kind not in get_args(RuleKind) or len(values) != (kind != "dense"):
            raise ConfigError(_unknown_rule(text))
        try:
            if kind == "top_k":
                return cls(kind="top_k", k=_positive(int(values[0])), renormalize=renormalize)
            epsilon = _positive(float(values[0])) if values else None
        except ValueError as error:
            raise ConfigError(_unknown_rule(text)) from error
        return cls(kind=cast(RuleKind, kind), epsilon=epsilon, renormalize=renormalize)

    def __str__(self) -> str:
        value = self.k if self.kind == "top_k" else self.epsilon
        parts = [self.kind] if value is None else [self.kind, str(value)]
        return ":".join([*parts, "renormalize"] if self.renormalize else parts)

    def check(self, num_experts: int) -> None:
        """Raise ConfigError if the rule selects more experts than there are."""
        if self.k is not None and self.k > num_experts:
            raise ConfigError(
                f"rule {self} asks for {self.k} experts per token, but there are {num_experts}; "
                f"the most that works is top_k:{num_experts}"
            )


def _positive(value: _Number) -> _Number:
    if not 0 < value < float("inf"):
        raise ValueError(value)
    return value


def _unknown_rule(text: str) -> str:
    return (
        f"{text!r} is not an inference rule; write dense, top_k:K, threshold:EPS or "
        "threshold_top_k:EPS with K and EPS above zero, for example top_k:4 or threshold:0.48, "
        "and append :renormalize to make the selected weights sum to one"
    )


def active_experts(
    scores_TE: Tensor, rule: Rule, real_T: Tensor | None = None, bias_E: Tensor | None = None
) -> Tensor:
    """Return a boolean mask [T, E] of the experts that each token uses.

    Args:
        scores_TE: Router scores.
        rule: The inference rule.
        real_T: False for padding tokens, which `threshold_top_k` leaves out of its mean.
        bias_E: Added to the scores for the choice of the k best.
    """
    if rule.kind == "dense":
        return torch.ones_like(scores_TE, dtype=torch.bool)
    if rule.kind == "threshold":
        return _above_threshold(scores_TE, rule)
    ids_TK = _top_k(scores_TE, rule, real_T, bias_E).ids_TK
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, ids_TK, True)


def _above_threshold(scores_TE: Tensor, rule: Rule) -> Tensor:
    assert rule.epsilon is not None
    mask_TE = scores_TE * scores_TE.shape[-1] > rule.epsilon
    # With an epsilon of 1 or more, no expert may pass; a token without experts would skip its MLP.
    return mask_TE.scatter(-1, scores_TE.argmax(-1, keepdim=True), True)


def _top_k(
    scores_TE: Tensor, rule: Rule, real_T: Tensor | None, bias_E: Tensor | None = None
) -> Routing:
    """Select k experts per token, with the rule's k or the mean number of `threshold`."""
    k = rule.k if rule.k is not None else _mean_count(scores_TE, rule, real_T)
    rule.check(scores_TE.shape[-1])
    if bias_E is not None:
        ids_TK = _preferences(scores_TE, bias_E, scores_TE > 0).topk(k, dim=-1).indices
        return Routing(ids_TK, scores_TE.gather(-1, ids_TK))
    weights_TK, ids_TK = scores_TE.topk(k, dim=-1)
    return Routing(ids_TK, weights_TK)


def _preferences(scores_TE: Tensor, bias_E: Tensor, possible_TE: Tensor) -> Tensor:
    """Return by what the k best are chosen: scores and biases, of experts that are possible.

    What excludes an expert gives it a score of 0, and no bias may bring it back.
    """
    preference_TE = scores_TE.detach() + bias_E.to(scores_TE.dtype)
    return preference_TE.masked_fill(~possible_TE, -torch.inf)


def _mean_count(scores_TE: Tensor, rule: Rule, real_T: Tensor | None) -> int:
    count_T = _above_threshold(scores_TE, rule).sum(-1).float()
    if real_T is not None:
        count_T = count_T[real_T]
    mean = count_T.mean().item() if count_T.numel() else 1.0
    return max(1, int(mean + 0.5))


def masked_scores(scores_TE: Tensor, mask_TE: Tensor, *, renormalize: bool) -> Tensor:
    """Return the scores [T, E] of active experts, 0 elsewhere; sums are 1 if `renormalize`."""
    active_TE = scores_TE * mask_TE
    return active_TE / active_TE.sum(-1, keepdim=True) if renormalize else active_TE


def route(
    scores_TE: Tensor, rule: Rule, real_T: Tensor | None = None, bias_E: Tensor | None = None
) -> Routing:
    """Select experts by `rule`.

    Args:
        scores_TE: Router scores.
        rule: The rule.
        real_T: As for `active_experts`.
        bias_E: Added to the scores where k experts are chosen, and not to their weights; other
            rules do not know it.

    Returns:
        Ids and weights [T, K], where K is the largest number of active experts of any token; tokens
        with fewer are padded with the id E. For `dense` the ids are 0..E-1 in order.
    """
    num_tokens, num_experts = scores_TE.shape
    if rule.kind == "dense":
        ids_E = torch.arange(num_experts, device=scores_TE.device)
        return Routing(ids_E.expand(num_tokens, num_experts), scores_TE)
    if rule.kind == "threshold":
        routing = _by_threshold(scores_TE, rule)
    else:
        routing = _top_k(scores_TE, rule, real_T, bias_E)
    if not rule.renormalize:
        return routing
    weights_TK = routing.weights_TK
    return Routing(routing.ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True))


def masked_route(scores_TE: Tensor, rule: Rule, real_T: Tensor | None = None) -> Routing:
    """Return the selection of `route` as weights of all experts, 0 for those not selected.

    Shapes do not depend on the scores; ids are 0..E-1 in order.
    """
    dense = route(scores_TE, Rule(kind="dense"), real_T)
    if rule.kind == "dense":
        return dense
    mask_TE = active_experts(scores_TE, rule, real_T)
    active_TE = masked_scores(scores_TE, mask_TE, renormalize=rule.renormalize)
    return Routing(dense.ids_TK, active_TE)


def route_allowed(
    logits_TE: Tensor,
    allowed_TE: Tensor,
    rule: Rule,
    real_T: Tensor | None = None,
    bias_E: Tensor | None = None,
) -> Routing:
    """Select experts where each token may use only some, as serving does in virtual mode.

    Each token gets as many experts as `rule` selects among all, but the best of those that are
    allowed. Their weights sum to what the rule's own selection sums to, or to one if the rule
    renormalizes.

    Args:
        logits_TE: Router logits of all experts.
        allowed_TE: True for experts that the token may use, at least one per token.
        rule: The rule.
        real_T: As for `active_experts`.
        bias_E: As for `route`.

    Returns:
        Ids and weights [T, K] with K of the rule `top_k`, else E. If fewer experts are allowed than
        the rule selects, the others are the padding id E.
    """
    num_experts = logits_TE.shape[-1]
    scores_TE = logits_TE.softmax(-1)
    own_TE = active_experts(scores_TE, rule, real_T, bias_E)
    allowed_scores_TE = logits_TE.masked_fill(~allowed_TE, -torch.inf).softmax(-1)
    k = num_experts if rule.k is None else rule.k
    weights_TK, ids_TK = allowed_scores_TE.topk(k, dim=-1)
    if bias_E is not None and rule.kind in ("top_k", "threshold_top_k"):
        preference_TE = _preferences(scores_TE, bias_E, allowed_scores_TE > 0)
        ids_TK = preference_TE.topk(k, dim=-1).indices
        weights_TK = allowed_scores_TE.gather(-1, ids_TK)
    rank_K = torch.arange(k, device=ids_TK.device)
    chosen_TK = (rank_K < own_TE.sum(-1, keepdim=True)) & allowed_TE.gather(-1, ids_TK)
    weights_TK = weights_TK * chosen_TK
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    if not rule.renormalize:
        weights_TK = weights_TK * (scores_TE * own_TE).sum(-1, keepdim=True)
    return Routing(ids_TK.masked_fill(~chosen_TK, num_experts), weights_TK)


_CERTAIN = 100.0  # a logit beside which others, of 0, have a score of 0 in float32


def hashed_logits(ids_T: Tensor, num_experts: int) -> Tensor:
    """Return logits [.., E] that give each token id one expert with a score of 1, for good.

    Hash Layers (arXiv 2106.04426), by multiplicative hashing: consecutive ids are spread evenly.

    Args:
        ids_T: Token ids [..].
        num_experts: E.

    >>> hashed_logits(torch.arange(6), 4).argmax(-1)
    tensor([0, 2, 0, 3, 1, 0])
    """
    hashed_T = (ids_T.long() * 2654435761) & (2**32 - 1)
    expert_T = (hashed_T * num_experts) >> 32
    return _CERTAIN * F.one_hot(expert_T, num_experts).float()


def _by_threshold(scores_TE: Tensor, rule: Rule) -> Routing:
    mask_TE = _above_threshold(scores_TE, rule)
    k = int(mask_TE.sum(-1).max()) if mask_TE.numel() else 1
    weights_TK, ids_TK = scores_TE.topk(k, dim=-1)
    chosen_TK = mask_TE.gather(-1, ids_TK)
    weights_TK = weights_TK * chosen_TK
    return Routing(ids_TK.masked_fill(~chosen_TK, scores_TE.shape[-1]), weights_TK)


def default_rules(num_experts: int) -> tuple[Rule, ...]:
    """Return rules to compare: all experts, then fewer and fewer, then the adaptive rules.

    >>> [str(rule) for rule in default_rules(16)][:4]
    ['dense', 'top_k:8', 'top_k:4', 'top_k:2']
    """
    if num_experts == 1:
        return (Rule(kind="dense"),)
    counts = sorted({max(1, num_experts // part) for part in (2, 4, 8, 16)}, reverse=True)
    return (
        Rule(kind="dense"),
        *(Rule(kind="top_k", k=k) for k in counts if k < num_experts),
        Rule(kind="threshold", epsilon=0.48),
        Rule(kind="threshold_top_k", epsilon=0.48),
    )


def plain_weighted_sum(
    y_RD: Tensor, weights_TK: Tensor, dtype: torch.dtype, *, energy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Sum each token's expert outputs with their weights.

    Args:
        y_RD: Outputs, K rows per token.
        weights_TK: Weights.
        dtype: Dtype of the result.
        energy: Whether to also return |weight * output|^2 of each row.

    Returns:
        y_TD, and float32 [R] or None.
    """
    weighted_RD = y_RD.to(dtype) * weights_TK.reshape(-1, 1)
    energy_R = weighted_RD.float().square().sum(-1) if energy else None
    total_TD = y_RD.new_zeros(len(weights_TK), y_RD.shape[1], dtype=torch.float32)
    for part_TD in weighted_RD.view(*weights_TK.shape, -1).unbind(1):
        total_TD += part_TD.float()
    return total_TD.to(dtype), energy_R
