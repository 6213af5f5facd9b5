"""Whole models computed by the kernels equal torch's computation of them."""

import copy

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from moefit.evaluate.kernel_experts import KERNEL_EXPERTS, kernel_experts_forward, use_kernels
from moefit.moe.experts import expert_weights, reference_experts
from moefit.moe.routing import Routing, Rule
from moefit.quant import cpu_kernels

RULES = ("dense", "top_k:1", "top_k:3", "threshold:0.9", "threshold_top_k:0.9:renormalize")
compiled = pytest.mark.skipif(cpu_kernels.kernels() is None, reason="no compiled kernels")


@torch.inference_mode()
def experts_and_inputs(dtype: torch.dtype, num_tokens: int, *, swiglu: bool):
    model = tiny_model(mlp_type="swiglu" if swiglu else "gelu").eval().to(dtype)
    module = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, module.down_proj.shape[1], generator=generator).to(dtype)
    scores_TE = torch.rand(num_tokens, module.num_experts, generator=generator)
    return module, x_TD, scores_TE


@compiled
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_equal_reference(dtype: torch.dtype, num_tokens: int, swiglu: bool) -> None:
    module, x_TD, scores_TE = experts_and_inputs(dtype, num_tokens, swiglu=swiglu)
    num_experts = scores_TE.shape[1]
    weights_TK, ids_TK = scores_TE.topk(3)
    ids_TK = ids_TK.clone()
    ids_TK[::2, 2], weights_TK[::2, 2] = num_experts, 0  # padding
    with torch.inference_mode():
        got = kernel_experts_forward(module, x_TD, ids_TK, weights_TK)
        exact = [t.double() for t in (x_TD, module.down_proj)]
        weights = expert_weights(copy.deepcopy(module).double())
        expected = reference_experts(exact[0], Routing(ids_TK, weights_TK.double()), weights)
    assert got.dtype == dtype
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@compiled
def test_tokens_without_experts_are_zero() -> None:
    module, x_TD, scores_TE = experts_and_inputs(torch.float32, 1, swiglu=True)
    ids_TK = torch.full((1, 2), scores_TE.shape[1])
    with torch.inference_mode():
        assert not kernel_experts_forward(module, x_TD, ids_TK, torch.zeros(1, 2)).any()
        empty = kernel_experts_forward(module, x_TD[:0], ids_TK[:0], torch.zeros(0, 2))
    assert empty.shape == (0, x_TD.shape[1])


def logits(model, ids: Tensor, rule: str) -> Tensor:
    model.set_inference_rule(rule)
    with torch.inference_mode():
        return model(ids).logits


@compiled
@pytest.mark.parametrize("rule", RULES)
def test_dsmoe_equals_torch(rule: str) -> None:
    model = tiny_model(num_attention_experts=2).eval()
    expected = logits(model, tokens(2, 9), rule)
    assert use_kernels(model)
    assert model.config._experts_implementation == KERNEL_EXPERTS
    torch.testing.assert_close(logits(model, tokens(2, 9), rule), expected, rtol=1e-4, atol=1e-5)


@compiled
def test_olmoe_equals_torch() -> None:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=37, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=4, num_experts=5, num_experts_per_tok=2, initializer_range=0.4,
        pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = OlmoeForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    with torch.inference_mode():
        expected = model(tokens(2, 9)).logits
        assert use_kernels(model)
        torch.testing.assert_close(model(tokens(2, 9)).logits, expected, rtol=1e-4, atol=1e-5)


@compiled
def test_generation_equals_torch() -> None:
    model = tiny_model().eval()
    model.set_inference_rule(Rule(kind="top_k", k=2))
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(1, 5), **how)
    use_kernels(model)
    assert torch.equal(model.generate(tokens(1, 5), **how), expected)


def test_weights_that_changed_are_read_again() -> None:
    model = tiny_model().eval()
    use_kernels(model)
    before = logits(model, tokens(1, 5), "top_k:2")
    for layer in model.model.layers:
        layer.mlp.experts.down_proj = torch.nn.Parameter(-layer.mlp.experts.down_proj.detach())
    assert not torch.allclose(logits(model, tokens(1, 5), "top_k:2"), before)


def test_gradients_come_from_torch() -> None:
    module, x_TD, scores_TE = experts_and_inputs(torch.float32, 4, swiglu=True)
    module = copy.deepcopy(module)
    module.down_proj = torch.nn.Parameter(module.down_proj.detach().clone())
    weights_TK, ids_TK = scores_TE.clone().topk(2)
    kernel_experts_forward(module, x_TD.clone(), ids_TK.clone(), weights_TK).sum().backward()
    assert module.down_proj.grad is not None


def test_without_kernels_nothing_changes(monkeypatch) -> None:
    monkeypatch.setattr("moefit.evaluate.kernel_experts.kernels", lambda: None)
    model = tiny_model().eval()
    before = model.config._experts_implementation
    assert not use_kernels(model)
    assert model.config._experts_implementation == before
