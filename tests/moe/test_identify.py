"""Routing rules are identified from examples among all forms."""

from itertools import product

import pytest
import torch
from torch import Tensor

from moefit.moe.routing import Routing
from moefit.moe.scoring import Groups, KnownForms, RouterExample, ScoringRule, identify

TOKENS, EXPERTS, K = 64, 16, 3
GROUPS = tuple(Groups(number=4, kept=2, score=score) for score in ("top_2", "max"))
LIKE = Routing(torch.zeros(TOKENS, K, dtype=torch.long), torch.ones(TOKENS, K))
KNOWN = KnownForms(groups=GROUPS, tolerances=(0.2,))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOGITS, BIAS, FACTOR = (
    numbers(TOKENS, EXPERTS, seed=1),
    numbers(EXPERTS, seed=2).abs(),
    numbers(EXPERTS, seed=3).abs() + 0.5,
)


def example(rule: ScoringRule, logits_TE: Tensor = LOGITS) -> RouterExample:
    routing = rule.route(logits_TE, LIKE, BIAS)
    return RouterExample(logits_TE=logits_TE, routing=routing, vectors=(FACTOR, BIAS))


COMMON = list(
    product(
        ("softmax", "sigmoid", "sqrt_softplus"),
        ("kept", "normalised"),
        (False, True),
        (*GROUPS, None),
    )
)


@pytest.mark.parametrize(("score", "chosen", "biased", "groups"), COMMON)
def test_rule_is_identified_from_outputs(score, chosen, biased, groups):
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
def test_rare_forms_are_identified(rule):
    found = identify(example(rule), KNOWN)
    assert found is not None
    assert found.rule == rule
    assert (found.rule.factor_E is None) == (rule.factor_E is None)


def test_low_precision_ties_match_router():
    rule = ScoringRule(score="sigmoid", chosen="kept", biased=True, rounded=True)
    found = identify(example(rule, (LOGITS * 4).bfloat16()), KNOWN)
    assert found is not None
    assert found.rule == rule


def test_inconsistent_outputs_match_no_rule():
    seen = example(ScoringRule(score="softmax", chosen="kept"))
    other = RouterExample(logits_TE=numbers(TOKENS, EXPERTS, seed=9), routing=seen.routing)
    assert identify(other, KNOWN) is None
    odd = Routing(seen.routing.ids_TK, seen.routing.weights_TK**2)
    assert identify(RouterExample(logits_TE=LOGITS, routing=odd), KNOWN) is None
