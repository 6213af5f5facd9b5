"""Routing rules, and routing restricted by them."""

from itertools import product

import pytest
import torch

from moefit.moe.routing import Routing
from moefit.moe.scoring import Groups, ScoringRule

TOKENS, EXPERTS, K = 64, 16, 3
GROUPS = tuple(Groups(number=4, kept=2, score=score) for score in ("top_2", "max"))
LIKE = Routing(torch.zeros(TOKENS, K, dtype=torch.long), torch.ones(TOKENS, K))
LOGITS = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))


def test_sparsemixer_by_hand():
    """Each choice is normalised over the remaining near scores: 2 vs 1.9, then 1.9 alone."""
    rule = ScoringRule(score="given", chosen="sparsemixer", tolerance=0.1)
    like = Routing(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))
    routing = rule.route(torch.tensor([[1.0, 2.0, 1.9, -3.0]]), like)
    assert routing.ids_TK.tolist() == [[1, 2]]
    first = torch.tensor([2.0, 1.9]).softmax(0)[0].item()
    assert routing.weights_TK.tolist() == [[pytest.approx(first), 1.0]]


FORMS = [*product(("kept", "normalised", "softmax"), (*GROUPS, None)), ("sparsemixer", None)]


@pytest.mark.parametrize(("chosen", "groups"), FORMS)
@pytest.mark.parametrize("allowed", [1, 2, EXPERTS // 2])
def test_restricted_routing_uses_allowed_experts(chosen, groups, allowed):
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
