"""Training from given weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError
from moefit.train.model import load_initial_weights


@pytest.fixture
def folder(tmp_path):
    model = tiny_model(seed=1)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def test_all_weights_are_copied(folder):
    path, source = folder
    model = tiny_model(seed=2)
    load_initial_weights(model, str(path))
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_weights_of_another_model_raise(folder):
    path, _ = folder
    with pytest.raises(ConfigError, match=r"another model.*has .*embed_tokens"):
        load_initial_weights(tiny_model(vocab_size=41), str(path))
    tensors = load_file(path / "model.safetensors")
    gone = next(name for name in tensors if "down_proj" in name)
    del tensors[gone]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"lacks {gone}"):
        load_initial_weights(tiny_model(), str(path))


def test_quantised_weights_raise(folder):
    path, _ = folder
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=f"{name} is float8_e4m3fn.*quantised"):
        load_initial_weights(tiny_model(), str(path))


def test_missing_or_damaged_source_raises(folder, tmp_path):
    path, _ = folder
    with pytest.raises(ConfigError, match="neither a model folder"):
        load_initial_weights(tiny_model(), str(tmp_path / "no-run"))
    (path / "model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(CheckpointError, match="damaged"):
        load_initial_weights(tiny_model(), str(path))


RULES = {"training_rule": "top_k:1", "inference_rule": "top_k:1"}


def test_biases_that_a_source_lacks_begin_at_0(folder):
    path, source = folder
    model = tiny_model(seed=2, score_correction_bias=True, **RULES)
    load_initial_weights(model, str(path))
    for layer, other in zip(model.model.layers, source.model.layers, strict=True):
        assert not layer.mlp.gate.e_score_correction_bias.any()
        assert torch.equal(layer.mlp.gate.weight, other.mlp.gate.weight)


@pytest.mark.parametrize(("before", "now"), [("grap", "hash"), ("hash", "linear")])
def test_experts_of_another_kind_of_router_raise(tmp_path, before, now):
    """Two kinds have no weights by which they could be told apart."""
    shape = {"num_experts": 4, **RULES}
    tiny_model(router_type=before, **shape).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"has router_type={before}, not {now}|lacks .*gate"):
        load_initial_weights(tiny_model(router_type=now, **shape), str(tmp_path))
