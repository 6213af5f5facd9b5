"""Routing rules: found by example among all forms, and routing restricted by them."""

from itertools import product

import pytest
import torch
from torch import Tensor

from moefit.moe.routing import Routing
from moefit.moe.scoring import Example, Groups, Known, ScoringRule, identify

TOKENS, EXPERTS, K = 64, 16, 3
GROUPS = tuple(Groups(number=4, kept=2, score=score) for score in ("top_2", "max"))
LIKE = Routing(torch.zeros(TOKENS, K, dtype=torch.long), torch.ones(TOKENS, K))
KNOWN = Known(groups=GROUPS, tolerances=(0.2,))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOGITS, BIAS, FACTOR = (
    numbers(TOKENS, EXPERTS, seed=1),
    numbers(EXPERTS, seed=2).abs(),
    numbers(EXPERTS, seed=3).abs() + 0.5,
)


def example(rule: ScoringRule, logits_TE: Tensor = LOGITS) -> Example:
    routing = rule.route(logits_TE, LIKE, BIAS)
    return Example(logits_TE=logits_TE, routing=routing, vectors=(FACTOR, BIAS))


COMMON = list(
    product(
        ("softmax", "sigmoid", "sqrt_softplus"),
        ("kept", "normalised"),
        (False, True),
        (*GROUPS, None),
    )
)


@pytest.mark.parametrize(("score", "chosen", "biased", "groups"), COMMON)
def test_a_rule_is_found_by_what_it_does(score, chosen, biased, groups):
    rule = ScoringRule(score=score, chosen=chosen, biased=biased, groups=groups, scale=2.5)
    found = identify(example(rule), KNOWN)
    assert found is not None
    assert found.bias == (1 if biased else None)
    assert found.rule.scale == pytest.approx(2.5)
    again = found.rule.route(LOGITS, LIKE, BIAS)
    torch.testing.assert_close(again.weights_TK, rule.route(LOGITS, LIKE, BIAS).weights_TK)


@pytest.mark.parametrize(
    "rule",
    [
        ScoringRule(score="sigmoid", chosen="kept", biased=True, by_logits=True),
        ScoringRule(score="softmax", chosen="normalised", factor_E=FACTOR),
        ScoringRule(score="given", chosen="sparsemixer", tolerance=0.2),
    ],
)
def test_rare_forms_are_found(rule):
    found = identify(example(rule), KNOWN)
    assert found is not None
    assert found.rule == rule
    assert (found.rule.factor_E is None) == (rule.factor_E is None)


def test_scores_in_low_precision_tie_as_the_router_s_do():
    rule = ScoringRule(score="sigmoid", chosen="kept", biased=True, rounded=True)
    found = identify(example(rule, (LOGITS * 4).bfloat16()), KNOWN)
    assert found is not None
    assert found.rule == rule


def test_other_logits_or_weights_fit_no_rule():
    seen = example(ScoringRule(score="softmax", chosen="kept"))
    other = Example(logits_TE=numbers(TOKENS, EXPERTS, seed=9), routing=seen.routing)
    assert identify(other, KNOWN) is None
    odd = Routing(seen.routing.ids_TK, seen.routing.weights_TK**2)
    assert identify(Example(logits_TE=LOGITS, routing=odd), KNOWN) is None


def test_sparsemixer_by_hand():
    """Each choice against what is left and near enough: 2 vs 1.9; then 1.9 alone, 1 is too far."""
    rule = ScoringRule(score="given", chosen="sparsemixer", tolerance=0.1)
    like = Routing(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))
    routing = rule.route(torch.tensor([[1.0, 2.0, 1.9, -3.0]]), like)
    assert routing.ids_TK.tolist() == [[1, 2]]
    first = torch.tensor([2.0, 1.9]).softmax(0)[0].item()
    assert routing.weights_TK.tolist() == [[pytest.approx(first), 1.0]]


FORMS = [*product(("kept", "normalised", "softmax"), (*GROUPS, None)), ("sparsemixer", None)]


@pytest.mark.parametrize(("chosen", "groups"), FORMS)
@pytest.mark.parametrize("allowed", [1, 2, EXPERTS // 2])
def test_restricted_routing_names_only_what_is_allowed(chosen, groups, allowed):
    allowed_E = torch.arange(EXPERTS) % (EXPERTS // allowed) == 0
    score = "given" if chosen in ("softmax", "sparsemixer") else "sigmoid"
    rule = ScoringRule(score=score, chosen=chosen, groups=groups, tolerance=0.2)
    routing = rule.route(LOGITS, LIKE, allowed_E=allowed_E)
    real_TK = routing.ids_TK < EXPERTS
    assert real_TK.any(-1).all()
    assert allowed_E[routing.ids_TK[real_TK]].all()
    assert (routing.weights_TK[~real_TK] == 0).all()
    assert torch.isfinite(routing.weights_TK).all()
    assert (routing.weights_TK != 0).any(-1).all()
    if chosen in ("normalised", "softmax"):
        torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(TOKENS))
