"""Each error says what was given, why it can't be, and the nearest thing that works."""

import pytest

from moefit.dsmoe.config import DsMoeConfig
from moefit.errors import ConfigError

POSITIVE = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_attention_experts", "num_experts",
]  # fmt: skip


def message(**fields) -> str:
    with pytest.raises(ConfigError) as error:
        DsMoeConfig(**fields)
    return str(error.value)


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_are_at_least_one(name: str, value: int) -> None:
    assert message(**{name: value, "head_dim": 32}).startswith(
        f"{name}={value}, but it must be a whole number from 1 on"
    )


@pytest.mark.parametrize("value", [0, -2])
def test_head_dim_is_at_least_one(value: int) -> None:
    assert message(head_dim=value).startswith(
        f"head_dim={value}, but it must be a whole number from 1 on"
    )


def test_heads_must_divide_the_width() -> None:
    text = message(hidden_size=100, num_attention_heads=8)
    assert "hidden_size=100 does not divide into num_attention_heads=8" in text
    assert "the nearest that works is hidden_size=96, or give head_dim" in text


def test_what_it_names_works() -> None:
    assert DsMoeConfig(hidden_size=96, num_attention_heads=8).head_dim == 12
    assert DsMoeConfig(hidden_size=100, num_attention_heads=8, head_dim=16).head_dim == 16


def test_more_heads_than_width() -> None:
    assert "nearest that works is hidden_size=16" in message(hidden_size=4, num_attention_heads=8)


def test_odd_head_dim() -> None:
    text = message(head_dim=31)
    assert "head_dim=31 is odd" in text
    assert "rotary embeddings need pairs" in text


def test_odd_head_dim_that_follows_from_the_width() -> None:
    assert "head_dim=3 is odd" in message(hidden_size=24, num_attention_heads=8)


def test_attention_experts_times_kv_heads_are_the_heads() -> None:
    text = message(num_attention_heads=8, num_attention_experts=4, num_key_value_heads=4)
    assert "num_attention_heads=8 is not num_attention_experts=4 times" in text
    assert "num_key_value_heads=4; the nearest that works is num_attention_heads=16" in text


def test_kv_heads_follow_from_attention_experts() -> None:
    assert DsMoeConfig(num_attention_heads=8, num_attention_experts=4).num_key_value_heads == 2
    assert DsMoeConfig(num_attention_heads=8).num_key_value_heads == 8


def test_attention_experts_that_do_not_divide_the_heads() -> None:
    text = message(num_attention_heads=8, num_attention_experts=3)
    assert "num_attention_heads=8 is not num_attention_experts=3 times" in text
    assert "the nearest that works is num_attention_heads=6" in text


def test_kv_heads_must_divide_the_heads() -> None:
    text = message(num_attention_heads=8, num_key_value_heads=3)
    assert "num_attention_heads=8 is no multiple of num_key_value_heads=3" in text
    assert "that works is num_attention_heads=" in text


def test_more_kv_heads_than_heads() -> None:
    text = message(num_attention_heads=2, num_key_value_heads=3)
    assert "the nearest that works is num_attention_heads=3" in text


def test_unknown_mlp_type() -> None:
    assert message(mlp_type="relu") == "mlp_type='relu' is unknown; use 'gelu' or 'swiglu'"


def test_router_hidden_size() -> None:
    text = message(router_hidden_size=0)
    assert "router_hidden_size=0, but it must be a whole number from 1 on" in text
    assert "null for a linear router" in text


@pytest.mark.parametrize("which", ["training_rule", "inference_rule"])
@pytest.mark.parametrize("rule", ["topk:2", "top_k", "top_k:0", "top_k:2.5", "threshold:nan", ""])
def test_unknown_rule(which: str, rule: str) -> None:
    text = message(**{which: rule})
    assert f"{rule!r} is not an inference rule" in text
    assert "write dense, top_k:K, threshold:EPS or threshold_top_k:EPS" in text
    assert "for example top_k:4" in text


@pytest.mark.parametrize("which", ["training_rule", "inference_rule"])
def test_more_active_experts_than_there_are(which: str) -> None:
    text = message(**{which: "top_k:17"}, num_experts=16)
    assert "top_k:17 asks for 17 experts per token, but there are 16" in text
    assert "the most that works is top_k:16" in text


def test_a_dense_model_has_no_two_best_experts() -> None:
    assert "the most that works is top_k:1" in message(num_experts=1, training_rule="top_k:2")


def test_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="num_experts=0"):
        DsMoeConfig(num_experts=0)


@pytest.mark.parametrize("value", ["16", 16.0, True, None])
def test_sizes_are_whole_numbers(value) -> None:
    assert f"num_experts={value!r}, but it must be a whole number" in message(num_experts=value)


def test_loss_weights_are_not_negative() -> None:
    assert "mlp_mi_loss_coef=-1.0" in message(mlp_mi_loss_coef=-1.0)
