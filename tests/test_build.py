import pytest
import torch

from moefit.train.build import attention_implementation, build_model, loss_weights, use_bf16
from moefit.train.config import make_config

CPU = torch.device("cpu")


def test_the_seed_makes_the_weights_and_leaves_the_global_state_alone(config):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    a, b = (build_model(config, vocab_size=300, eos_token_id=0) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_preset_with_a_field_of_its_own(tree):
    tree["model"] = {"preset": "dsmoe-tiny", "num_experts": 8}
    model = build_model(make_config(tree), vocab_size=300, eos_token_id=0)
    assert (model.config.num_experts, model.config.vocab_size) == (8, 300)
    assert model.config.mlp_mi_loss_coef == 0.02


def test_load_balancing_counts_the_training_rules_k(tree):
    tree["model"]["training_rule"] = "top_k:2"
    tree["loss"] = {"load_balancing": 0.01, "z": 0.001}
    config = make_config(tree)
    weights = loss_weights(config, build_model(config, vocab_size=300, eos_token_id=0))
    assert (weights.k, weights.load_balancing, weights.z) == (2, 0.01, 0.001)


@pytest.mark.parametrize(
    ("precision", "length", "expected"),
    [("bf16", 512, "eager"), ("bf16", 513, "sdpa"), ("fp32", 64, "sdpa")],
)
def test_attention_that_pays(tree, precision, length, expected):
    config = make_config(tree | {"precision": precision, "seq_len": length})
    assert attention_implementation(config, CPU) == expected
    chosen = make_config(tree | {"attention": "sdpa", "precision": precision})
    assert attention_implementation(chosen, CPU) == "sdpa"


def test_precision(tree):
    assert use_bf16(make_config(tree | {"precision": "bf16"}), CPU)
    assert not use_bf16(make_config(tree | {"precision": "fp32"}), CPU)
    automatic = use_bf16(make_config(tree | {"precision": "auto"}), CPU)
    assert automatic == torch.cpu._is_amx_tile_supported()


def test_a_presets_alpha_counts_unless_another_is_given(tree):
    tree["model"], tree["loss"] = {"preset": "dsmoe-tiny"}, {}
    config = make_config(tree)
    model = build_model(config, vocab_size=300, eos_token_id=0)
    assert loss_weights(config, model).mlp_mi == model.config.mlp_mi_loss_coef > 0
    config = make_config(tree | {"loss": {"mlp_mi": 0.0}})
    assert loss_weights(config, build_model(config, vocab_size=300, eos_token_id=0)).mlp_mi == 0


def test_without_any_model_setting_it_is_a_preset():
    assert make_config({}).model.preset == "dsmoe-tiny"
