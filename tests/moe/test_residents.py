import math
import random

import pytest
import torch

from moefit.moe.residents import (
    choice_margins,
    chosen_experts,
    eviction_loss,
    simulated_residents,
    slot_hits,
)
from moefit.moe.routing import Rule, active_experts
from moefit.serve.cache.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.cache.slot_table import SlotTable

TOP_2 = Rule(kind="top_k", k=2)


def served(chosen, num_experts, slots):
    """Return the residents before each token in the slot table of the server."""
    policy = POLICIES[DEFAULT_POLICY]()
    table, before = SlotTable(num_experts, slots, policy), []
    for needed in chosen:
        before.append(set(table.residents))
        policy.observe(dict.fromkeys(needed, 1.0))
        for expert in needed - set(table.residents):
            slot = table.reserve(expert, needed)
            assert slot is not None
            table.publish(slot)
    return before


@pytest.mark.parametrize("slots", [3, 5, 8])
def test_residents_are_those_of_the_server(slots):
    chance = random.Random(slots)
    chosen = [[set(chance.sample(range(8), 3)) for _ in range(60)] for _ in range(4)]
    chosen_BTE = torch.zeros(4, 60, 8, dtype=torch.bool)
    for b, sequence in enumerate(chosen):
        for t, needed in enumerate(sequence):
            chosen_BTE[b, t, list(needed)] = True
    resident_BTE, full_BT = simulated_residents(chosen_BTE, slots)
    for b, sequence in enumerate(chosen):
        found = [set(row.nonzero().flatten().tolist()) for row in resident_BTE[b]]
        assert found == served(sequence, 8, slots)
        assert full_BT[b].tolist() == [len(one) >= slots for one in found]


def test_more_experts_than_slots():
    """The slots hold some of a token's experts, never others."""
    chosen_BTE = torch.rand(2, 9, 6) < 0.7
    resident_BTE, _ = simulated_residents(chosen_BTE, 2)
    assert (resident_BTE.sum(-1) <= 2).all()
    many_BT = chosen_BTE.sum(-1)[:, :-1] >= 2
    kept_BTE = resident_BTE[:, 1:]
    assert (chosen_BTE[:, :-1] | ~kept_BTE)[many_BT].all()


@pytest.mark.parametrize("text", ["top_k:2", "threshold:0.8", "threshold:2.5"])
def test_choice_is_that_of_the_rule(text):
    rule, logits = Rule.parse(text), torch.randn(3, 7, 6)
    expected = active_experts(logits.flatten(0, 1).softmax(-1), rule).view(3, 7, 6)
    assert torch.equal(chosen_experts(logits, rule), expected)
    best = logits == logits.amax(-1, keepdim=True)
    assert torch.equal((choice_margins(logits, rule) > 0) | best, expected | best)


def of_choices(choices, num_experts, scale):
    """Return logits of one sequence that choose these experts."""
    chosen = torch.stack([torch.eye(num_experts)[list(one)].sum(0) for one in choices])
    return (scale * (2 * chosen - 1))[None]


def test_loss_is_the_share_of_choices_that_evict():
    kept = of_choices([{0, 1}] * 6 + [{0, 2}], 5, 40.0)
    assert eviction_loss(kept, TOP_2, 2).item() == pytest.approx(1 / 12)  # full from the second on
    assert eviction_loss(of_choices([{0, 1}] * 7, 5, 40.0), TOP_2, 2).item() == pytest.approx(
        0, abs=1e-6
    )
    apart = of_choices([{0, 1}, {2, 3}, {0, 1}, {2, 3}], 5, 40.0)
    assert eviction_loss(apart, TOP_2, 2).item() == pytest.approx(1)
    # With room for a third expert, it alone is no miss, and the slots that wait are none.
    assert eviction_loss(
        of_choices([{0, 1}, {0, 2}] * 3, 5, 40.0), TOP_2, 3
    ).item() == pytest.approx(0, abs=1e-6)
    assert eviction_loss(of_choices([{0, 1}], 5, 40.0), TOP_2, 2).item() == pytest.approx(
        0, abs=1e-6
    )  # nothing is full


def test_gradient_moves_the_choice_towards_residents():
    logits = of_choices([{0, 1}] * 3 + [{0, 2}], 5, 0.5).requires_grad_()
    eviction_loss(logits, TOP_2, 2).backward()
    assert logits.grad is not None
    last_E = logits.grad[0, -1]
    assert last_E[2] > 0 and last_E[1] < 0  # descent lowers the absent one, raises the resident
    assert not logits.grad[0, 0].any()


@pytest.mark.parametrize("finite", [1, 2, 3])
def test_excluded_experts_have_no_effect_on_the_loss(finite):
    logits = torch.full((1, 6, 5), -math.inf)
    logits[..., :finite] = torch.arange(finite).float()
    logits.requires_grad_()
    loss = eviction_loss(logits, TOP_2, 2)
    loss.backward()
    assert math.isfinite(loss.item())
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_training_with_the_loss_raises_hits():
    torch.manual_seed(0)
    logits = torch.randn(2, 48, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    before = slot_hits(logits, 2, 3)
    for _ in range(40):
        optimizer.zero_grad()
        eviction_loss(logits, TOP_2, 3).backward()
        optimizer.step()
    assert slot_hits(logits, 2, 3) > before + 0.2


def test_hits():
    assert slot_hits(of_choices([{0, 1}, {0, 2}, {0, 1}], 4, 1.0), 2, 2) == pytest.approx(0.5)
    assert slot_hits(of_choices([{0, 1}, {0, 1}], 4, 1.0), 2, 3) == 1
    assert math.isnan(slot_hits(of_choices([{0, 1}], 4, 1.0), 2, 2))
