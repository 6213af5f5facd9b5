"""DS-MoE as GGUF: in its form as OLMoE where llama.cpp computes that, else refused with reasons."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model
from typer.testing import CliRunner

from moefit.cli import app
from moefit.dsmoe.export import export_olmoe
from moefit.errors import ConfigError, UnsupportedModelError
from moefit.gguf.families import family_of, refuse_dsmoe
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.train.data.tokenizer import train_bpe

pytest.importorskip("gguf", reason="needs the package gguf (moefit[gguf])")

IDS = [3, 17, 9, 20, 4]
FITS = {
    "vocab_size": 300,
    "qk_norm": True,
    "hidden_size": 32,
    "intermediate_size": 32,
    "inference_rule": "top_k:2",
}


def saved(tmp_path, **changes):
    model = tiny_model(**(FITS | changes))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(tmp_path / "model")
    train_bpe(["some text"], 300).save_pretrained(tmp_path / "model")
    return model


def exported(tmp_path, *options):
    command = ["export", str(tmp_path / "model"), str(tmp_path / "m.gguf"), "--format", "gguf"]
    return CliRunner().invoke(app, [*command, "--type", "f32", "--no-tokenizer", *options])


@pytest.mark.parametrize(
    ("changes", "options", "rule"),
    [
        ({}, (), "top_k:2"),
        ({"num_key_value_heads": 2, "routed_scaling_factor": 5.0}, (), "top_k:2"),
        ({"inference_rule": "dense", "tie_word_embeddings": True}, (), "dense"),
        ({"inference_rule": "threshold:0.5"}, ("--experts-per-token", "3"), "top_k:3"),
    ],
    ids=["plain", "grouped", "dense", "threshold"],
)
def test_file_computes_the_same_logits(tmp_path, changes, options, rule):
    model = saved(tmp_path, **changes)
    done = exported(tmp_path, *options)
    assert done.exit_code == 0, done.exception
    model.set_inference_rule(rule)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
        with load_model(tmp_path / "m.gguf", LoadSettings()) as served:
            found = served.model(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_llama_cpp_computes_the_same_logits(tmp_path):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (moefit[rivals])")
    from test_llama_cpp import LlamaCpp

    model = saved(tmp_path, num_key_value_heads=2, routed_scaling_factor=5.0)
    assert exported(tmp_path).exit_code == 0
    theirs = LlamaCpp(tmp_path / "m.gguf")
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, -1].numpy()
    np.testing.assert_allclose(theirs.logits(IDS), expected, atol=1e-3)
    theirs.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_experts": 2, "num_key_value_heads": 2}, "no mixture of attention heads"),
        ({"mlp_type": "gelu"}, "three matrices"),
        ({"router_hidden_size": 8}, "its router is linear"),
        ({"qk_norm": False}, "qk_norm=False"),
        ({"inference_rule": "top_k:2:renormalize"}, "does not renormalise"),
        ({"inference_rule": "threshold:0.5"}, "no threshold"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_no_graph_computes_is_refused_by_name(changes, words):
    with pytest.raises(UnsupportedModelError, match=words):
        refuse_dsmoe(tiny_config(**(FITS | changes)))


def test_command_refuses_before_it_writes(tmp_path):
    saved(tmp_path, inference_rule="threshold:0.5")
    done = exported(tmp_path)
    assert isinstance(done.exception, ConfigError)
    assert "--experts-per-token K" in str(done.exception)
    saved(tmp_path, mlp_type="gelu")
    assert "three matrices" in str(exported(tmp_path).exception)
    assert [one.name for one in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UnsupportedModelError, match="in its form as OLMoE"):
        family_of(tiny_config(**FITS))


def test_experts_per_token_of_other_models_is_refused(tmp_path):
    tokenizer = train_bpe(["some text"], 300)
    export_olmoe(tiny_model(**FITS), tmp_path / "model", experts_per_token=2, tokenizer=tokenizer)
    done = exported(tmp_path, "--experts-per-token", "3")
    assert "--format olmoe" in str(done.exception)
