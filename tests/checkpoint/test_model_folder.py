"""Other files in a model's folder are reported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_served import saved, tiny, tokens
from transformers import ByT5Tokenizer
from typer.testing import CliRunner

from moefit.checkpoint.safetensors import SINGLE
from moefit.checkpoint.tokenizer import read_tokenizer, refuse_without_tokenizer
from moefit.cli import app
from moefit.errors import CheckpointError, ConfigError, MoefitError, UnsupportedModelError
from moefit.evaluate.loading import load_full_model as load_whole
from moefit.evaluate.loading import locate, reference_path
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a tokenizer."""
    saved(tiny("Olmoe", vocab_size=8192), tmp_path)
    for file in reference_path().glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def commands_refuse(folder: Path, match: str) -> None:
    for more in (("generate", "x"), ("generate", "x", "--memory", "9GiB"), ("serve", "--port=0")):
        found = CliRunner().invoke(app, [more[0], str(folder), *more[1:]])
        assert isinstance(found.exception, MoefitError), found.output
        assert match in str(found.exception)


def test_missing_tokenizer_raises(folder: Path) -> None:
    assert len(read_tokenizer(folder)) > 1000
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer .*tokenizer.json.*token ids"):
        read_tokenizer(folder)
    commands_refuse(folder, "has no tokenizer")
    with load_model(folder, LoadSettings()) as served:  # a program may give token ids
        served.generate(tokens(1, 4), max_new_tokens=2)
        with pytest.raises(ConfigError, match="has no tokenizer"):
            _ = served.tokenizer


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_git_lfs_pointer_for_tokenizer_raises(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        refuse_without_tokenizer(folder)
    commands_refuse(folder, "is a Git LFS pointer")


def test_damaged_tokenizer_raises(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:1000])
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read: .*again"):
        read_tokenizer(folder)
    commands_refuse(folder, "cannot be read")


def test_byte_tokenizer_needs_no_vocabulary(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert len(read_tokenizer(tmp_path)) > 256


def test_adapter_beside_model_raises(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for enter in (lambda: load_model(folder, LoadSettings()), lambda: load_whole(str(folder))):
        with pytest.raises(UnsupportedModelError, match=r"beside its model.*--adapter.*out of"):
            enter()


def test_adapter_without_model_raises(tmp_path: Path) -> None:
    text = json.dumps({"base_model_name_or_path": "Qwen/Qwen3-30B-A3B"})
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=r"is an adapter \(LoRA\) of 'Qwen/Qwen3-30B"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "words"),
    [("pytorch_model.bin", "pickled.*moefit convert"),
     ("consolidated.00.pth", "pickled.*save_pretrained"), ("model.onnx", "another framework"),
     ("consolidated.safetensors", "makers' own names"),
     ("model-00001-of-00002.safetensors", "index.json, which says")],
)  # fmt: skip
def test_unsupported_weights_raise(folder: Path, name: str, words: str) -> None:
    (folder / SINGLE).rename(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*{words}"):
        load_model(folder, LoadSettings())
    (folder / "config.json").unlink()
    for given in (folder, folder / name):
        with pytest.raises(CheckpointError, match=rf"not a model folder.*{name}.*{words}"):
            locate(str(given))


def test_generation_works_without_tokenizer(folder: Path) -> None:
    torch.manual_seed(0)
    found = CliRunner().invoke(app, ["generate", str(folder), "x", "--max-new-tokens", "2"])
    assert found.exit_code == 0, found.exception


def test_single_file_raises(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match="one file of a model; give its folder") as said:
            locate(str(tmp_path / name))
        assert str(said.value).endswith(f"{str(tmp_path)!r}")
