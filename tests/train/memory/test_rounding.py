import os
import signal

import pytest
import torch
from quick import slow_but

import moefit
from moefit.errors import ConfigError
from moefit.quant import cpu_kernels
from moefit.quant.format import parse_format
from moefit.train.config import make_config
from moefit.train.loop import train
from moefit.train.memory.rounding import Rounding, expert_matrices, rounded
from moefit.train.model import build_model
from moefit.train.run_folder import read_log

OLMOE = {
    "architecture": "olmoe",
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
SPARSE = {
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_attention_experts": 1,
    "attention_dropout": 0.0,
    "training_rule": "top_k:2:renormalize",
    "inference_rule": "top_k:2:renormalize",
}


@pytest.fixture
def sparse(tree):
    tree["model"] |= SPARSE
    tree["loss"] = {"load_balancing": 0.01}
    tree["rounding"] = {"formats": ["int2", "int4"], "begin": 0.5}
    return tree


def rounding_of(tree, processes=1):
    config = make_config(tree)
    model = build_model(config, vocab_size=300, eos_token_id=0)
    found = Rounding.of(config, model, processes)
    assert found is not None
    return found, model


@pytest.fixture(params=["kernels", "torch"])
def tolerance(request, monkeypatch):
    """Kernels round activations of these formats to 8 bits; torch multiplies as training does."""
    if request.param == "torch":
        monkeypatch.setenv(cpu_kernels.SWITCH, "torch")
    cpu_kernels.kernels.cache_clear()
    yield {"kernels": 0.03, "torch": 1e-4}[request.param]
    cpu_kernels.kernels.cache_clear()


@pytest.mark.parametrize(
    "format_", slow_but(["int2", "int4-nearest"], ["int2", "int3", "int4", "int4-nearest"])
)
@pytest.mark.parametrize("architecture", ["dsmoe", "olmoe"])
def test_rounded_forward_is_that_of_the_server(sparse, callback, architecture, format_, tolerance):
    """Trained with rounded experts, and served with experts in that format: the same logits."""
    if architecture == "olmoe":
        sparse["model"], sparse["loss"] = OLMOE, {}
    sparse |= {"rounding": None, "steps": 4}
    last = train(make_config(sparse), callback).checkpoint
    settings = {"formats": format_, "begin": 0}
    rounding, model = rounding_of(sparse | {"rounding": settings})
    model = type(model).from_pretrained(last, dtype=torch.float32).eval()
    ids = torch.randint(300, (1, 12))
    with torch.no_grad():
        plain = model(ids).logits
        with rounding.applied(model, step=8):
            expected = model(ids).logits
        assert torch.equal(model(ids).logits, plain)  # the weights are back
    with moefit.load(last, precision=format_, context=32, dtype=torch.float32) as served:
        for layer, block in zip(expert_matrices(model), served.blocks.values(), strict=True):
            _same_weights(layer, block, format_)
        with torch.inference_mode():
            found = served.model(ids).logits
    assert (expected - plain).abs().max() > 1e-4
    assert torch.allclose(found, expected, rtol=0, atol=tolerance)


def _same_weights(layer, block, format_):
    """Decoded, the server's experts have the very values that training computes with."""
    for name, weights_ERC in layer.items():
        values_ERC = rounded(weights_ERC, [parse_format(format_)] * len(weights_ERC))
        for expert, slot in block.slot_table.slot_of.items():
            held = block.slots[slot]
            decoded = held.format.decode(held.tensors, block.block.layout.specs, torch.float32)
            rows = [one for short, one in decoded.items() if short in _parts(name, decoded)]
            assert torch.equal(torch.cat(rows), values_ERC[expert])
            assert not torch.equal(values_ERC[expert], weights_ERC[expert])


def _parts(name, decoded):
    """Return the names of a stacked matrix's parts, whichever way the family stores them."""
    if name in decoded:
        return [name]
    return {
        "gate_up_proj": ["gate_proj", "up_proj"],
        "up_proj": ["up_proj"],
        "down_proj": ["down_proj"],
    }[name]


def test_gradients_pass_straight_through(sparse):
    """They are those of a model that has the rounded weights, and update the unrounded ones."""
    rounding, model = rounding_of(sparse)
    ids = torch.randint(300, (2, 9))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with rounding.applied(model, step=8):
        model(ids, labels=ids).loss.backward()
    straight = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.zero_grad()
    formats = rounding.draw(8, 2, 4)
    with torch.no_grad():
        for layer, formats_E in zip(expert_matrices(model), formats, strict=True):
            for parameter in layer.values():
                parameter.copy_(rounded(parameter, formats_E))
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(straight[name], parameter.grad), name
    assert straight["model.layers.0.mlp.experts.down_proj"].abs().max() > 0


def test_draws_follow_from_seed_and_step_alone(sparse):
    first, _ = rounding_of(sparse)
    state = torch.get_rng_state()
    drawn = first.draw(5, 2, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert rounding_of(sparse)[0].draw(5, 2, 4) == drawn
    assert any(first.draw(step, 2, 4) != drawn for step in (6, 7))
    many = [one.name for layer in first.draw(1, 50, 40) for one in layer]
    assert many.count("int2") / len(many) == pytest.approx(0.5, abs=0.05)


def test_experts_that_share_a_format_are_encoded_as_alone():
    weights = torch.randn(3, 24, 64)
    formats = [parse_format(name) for name in ("int3", "int2", "int3")]
    together = rounded(weights, formats)
    for index, format_ in enumerate(formats):
        assert torch.equal(together[index : index + 1], rounded(weights[index][None], [format_]))


def test_nothing_is_rounded_before_it_begins(sparse):
    rounding, model = rounding_of(sparse)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with rounding.applied(model, step=4):
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with rounding.applied(model, step=5):
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"gate_up_proj", "down_proj"}


def test_weights_are_back_after_an_error(sparse):
    rounding, model = rounding_of(sparse)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyError), rounding.applied(model, step=8):
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("stop_after", slow_but([6], [3, 6]))
def test_resume_equals_uninterrupted_run(sparse, callback, tmp_path, stop_after):
    """Bitwise equality after stops before and after rounding begins, with all recipes together."""
    sparse["expert_dropout"] = {"order": "nested", "begin": 0.5}
    sparse["budget_aware"] = {"weight": 0.1, "share": 0.5, "ramp": [0.25, 0.75]}
    whole = train(make_config(sparse), callback)
    sparse["out"] = str(tmp_path / "broken")
    callback.after_step = lambda step: (
        os.kill(os.getpid(), signal.SIGTERM) if step == stop_after else None
    )
    assert train(make_config(sparse), callback).step == stop_after
    callback.after_step = None
    resumed = train(make_config(sparse), callback)
    for name in ("model.safetensors", "config.json"):
        a, b = ((result.checkpoint / name).read_bytes() for result in (whole, resumed))
        assert a == b, name


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"formats": ["int2"], "begin": 0.5}, "rounding.formats"),
        ({"formats": ["int2", "int4"], "begin": 0.25}, "rounding.begin"),
        (None, "rounding"),
    ],
)
def test_another_rounding_does_not_resume(sparse, callback, change, differing):
    """Changed or left out, before the first rounded step too; with the first settings it does."""
    callback.after_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    stopped = train(make_config(sparse), callback)
    callback.after_step = None
    with pytest.raises(
        ConfigError, match=rf"other settings \({differing}\); .* give another folder"
    ):
        train(make_config(sparse | {"rounding": change}), callback)
    assert (stopped.checkpoint / "model.safetensors").is_file()
    assert train(make_config(sparse), callback).step == sparse["steps"]


def test_rounding_is_added_by_continuing_elsewhere(sparse, callback, tmp_path):
    """A plain run does not resume with rounding; another folder continues it, as if from step 1."""
    sparse |= {"steps": 8, "checkpoint": {"every": 4, "keep": 9}}
    plain = sparse | {"rounding": None, "out": str(tmp_path / "plain")}
    train(make_config(plain), callback)
    with pytest.raises(ConfigError, match=r"other settings \(rounding\)"):
        train(make_config(sparse | {"out": plain["out"]}), callback)
    branch = {"out": str(tmp_path / "branch"), "continue_from": f"{plain['out']}/step-00000004"}
    whole, continued = (train(make_config(one), callback) for one in (sparse, sparse | branch))
    a, b = ((one.checkpoint / "model.safetensors").read_bytes() for one in (whole, continued))
    assert a == b


def test_rounded_steps_have_another_loss(sparse, callback, tmp_path):
    plain = {name: value for name, value in sparse.items() if name != "rounding"}
    train(make_config(plain | {"out": str(tmp_path / "plain")}), callback)
    train(make_config(sparse), callback)
    losses = [
        [r["loss"] for r in read_log(tmp_path / out) if r["kind"] == "train"]
        for out in ("plain", "run")
    ]
    assert losses[0][:4] == losses[1][:4]
    assert losses[0][4] != losses[1][4]
    sparse["rounding"]["formats"] = ["int3"]
    with pytest.raises(ConfigError, match=r"other settings \(rounding.formats\)"):
        train(make_config(sparse), callback)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": []}, "rounding.formats: .*at least 1 item"),
        (
            {"formats": ["int4", "int1"]},
            "rounding.formats contains 'int1', .* there are int2, int3",
        ),
        ({"formats": ["mxfp4"]}, "rounding.formats contains 'mxfp4', .* there are .*int4"),
        (
            {"formats": ["native"]},
            "formats contains 'native', which training cannot round to; .* int4",
        ),
        ({"begin": 1}, "rounding.begin: .*less than 1"),
        ({"begin": 0.95}, r"begin=0.95 of steps=8 leaves no rounded step; .* begin=0.875"),
        ({"bits": 3}, "rounding.bits: unknown key"),
    ],
)
def test_settings_that_cannot_be(sparse, settings, message):
    sparse["rounding"] |= settings
    with pytest.raises(ConfigError, match=message):
        rounding_of(sparse)


def test_models_and_runs_without_experts_to_round(sparse):
    with pytest.raises(ConfigError, match="which 2 processes hold in parts; train with one"):
        rounding_of(sparse, processes=2)
    with pytest.raises(ConfigError, match="trainable=routers leaves as they are; give trainable"):
        rounding_of(sparse | {"trainable": "routers", "start_from": "somewhere"})
    sparse["model"] = {"hidden_size": 32, "num_attention_heads": 4, "num_experts": 1}
    sparse["loss"] = {}
    with pytest.raises(ConfigError, match="num_experts=1 has no routed experts; leave it out"):
        rounding_of(sparse)
