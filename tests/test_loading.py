import json
import shutil

import pytest
import torch
from tiny_models import tiny_model, tokens
from transformers import LlamaConfig

from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError
from moefit.evaluate.loading import load, locate, reference_path
from moefit.train import checkpoint
from moefit.train.tokenizer import train_bpe


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(vocab_size=300)
    model.save_pretrained(folder)
    train_bpe(["some text"], 300).save_pretrained(folder)
    return folder


def test_a_model_folder(saved):
    model, tokenizer = load(str(saved))
    assert not model.training
    ids = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(vocab_size=300)(ids).logits)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert load(str(saved), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_run_is_its_last_checkpoint(tmp_path):
    parts = tiny_model(vocab_size=300), train_bpe(["some text"], 300)
    for step in (1, 2):
        snapshot = checkpoint.Snapshot(step=step, model=parts[0], tokenizer=parts[1], state={})
        checkpoint.save(tmp_path, snapshot, keep=2)
    assert locate(str(tmp_path)).name == "step-00000002"
    load(str(tmp_path))


def test_the_shipped_model():
    assert locate("reference") == reference_path()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: None, CheckpointError, "there is no folder"),
        (lambda path: path.mkdir(), CheckpointError, "neither a model"),
    ],
)
def test_what_is_no_model(tmp_path, make, error, words):
    make(tmp_path / "model")
    with pytest.raises(error, match=words):
        load(str(tmp_path / "model"))


def test_a_foreign_family(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'llama' model; this command knows dsmoe"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file(saved, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(str(folder))


def test_missing_weights(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(str(folder))


def test_a_config_that_contradicts_itself(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 3}))
    with pytest.raises(ConfigError, match="head_dim=3"):
        load(str(folder))


def test_a_damaged_checkpoint_of_a_run_is_named(tmp_path):
    snapshot = checkpoint.Snapshot(
        step=1, model=tiny_model(vocab_size=300), tokenizer=train_bpe(["text"], 300), state={}
    )
    folder = checkpoint.save(tmp_path, snapshot, keep=1)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: model\.safetensors"):
        load(str(tmp_path))
