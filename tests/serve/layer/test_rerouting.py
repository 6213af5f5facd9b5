import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from slow_router import NUM_EXPERTS, RULES, Slow, Weights
from torch import Tensor

from moefit.moe.routing import Routing
from moefit.serve.layer.rerouting import (
    ScoredRouting,
    mask_absent,
    rescale_weights,
    substitute_absent,
    substituted_mass,
)

unhurried = settings(deadline=None)


@dataclass
class Case:
    """Routing in which some tokens have fewer experts and padding is anywhere."""

    scored: ScoredRouting
    resident_E: Tensor
    slow: list[Slow]
    chosen: list[list[int]]

    @property
    def residents(self) -> set[int]:
        return set(self.resident_E.nonzero().flatten().tolist())


def make_case(name: str, *, tokens: int, k: int, residents: set[int], seed: int, padding: float):
    generator = torch.Generator().manual_seed(seed)
    rule = RULES[name]
    tokens = max(tokens, 1) if rule.groups else tokens
    logits_TE = 2 * torch.randn(tokens, NUM_EXPERTS, generator=generator)
    bias_E = 0.3 * torch.randn(NUM_EXPERTS, generator=generator) if rule.biased else None
    slow = [Slow(rule, logits_E, bias_E) for logits_E in logits_TE]
    everyone = set(range(NUM_EXPERTS))
    chosen, ids, weights = [], [], []
    for one in slow:
        best: list[int | None] = list(one.best(k, everyone, one.preference()))
        places = torch.rand(len(best), generator=generator).tolist()
        row = [None if place < padding else e for e, place in zip(best, places, strict=True)]
        row += [None] * (k - len(row))
        row = [row[i] for i in torch.randperm(k, generator=generator).tolist()]
        real = [e for e in row if e is not None]
        by_expert = one.weights(real)
        chosen.append(real)
        ids.append([NUM_EXPERTS if e is None else e for e in row])
        weights.append([0.0 if e is None else by_expert[e] for e in row])
    routing = Routing(
        torch.tensor(ids, dtype=torch.long).view(tokens, k), torch.tensor(weights).view(tokens, k)
    )
    resident_E = torch.zeros(NUM_EXPERTS, dtype=torch.bool)
    resident_E[list(residents)] = True
    scored = ScoredRouting(rule=rule, logits_TE=logits_TE, bias_E=bias_E, routing=routing)
    return Case(scored, resident_E, slow, chosen)


cases = st.builds(
    make_case,
    st.sampled_from(sorted(RULES)),
    tokens=st.sampled_from([0, 1, 2, 9]),
    k=st.integers(1, 4),
    residents=st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1),
    seed=st.integers(0, 10**6),
    padding=st.sampled_from([0.0, 0.0, 0.4]),
)


def by_expert(routing: Routing) -> list[Weights]:
    """Return weights by token; fails for repeated experts and weights of padding."""
    found = []
    for ids_K, weights_K in zip(routing.ids_TK.tolist(), routing.weights_TK.tolist(), strict=True):
        real = {e: w for e, w in zip(ids_K, weights_K, strict=True) if e < NUM_EXPERTS}
        assert len(real) == sum(e < NUM_EXPERTS for e in ids_K), f"an expert twice: {ids_K}"
        assert all(w == 0 for e, w in zip(ids_K, weights_K, strict=True) if e == NUM_EXPERTS)
        found.append(real)
    return found


def assert_same(routing: Routing, expected: list[Weights]) -> None:
    for ours, theirs in zip(by_expert(routing), expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6)


@unhurried
@given(cases)
def test_mask_absent_matches_the_slow_router(case: Case) -> None:
    expected = []
    for one, chosen in zip(case.slow, case.chosen, strict=True):
        values = one.preference()
        if all(values[e] == -math.inf for e in case.residents):  # every kept group is absent
            values = one.scores()
        expected.append(one.weights(one.best(len(chosen), case.residents, values)))
    routing = mask_absent(case.scored, case.resident_E)
    assert_same(routing, expected)
    for ours, chosen in zip(by_expert(routing), case.chosen, strict=True):
        assert set(ours) <= case.residents
        assert bool(ours) == bool(chosen), "a token is left without an expert"


@unhurried
@given(cases)
def test_nothing_changes_with_all_experts_resident(case: Case) -> None:
    everyone_E = torch.ones(NUM_EXPERTS, dtype=torch.bool)
    expected = [
        one.weights(one.best(len(chosen), set(range(NUM_EXPERTS)), one.preference()))
        for one, chosen in zip(case.slow, case.chosen, strict=True)
    ]
    assert_same(mask_absent(case.scored, everyone_E), expected)
    assert substitute_absent(case.scored, everyone_E, bound=1.0, protected=0) is case.scored.routing


def replaced_experts(
    one: Slow, chosen: list[int], case: Case, bound: float, protected: int
) -> list[int]:
    """Return the chosen experts that are replaced; skip cases that depend on rounding."""
    weights = one.weights(chosen)
    total = sum(weights.values())
    heavy = sorted(chosen, key=lambda e: -weights[e])[:protected]
    absent = [e for e in chosen if e not in case.residents and e not in heavy]
    lost, mass = [], 0.0
    for expert in sorted(absent, key=lambda e: weights[e]):
        mass += weights[expert] / total
        assume(abs(mass - bound) > 1e-5 or bound == 1)
        if mass > bound + 1e-9:
            break
        lost.append(expert)
    return lost


@unhurried
@given(cases, st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]), st.integers(0, 5))
def test_substitute_absent_matches_the_slow_router(
    case: Case, bound: float, protected: int
) -> None:
    expected: list[Weights] = []
    for t, (one, chosen) in enumerate(zip(case.slow, case.chosen, strict=True)):
        lost = replaced_experts(one, chosen, case, bound, protected)
        free = one.best(len(chosen), case.residents - set(chosen), one.preference())
        ids = [e for e in case.scored.routing.ids_TK[t].tolist() if e < NUM_EXPERTS]
        gone = [e for e in ids if e in lost]
        substitutes = dict(zip(gone, free, strict=False))
        expected.append(one.weights([substitutes.get(e, e) for e in ids]))
    routing = substitute_absent(case.scored, case.resident_E, bound=bound, protected=protected)
    assert_same(routing, expected)
    for after, chosen, one in zip(by_expert(routing), case.chosen, case.slow, strict=True):
        assert len(after) == len(chosen)
        weights = one.weights(chosen)
        share = sum(weights[e] for e in set(chosen) - set(after)) / (sum(weights.values()) or 1.0)
        assert share <= bound + 1e-5
        heavy = sorted(chosen, key=lambda e: -weights[e])[:protected]
        assert set(heavy) <= set(after)


@pytest.mark.parametrize("name", sorted(RULES))
def test_ties_do_not_depend_on_the_batch(name: str) -> None:
    """Two values and sixteen tokens: a token's experts must not depend on the others."""
    case = make_case(name, tokens=16, k=3, residents={1, 2, 4, 7}, seed=3, padding=0.0)
    coarse_TE = case.scored.logits_TE.sign().to(torch.bfloat16)
    ids_TK = case.scored.routing.ids_TK

    def routed(rows: slice) -> list[Routing]:
        scored = ScoredRouting(
            rule=case.scored.rule,
            logits_TE=coarse_TE[rows],
            bias_E=case.scored.bias_E,
            routing=Routing(ids_TK[rows], case.scored.routing.weights_TK[rows]),
        )
        return [
            mask_absent(scored, case.resident_E),
            substitute_absent(scored, case.resident_E, bound=0.6, protected=1),
        ]

    together, again = routed(slice(None)), routed(slice(None))
    alone = [routed(slice(t, t + 1)) for t in range(16)]
    for i, routing in enumerate(together):
        assert torch.equal(routing.ids_TK, again[i].ids_TK)
        assert torch.equal(routing.ids_TK, torch.cat([one[i].ids_TK for one in alone]))
        assert all(by_expert(routing))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_keep_the_routers_dtype(dtype: torch.dtype) -> None:
    case = make_case("softmax", tokens=3, k=2, residents={0, 1, 2}, seed=0, padding=0.0)
    routing = case.scored.routing
    low = ScoredRouting(
        rule=case.scored.rule,
        logits_TE=case.scored.logits_TE,
        bias_E=None,
        routing=Routing(routing.ids_TK, routing.weights_TK.to(dtype)),
    )
    for after in (
        mask_absent(low, case.resident_E),
        substitute_absent(low, case.resident_E, bound=1.0, protected=0),
        rescale_weights(low.routing, mask_absent(low, case.resident_E)),
    ):
        assert after.weights_TK.dtype == dtype


@unhurried
@given(cases)
def test_substituted_mass_is_the_share_of_replaced_experts(case: Case) -> None:
    before, after = case.scored.routing, mask_absent(case.scored, case.resident_E)
    lost = total = 0.0
    for old, new in zip(by_expert(before), by_expert(after), strict=True):
        lost += sum(weight for expert, weight in old.items() if expert not in new)
        total += sum(old.values())
    assert substituted_mass(before, after) == pytest.approx(lost / total if total else 0, abs=1e-5)
    assert substituted_mass(before, before) == 0.0


@unhurried
@given(cases)
def test_rescale_weights_keeps_each_tokens_total_weight(case: Case) -> None:
    after = mask_absent(case.scored, case.resident_E)
    scaled = rescale_weights(case.scored.routing, after)
    assert torch.equal(scaled.ids_TK, after.ids_TK)
    torch.testing.assert_close(scaled.weights_TK.sum(-1), case.scored.routing.weights_TK.sum(-1))
