import pytest
import torch

from moefit.dsmoe.card import model_card
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.train.throughput import measured_peak_flops, training_flops_per_token


@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_word_embeddings": True}, {"num_experts": 1}, {"training_rule": "top_k:4"}],
)
def test_close_to_the_cards_own_count(settings):
    """The card counts the causal mask's half of attention; this formula counts the whole."""
    config = DsMoeConfig(hidden_size=64, num_attention_heads=4, **settings)
    with torch.device("meta"):
        model = DsMoeForCausalLM(config)
    attention = 12 * config.num_hidden_layers * 64
    ours = training_flops_per_token(model, 128) - attention * 128
    card = model_card(config).training_flops_per_token(128) - attention * 129 / 2
    assert ours == pytest.approx(card, rel=1e-6)


def test_the_ceiling_is_a_rate():
    peak = measured_peak_flops(torch.device("cpu"), torch.float32, seconds=0.01)
    assert 1e8 < peak < 1e15
