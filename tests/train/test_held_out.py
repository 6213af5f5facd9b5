import numpy as np
import pytest
import torch

from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.train.step import HeldOutEvaluator


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = DsMoeConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=4,
        attention_dropout=0.5,
    )
    return DsMoeForCausalLM(config).train()


def held_out(*, batch_size, limit=1000, length=75):
    tokens = np.random.default_rng(0).integers(50, size=length).astype(np.uint16)
    return HeldOutEvaluator(
        tokens=tokens, seq_len=8, batch_size=batch_size, limit=limit, bf16=False
    )


def test_loss_is_mean_over_targets(model):
    """The last window is shorter."""
    found = held_out(batch_size=4).loss(model, lambda: False)
    tokens = torch.from_numpy(held_out(batch_size=4).tokens.astype(np.int64))
    model.eval()
    total = 0.0
    for start in range(0, 74, 8):
        ids = tokens[None, start : start + 9]
        loss = model(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)
        total -= loss.gather(1, ids[0, 1:, None]).sum().item()
    assert found == pytest.approx(total / 74, rel=1e-5)


def test_loss_does_not_depend_on_batch_size(model):
    found = [held_out(batch_size=size).loss(model, lambda: False) for size in (1, 3, 100)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    assert model.training


def test_evaluation_stops_on_request(model):
    asked = []
    stop = lambda: asked.append(1) or len(asked) > 2  # noqa: E731
    assert held_out(batch_size=2).loss(model, stop) is None
    assert len(asked) == 3
    assert model.training
