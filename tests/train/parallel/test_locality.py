"""Routers that are kept to experts of some machines."""

import pytest
import torch

from moefit.dsmoe.losses import RouterLossWeights
from moefit.errors import ConfigError
from moefit.train.config import make_config
from moefit.train.model import build_model
from moefit.train.parallel.locality import NodeLocality, _check_limit
from moefit.train.step import make_losses

MODEL = {
    "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_experts": 8, "training_rule": "top_k:2", "initializer_range": 0.5,
}  # fmt: skip
IDS = torch.arange(34).view(2, 17)


@pytest.fixture
def model():
    return build_model(make_config({"model": MODEL}), vocab_size=64, eos_token_id=0).train()


def chosen(model):
    """Return the experts of all tokens, by layer."""
    seen = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
        for layer in model.model.layers
    ]
    model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_tokens_use_one_machine(model, bias):
    own_E = torch.arange(8) < 2
    free = [ids_TK // 2 for ids_TK in chosen(model)]
    assert any((one_TK[:, 0] != one_TK[:, 1]).any() for one_TK in free)
    nodes = NodeLocality(model, own_E, bias, 1)
    used = [ids_TK // 2 for ids_TK in chosen(model)]
    assert all((one_TK[:, 0] == one_TK[:, 1]).all() for one_TK in used)
    assert len(torch.cat(used).unique()) > 1  # not the own machine alone
    nodes.remove()
    for one_TK, before_TK in zip(chosen(model), free, strict=True):
        assert (one_TK // 2).equal(before_TK)


def test_tokens_use_their_own_machine_in_training_only(model):
    nodes = NodeLocality(model, torch.arange(8) >= 4, 0.0, "own")
    assert all((ids_TK >= 4).all() for ids_TK in chosen(model))
    weights = RouterLossWeights(mlp_mi=0.1, load_balancing=0.1, z=0.1, k=2)
    losses = make_losses(model, weights, compile=False, nodes=nodes)
    lm_loss, router, logits, _ = losses(IDS, torch.tensor(1.0), None)
    (lm_loss + router).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all((one.softmax(-1)[..., :4] == 0).all() for one in logits)
    model.eval()
    model.set_inference_rule("top_k:2")
    assert any((ids_TK < 4).any() for ids_TK in chosen(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 2, 8, 4, 0.0), "node_limit=2 has no effect, because there are 2 machines"),
        ((1, 4, 8, 2, 0.0), "leaves 2 experts, but a token chooses 4; the least that works is 2"),
        (("own", 8, 8, 4, 0.0), "leaves 4 experts, but a token chooses 8; leave it out"),
        (("own", 2, 8, 4, 1.0), "node_bias=1 has no effect with node_limit=own"),
    ],
)
def test_limits_without_effect_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        _check_limit(*arguments)
    _check_limit(1, 2, 8, 4, 0.0)
