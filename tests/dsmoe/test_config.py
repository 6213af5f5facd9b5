"""Errors name the given value, the reason, and the nearest value that works."""

import pytest

from moefit.dsmoe.config import DsMoeConfig
from moefit.errors import ConfigError

POSITIVE = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_attention_experts", "num_experts", "max_position_embeddings",
]  # fmt: skip


LOSSES = [
    "mlp_mi_loss_coef", "attention_mi_loss_coef", "load_balancing_loss_coef", "z_loss_coef",
]  # fmt: skip


def message(**fields) -> str:
    with pytest.raises(ConfigError) as error:
        DsMoeConfig(**fields)
    return str(error.value)


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_are_at_least_one(name: str, value: int) -> None:
    assert message(**{name: value, "head_dim": 32}).startswith(
        f"{name}={value}, but it must be an integer of at least 1"
    )


@pytest.mark.parametrize("value", [0, -2])
def test_head_dim_is_at_least_one(value: int) -> None:
    assert message(head_dim=value).startswith(
        f"head_dim={value}, but it must be an integer of at least 1"
    )


def test_heads_must_divide_the_width() -> None:
    text = message(hidden_size=100, num_attention_heads=8)
    assert "hidden_size=100 does not divide into num_attention_heads=8" in text
    assert "the nearest that works is hidden_size=96, or give head_dim" in text


def test_suggested_value_works() -> None:
    assert DsMoeConfig(hidden_size=96, num_attention_heads=8).head_dim == 12
    assert DsMoeConfig(hidden_size=100, num_attention_heads=8, head_dim=16).head_dim == 16


def test_more_heads_than_width() -> None:
    assert "nearest that works is hidden_size=16" in message(hidden_size=4, num_attention_heads=8)


def test_odd_head_dim() -> None:
    text = message(head_dim=31)
    assert "head_dim=31 is odd" in text
    assert "rotary embeddings need pairs" in text


def test_odd_derived_head_dim() -> None:
    assert "head_dim=3 is odd" in message(hidden_size=24, num_attention_heads=8)


def test_attention_heads_must_match_experts_and_kv_heads() -> None:
    text = message(num_attention_heads=8, num_attention_experts=4, num_key_value_heads=4)
    assert "num_attention_heads=8 is not num_attention_experts=4 times" in text
    assert "num_key_value_heads=4; the nearest that works is num_attention_heads=16" in text


def test_kv_heads_are_derived_from_attention_experts() -> None:
    assert DsMoeConfig(num_attention_heads=8, num_attention_experts=4).num_key_value_heads == 2
    assert DsMoeConfig(num_attention_heads=8).num_key_value_heads == 8


def test_attention_experts_that_do_not_divide_the_heads() -> None:
    text = message(num_attention_heads=8, num_attention_experts=3)
    assert "num_attention_heads=8 is not num_attention_experts=3 times" in text
    assert "the nearest that works is num_attention_heads=6" in text


def test_kv_heads_must_divide_the_heads() -> None:
    text = message(num_attention_heads=8, num_key_value_heads=3)
    assert "num_attention_heads=8 is not a multiple of num_key_value_heads=3" in text
    assert "that works is num_attention_heads=" in text


def test_more_kv_heads_than_heads() -> None:
    text = message(num_attention_heads=2, num_key_value_heads=3)
    assert "the nearest that works is num_attention_heads=3" in text


def test_unknown_mlp_type() -> None:
    assert message(mlp_type="relu") == "mlp_type='relu' is unknown; use 'gelu' or 'swiglu'"


def test_router_hidden_size() -> None:
    text = message(router_hidden_size=0)
    assert "router_hidden_size=0, but it must be an integer of at least 1" in text
    assert "null for a linear router" in text


@pytest.mark.parametrize("which", ["training_rule", "inference_rule"])
@pytest.mark.parametrize("rule", ["topk:2", "top_k", "top_k:0", "top_k:2.5", "threshold:nan", ""])
def test_unknown_rule(which: str, rule: str) -> None:
    text = message(**{which: rule})
    assert f"{rule!r} is not an inference rule" in text
    assert "write dense, top_k:K, threshold:EPS or threshold_top_k:EPS" in text
    assert "for example top_k:4" in text


@pytest.mark.parametrize("which", ["training_rule", "inference_rule"])
def test_rule_with_too_many_experts_raises(which: str) -> None:
    text = message(**{which: "top_k:17"}, num_experts=16)
    assert "top_k:17 asks for 17 experts per token, but there are 16" in text
    assert "the most that works is top_k:16" in text


def test_dense_model_rejects_top_2() -> None:
    assert "the most that works is top_k:1" in message(num_experts=1, training_rule="top_k:2")


@pytest.mark.parametrize("changes", [{"num_experts": 1}, {"num_hidden_layers": 1}])
def test_pregated_models_have_something_to_choose_for(changes) -> None:
    said = message(pregated=True, **changes)
    assert "pregated=True lets a block choose" in said and "pregated=false" in said


def test_previous_token_needs_experts_to_choose() -> None:
    assert DsMoeConfig(pregated="previous_token", num_hidden_layers=1).pregated == "previous_token"
    said = message(pregated="previous_token", num_experts=1)
    assert "num_experts=1; give 2 or more, or pregated=false" in said


def test_routers_without_weights_see_no_embedding() -> None:
    said = message(pregated="previous_token_and_embedding", router_type="grap")
    assert "give router_type='linear', or pregated='previous_token'" in said


def test_config_error_is_value_error() -> None:
    with pytest.raises(ValueError, match="num_experts=0"):
        DsMoeConfig(num_experts=0)


@pytest.mark.parametrize("value", ["16", 16.0, True, None])
def test_sizes_must_be_integers(value) -> None:
    assert f"num_experts={value!r}, but it must be an integer" in message(num_experts=value)


@pytest.mark.parametrize(
    ("name", "wrong", "bound"),
    [
        *(
            (name, [-1.0, "1e-3", None, True, float("nan")], "a number of at least 0")
            for name in LOSSES
        ),
        ("routed_scaling_factor", [0, -2.0, "2e1", float("inf")], "a number above 0"),
        ("initializer_range", [0.0, "0.02", None], "a number above 0"),
        ("rms_norm_eps", [0, "1e-6", [1e-6]], "a number above 0"),
        ("attention_dropout", [1, -0.1, "0.1"], "a number of at least 0 and below 1"),
        ("qk_norm", [1, "true", None], "true or false"),
        (
            "pregated",
            [1, "yes", None],
            "true, false, 'previous_token' or 'previous_token_and_embedding'",
        ),
        ("use_cache", ["no"], "true or false"),
        ("output_router_logits", [0], "true or false"),
        ("tie_word_embeddings", ["yes"], "true or false"),
        ("training_rule", [3, None, ["dense"]], "text, such as 'dense' or 'top_k:4'"),
        ("inference_rule", [0.48], "text, such as 'dense' or 'top_k:4'"),
    ],
)
def test_fields_are_bounded(name: str, wrong: list, bound: str) -> None:
    for value in wrong:
        assert message(**{name: value}) == f"{name}={value!r}, but it must be {bound}"


def test_integers_are_accepted_as_floats() -> None:
    fields = {"routed_scaling_factor": 16, "attention_dropout": 0, "mlp_mi_loss_coef": 1}
    config = DsMoeConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", ["0", -1, 1.0, True, ["0"]])
def test_token_ids(name: str, value) -> None:
    assert message(**{name: value}).startswith(f"{name}={value!r}, but it must be")
    assert DsMoeConfig(**{name: 7}).vocab_size > 7
    assert DsMoeConfig(eos_token_id=[1, 2]).eos_token_id == [1, 2]


def test_pad_token_beyond_vocabulary_raises() -> None:
    assert message(pad_token_id=50, vocab_size=50).endswith("the largest that works is 49")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("linear", "rope_parameters='linear', but it must be a mapping"),
        (
            {"rope_type": "spiral"},
            "rope_type='spiral' is unknown; use one of default, linear, dynamic, yarn",
        ),
        ({"rope_type": "linear"}, "Missing required keys"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4', but it must be a number above 0"),
        ({"rope_theta": 0}, "rope_theta=0, but it must be a number above 0"),
        ({"rope_type": "linear", "factor": None}, "factor=None, but it must be a number above 0"),
    ],
)
def test_rotary_parameters(given, said: str) -> None:
    assert said in message(rope_parameters=given)


def test_valid_rotary_parameters_are_kept(tmp_path) -> None:
    given = {"rope_type": "linear", "factor": 2}
    config = DsMoeConfig(rope_parameters=given)
    assert given == {"rope_type": "linear", "factor": 2}
    config.save_pretrained(tmp_path)
    again = DsMoeConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters
    assert again.rope_parameters["factor"] == 2
