import pytest
import torch

from moefit.errors import ConfigError
from moefit.train.config import make_config
from moefit.train.model import build_model
from moefit.train.optimizer import Muon, make_optimizer, orthogonalised
from moefit.train.settings import OptimizerConfig


def test_orthogonalised_matrices_have_singular_values_of_about_one():
    torch.manual_seed(0)
    for shape in ((6, 10), (10, 6), (3, 8, 4)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_stacked_matrices_are_orthogonalised_one_by_one():
    torch.manual_seed(0)
    x_EID = torch.randn(3, 8, 5)
    found = orthogonalised(x_EID, parts=2)
    for expert in range(3):
        for half in (slice(0, 4), slice(4, 8)):
            expected = orthogonalised(x_EID[expert, half])
            torch.testing.assert_close(found[expert, half], expected)


def test_muon_updates_matrices_of_layers_and_adamw_the_rest():
    shape = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_experts": 2}
    config = make_config({"model": {**shape, "num_hidden_layers": 1}})
    model = build_model(config, vocab_size=32, eos_token_id=0)
    optimizer = make_optimizer(model, OptimizerConfig(name="muon", lr=0.1, weight_decay=0.0))
    assert isinstance(optimizer, Muon)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    for name, p in model.named_parameters():
        kept = set(optimizer.state[p])
        by_muon = ("experts" in name or "_proj" in name) and p.ndim > 1
        assert kept == ({"step", "momentum"} if by_muon else {"step", "exp_avg", "exp_avg_sq"}), (
            name
        )
        size = float((p.detach() - before[name]).square().mean().sqrt())
        assert size == pytest.approx(0.2 * 0.1 if by_muon else 0.1, rel=0.3), name


def test_experts_without_tokens_do_not_move():
    model = torch.nn.ParameterDict({"experts": torch.nn.Parameter(torch.zeros(2, 8, 4))})
    optimizer = make_optimizer(model, OptimizerConfig(name="muon", lr=0.1, weight_decay=0.0))
    weight = model["experts"]
    weight.grad = torch.randn(2, 8, 4)
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.stack([torch.randn(8, 4), torch.zeros(8, 4)])
    optimizer.step()
    assert not weight[0].equal(before[0])
    assert weight[1].equal(before[1])


def test_settings_without_effect_raise():
    with pytest.raises(ConfigError, match=r"decay_share=0\.5 has no effect with schedule=cosine"):
        make_config({"optimizer": {"decay_share": 0.5}})
    with pytest.raises(ConfigError, match=r"\[3, 2\] are not the first and the last"):
        make_config({"log": {"profile": [3, 2]}})
    with pytest.raises(ConfigError, match=r"log\.profile=\[9, 11\] ends after steps=10"):
        make_config({"steps": 10, "log": {"profile": [9, 11]}})
