"""Loss-free balancing in training."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from moefit.errors import ConfigError
from moefit.train import loop, trainer
from moefit.train.balancing import BalancingBias
from moefit.train.config import make_config
from moefit.train.loop import train
from moefit.train.model import build_model
from moefit.train.parallel.processes import OneProcess

MODEL = {
    "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_experts": 8, "training_rule": "top_k:2", "inference_rule": "top_k:2",
}  # fmt: skip
BIAS = {"balancing_bias": 0.02}
HASH = {
    **MODEL, "router_type": "hash", "training_rule": "top_k:1", "inference_rule": "top_k:1",
}  # fmt: skip


def built(model=MODEL, **settings):
    config = make_config({"model": model, **settings})
    return config, build_model(config, vocab_size=64, eos_token_id=0).train()


@torch.no_grad()
def test_loads_become_even():
    config, model = built({**MODEL, "initializer_range": 0.3}, loss=BIAS)
    balancing = BalancingBias.of(config, model)
    assert balancing is not None
    ids, uneven = torch.arange(256).view(4, 64) % 64, []
    for _ in range(40):
        model(ids, use_cache=False)
        load_LE = torch.stack(balancing.loads)
        uneven.append(float((load_LE.std(1, correction=0) / load_LE.mean(1)).mean()))
        balancing.update(OneProcess())
        assert not any(load_E.any() for load_E in balancing.loads)
    assert uneven[0] > 0.5
    assert max(uneven[-5:]) < 0.6 * uneven[0]


def test_a_bias_moves_by_the_rate_towards_an_even_load():
    config, model = built(loss=BIAS)
    balancing = BalancingBias.of(config, model)
    assert balancing is not None
    balancing.loads[0].copy_(torch.tensor([4.0, 0, 2, 2, 2, 2, 2, 2]))
    balancing.update(OneProcess())
    assert balancing.biases[0].tolist() == pytest.approx([-0.02, 0.02, 0, 0, 0, 0, 0, 0])
    assert not balancing.biases[1].any()
    assert BalancingBias.of(*built()) is None


def test_a_run_resumes_bit_for_bit(tree, tmp_path, callback, monkeypatch):
    monkeypatch.setattr(trainer, "measured_peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(loop, "draw_curve", lambda *_: None)
    rule = {"training_rule": "top_k:1", "inference_rule": "top_k:1"}
    tree = {**tree, "model": {**tree["model"], **rule}, "loss": BIAS, "steps": 6}
    whole = train(make_config({**tree, "out": str(tmp_path / "whole")}), callback)
    config = make_config({**tree, "out": str(tmp_path / "parts")})
    callback.after_step = lambda step: step == 3 and signal.raise_signal(signal.SIGTERM)
    assert train(config, callback).stopped_by == "SIGTERM"
    callback.after_step = None
    parts = train(config, callback)
    first, second = (load_file(one.checkpoint / "model.safetensors") for one in (whole, parts))
    assert all(first[name].equal(second[name]) for name in first)
    biases = [value for name, value in first.items() if name.endswith("correction_bias")]
    assert biases and all(one.any() for one in biases)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {**MODEL, "training_rule": "dense"}, "loss": BIAS}, "does not choose the best"),
        ({"model": HASH, "loss": BIAS}, "needs routers that choose by scores"),
        ({"model": HASH, "loss": {"load_balancing": 0.01}}, "loss.load_balancing=0.01 has no"),
        (
            {"model": HASH, "parallel": {"experts": "all_to_all", "node_bias": 1}},
            "parallel.node_bias=1.0 has no effect on model.router_type=hash",
        ),
        ({"model": HASH, "expert_dropout": {"order": "nested"}}, "expert_dropout=nested has no"),
        (
            {
                "model": {"architecture": "olmoe", "num_experts": 4},
                "loss": BIAS,
            },
            "loss.balancing_bias=0.02 needs routers with a bias",
        ),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        built(**settings)
