import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from moefit.dsmoe.losses import entropies, load_balancing_loss, mutual_information_loss, z_loss


def logits(num_tokens: int, num_experts: int, *, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(num_tokens, num_experts, generator=generator)).requires_grad_()


def balance(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    return load_balancing_loss(logits_TE, 2, real_T)


LOSSES = pytest.mark.parametrize("loss", [mutual_information_loss, balance, z_loss])


@LOSSES
def test_compiling_does_not_divide_the_graph(loss) -> None:
    found = torch._dynamo.explain(loss)(logits(12, 5))
    assert found.graph_count == 1 and found.graph_break_count == 0


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99), st.sampled_from([0.01, 1, 50]))
def test_mi_loss_lies_between_minus_ln_e_and_zero(t: int, e: int, seed: int, scale: float) -> None:
    loss = mutual_information_loss(logits(t, e, seed=seed, scale=scale)).item()
    assert -math.log(e) - 1e-5 <= loss <= 1e-5


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_entropies_lie_between_zero_and_ln_e(t: int, e: int, seed: int) -> None:
    marginal, conditional = (h.item() for h in entropies(logits(t, e, seed=seed)))
    assert -1e-5 <= conditional <= marginal + 1e-5 <= math.log(e) + 2e-5


def test_balanced_one_hot_routing_minimises_mi_loss() -> None:
    one_hot_TE = 1000 * torch.eye(6).repeat(3, 1)
    loss = mutual_information_loss(one_hot_TE).item()
    assert loss == pytest.approx(-math.log(6))


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [1.0, -2.0, 0.5], [0.0, 300.0, 0.0]])
def test_constant_routing_has_zero_mi_loss(row: list[float]) -> None:
    assert mutual_information_loss(torch.tensor([row]).repeat(7, 1)).item() == pytest.approx(
        0, abs=1e-6
    )


def test_mi_loss_by_hand() -> None:
    p_TE = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    conditional = (math.log(2) - 0.9 * math.log(0.9) - 0.1 * math.log(0.1)) / 2
    marginal = -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
    assert [h.item() for h in entropies(p_TE.log())] == pytest.approx([marginal, conditional])
    assert mutual_information_loss(p_TE.log()).item() == pytest.approx(conditional - marginal)


def test_mi_gradient_matches_float64() -> None:
    def formula(logits_TE: Tensor) -> Tensor:
        p_TE = logits_TE.softmax(-1)
        p_E = p_TE.mean(0)
        return -(p_TE * p_TE.log()).sum(-1).mean() + (p_E * p_E.log()).sum()

    logits_TE = logits(11, 5)
    exact_TE = logits_TE.detach().double().requires_grad_()
    mutual_information_loss(logits_TE).backward()
    formula(exact_TE).backward()
    torch.testing.assert_close(logits_TE.grad.double(), exact_TE.grad, rtol=1e-4, atol=1e-7)


@LOSSES
def test_gradients_are_finite_with_unused_experts(loss) -> None:
    logits_TE = (1e4 * torch.eye(4)[torch.zeros(6, dtype=torch.long)]).requires_grad_()
    loss(logits_TE).backward()
    assert torch.isfinite(logits_TE.grad).all()


@LOSSES
def test_padding_does_not_change_losses(loss) -> None:
    bare_TE = logits(9, 4)
    loss(bare_TE).backward()
    padded_TE = torch.full((15, 4), 17.0)
    padded_TE[::2, 1] = -30
    real_T = torch.zeros(15, dtype=torch.bool)
    real_T[[0, 1, 4, 5, 6, 8, 9, 13, 14]] = True
    padded_TE[real_T] = bare_TE.detach()
    padded_TE.requires_grad_()
    value = loss(padded_TE, real_T)
    value.backward()
    assert value.item() == pytest.approx(loss(bare_TE).item())
    torch.testing.assert_close(padded_TE.grad[real_T], bare_TE.grad)
    assert not padded_TE.grad[~real_T].any()


@LOSSES
def test_losses_are_computed_in_float32(loss) -> None:
    half_TE = logits(9, 4).detach().bfloat16()
    assert loss(half_TE).dtype == torch.float32
    torch.testing.assert_close(loss(half_TE), loss(half_TE.float()))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_balancing_is_k_when_uniform(k: int) -> None:
    # Each token prefers k neighbours by a hair, so that choices and probabilities are uniform.
    window_E = torch.tensor([1e-4] * k + [0.0] * (4 - k))
    logits_TE = torch.stack([window_E.roll(shift) for shift in range(4)])
    assert load_balancing_loss(logits_TE, k).item() == pytest.approx(k)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_load_balancing_equals_transformers(k: int) -> None:
    ours_TE, theirs_TE = logits(12, 5), logits(12, 5)
    mask_BT = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    ours = load_balancing_loss(ours_TE, k, mask_BT.flatten().bool())
    theirs = load_balancing_loss_func((theirs_TE,), 5, k, mask_BT)
    assert isinstance(theirs, Tensor)
    (ours + theirs).backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_TE.grad, theirs_TE.grad)


def test_z_loss_by_hand() -> None:
    logits_TE = torch.tensor([[math.log(1), math.log(3)], [math.log(2), math.log(5)]])
    expected = (math.log(4) ** 2 + math.log(7) ** 2) / 2
    assert z_loss(logits_TE).item() == pytest.approx(expected)
