"""Every family answers through the engine as it does by itself, packed where it can be."""

import pytest
import torch
from engines import check_crowd, engine_of
from test_encoder_decoder_serving import switch
from tiny_models import tiny_model
from tiny_served import COMMON, FAMILIES, saved, tiny
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def qwen3_moe():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, head_dim=8
    )
    model = Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model.eval()


MODELS = {
    **{family: lambda family=family: tiny(family) for family in FAMILIES},
    "Qwen3Moe": qwen3_moe,
    "sliding": lambda: tiny("Mixtral", sliding_window=5),
    "soft caps": lambda: tiny("Olmoe", num_key_value_heads=4),
    "longrope": lambda: tiny(
        "Mixtral",
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 20,
            "factor": 4.0,
        },
    ),
    "threshold": lambda: tiny_model(inference_rule="threshold:0.9", vocab_size=61),
    "attention experts": lambda: tiny_model(
        inference_rule="threshold:0.9", vocab_size=61, num_attention_experts=4, head_dim=8
    ),
    "rule of the batch": lambda: tiny_model(inference_rule="threshold_top_k:0.9", vocab_size=61),
    "Switch": lambda: switch(),
}
SEPARATE = {"longrope", "rule of the batch", "Switch"}


@pytest.mark.parametrize("name", MODELS)
def test_a_crowd_gets_what_each_would_get_alone(name, tmp_path):
    folder = saved(MODELS[name](), tmp_path)
    with engine_of(folder, context=120, prefill_chunk=6, max_concurrency=4) as engine:
        assert engine.stats().runner == ("separate" if name in SEPARATE else "packed")
        engine.served.model.generation_config.eos_token_id = None
        check_crowd(engine)
        assert engine.served.model.config._attn_implementation != "moefit_packed"
