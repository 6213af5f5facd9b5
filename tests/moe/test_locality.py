from itertools import pairwise

import pytest
import torch

from moefit.moe.locality import WINDOW, locality_statistics, routing_locality_loss
from moefit.moe.residents import slot_hits


def test_loss_equals_slow_reference():
    logits = torch.randn(3, 7, 5, requires_grad=True)
    total, count = 0.0, 0
    for sequence in logits.detach().softmax(-1):
        for before, now in pairwise(sequence):
            total += float((now - before).pow(2).sum())
            count += 1
    loss = routing_locality_loss(logits)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    loss.backward()
    assert logits.grad is not None and logits.grad.any()


def test_constant_routing_has_zero_loss():
    assert routing_locality_loss(torch.randn(2, 1, 4).expand(2, 6, 4)).item() == 0
    assert routing_locality_loss(torch.randn(2, 1, 4)).item() == 0  # one token alone


def one_hot(experts, num_experts):
    """Return logits that clearly choose these experts, one per token."""
    return 50.0 * torch.nn.functional.one_hot(torch.tensor(experts), num_experts).float()


def test_statistics_of_a_single_expert():
    found = locality_statistics([one_hot([2] * 2 * WINDOW, 6)], 1, 1)
    assert found["window_entropy"] == pytest.approx(0, abs=1e-5)
    assert found["window_coverage"] == pytest.approx(1)
    assert found["reuse_distance"] == 1


def test_statistics_of_alternating_experts():
    """Six alternating experts: a third of them covers a third, with reuse distance six."""
    logits = one_hot([i % 6 for i in range(6 * WINDOW)], 6)
    found = locality_statistics([logits, logits], 1, 1)
    assert found["window_entropy"] == pytest.approx(1, abs=0.01)
    assert found["window_coverage"] == pytest.approx(1 / 3, abs=0.05)
    assert found["reuse_distance"] == 6


def test_sequences_are_separate():
    apart = locality_statistics([one_hot([0, 1, 1, 0], 2)], 2, 1)
    assert "reuse_distance" not in apart  # neither sequence uses an expert twice
    assert locality_statistics([one_hot([0, 1, 1, 0], 2)], 1, 1)["reuse_distance"] == 2  # 3 and 1


def test_hits_are_of_two_sequences_of_512_tokens():
    """The rest of a batch changes other statistics, and not this one."""
    logits = torch.randn(4, 600, 6)
    found = locality_statistics([logits.flatten(0, 1)], 4, 2)
    few = logits[:2, :512]
    assert found["slot_hits"] == pytest.approx(slot_hits(few, 2, 2))
    assert found["slot_hits"] != pytest.approx(slot_hits(logits, 2, 2), abs=1e-9)


def test_statistics_are_empty_without_routers():
    assert locality_statistics([], 4, 2) == {}
