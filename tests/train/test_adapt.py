"""`moefit adapt`: the recipe as a fine-tune of a model that exists."""

import json

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, OlmoeForCausalLM
from typer.testing import CliRunner

from moefit.cli import app
from moefit.errors import ConfigError, UnsupportedModelError
from moefit.evaluate.loading import load_full_model
from moefit.moe.expert_dropout import dropout_record
from moefit.train.adapt import adapt_config
from moefit.train.config import make_config, read_config
from moefit.train.data.tokenizer import train_bpe

TOKENIZER = train_bpe(["expert router token slot budget dense sparse memory " * 9], 300)


def made(folder, model):
    model.config.eos_token_id = TOKENIZER.eos_token_id
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def olmoe(tmp_path):
    """An OLMoE that was not trained here, in bfloat16, with fields of its own."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(
            train_bpe(["expert router token slot budget dense sparse memory " * 9], 300)
        ),
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        router_aux_loss_coef=0.02,
    )
    config.remark = "not ours"
    return made(tmp_path / "olmoe", OlmoeForCausalLM(config).bfloat16())


@pytest.fixture
def dsmoe(tmp_path):
    model = tiny_model(
        vocab_size=len(TOKENIZER), inference_rule="threshold:0.5", num_attention_experts=2
    )
    return made(tmp_path / "dsmoe", model)


def adapted(model, out, corpus, *more):
    arguments = [str(model), str(out), "--text", str(corpus), "--seq-len", "16", *more]
    result = CliRunner().invoke(app, ["adapt", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def differing(a, b):
    a, b = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (a, b))
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_it_keeps_class_settings_and_dtype(olmoe, corpus, tmp_path):
    result = adapted(olmoe, tmp_path / "out", corpus, "--steps", "3")
    assert "trained with expert dropout (nested)" in " ".join(result.output.split())
    before, after = (json.loads((x / "config.json").read_text()) for x in (olmoe, tmp_path / "out"))
    assert after.pop("expert_dropout")["least"] == 2
    assert after == before
    model, tokenizer = load_full_model(str(tmp_path / "out"))
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| {count} of 6 | " in card for count in (6, 4, 3, 2))
    assert differing(olmoe, tmp_path / "out")


def test_defaults_are_those_that_were_measured_best(olmoe, corpus, tmp_path):
    adapted(olmoe, tmp_path / "out", corpus, "--steps", "1")
    config = read_config(tmp_path / "out/run/config.yaml", [])
    assert config.expert_dropout is not None
    assert (config.expert_dropout.order, config.expert_dropout.share) == ("nested", 0.75)
    assert (config.batch_size, config.optimizer.lr) == (4, 5e-4)


def test_routers_alone(olmoe, dsmoe, corpus, tmp_path):
    for number, model in enumerate((olmoe, dsmoe)):
        out = tmp_path / f"out{number}"
        adapted(model, out, corpus, "--steps", "3", "--trainable", "routers", "--lr", "0.1")
        changed = differing(model, out)
        assert changed
        assert all("gate.weight" in name or "norm" in name for name in changed)


def test_changes_of_low_rank(olmoe, corpus, tmp_path):
    settings = ("--steps", "3", "--trainable", "low_rank", "--rank", "2", "--lr", "0.1")
    adapted(olmoe, tmp_path / "out", corpus, *settings)
    changed = differing(olmoe, tmp_path / "out")
    assert any(".experts." in name for name in changed)
    assert all(".experts." in name or "gate.weight" in name or "norm" in name for name in changed)
    with pytest.raises(ConfigError, match="rank=8 saves nothing"):
        adapted(olmoe, tmp_path / "other", corpus, *settings[:4], "--rank", "8")


def test_what_fewer_experts_cost_goes_down(dsmoe, corpus, tmp_path):
    adapted(dsmoe, tmp_path / "short", corpus, "--steps", "1", "--lr", "1e-9")
    adapted(dsmoe, tmp_path / "long", corpus, "--steps", "60", "--lr", "0.01")
    few = []
    for name in ("short", "long"):
        record = dropout_record(load_full_model(str(tmp_path / name))[0].config)
        assert record is not None and record.held_out_loss is not None
        few.append(record.held_out_loss[2])
    assert few[1] < few[0] - 0.5


def test_the_same_command_goes_on(olmoe, corpus, tmp_path):
    adapted(olmoe, tmp_path / "out", corpus, "--steps", "2")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    adapted(olmoe, tmp_path / "out", corpus, "--steps", "2")  # nothing is left to do
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    with pytest.raises(ConfigError, match="a run with other settings"):
        adapted(olmoe, tmp_path / "out", corpus, "--steps", "2", "--order", "mixed")


def test_what_cannot_be_adapted(olmoe, corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"least=1, .* choose 2; the nearest that works is 2"):
        adapted(olmoe, tmp_path / "out", corpus, "--least", "1")
    with pytest.raises(ConfigError, match=r"expert_dropout.share: .*greater than 0"):
        adapted(olmoe, tmp_path / "out", corpus, "--share", "0")
    MixtralConfig().save_pretrained(tmp_path / "mixtral")
    with pytest.raises(UnsupportedModelError, match="'mixtral'"):
        adapt_config(tmp_path / "mixtral", tmp_path / "out", {})
    with pytest.raises(UnsupportedModelError, match="mixtral"):
        adapted(tmp_path / "mixtral", tmp_path / "out", corpus)


def test_routers_need_a_model_to_start_from(tree):
    with pytest.raises(ConfigError, match=r"trainable=routers would leave .* give start_from"):
        make_config(tree | {"trainable": "routers"})
