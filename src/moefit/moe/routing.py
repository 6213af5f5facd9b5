"""Which experts a token uses, and with what weight.

Owns the inference rules of DS-MoE (arXiv 2404.05567, section 3.2) and what they make of router
scores. Takes scores [T, E] that sum to one over the experts; gives a `Routing`. Knows nothing of
experts' weights, layers or losses.

Shapes: T tokens, E experts, K chosen per token.
"""

from dataclasses import dataclass
from typing import Literal, Self, TypeVar, cast, get_args

import torch
from torch import Tensor

from moefit.errors import ConfigError

RuleKind = Literal["dense", "threshold", "top_k", "threshold_top_k"]
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class Routing:
    """Chosen experts and their weights; an id equal to E is padding and carries weight zero."""

    ids_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How many of a token's experts are active at inference.

    - `dense`: all of them.
    - `threshold`: those with E * S > epsilon; always at least the best one.
    - `top_k`: the k best.
    - `threshold_top_k`: the k best, where k is the batch's mean count under `threshold`, rounded
      half up and at least 1.

    Weights stay the scores themselves, as in the paper, unless `renormalize` is set; then the
    chosen ones are divided by their sum.

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
        """Read `dense`, `top_k:K`, `threshold:EPS` or `threshold_top_k:EPS`, [`:renormalize`].

        Raises ConfigError if the text is none of these.
        """
        kind, *rest = text.split(":")
        renormalize = rest[-1:] == ["renormalize"]
        values = rest[:-1] if renormalize else rest
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
        """Raise ConfigError if this rule asks for more experts than there are."""
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
        "and :renormalize behind it if the chosen weights shall sum to one"
    )


def active_experts(scores_TE: Tensor, rule: Rule, real_T: Tensor | None = None) -> Tensor:
    """Which experts each token uses under `rule`, as a boolean mask_TE.

    real_T: False where a token is padding; such tokens don't count in threshold_top_k's mean.
    """
    if rule.kind == "dense":
        return torch.ones_like(scores_TE, dtype=torch.bool)
    if rule.kind == "threshold":
        return _above_threshold(scores_TE, rule)
    ids_TK = _top_k(scores_TE, rule, real_T).ids_TK
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, ids_TK, True)


def _above_threshold(scores_TE: Tensor, rule: Rule) -> Tensor:
    assert rule.epsilon is not None
    mask_TE = scores_TE * scores_TE.shape[-1] > rule.epsilon
    # An epsilon of 1 or more may pass nobody; a token without experts would lose its MLP.
    return mask_TE.scatter(-1, scores_TE.argmax(-1, keepdim=True), True)


def _top_k(scores_TE: Tensor, rule: Rule, real_T: Tensor | None) -> Routing:
    """Every token's k best, k being the rule's own or the batch's mean count."""
    k = rule.k if rule.k is not None else _mean_count(scores_TE, rule, real_T)
    rule.check(scores_TE.shape[-1])
    weights_TK, ids_TK = scores_TE.topk(k, dim=-1)
    return Routing(ids_TK, weights_TK)


def _mean_count(scores_TE: Tensor, rule: Rule, real_T: Tensor | None) -> int:
    count_T = _above_threshold(scores_TE, rule).sum(-1).float()
    if real_T is not None:
        count_T = count_T[real_T]
    mean = count_T.mean().item() if count_T.numel() else 1.0
    return max(1, int(mean + 0.5))


def masked_scores(scores_TE: Tensor, mask_TE: Tensor, *, renormalize: bool) -> Tensor:
    """The scores of the active experts, zero elsewhere; summing to one if `renormalize`."""
    kept_TE = scores_TE * mask_TE
    return kept_TE / kept_TE.sum(-1, keepdim=True) if renormalize else kept_TE


def route(scores_TE: Tensor, rule: Rule, real_T: Tensor | None = None) -> Routing:
    """Choose experts by `rule`.

    K is the largest number of active experts of any token; tokens with fewer are filled up with
    the padding id E. Under `dense` the ids are 0..E-1 in order.
    """
    num_tokens, num_experts = scores_TE.shape
    if rule.kind == "dense":
        ids_E = torch.arange(num_experts, device=scores_TE.device)
        return Routing(ids_E.expand(num_tokens, num_experts), scores_TE)
    if rule.kind == "threshold":
        routing = _by_threshold(scores_TE, rule)
    else:
        routing = _top_k(scores_TE, rule, real_T)
    if not rule.renormalize:
        return routing
    weights_TK = routing.weights_TK
    return Routing(routing.ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True))


def masked_route(scores_TE: Tensor, rule: Rule, real_T: Tensor | None = None) -> Routing:
    """The choice of `route`, told as weights of all experts, zero for those that are not chosen.

    No shape depends on the scores; ids are 0..E-1 in order.
    """
    everyone = route(scores_TE, Rule(kind="dense"), real_T)
    if rule.kind == "dense":
        return everyone
    mask_TE = active_experts(scores_TE, rule, real_T)
    kept_TE = masked_scores(scores_TE, mask_TE, renormalize=rule.renormalize)
    return Routing(everyone.ids_TK, kept_TE)


def _by_threshold(scores_TE: Tensor, rule: Rule) -> Routing:
    mask_TE = _above_threshold(scores_TE, rule)
    k = int(mask_TE.sum(-1).max()) if mask_TE.numel() else 1
    weights_TK, ids_TK = scores_TE.topk(k, dim=-1)
    chosen_TK = mask_TE.gather(-1, ids_TK)
    weights_TK = weights_TK * chosen_TK
    return Routing(ids_TK.masked_fill(~chosen_TK, scores_TE.shape[-1]), weights_TK)


def default_rules(num_experts: int) -> tuple[Rule, ...]:
    """A ladder for comparing: all experts, then fewer and fewer, then the adaptive rules.

    >>> [str(rule) for rule in default_rules(16)][:4]
    ['dense', 'top_k:8', 'top_k:4', 'top_k:2']
    """
    if num_experts == 1:
        return (Rule(kind="dense"),)
    ladder = sorted({max(1, num_experts // part) for part in (2, 4, 8, 16)}, reverse=True)
    return (
        Rule(kind="dense"),
        *(Rule(kind="top_k", k=k) for k in ladder if k < num_experts),
        Rule(kind="threshold", epsilon=0.48),
        Rule(kind="threshold_top_k", epsilon=0.48),
    )
