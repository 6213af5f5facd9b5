from types import SimpleNamespace

import pytest
import torch
from tiny_models import gradients, tiny_model, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import use_experts_implementation

from moefit.dsmoe.dense_experts import DENSE_EXPERTS, dense_experts_forward, register_dense_experts
from moefit.dsmoe.losses import RouterLossWeights, language_model_loss, router_loss
from moefit.errors import UnsupportedModelError


@pytest.fixture(autouse=True)
def registered() -> None:
    assert register_dense_experts() == DENSE_EXPERTS == "moefit_dense"


def olmoe(k: int, implementation: str, **changes) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=37, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=4, num_experts=5, num_experts_per_tok=k, initializer_range=0.4,
        pad_token_id=None, eos_token_id=None, **changes,
    )  # fmt: skip
    model = OlmoeForCausalLM(config)
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    return model


def logits_and_gradients(model: nn.Module, ids: Tensor):
    logits = model(ids).logits
    language_model_loss(logits, ids).backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shape", [(2, 9), (1, 1)])
def test_olmoe_with_wide_mlp_matches(k: int, renormalize: bool, shape) -> None:
    ids = tokens(*shape) if shape != (1, 1) else tokens(1, 2)
    eager = logits_and_gradients(olmoe(k, "eager", norm_topk_prob=renormalize), ids)
    wide = logits_and_gradients(olmoe(k, DENSE_EXPERTS, norm_topk_prob=renormalize), ids)
    torch.testing.assert_close(wide, eager, rtol=1e-4, atol=1e-6)


def test_dense_training_of_olmoe_equals_dsmoe() -> None:
    ours = tiny_model(qk_norm=True, mlp_mi_loss_coef=0.3).train()
    stock = olmoe(5, DENSE_EXPERTS).train()
    stock.load_state_dict(ours.state_dict())
    ids = tokens(2, 9)
    expected = ours(ids, labels=ids).loss
    output = stock(ids, output_router_logits=True)
    weights = RouterLossWeights(mlp_mi=0.3)
    loss = language_model_loss(output.logits, ids) + router_loss(output.router_logits, (), weights)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(gradients(stock), gradients(ours), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mlp_type", ["gelu", "swiglu"])
@pytest.mark.parametrize("rule", ["dense", "top_k:2", "threshold:0.7"])
def test_dsmoe_experts_support_dense_implementation(mlp_type: str, rule: str) -> None:
    eager, wide = (tiny_model(mlp_type=mlp_type, inference_rule=rule) for _ in range(2))
    wide.set_experts_implementation(DENSE_EXPERTS)
    results = (logits_and_gradients(model, tokens(2, 9)) for model in (eager, wide))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


class PlainExperts(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.act_fn = F.silu


class OwnGateExperts(PlainExperts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * (up + 1)


@pytest.mark.parametrize(
    ("options", "complaints"),
    [
        ({"is_transposed": True}, ["its matrices are stored transposed"]),
        ({"is_concatenated": False}, ["its gate and up rows are interleaved"]),
        ({"has_bias": True}, ["it adds biases"]),
        ({"has_post_expert_norm": True}, ["it normalises each expert's output"]),
        ({"has_bias": True, "is_transposed": True}, ["transposed", "biases"]),
    ],
)
def test_unsupported_layouts_raise(options: dict, complaints: list[str]) -> None:
    class Experts(PlainExperts):
        pass

    experts = use_experts_implementation(**options)(Experts)(
        SimpleNamespace(_experts_implementation=DENSE_EXPERTS)
    )
    with pytest.raises(UnsupportedModelError, match=r"Experts cannot be .* one wide MLP") as caught:
        experts(torch.randn(2, 6), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    assert all(complaint in str(caught.value) for complaint in complaints)
    assert 'set_experts_implementation("eager")' in str(caught.value)


def test_custom_gate_raises() -> None:
    experts = use_experts_implementation(OwnGateExperts)(SimpleNamespace())
    with pytest.raises(UnsupportedModelError, match=r"its gate is not act\(gate\) \* up"):
        dense_experts_forward(
            experts, torch.randn(2, 6), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
        )
