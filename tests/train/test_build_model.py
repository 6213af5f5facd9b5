import pytest
import torch

from moefit.errors import ConfigError
from moefit.train.config import make_config
from moefit.train.model import attention_implementation, build_model, loss_weights, use_bf16

CPU = torch.device("cpu")


def test_weights_depend_on_seed_without_global_state(config):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    a, b = (build_model(config, vocab_size=300, eos_token_id=0) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_preset_with_overridden_field(tree):
    tree["model"], tree["loss"] = {"preset": "dsmoe-tiny", "num_experts": 8}, {"mlp_mi": 0.02}
    model = build_model(make_config(tree), vocab_size=300, eos_token_id=0)
    assert (model.config.num_experts, model.config.vocab_size) == (8, 300)
    assert model.config.mlp_mi_loss_coef == 0.02


def test_load_balancing_k_is_training_rules(tree):
    tree["model"]["training_rule"] = "top_k:2"
    tree["loss"] = {"load_balancing": 0.01, "z": 0.001}
    config = make_config(tree)
    weights = loss_weights(config, build_model(config, vocab_size=300, eos_token_id=0))
    assert (weights.k, weights.load_balancing, weights.z) == (2, 0.01, 0.001)


@pytest.mark.parametrize(
    ("precision", "length", "expected"),
    [("bf16", 512, "eager"), ("bf16", 513, "sdpa"), ("fp32", 64, "sdpa")],
)
def test_attention_implementation_choice(tree, precision, length, expected):
    config = make_config(tree | {"precision": precision, "seq_len": length})
    assert attention_implementation(config, CPU) == expected
    chosen = make_config(tree | {"attention": "sdpa", "precision": precision})
    assert attention_implementation(chosen, CPU) == "sdpa"


def test_precision_choice(tree):
    assert use_bf16(make_config(tree | {"precision": "bf16"}), CPU)
    assert not use_bf16(make_config(tree | {"precision": "fp32"}), CPU)
    automatic = use_bf16(make_config(tree | {"precision": "auto"}), CPU)
    assert automatic == torch.cpu._is_amx_tile_supported()


def test_preset_alpha_is_default(tree):
    tree["model"], tree["loss"] = {"preset": "dsmoe-tiny"}, {}
    config = make_config(tree)
    model = build_model(config, vocab_size=300, eos_token_id=0)
    assert loss_weights(config, model).mlp_mi == model.config.mlp_mi_loss_coef > 0
    config = make_config(tree | {"loss": {"mlp_mi": 0.0}})
    assert loss_weights(config, build_model(config, vocab_size=300, eos_token_id=0)).mlp_mi == 0


def test_default_model_is_preset():
    assert make_config({}).model.preset == "dsmoe-tiny"


OLMOE = {
    "architecture": "olmoe",
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_experts": 4,
}


def built(**settings):
    return build_model(make_config(settings), vocab_size=300, eos_token_id=0)


def test_olmoe_trains_all_experts():
    model = built(model=OLMOE, loss={"load_balancing": 0.01, "attention_mi": 0})
    assert model.config.num_experts_per_tok == model.config.num_experts == 4
    weights = loss_weights(make_config({"loss": {"load_balancing": 0.01}}), model)
    assert (weights.k, weights.load_balancing) == (4, 0.01)


def test_olmoe_is_sparse_with_a_number_of_experts_per_token():
    model = built(model=OLMOE | {"num_experts_per_tok": 2}, loss={"load_balancing": 0.01})
    assert (model.config.num_experts_per_tok, model.config.num_experts) == (2, 4)
    assert loss_weights(make_config({"loss": {"load_balancing": 0.01}}), model).k == 2
    assert model.model.layers[0].mlp.gate.top_k == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 33}, "model.hidden_size=33 does not divide .* model.hidden_size=32"),
        ({"hidden_size": 12}, "model.hidden_size=12 does not divide .* model.hidden_size=16"),
        ({"num_experts": 1}, "model.num_experts=1, .* the smallest that works is 2"),
        ({"num_experts": "x"}, "OLMoE cannot be built with .*num_experts='x'.* 'num_experts' "),
        ({"num_experts": -4}, "model.num_experts=-4"),
        ({"num_attention_heads": 0}, "num_attention_heads=0, but it must be an integer"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"rms_norm_eps": "tiny"}, "model.rms_norm_eps='tiny': .* expected float, got str"),
        ({"attention_dropout": 2.0}, "attention_dropout=2.0, but it must be"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "'spiral' is unknown; use one of default"),
        ({"hidden_act": "sili"}, "model.hidden_act='sili' is unknown; use one of .*silu"),
        ({"router_aux_loss_coef": 0.1}, "has no effect.* use loss.load_balancing"),
        ({"output_router_logits": True}, "has no effect.* use loss.load_balancing"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok=5, .*num_experts=4 .* leave it out"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
        ({"mlp_type": "gelu"}, "model.mlp_type is not a field of OlmoeConfig"),
    ],
)
def test_invalid_olmoe_raises(changes, said):
    with pytest.raises(ConfigError, match=said):
        built(model=OLMOE | changes)


def test_construction_errors_become_config_errors(monkeypatch):
    def stumble(config):
        raise RuntimeError("not\n  so")

    monkeypatch.setattr("moefit.train.model.OlmoeForCausalLM", stumble)
    with pytest.raises(ConfigError, match=r"model\.num_experts=4: not so; change that"):
        built(model=OLMOE)


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        ({"preset": "dsmoe-tiny"}, {"attention_mi": 0.1}, "loss.attention_mi=0.1 has no effect"),
        ({"num_experts": 4}, {"attention_mi": 1}, "model.num_attention_experts=1 has no router"),
        ({"preset": "dense-tiny"}, {"mlp_mi": 0.1}, "loss.mlp_mi=0.1 has no .* give 0, or give"),
        ({"num_experts": 1}, {"load_balancing": 1}, "loss.load_balancing=1 has no effect"),
        ({"num_experts": 1}, {"z": 0.1}, "loss.z=0.1 .* give model.num_experts=2 or more"),
        (
            {"num_experts": 1, "routed_scaling_factor": 16},
            {},
            "model.routed_scaling_factor=16 has no effect, .* leave it out, give 1, or",
        ),
    ],
)
def test_router_settings_without_router_raise(model, loss, said):
    with pytest.raises(ConfigError, match=said):
        built(model=model, loss=loss)


@pytest.mark.parametrize(
    "model",
    [
        {"preset": "dense-tiny", "routed_scaling_factor": 1},
        {"preset": "dsmoe-tiny", "num_experts": 1},  # the preset's own factor and alpha stand idle
        {"num_experts": 1, "hidden_size": 32},
    ],
)
def test_zero_and_preset_router_settings_are_accepted(model):
    zeros = {"mlp_mi": 0, "attention_mi": 0.0, "load_balancing": 0, "z": 0}
    assert built(model=model, loss=zeros).config.num_experts == 1
    assert built(model=model).config.num_experts == 1


def test_sparse_rule_without_router_raises():
    with pytest.raises(ConfigError, match=r"sparse\.rule=top_k:1 has no effect, .* give null"):
        built(model={"num_experts": 1}, sparse={"rule": "top_k:1"})
    with pytest.raises(ConfigError, match=r"top_k:9 asks for 9 experts .* top_k:8"):
        built(model={"num_experts": 8, "hidden_size": 32}, sparse={"rule": "top_k:9"})
    with pytest.raises(ConfigError, match=r"sparse\.rule"):
        built(model=OLMOE, sparse={"rule": "top_k:2"})
