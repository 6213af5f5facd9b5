import pytest
import torch
from tiny_models import tiny_model
from transformers import OlmoeForCausalLM

from moefit.dsmoe.card import model_card
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.export import olmoe_config
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.train import throughput
from moefit.train.throughput import measured_peak_flops, training_flops_per_token


@pytest.mark.parametrize("settings", [{}, {"num_experts": 1}, {"training_rule": "top_k:4"}])
@pytest.mark.parametrize("tied", [False, True])
def test_dsmoe_flops_equal_model_card(settings: dict, tied: bool) -> None:
    config = DsMoeConfig(
        hidden_size=64, num_attention_heads=4, tie_word_embeddings=tied, **settings
    )
    with torch.device("meta"):
        model = DsMoeForCausalLM(config)
    assert training_flops_per_token(model, 128) == model_card(config).training_flops_per_token(128)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_olmoe_flops_equal_those_of_same_dsmoe(k: int, kv_heads: int) -> None:
    rule = f"top_k:{k}"
    ours = tiny_model(
        qk_norm=True, num_key_value_heads=kv_heads, training_rule=rule, inference_rule=rule
    )
    with torch.device("meta"):
        stock = OlmoeForCausalLM(olmoe_config(ours.config, k))
    for length in (2, 127, 128):
        assert training_flops_per_token(stock, length) == pytest.approx(
            training_flops_per_token(ours, length), rel=1e-12
        )


def test_context_is_mean_under_causal_mask() -> None:
    model = tiny_model()
    longer = training_flops_per_token(model, 5) - training_flops_per_token(model, 3)
    assert longer == 12 * 2 * 16  # layers, query width; one position more in the mean


def test_peak_flops_is_plausible() -> None:
    peak = measured_peak_flops(torch.device("cpu"), torch.float32, seconds=0.01)
    assert 1e8 < peak < 1e15


def test_all_timed_products_are_counted(monkeypatch) -> None:
    """Two warm-up products, then batches between readings of a mocked clock."""
    widths, clock = [], iter(range(100))
    monkeypatch.setattr(throughput, "CPU_PRODUCTS", (8, 3))
    monkeypatch.setattr(throughput, "_synchronized_time", lambda device: float(next(clock)))
    monkeypatch.setattr(torch, "mm", lambda a, b: widths.append(a.shape))
    peak = measured_peak_flops(torch.device("cpu"), torch.float32, seconds=2.5)
    assert widths == [(8, 8)] * (2 + 6)
    assert peak == 6 * 2 * 8**3 / 3
