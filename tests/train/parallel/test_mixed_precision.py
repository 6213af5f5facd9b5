"""Weights rounded to bfloat16 in the computation of one process."""

import signal
from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moefit.dsmoe.model import register
from moefit.errors import ConfigError
from moefit.train import loop, trainer
from moefit.train.config import make_config
from moefit.train.loop import train
from moefit.train.model import build_model, use_bf16
from moefit.train.parallel.mixed_precision import round_weights

SHAPE = {
    "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_experts": 4,
}  # fmt: skip
MODELS = {
    "dsmoe": {**SHAPE, "num_attention_experts": 2, "tie_word_embeddings": True},
    "olmoe": {**SHAPE, "architecture": "olmoe", "num_experts_per_tok": 2},
    "grap": {**SHAPE, "router_type": "grap", "training_rule": "top_k:1"},
}
MIXED = {"mixed_precision": "bf16"}
ids = torch.arange(34).view(2, 17) % 50


def built(name):
    config = make_config({"model": MODELS[name], "seq_len": 16})
    return build_model(config, vocab_size=64, eos_token_id=0).train()


def gradients(model, ids=ids):
    output = model(ids, output_router_logits=True, use_cache=False)
    logits = output.logits.float()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_frequent_tokens_are_summed_in_float32(tied):
    """In bfloat16 the sum of a token's rows stops growing after some hundred."""
    config = make_config({"model": {**SHAPE, "tie_word_embeddings": tied}, "seq_len": 256})
    exact, model = (build_model(config, vocab_size=64, eos_token_id=0).train() for _ in range(2))
    model.load_state_dict(exact.state_dict())
    round_weights(model)
    generator = torch.Generator().manual_seed(1)
    many = torch.randint(0, 64, (16, 257), generator=generator)
    many[torch.rand(many.shape, generator=generator) < 0.3] = 5
    found, expected = (
        gradients(one, many)[1]["model.embed_tokens.weight"] for one in (model, exact)
    )
    assert (found - expected).norm() / expected.norm() < 0.03
    copied = deepcopy(model)
    copied.model.embed_tokens.weight.data.zero_()
    assert not copied.model.embed_tokens(ids).any()


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_rounded_in_the_forward_pass_only(name):
    model, exact = built(name), built(name)
    model.load_state_dict(exact.state_dict())
    round_weights(model)
    output, found = gradients(model)
    assert output.logits.dtype == torch.bfloat16
    assert {one.dtype for one in output.router_logits} == {torch.float32}
    _, expected = gradients(exact)
    assert found.keys() == expected.keys()
    for key, one in found.items():
        assert one.dtype == torch.float32
        error = (one - expected[key]).norm() / expected[key].norm().clamp_min(1e-6)
        assert error < (0.05 if "experts" not in key else 0.2), (key, float(error))
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert one.equal(other)
        assert isinstance(one, torch.nn.Parameter)


def test_logits_of_routers_are_not_rounded():
    """What a router is given is rounded, but neither its weights nor its products are."""
    for name in ("dsmoe", "olmoe"):
        model = built(name)
        round_weights(model)
        gate, seen = model.model.layers[0].mlp.gate, []
        gate.register_forward_hook(lambda _, given, out, seen=seen: seen.extend((given[0], out)))
        model(ids, use_cache=False)
        given, out = seen
        logits = out[0] if isinstance(out, tuple) else out
        assert logits.equal(F.linear(given.float().flatten(0, -2), gate.weight).view_as(logits))
        assert not gate.weight.equal(gate.weight.bfloat16())


def test_an_error_in_a_forward_pass_leaves_whole_weights():
    model = built("dsmoe")
    round_weights(model)
    before = dict(model.named_parameters())

    def fail(*_):
        raise ValueError("an error inside")

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="an error inside"):
        model(ids)
    assert all(before[name] is one for name, one in model.named_parameters())


@pytest.fixture
def mixed_tree(tree, monkeypatch):
    monkeypatch.setattr(trainer, "measured_peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(loop, "draw_curve", lambda *_: None)
    return {**tree, "precision": "auto", "parallel": MIXED, "activation_checkpointing": True}


def test_a_run_resumes_bit_for_bit(mixed_tree, tmp_path, callback):
    """With activation checkpointing, which repeats forward passes."""
    whole = train(make_config({**mixed_tree, "out": str(tmp_path / "whole")}), callback)
    assert callback.info["precision"] == "mixed bf16"
    assert not callback.messages
    config = make_config({**mixed_tree, "out": str(tmp_path / "parts")})
    callback.after_step = lambda step: step == 5 and signal.raise_signal(signal.SIGTERM)
    assert train(config, callback).stopped_by == "SIGTERM"
    callback.after_step = None
    parts = train(config, callback)
    plain = {**mixed_tree, "activation_checkpointing": False, "out": str(tmp_path / "plain")}
    other = train(make_config(plain), callback)
    register()
    first, second, third = (
        AutoModelForCausalLM.from_pretrained(one.checkpoint).state_dict()
        for one in (whole, parts, other)
    )
    assert all(first[name].equal(second[name]) for name in first)
    assert all(first[name].equal(third[name]) for name in first)
    assert {one.dtype for one in first.values()} == {torch.float32}


def test_contradictions_and_changes_are_refused(mixed_tree, tree, tmp_path, callback):
    for precision in ("fp32", "bf16"):
        with pytest.raises(ConfigError, match=rf"precision={precision} and parallel\.mixed_prec"):
            make_config({**mixed_tree, "precision": precision})
    with pytest.raises(ConfigError, match=r"parallel\.mixed_precision: Input should be 'bf16'"):
        make_config({"parallel": {"mixed_precision": "fp8"}})
    assert not use_bf16(make_config(mixed_tree), torch.device("cuda"))
    first = train(make_config({**mixed_tree, "steps": 4}), callback)
    with pytest.raises(ConfigError, match=r"other settings \(parallel\.mixed_precision\)"):
        train(make_config({**tree, "activation_checkpointing": True, "steps": 4}), callback)
    other = {"out": str(tmp_path / "other"), "continue_from": str(first.checkpoint)}
    with pytest.raises(ConfigError, match=r"give parallel\.mixed_precision=bf16 without precision"):
        train(make_config({**tree, **other}), callback)
