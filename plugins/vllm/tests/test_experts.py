"""GELU experts by the path that vLLM has on GPUs alone, with a stand-in for it on a CPU."""

from types import SimpleNamespace

import moefit_vllm.experts as code
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation

E, D, INNER = 4, 16, 8  # experts, model width, expert width
PARTS = 2  # processes


class StandIn(nn.Module):
    """Experts without a gate as vLLM's fused path has them, for one process of several."""

    parts = 1

    def __init__(self, **given):
        super().__init__()
        assert given["ckpt_names"][2] is None  # vLLM demands it without a gate
        self.given = given
        inner = given["intermediate_size"] // self.parts
        self.w13_weight = nn.Parameter(torch.empty(given["num_experts"], inner, D))
        self.w2_weight = nn.Parameter(torch.empty(given["num_experts"], D, inner))

    def forward(self, hidden_states, router_logits):
        """Compute each chosen expert of each token by itself."""
        activation = MoEActivation.from_str(self.given["activation"])
        weights_TK, ids_TK = self.given["custom_routing_function"](
            hidden_states, router_logits, self.given["top_k"], self.given["renormalize"]
        )
        rows = []
        for x_D, weights_K, ids_K in zip(hidden_states, weights_TK, ids_TK, strict=True):
            row_D = torch.zeros(D)
            for weight, expert in zip(weights_K, ids_K, strict=True):
                before_1I = F.linear(x_D[None], self.w13_weight[expert])
                after_1I = apply_moe_activation(activation, torch.empty_like(before_1I), before_1I)
                row_D += weight * F.linear(after_1I, self.w2_weight[expert])[0]
            rows.append(row_D)
        return torch.stack(rows)


def block(rule, **changed):
    """Make a block with random routers."""
    config = SimpleNamespace(
        inference_rule=rule, routed_scaling_factor=3.0, num_experts=E, mlp_type="gelu",
        hidden_size=D, intermediate_size=INNER, router_hidden_size=None, **changed,
    )  # fmt: skip
    torch.manual_seed(0)
    made = code.DsMoeBlock(config, "layers.0.mlp")
    nn.init.normal_(made.gate.weight)
    return made


def weights():
    """Return a checkpoint's matrices of a block."""
    torch.manual_seed(1)
    return {"up_proj": torch.randn(E, INNER, D), "down_proj": torch.randn(E, D, INNER)}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Make the plugin choose what it chooses on a GPU."""
    monkeypatch.setattr(code, "fused_takes_gelu", lambda: True)
    monkeypatch.setattr(code, "FusedMoEFactory", StandIn)
    monkeypatch.setattr(code, "get_tensor_model_parallel_world_size", lambda: StandIn.parts)
    monkeypatch.setattr(code, "get_tensor_model_parallel_rank", lambda: 0)


def test_a_cpu_computes_gelu_experts_one_by_one():
    """VLLM's fused path refuses them there."""
    assert not code.fused_takes_gelu()
    assert isinstance(block("top_k:2").experts, code.LoopedExperts)


@pytest.mark.parametrize("rule", ["dense", "top_k:2", "threshold:0.9", "threshold:0.9:renormalize"])
def test_the_fused_path_computes_what_the_loop_does(on_a_gpu, monkeypatch, rule):
    """Activation, weights and routing reach it as it expects them."""
    fused, x_TD = block(rule), torch.randn(5, D)
    assert isinstance(fused.experts, code.FusedExperts)
    loaded = fused.experts.load_weights(weights().items())
    assert loaded == {"fused.w13_weight", "fused.w2_weight"}
    monkeypatch.setattr(code, "fused_takes_gelu", lambda: False)
    looped = block(rule)
    looped.experts.load_state_dict(weights())
    with torch.no_grad():
        assert torch.allclose(fused(x_TD), looped(x_TD), atol=1e-4)


def test_processes_divide_the_experts_width(on_a_gpu, monkeypatch):
    """The sum of their outputs is the whole output."""
    x_TD, made = torch.randn(5, D), weights()
    whole = block("top_k:2")
    whole.experts.load_weights(made.items())
    monkeypatch.setattr(StandIn, "parts", PARTS)
    total_TD = torch.zeros(5, D)
    for rank in range(PARTS):
        monkeypatch.setattr(code, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        part = block("top_k:2")
        part.experts.load_weights(made.items())
        with torch.no_grad():
            total_TD += part(x_TD)
    with torch.no_grad():
        assert torch.allclose(total_TD, whole(x_TD), atol=1e-4)
