"""Layouts of experts compute what their family's modules compute."""

import pytest
import torch
from tiny_served import FAMILIES, model_of, parts_of
from transformers import LlamaConfig, LlamaForCausalLM

from moefit.errors import UnsupportedModelError
from moefit.moe.layouts import find_blocks

TOKENS, K = 5, 2


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_equals_module(family: str) -> None:
    model = model_of(family)
    generator = torch.Generator().manual_seed(0)
    for block in find_blocks(model):
        module = model.get_submodule(block.name)
        x_TD = torch.randn(TOKENS, model.config.hidden_size, generator=generator)
        ids_TK = torch.rand(TOKENS, block.num_experts, generator=generator).argsort(-1)[:, :K]
        weights_TK = torch.rand(TOKENS, K, generator=generator)
        routing = block.layout.routing(TOKENS, ids_TK, weights_TK)
        y_TD = torch.zeros_like(x_TD)
        for token in range(TOKENS):
            for expert, weight in zip(
                routing.ids_TK[token], routing.weights_TK[token], strict=True
            ):
                parts = parts_of(module, block, int(expert))
                y_TD[token] += weight * block.layout.output(parts, x_TD[token][None])[0]
        with torch.no_grad():
            torch.testing.assert_close(y_TD, module(x_TD, ids_TK, weights_TK), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_specs_match_tensor_shapes(family: str) -> None:
    model = model_of(family)
    for block in find_blocks(model):
        assert block.num_experts == 8
        parts = parts_of(model.get_submodule(block.name), block, 3)
        assert {short: tuple(part.shape) for short, part in parts.items()} == {
            short: spec.shape for short, spec in block.layout.specs.items()
        }
        assert block.expert_bytes == sum(part.nbytes for part in parts.values())


def test_blocks_are_in_layer_order() -> None:
    names = [block.name for block in find_blocks(model_of("Mixtral"))]
    assert names == [f"model.layers.{number}.mlp.experts" for number in range(2)]
    assert [block.parent for block in find_blocks(model_of("Mixtral"))] == [
        f"model.layers.{number}.mlp" for number in range(2)
    ]


def test_model_without_experts_raises() -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="has no experts"):
        find_blocks(LlamaForCausalLM(config))
