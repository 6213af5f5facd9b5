"""Which rule a family's router follows, found by example.

Owns the search. A rule is never looked up by name: the family's own router decides on some tokens,
and the simplest rule that decides and weighs alike is taken. Knows nothing of models: whoever asks
has made the router decide.

Shapes: T tokens, E experts, K chosen per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from moefit.moe.routing import Routing
from moefit.moe.scoring import Groups, Score, ScoringRule, Weighing


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What a family's router did: its logits, its choice, and per-expert vectors that may matter.

    A vector may be a bias of the choice or a factor of the weights.
    """

    logits_TE: Tensor
    routing: Routing
    vectors: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a configuration says of its router: forms that are possible, not that they are used."""

    groups: tuple[Groups, ...] = ()
    tolerances: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """A rule, and which of the example's vectors is its bias (None: none)."""

    rule: ScoringRule
    bias: int | None


def identify(example: Example, known: Known = Known()) -> Identified | None:
    """The simplest rule that chooses and weighs as the example does; None if no known rule does."""
    for rule, bias in _candidates(example, known):
        if (matching := _matching(rule, example, bias)) is not None:
            return Identified(rule=matching, bias=bias)
    return None


def _candidates(example: Example, known: Known) -> Iterator[tuple[ScoringRule, int | None]]:
    low = example.logits_TE.dtype.itemsize < torch.float32.itemsize
    for rounded in (False, True) if low else (False,):
        for rule, bias in _forms(example, known):
            yield replace(rule, rounded=rounded), bias


def _forms(example: Example, known: Known) -> Iterator[tuple[ScoringRule, int | None]]:
    scores: tuple[Score, ...] = ("softmax", "sigmoid", "sqrt_softplus", "given")
    weighings: tuple[Weighing, ...] = ("kept", "normalised", "softmax")
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


def _matching(rule: ScoringRule, example: Example, bias: int | None) -> ScoringRule | None:
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


def _dense(routing: Routing, example: Example) -> Tensor:
    """Weights by expert [T, E]."""
    num_tokens, num_experts = example.logits_TE.shape
    weights_TE1 = torch.zeros(num_tokens, num_experts + 1)
    ids_TK = routing.ids_TK.cpu().clamp(max=num_experts)
    weights_TE1.scatter_add_(1, ids_TK, routing.weights_TK.float().cpu())
    return weights_TE1[:, :num_experts]
