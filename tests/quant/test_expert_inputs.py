"""Inputs of each matrix of an expert, for different layouts."""

from collections.abc import Callable

import pytest
import torch
from tiny_served import tiny
from torch import Tensor
from torch.nn import functional as F
from transformers import SwitchTransformersForConditionalGeneration

from moefit.moe.families import MoeBlock, Tensors
from moefit.moe.layouts import find_blocks
from moefit.quant.gptq import expert_inputs
from tests.serve.test_encoder_decoder_serving import switch_config
from tests.serve.test_jetmoe_serving import jetmoe


def expert_of(model: torch.nn.Module, number: int = 1) -> tuple[MoeBlock, Tensors]:
    block = find_blocks(model)[0]
    module = dict(model.get_submodule(block.name).named_parameters())
    tensors: dict[str, Tensor] = {}
    for short in block.layout.specs:
        name, row = block.layout.parameter(short, number)
        tensors[short] = (module[name] if row is None else module[name][row]).detach()
    return block, tensors


@torch.no_grad()
@pytest.mark.parametrize("family", ["Mixtral", "Olmoe", "DeepseekV3"])
def test_a_gated_expert(family: str) -> None:
    block, tensors = expert_of(tiny(family))
    x_ND = torch.randn(5, 32)
    inputs, y_ND = expert_inputs(block.layout, tensors, x_ND)
    gate_NF, up_NF = F.linear(x_ND, tensors["gate_up_proj"]).chunk(2, -1)
    assert set(inputs) == {"gate_up_proj", "down_proj"}
    assert torch.equal(inputs["gate_up_proj"], x_ND)
    assert torch.allclose(inputs["down_proj"], F.silu(gate_NF) * up_NF, atol=1e-6)
    assert torch.equal(y_ND, block.layout.output(tensors, x_ND))


@torch.no_grad()
def test_transposed_matrices_and_biases() -> None:
    block, tensors = expert_of(tiny("GptOss"))
    x_ND = torch.randn(5, 32)
    inputs, y_ND = expert_inputs(block.layout, tensors, x_ND)
    assert set(inputs) == {"gate_up_proj", "down_proj"}
    assert torch.equal(inputs["gate_up_proj"], x_ND)
    again_ND = inputs["down_proj"] @ tensors["down_proj"] + tensors["down_proj_bias"]
    assert torch.allclose(again_ND, y_ND, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [jetmoe, lambda: SwitchTransformersForConditionalGeneration(switch_config())]
)
def test_experts_outside_the_interface(make: Callable[[], torch.nn.Module]) -> None:
    block, tensors = expert_of(make().eval())
    first, last = block.layout.specs
    x_ND = torch.randn(5, tensors[first].shape[1])
    inputs, y_ND = expert_inputs(block.layout, tensors, x_ND)
    assert set(inputs) == {first, last}
    assert torch.equal(inputs[first], x_ND)
    assert torch.allclose(F.linear(inputs[last], tensors[last]), y_ND, atol=1e-6)


def test_hooks_are_removed() -> None:
    block, tensors = expert_of(tiny("Mixtral"))
    with torch.no_grad():
        inputs, _ = expert_inputs(block.layout, tensors, torch.randn(3, 32))
        first = inputs["gate_up_proj"]
        block.layout.output(tensors, torch.randn(4, 32))
    assert inputs["gate_up_proj"] is first
