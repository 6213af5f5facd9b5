"""Routing with absent experts in training equals virtual mode."""

import pytest
import torch

from moefit.moe.routing import Rule, masked_route, route, route_allowed
from moefit.moe.scoring import ScoringRule
from moefit.serve.layer.rerouting import ScoredRouting, mask_absent, rescale_weights

E = 8


def spread(routing):
    """Weights of all experts [T, E]."""
    weights = torch.zeros(len(routing.ids_TK), E + 1)
    return weights.scatter_add(1, routing.ids_TK, routing.weights_TK)[:, :E]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("resident", [2, 3, 5, 8])
def test_top_k_equals_virtual_mode(renormalize, resident):
    logits_TE = 3 * torch.randn(50, E, generator=torch.Generator().manual_seed(resident))
    rule = Rule(kind="top_k", k=3, renormalize=renormalize)
    resident_E = torch.arange(E) < resident
    chosen = route(logits_TE.softmax(-1), rule)
    scored = ScoredRouting(
        rule=ScoringRule(score="softmax", chosen="normalised" if renormalize else "kept"),
        logits_TE=logits_TE,
        bias_E=None,
        routing=chosen,
    )
    served = rescale_weights(chosen, mask_absent(scored, resident_E))
    trained = route_allowed(logits_TE, resident_E.expand_as(logits_TE), rule)
    assert torch.allclose(spread(trained), spread(served), atol=1e-6)


def slow(logits_E, allowed_E, rule):
    """Reference for one token: as many experts as the rule selects, the best allowed ones."""
    scores = logits_E.softmax(-1)
    own = [e for e in range(E) if spread(masked_route(scores[None], rule))[0, e] > 0]
    ranked = sorted((e for e in range(E) if allowed_E[e]), key=lambda e: -float(logits_E[e]))
    best = ranked[: len(own)]
    mass = 1.0 if rule.renormalize else float(sum(scores[e] for e in own))
    total = float(sum(scores[e] for e in best))
    weights = torch.zeros(E)
    for e in best:
        weights[e] = scores[e] / total * mass
    return weights


@pytest.mark.parametrize(
    "text", ["dense", "top_k:3", "top_k:3:renormalize", "threshold:0.8", "threshold:2:renormalize"]
)
def test_equals_slow_reference(text):
    generator = torch.Generator().manual_seed(1)
    logits_TE = 2 * torch.randn(40, E, generator=generator)
    allowed_TE = torch.rand(40, E, generator=generator) < 0.5
    allowed_TE[:, 5] = True  # each token may use one expert at least
    found = spread(route_allowed(logits_TE, allowed_TE, Rule.parse(text)))
    for logits_E, allowed_E, found_E in zip(logits_TE, allowed_TE, found, strict=True):
        expected_E = slow(logits_E, allowed_E, Rule.parse(text))
        assert torch.allclose(found_E, expected_E, atol=1e-6)
        assert not found_E[~allowed_E].any()


def test_all_experts_allowed_equals_rule():
    logits_TE = torch.randn(30, E, generator=torch.Generator().manual_seed(2))
    everything_TE = torch.ones(30, E, dtype=torch.bool)
    for text in ("dense", "top_k:2", "top_k:2:renormalize", "threshold:0.9"):
        rule = Rule.parse(text)
        own = spread(route(logits_TE.softmax(-1), rule))
        assert torch.allclose(spread(route_allowed(logits_TE, everything_TE, rule)), own, atol=1e-6)


def test_disallowed_expert_gets_no_gradient():
    logits_TE = torch.randn(6, E, requires_grad=True)
    allowed_TE = torch.arange(E).expand(6, E) < 4
    rule = Rule(kind="top_k", k=2, renormalize=True)
    route_allowed(logits_TE, allowed_TE, rule).weights_TK.square().sum().backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.isfinite().all()
    assert not logits_TE.grad[:, 4:].any()
    assert logits_TE.grad[:, :4].any()
