from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_router import NUM_EXPERTS, RULES, Slow, Weights
from torch import Tensor

from moefit.moe.routing import Routing
from moefit.moe.scoring import (
    Groups,
    IdentifiedRule,
    KnownForms,
    RouterExample,
    ScoringRule,
    identify,
)

K, TOKENS = 3, 24
ANYWHERE = KnownForms(
    groups=(
        Groups(number=4, kept=2, score="top_2"),
        Groups(number=4, kept=2, score="max"),
        Groups(number=2, kept=1, score="max"),
    ),
    tolerances=(0.1,),
)
EVERYONE = set(range(NUM_EXPERTS))


def vector(seed: int) -> Tensor:
    return 0.5 + torch.rand(NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))


def some_logits(seed: int, tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(tokens, NUM_EXPERTS, generator=generator)


def slow_routing(
    rule: ScoringRule, logits_TE: Tensor, bias_E: Tensor | None, allowed: set[int] = EVERYONE
) -> list[Weights]:
    found = []
    for logits_E in logits_TE:
        one = Slow(rule, logits_E, bias_E)
        values = one.preference()
        if all(values[e] == -torch.inf for e in allowed):
            values = one.scores()
        found.append(one.weights(one.best(K, allowed, values)))
    return found


def as_routing(weights: list[Weights], dtype: torch.dtype = torch.float32) -> Routing:
    rows = [[*one.items(), *[(NUM_EXPERTS, 0.0)] * (K - len(one))] for one in weights]
    ids_TK = torch.tensor([[expert for expert, _ in row] for row in rows])
    weights_TK = torch.tensor([[weight for _, weight in row] for row in rows])
    return Routing(ids_TK, weights_TK.to(dtype))


def example_of(
    rule: ScoringRule, *, vectors: tuple[Tensor, ...] = (), seed: int = 0
) -> RouterExample:
    """Return a router of this rule; its bias, if any, is the last vector."""
    logits_TE = some_logits(seed)
    bias_E = vectors[-1] if rule.biased else None
    return RouterExample(
        logits_TE=logits_TE,
        routing=as_routing(slow_routing(rule, logits_TE, bias_E)),
        vectors=vectors,
    )


def assert_routes_as(
    found: IdentifiedRule | None, rule: ScoringRule, vectors: tuple[Tensor, ...]
) -> None:
    """Compare rules on other tokens, with all experts and with some."""
    assert found is not None
    logits_TE = some_logits(1)
    theirs_E = vectors[-1] if rule.biased else None
    ours_E = None if found.bias is None else vectors[found.bias]
    like = as_routing([dict.fromkeys(range(K), 1.0)] * TOKENS)
    for allowed in (EVERYONE, {0, 3, 5, 6}, {2}):
        expected = slow_routing(rule, logits_TE, theirs_E, allowed)
        allowed_E = torch.zeros(NUM_EXPERTS, dtype=torch.bool)
        allowed_E[list(allowed)] = True
        routing = found.rule.route(logits_TE, like, ours_E, allowed_E)
        rows = zip(routing.ids_TK.tolist(), routing.weights_TK.tolist(), expected, strict=True)
        for ids, weights, weights_by_expert in rows:
            ours = {e: w for e, w in zip(ids, weights, strict=True) if e < NUM_EXPERTS}
            assert ours == pytest.approx(weights_by_expert, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_every_form_is_identified(name: str, scale: float) -> None:
    rule = replace(RULES[name], scale=scale)
    vectors = (vector(5), vector(6))
    found = identify(example_of(rule, vectors=vectors), ANYWHERE)
    assert_routes_as(found, rule, vectors)


@pytest.mark.parametrize("name", ["softmax", "sigmoid-biased"])
def test_weight_factor_is_identified(name: str) -> None:
    factor_E, bias_E = vector(7), vector(8)
    rule = replace(RULES[name], factor_E=factor_E)
    vectors = (factor_E, bias_E)
    found = identify(example_of(rule, vectors=vectors), ANYWHERE)
    assert_routes_as(found, rule, vectors)


def test_simpler_of_equivalent_forms_is_chosen() -> None:
    """A zero bias equals no bias, and a group that is never excluded equals no group."""
    rule = RULES["softmax-normalised"]
    example = example_of(rule, vectors=(torch.zeros(NUM_EXPERTS),))
    found = identify(example, KnownForms())
    assert found == IdentifiedRule(
        rule=ScoringRule(score="softmax", chosen="normalised"), bias=None
    )


def test_padding_does_not_affect_identification() -> None:
    example = example_of(RULES["softmax"])
    ids_TK = example.routing.ids_TK.clone()
    weights_TK = example.routing.weights_TK.clone()
    ids_TK[::3, -1], weights_TK[::3, -1] = NUM_EXPERTS, 0.0
    flipped = Routing(ids_TK.flip(-1), weights_TK.flip(-1))
    assert_routes_as(
        identify(replace(example, routing=flipped), KnownForms()), RULES["softmax"], ()
    )


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(RULES)),
    seed=st.integers(0, 99),
    token=st.integers(0, TOKENS - 1),
    damage=st.sampled_from(["weight", "choice"]),
)
def test_one_different_token_rejects_rule(name: str, seed: int, token: int, damage: str) -> None:
    vectors = (vector(5), vector(6))
    example = example_of(RULES[name], vectors=vectors, seed=seed)
    ids_TK = example.routing.ids_TK.clone()
    weights_TK = example.routing.weights_TK.clone()
    if damage == "weight":
        weights_TK[token, 1] *= 1.02
    else:
        worst = int(example.logits_TE[token].argmin())
        if worst in ids_TK[token].tolist():
            return
        ids_TK[token, 0] = worst
    assert identify(replace(example, routing=Routing(ids_TK, weights_TK)), ANYWHERE) is None


def test_unknown_router_matches_no_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(TOKENS, NUM_EXPERTS, generator=generator).argsort(-1)[:, :K]
    routing = Routing(ids_TK, torch.rand(TOKENS, K, generator=generator))
    example = RouterExample(logits_TE=some_logits(0), routing=routing, vectors=(vector(1),))
    assert identify(example, ANYWHERE) is None
    even = Routing(example_of(RULES["softmax"]).routing.ids_TK, torch.ones(TOKENS, K))
    assert identify(replace(example, routing=even), ANYWHERE) is None


@pytest.mark.parametrize("name", ["softmax-normalised", "softmax", "sigmoid-biased"])
def test_low_precision_is_tolerated(name: str) -> None:
    """A router with scores and weights in bfloat16."""
    rule, bias_E = RULES[name], vector(6)
    logits_TE = some_logits(0).to(torch.bfloat16)
    weights = slow_routing(rule, logits_TE, bias_E if rule.biased else None)
    example = RouterExample(
        logits_TE=logits_TE, routing=as_routing(weights, torch.bfloat16), vectors=(bias_E,)
    )
    found = identify(example, ANYWHERE)
    assert found is not None
    assert (found.rule.score, found.rule.chosen) in {
        (rule.score, rule.chosen), ("given", "softmax") if "softmax-n" in name else ("", ""),
    }  # fmt: skip


def test_router_that_rounds_before_it_selects_is_identified() -> None:
    """Switch Transformers: logits in float32, but the best of the scores in bfloat16."""
    logits_TE = some_logits(1, 512) / 8
    scores_TE = logits_TE.softmax(-1)
    weights_T1, ids_T1 = scores_TE.bfloat16().max(-1, keepdim=True)
    assert (ids_T1 != scores_TE.argmax(-1, keepdim=True)).any()
    found = identify(RouterExample(logits_TE=logits_TE, routing=Routing(ids_T1, weights_T1)))
    assert found is not None
    assert (found.rule.score, found.rule.chosen, found.rule.scale) == ("softmax", "kept", 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_never_are_nan(dtype: torch.dtype) -> None:
    padding_TK = torch.full((2, K), NUM_EXPERTS)
    far_TE = torch.full((2, NUM_EXPERTS), -200.0, dtype=dtype)
    for rule in RULES.values():
        assert torch.equal(rule.weights(far_TE, padding_TK), torch.zeros(2, K))
        assert rule.weights(far_TE, torch.tensor([[0, 1, 2]] * 2)).isfinite().all()
