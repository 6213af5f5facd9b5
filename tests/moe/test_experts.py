from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from torch.nn import functional as F

from moefit.moe.experts import (
    ExpertWeights,
    expert_weights,
    grouped_experts,
    reference_experts,
    scattered_scores,
    wide_experts,
)
from moefit.moe.routing import Routing, Rule, route

Compute = Callable[[Tensor, Routing, ExpertWeights], Tensor]


def wide(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    scores_TE = scattered_scores(routing, weights.w_in_EID.shape[0])
    return wide_experts(x_TD, scores_TE, weights)


FAST = pytest.mark.parametrize("compute", [wide, grouped_experts])
GATED = pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return values.requires_grad_()


def results(compute: Compute, routing_of: Callable[[Tensor], Routing], gated: bool, t: int, e: int):
    """Return output and gradients of x, scores and both matrices, with odd D and F."""
    x_TD, logits_TE = normal(t, 7, seed=0), normal(t, e, seed=1)
    w_in_EID, w_out_EDF = normal(e, 10 if gated else 5, 7, seed=2), normal(e, 7, 5, seed=3)
    weights = ExpertWeights(
        w_in_EID=w_in_EID,
        w_out_EDF=w_out_EDF,
        activation=F.silu if gated else F.gelu,
        gated=gated,
    )
    y_TD = compute(x_TD, routing_of(logits_TE.softmax(-1)), weights)
    (y_TD * normal(t, 7, seed=4).detach()).sum().backward()
    return y_TD.detach(), x_TD.grad, logits_TE.grad, w_in_EID.grad, w_out_EDF.grad


def assert_equal_to_the_reference(
    compute: Compute, routing_of: Callable[[Tensor], Routing], gated: bool, t: int = 11, e: int = 5
) -> None:
    fast = results(compute, routing_of, gated, t, e)
    slow = results(reference_experts, routing_of, gated, t, e)
    # grouped_experts adds up in float32, whatever it is given.
    tolerance = 2e-6 if compute is grouped_experts else 1e-12
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)


@FAST
@GATED
@pytest.mark.parametrize("rule", ["dense", "top_k:1", "top_k:3", "top_k:5", "threshold:1.1"])
@pytest.mark.parametrize("num_tokens", [1, 11])
def test_equals_the_reference_loop(compute: Compute, gated: bool, rule: str, num_tokens: int):
    assert_equal_to_the_reference(
        compute, lambda scores_TE: route(scores_TE, Rule.parse(rule)), gated, t=num_tokens
    )


@FAST
@GATED
def test_experts_without_tokens_get_zero_gradient(compute: Compute, gated: bool) -> None:
    def everyone_to_3(scores_TE: Tensor) -> Routing:
        return Routing(torch.full((11, 1), 3), scores_TE[:, 3:4])

    assert_equal_to_the_reference(compute, everyone_to_3, gated)
    *_, grad_in_EID, grad_out_EDF = results(compute, everyone_to_3, gated, 11, 5)
    used = [False, False, False, True, False]
    assert [bool(grad.any()) for grad in grad_in_EID] == used
    assert [bool(grad.any()) for grad in grad_out_EDF] == used


@FAST
@GATED
def test_padding_ids_are_skipped_even_if_their_weight_is_not_zero(compute: Compute, gated: bool):
    def half_padding(scores_TE: Tensor) -> Routing:
        ids_TK = torch.tensor([[0, 5], [5, 5], [5, 2], [4, 1]])
        return Routing(ids_TK, scores_TE[:, :2])

    assert_equal_to_the_reference(compute, half_padding, gated, t=4)


@FAST
@GATED
def test_expert_chosen_twice_counts_twice(compute: Compute, gated: bool) -> None:
    ids_TK = torch.tensor([[2, 2], [0, 1], [4, 4]])
    assert_equal_to_the_reference(
        compute, lambda scores_TE: Routing(ids_TK, scores_TE[:, :2]), gated, t=3
    )


@FAST
@GATED
def test_one_expert(compute: Compute, gated: bool) -> None:
    assert_equal_to_the_reference(
        compute, lambda scores_TE: route(scores_TE, Rule.parse("dense")), gated, e=1
    )


@pytest.mark.parametrize("compute", [wide, grouped_experts, reference_experts])
@GATED
def test_no_tokens(compute: Compute, gated: bool) -> None:
    def routing_of(scores_TE: Tensor) -> Routing:
        return Routing(torch.empty(0, 2, dtype=torch.long), scores_TE[:, :2])

    y_TD, *grads = results(lambda *a: compute(*a) + a[0], routing_of, gated, 0, 5)
    assert y_TD.shape == (0, 7)
    assert not any(grad.any() for grad in grads if grad is not None)


def test_wide_experts_without_scores_equal_mlp() -> None:
    w_in_EID, w_out_EDF, x_TD = (
        normal(3, 5, 7, seed=0),
        normal(3, 7, 5, seed=1),
        normal(4, 7, seed=2),
    )
    weights = ExpertWeights(w_in_EID=w_in_EID, w_out_EDF=w_out_EDF, activation=F.gelu, gated=False)
    w_out_DEF = w_out_EDF.transpose(0, 1)
    expected_TD = F.gelu(x_TD @ w_in_EID.flatten(0, 1).T) @ w_out_DEF.flatten(1).T
    torch.testing.assert_close(wide_experts(x_TD, None, weights), expected_TD)


def test_scattered_scores_put_each_weight_at_its_expert() -> None:
    routing = Routing(torch.tensor([[2, 0], [3, 1]]), torch.tensor([[0.5, 0.25], [0.0, 1.0]]))
    assert scattered_scores(routing, 3).tolist() == [[0.25, 0.0, 0.5], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize(("mlp_type", "rows"), [("gelu", 8), ("swiglu", 16)])
def test_weights_of_a_module_are_its_own_parameters(mlp_type: str, rows: int) -> None:
    module = tiny_model(mlp_type=mlp_type).model.layers[0].mlp.experts
    weights = expert_weights(module)
    assert weights.w_in_EID.shape == (5, rows, 16)
    assert weights.w_out_EDF is module.down_proj
    assert weights.gated == (mlp_type == "swiglu")
    assert weights.activate(torch.ones(3, rows)).shape == (3, 8)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("mlp_type", ["gelu", "swiglu"])
@pytest.mark.parametrize("rule", ["dense", "top_k:2", "threshold:0.7"])
def test_transformers_implementations_agree(implementation: str, mlp_type: str, rule: str):
    model = tiny_model(mlp_type=mlp_type, inference_rule=rule)
    ids = tokens(2, 9)

    def logits_and_gradients():
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    ours = logits_and_gradients()
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    torch.testing.assert_close(logits_and_gradients(), ours, rtol=1e-4, atol=1e-5)
