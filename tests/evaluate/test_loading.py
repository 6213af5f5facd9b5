import json
import shutil

import pytest
import torch
from tiny_models import tiny_model, tokens
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoeConfig, OlmoeForCausalLM

from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError
from moefit.evaluate.loading import check_family, config_of, load_full_model, locate, reference_path
from moefit.train import checkpoint
from moefit.train.data.tokenizer import train_bpe


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(vocab_size=300)
    model.save_pretrained(folder)
    train_bpe(["some text"], 300).save_pretrained(folder)
    return folder


def test_model_folder_loads(saved):
    model, tokenizer = load_full_model(str(saved))
    assert not model.training
    ids = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(vocab_size=300)(ids).logits)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert load_full_model(str(saved), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_run_folder_loads_last_checkpoint(tmp_path):
    parts = tiny_model(vocab_size=300), train_bpe(["some text"], 300)
    for step in (1, 2):
        snapshot = checkpoint.Snapshot(step=step, model=parts[0], tokenizer=parts[1], state={})
        checkpoint.save(tmp_path, snapshot, keep=2)
    assert locate(str(tmp_path)).name == "step-00000002"
    load_full_model(str(tmp_path))


def test_shipped_model_loads():
    assert locate("reference") == reference_path()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: None, CheckpointError, "there is no folder"),
        (lambda path: path.mkdir(), CheckpointError, "neither a model"),
    ],
)
def test_missing_model_raises(tmp_path, make, error, words):
    make(tmp_path / "model")
    with pytest.raises(error, match=words):
        load_full_model(str(tmp_path / "model"))


def test_other_family_raises(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'llama' model; this command supports dsmoe"):
        load_full_model(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_file_raises(saved, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cannot be read|cut short"):
        load_full_model(str(folder))


def test_missing_weights_raise(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_full_model(str(folder))


def with_config(saved, folder, **changes):
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, r"missing \(model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"unexpected \(model\.layers\.1\."),
        ({"qk_norm": True}, r"4 missing \(model\.layers\.0\.self_attn\.k_norm\.weight"),
        ({"num_experts": 4}, r"of another shape \(model\.layers.* is \[5, .*\], not \[4, "),
    ],
)
def test_config_of_another_model_raises(saved, tmp_path, changes, words):
    with pytest.raises(CheckpointError, match=f"do not match its config.json: .*{words}"):
        load_full_model(with_config(saved, tmp_path / "model", **changes))


def test_tied_embeddings_are_not_missing(saved, tmp_path):
    tiny_model(vocab_size=300, tie_word_embeddings=True).save_pretrained(tmp_path)
    train_bpe(["some text"], 300).save_pretrained(tmp_path)
    load_full_model(str(tmp_path))


@pytest.mark.parametrize("width", [8, 6])
def test_olmoe_of_any_width_loads(tmp_path, width):
    config = OlmoeConfig(
        vocab_size=300, hidden_size=16, intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=4, num_experts=4, num_experts_per_tok=4, pad_token_id=None,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(tmp_path)
    train_bpe(["some text"], 300).save_pretrained(tmp_path)
    model, _ = load_full_model(str(tmp_path))
    assert isinstance(model, OlmoeForCausalLM)
    with torch.no_grad():
        assert model(tokens(1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"model": 3}'])
def test_damaged_tokenizer_raises(saved, tmp_path, content):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
        load_full_model(str(folder))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "dsmoe", "qk_norm": "perhaps"}'])
def test_damaged_config_raises(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((CheckpointError, ConfigError)):
        check_family(tmp_path)
    with pytest.raises((CheckpointError, ConfigError)):
        config_of(str(tmp_path))


def test_family_is_read_without_weights(saved, tmp_path):
    assert check_family(saved) == "dsmoe"
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(UnsupportedModelError, match="a 'never_heard_of' model"):
        check_family(tmp_path)


def test_config_of_preset_and_folder(saved):
    assert config_of("dsmoe-3b").num_experts > 1
    assert config_of(str(saved)).vocab_size == 300


def test_config_of_another_family_raises(tmp_path):
    OlmoeConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'olmoe' model; this command supports dsmoe$"):
        config_of(str(tmp_path))


def test_missing_device_raises(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # said before reading
    with pytest.raises(ConfigError, match="device='cuda' is not available here; use auto or cpu"):
        load_full_model(str(saved), device="cuda")


def test_contradictory_config_raises(saved, tmp_path):
    with pytest.raises(ConfigError, match="head_dim=3"):
        load_full_model(with_config(saved, tmp_path / "model", head_dim=3))


def test_damaged_run_checkpoint_raises(tmp_path):
    snapshot = checkpoint.Snapshot(
        step=1, model=tiny_model(vocab_size=300), tokenizer=train_bpe(["text"], 300), state={}
    )
    folder = checkpoint.save(tmp_path, snapshot, keep=1)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: model\.safetensors"):
        load_full_model(str(tmp_path))
