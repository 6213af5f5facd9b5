import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moefit.errors import DataError
from moefit.train.data.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe, vocabulary_size

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "the cat and the hat, 1984\n" * 20]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS, 270)


@given(st.text())
def test_encoding_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", [" a  b", "a , b . ' s n't", "\t\n\n  x\r\n ", "", "\x00é日\u200d"]
)
def test_whitespace_and_rare_characters_round_trip(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == vocabulary_size(tokenizer) == 270
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.unk_token is None
    assert len(tokenizer.encode("1984")) == 4


def test_bpe_training_is_deterministic_and_prints_nothing(tokenizer, capfd) -> None:
    again = train_bpe(iter(TEXTS), 270)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert capfd.readouterr() == ("", "")


def test_small_corpus_has_smaller_vocabulary() -> None:
    assert len(train_bpe(["ab"], 4096)) == 258  # every byte, the end of text, and "ab"


def test_saved_tokenizer_loads_equal(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    text = "  return the cat\n"
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert loaded.eos_token_id == tokenizer.eos_token_id


def test_tokenizer_json_of_any_name_loads(tokenizer, tmp_path: Path) -> None:
    tokenizer.backend_tokenizer.save(str(tmp_path / "mine.json"))
    (tmp_path / "tokenizer_config.json").write_text("of another tokenizer")
    assert load_tokenizer(tmp_path / "mine.json").eos_token == END_OF_TEXT


def test_gpt2_files(tmp_path: Path) -> None:
    trained = train_bpe(TEXTS, 300)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token == END_OF_TEXT
    assert loaded.encode("the cat") == trained.encode("the cat")
    assert load_tokenizer(tmp_path / "vocab.json").encode("hat") == trained.encode("hat")


def test_missing_end_of_text_token_raises(tmp_path: Path) -> None:
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"has no end-of-text token.*special tokens: none.*eos_"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer='.*nowhere' does not exist; give a tok"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no tokenizer file, but a tokenizer is"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match=r"has vocab\.json, but .*vocab\.json with merges\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be read \(.*\); save it again"):
        load_tokenizer(tmp_path)
