import pytest

from moefit.errors import DataError
from moefit.evaluate.passage import held_out_text, text_of_file
from moefit.train.data.corpus import Document
from moefit.train.data.tokenizer import train_bpe
from moefit.train.data.tokens import write_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["def f(x):\n    return x\n" * 5], 300)


def test_text_of_file(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("def größe(x):\n", encoding="utf-8")
    text = text_of_file(path, tokenizer, 16, None)
    assert tokenizer.decode(text.ids_T[:-1]) == "def größe(x):\n"
    assert text.ids_T[-1] == tokenizer.eos_token_id
    assert text.text_bytes == len("def größe(x):\n".encode())


def test_held_out_standard_library(tokenizer):
    text = held_out_text(tokenizer, 256, 1000)
    assert len(text.ids_T) > 10_000
    assert sum(ids.shape[0] * (ids.shape[1] - 1) for ids in text.batches()) <= 1000


def test_unreadable_file_raises(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"cannot read .*nothing\.txt"):
        text_of_file(tmp_path / "nothing.txt", tokenizer, 16, None)
    (tmp_path / "latin.txt").write_bytes(b"gr\xf6\xdfe")
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 2\).*iconv"):
        text_of_file(tmp_path / "latin.txt", tokenizer, 16, None)


def test_text_is_tokenised_as_in_training(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("def <|endoftext|> f(x):\n<|endoftext|>", encoding="utf-8")
    document = Document(name="text.txt", text=path.read_text("utf-8"))
    trained = write_tokens(
        tmp_path / "tokens", [document], tokenizer, on_written=lambda more: None
    ).open()
    ids = text_of_file(path, tokenizer, 16, None).ids_T.tolist()
    assert ids == trained.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1


def test_tokenizer_without_end_of_text_token(tmp_path):
    tokenizer = train_bpe(["some text"], 300)
    tokenizer.eos_token = None
    path = tmp_path / "text.txt"
    path.write_text("some text")
    text = text_of_file(path, tokenizer, 16, None)
    assert tokenizer.decode(text.ids_T) == "some text"
    path.write_text("")
    assert len(text_of_file(path, tokenizer, 16, None).ids_T) == 0
