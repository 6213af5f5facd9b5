"""JetMoE: router, experts and bias in one module, and experts in its attention too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import (
    assert_same_but_for_rounding,
    differs_by,
    greedy,
    hold,
    logits,
    saved,
    serving,
)
from torch import nn
from transformers import JetMoeConfig, JetMoeForCausalLM
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE

from moefit.moe.layouts import GatedLayout, ServedJetMoe

EXPERTS = 5


def config(**changes):
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 4,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    }
    return JetMoeConfig(**(sizes | changes))


def randomised(module: nn.Module):
    """Make biases nonzero."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


def jetmoe(**changes):
    return randomised(JetMoeForCausalLM(config(**changes)))


@pytest.fixture
def inputs():
    ids = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": EXPERTS},
        {"activation_function": "gelu", "tie_word_embeddings": False},
    ],
)
def test_one_slot_per_block_equals_model(changes, tmp_path, inputs):
    model = jetmoe(**changes)
    with serving(saved(model, tmp_path)) as served:
        assert set(served.report()["slots"].values()) == {1}
        assert differs_by(logits(served.model, inputs), logits(model, inputs)) < 1e-6
        assert differs_by(greedy(served.model, inputs), greedy(model, inputs)) < 1e-6
        assert served.report()["fetches"] > len(served.blocks)


def test_bfloat16(tmp_path, inputs):
    folder = saved(jetmoe().to(torch.bfloat16), tmp_path)
    model = JetMoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with serving(folder) as served:
        assert_same_but_for_rounding(served, model, inputs)


def test_router_logits_are_available(tmp_path, inputs):
    model = jetmoe()
    asked = inputs | {"output_router_logits": True}
    with serving(saved(model, tmp_path)) as served, torch.inference_mode():
        ours, theirs = served.model(**asked), model(**asked)
        assert len(ours.router_logits) == len(theirs.router_logits) > 0
        for our, their in zip(ours.router_logits, theirs.router_logits, strict=True):
            assert torch.allclose(our, their, atol=1e-5)
        assert torch.allclose(ours.aux_loss, theirs.aux_loss)


def test_attention_experts_are_dense_weights(tmp_path):
    model = jetmoe()
    with serving(saved(model, tmp_path)) as served:
        assert list(served.blocks) == ["model.layers.0.mlp", "model.layers.1.mlp"]
        name = "model.layers.1.self_attention.experts.input_linear.weight"
        assert torch.equal(served.model.get_parameter(name), model.get_parameter(name))


@pytest.mark.parametrize("residents", [[2], [0, 3], list(range(EXPERTS))])
def test_virtual_mode_is_masked_gating(residents, tmp_path, inputs):
    """Weights are a softmax over the chosen logits, so masked logits are masked gating."""
    model = jetmoe()
    absent_E = torch.full((EXPERTS,), -torch.inf).index_fill(0, torch.tensor(residents), 0)
    with serving(saved(model, tmp_path), slots=len(residents)) as served:
        hold(served, residents, "virtual")
        served.reset()
        for layer in model.model.layers:
            layer.mlp.router.layer.register_forward_hook(lambda *call: call[2] + absent_E)
        assert differs_by(logits(served.model, inputs), logits(model, inputs)) < 1e-6
        assert differs_by(greedy(served.model, inputs), greedy(model, inputs)) < 1e-6
        assert served.report()["fetches"] == 0


@pytest.mark.parametrize("bound", [0.0, 0.4, 1.0])
def test_bounded_mode_respects_bound(bound, tmp_path, inputs):
    model = jetmoe()
    with serving(saved(model, tmp_path), slots=2) as served:
        hold(served, [0, 3], "bounded", bound=bound, ramp=0.0, protected=0)
        served.reset()
        ours = logits(served.model, inputs)
        report = served.report()
        assert report["substituted_mass"] <= bound
        if bound == 0:
            assert differs_by(ours, logits(model, inputs)) < 1e-6
        if bound == 1:
            assert report["substituted_mass"] > 0
            assert report["fetches"] == 0


class FromTheStack(nn.Module):
    """Reference: one token and one expert at a time."""

    def __init__(self, block: JetMoeMoE):
        super().__init__()
        self._layout = GatedLayout(
            block, "input_linear.weight", "output_linear.weight", block.activation
        )
        self._stacks = {short: block.get_parameter(short) for short in self._layout.specs}

    def forward(self, x_TD, ids_TK, weights_TK):
        routing = self._layout.routing(len(x_TD), ids_TK, weights_TK)
        y_TD = torch.zeros_like(x_TD)
        for token, ids_K in enumerate(routing.ids_TK.tolist()):
            for k, expert in enumerate(ids_K):
                tensors = {short: stack[expert] for short, stack in self._stacks.items()}
                y_D = self._layout.output(tensors, x_TD[token : token + 1])[0]
                y_TD[token] += routing.weights_TK[token, k] * y_D
        return y_TD


@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, EXPERTS), st.integers(1, EXPERTS))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_block_with_given_experts_equals_family(sequences, tokens, experts, k):
    block = JetMoeMoE(config(num_local_experts=experts, num_experts_per_tok=min(k, experts)))
    randomised(block)
    x_BTD = torch.randn(sequences, tokens, 16)
    ours = ServedJetMoe(block, FromTheStack(block))(x_BTD)
    assert torch.allclose(ours, block(x_BTD), atol=1e-5)
