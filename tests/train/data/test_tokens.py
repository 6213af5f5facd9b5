import errno
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from moefit.errors import ConfigError, DataError
from moefit.train.data import tokens as token_file
from moefit.train.data.corpus import Document
from moefit.train.data.split import split
from moefit.train.data.tokenizer import train_bpe
from moefit.train.data.tokens import (
    PreparedData,
    cache_folder,
    prepare,
    prepare_shards,
    write_tokens,
)
from moefit.train.settings import DataConfig


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.txt").write_text(f"Text number {n}: the cat sat on the mat, zoë.\n" * 3)
    return DataConfig(
        sources=(str(folder),),
        held_out_fraction=0.2,
        vocab_size=280,
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.mark.parametrize("weight", [None, 1.0])
def test_more_files_may_be_held_out_than_trained_on(tmp_path: Path, weight: float | None) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name}: the cat sat on the mat.\n" * 60)
    source = str(tmp_path / "a.txt")
    prepared = prepare(
        DataConfig(
            sources=(source if weight is None else {"path": source, "weight": weight},),
            held_out=tuple(str(tmp_path / f"{name}.txt") for name in "bc"),
            vocab_size=280,
            cache_dir=str(tmp_path / "cache"),
        ),
        seq_len=16,
    )
    assert len(texts_of(prepared, "held_out")) == 2


def texts_of(prepared: PreparedData, side: str) -> list[str]:
    tokens = getattr(prepared, side).open()
    texts = str(prepared.tokenizer.decode(tokens.tolist())).split("<|endoftext|>")
    assert texts.pop() == ""
    return texts


def test_token_files_contain_documents(data: DataConfig) -> None:
    prepared = prepare(data, seq_len=16)
    division = split(data)
    assert texts_of(prepared, "train") == [d.text for d in division.train()]
    assert texts_of(prepared, "held_out") == [d.text for d in division.held_out()]
    assert prepared.train.documents + prepared.held_out.documents == 40
    assert prepared.train.text_bytes == sum(len(d.text.encode()) for d in division.train())
    assert prepared.train.dtype == "uint16"
    tokens = prepared.train.open()
    assert isinstance(tokens, np.memmap)
    assert len(tokens) == prepared.train.tokens
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_prepared_data_is_cached(data: DataConfig, monkeypatch) -> None:
    first = prepare(data, seq_len=16)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("made a second time")

    monkeypatch.setattr("moefit.train.data.tokens.write_tokens", refuse)
    again = prepare(data, seq_len=8)
    assert (again.train, again.held_out) == (first.train, first.held_out)
    assert [p.name for p in cache_folder(data).iterdir()] == [first.fingerprint]


def test_fingerprint_covers_text_and_tokenizer(data: DataConfig, tmp_path: Path) -> None:
    first = prepare(data, seq_len=16)
    same = data.model_copy(update={"cache_dir": str(tmp_path / "elsewhere")})
    assert prepare(same, seq_len=16).fingerprint == first.fingerprint

    given = data.model_copy(update={"tokenizer": str(first.train.path.parent / "tokenizer")})
    prints = {first.fingerprint, prepare(given, seq_len=16).fingerprint}
    for change in ({"vocab_size": 290}, {"held_out_fraction": 0.3}, {"max_bytes": 4000}):
        prints.add(prepare(data.model_copy(update=change), seq_len=16).fingerprint)
    (tmp_path / "texts" / "7.txt").write_text("other words\n")
    prints.add(prepare(data, seq_len=16).fingerprint)
    assert len(prints) == 6


@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "meta.json", "tokenizer"])
@pytest.mark.parametrize("how", ["shorter", "gone"])
def test_damaged_cache_is_rebuilt(data: DataConfig, name: str, how: str) -> None:
    first = prepare(data, seq_len=16)
    before = first.train.open().tolist()
    victim = first.train.path.parent / name
    if victim.is_dir():
        shutil.rmtree(victim)
    elif how == "gone":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-3])
    again = prepare(data, seq_len=16)
    assert again.train.open().tolist() == before
    assert [p.name for p in cache_folder(data).iterdir()] == [first.fingerprint]


def test_incomplete_cache_folder_is_ignored(data: DataConfig, monkeypatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moefit.train.data.tokens.save_tokenizer", interrupt)
        patch.setattr(
            "moefit.train.data.tokens.shutil.rmtree", lambda *a, **k: None
        )  # as if killed
        with pytest.raises(KeyboardInterrupt):
            prepare(data, seq_len=16)
    (left,) = cache_folder(data).iterdir()
    assert (left / "train.bin").exists()
    assert prepare(data, seq_len=16).train.path.parent != left


def test_concurrent_prepare_shares_result(data: DataConfig) -> None:
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(lambda _: prepare(data, seq_len=16), range(2))
    assert (a.train, a.held_out, a.fingerprint) == (b.train, b.held_out, b.fingerprint)
    assert [p.name for p in cache_folder(data).iterdir()] == [a.fingerprint]


def test_shards_have_the_sources_of_their_machine(data: DataConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "texts", other)
    for path in other.iterdir():
        path.write_text("A dog barks. " * 8)
    both = data.model_copy(update={"sources": (*data.sources, str(other))})
    whole = prepare(both, seq_len=8)
    found = prepare_shards(both, whole, 2, seq_len=8, progress=lambda *_: None)
    decoded = [whole.tokenizer.decode(shard.open().tolist()) for shard in found.shards]
    assert [("cat" in text, "dog" in text) for text in decoded] == [(True, False), (False, True)]
    with pytest.raises(ConfigError, match="divides 2 sources among 3 machines; give at least 3"):
        prepare_shards(both, whole, 3, seq_len=8, progress=lambda *_: None)
    limited = both.model_copy(update={"max_bytes": 1000})
    with pytest.raises(ConfigError, match=r"max_bytes does not work with data\.shard_by"):
        prepare_shards(limited, whole, 2, seq_len=8, progress=lambda *_: None)


def test_progress_reports_stages(data: DataConfig) -> None:
    heard: list[tuple[str, int, int | None]] = []
    prepared = prepare(data, seq_len=16, progress=lambda *event: heard.append(event))
    total = prepared.train.text_bytes + prepared.held_out.text_bytes
    assert list(dict.fromkeys(stage for stage, _, _ in heard)) == [
        "reading",
        "training the tokenizer",
        "tokenising",
    ]
    assert heard[-1] == ("tokenising", total, total)
    assert ("reading", total, None) in heard


def test_default_cache_folder(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(DataConfig()) == Path("/somewhere/moefit/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder(DataConfig()) == Path("/home/me/.cache/moefit/data")
    assert cache_folder(DataConfig(cache_dir="~/c")) == Path("/home/me/c")


def test_too_short_corpus_raises(data: DataConfig, tmp_path: Path) -> None:
    prepared = prepare(data, seq_len=16)
    held_out = prepared.held_out.tokens
    assert prepared.train.tokens > held_out + 1
    assert prepare(data, seq_len=held_out + 1).held_out.tokens == held_out  # one shorter window
    said = (
        f"text to train on has {prepared.train.tokens} tokens, but a sequence of "
        f"seq_len={prepared.train.tokens} needs {prepared.train.tokens + 1}; give more text or a "
        f"seq_len of at most {prepared.train.tokens - 1}"
    )
    with pytest.raises(DataError, match=said):
        prepare(data, seq_len=prepared.train.tokens)
    (tmp_path / "short.txt").write_text("ab")
    short = data.model_copy(
        update={"sources": (str(tmp_path / "short.txt"),), "held_out": data.sources}
    )
    with pytest.raises(DataError, match=r"to train on has 2 tokens, .*; give more text$"):
        prepare(short, seq_len=4)
    none = data.model_copy(update={"held_out": (str(tmp_path / "short.txt"),)})
    (tmp_path / "short.txt").write_text("a")
    assert prepare(none, seq_len=4).held_out.tokens == 2  # with the end of the document


def test_unwritable_cache_raises(data: DataConfig, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a file").write_text("")
    blocked = data.model_copy(update={"cache_dir": str(tmp_path / "a file")})
    with pytest.raises(DataError, match=r"cannot be written to .*a file/.*bytes are.*cache_dir="):
        prepare(blocked, seq_len=16)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moefit.train.data.tokens.write_tokens", full)
    with pytest.raises(DataError, match="No space left on device"):
        prepare(data, seq_len=16)
    assert list(cache_folder(data).iterdir()) == []


def test_tokenizer_save_failure_raises(data: DataConfig, monkeypatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library does

    monkeypatch.setattr("moefit.train.data.tokens.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(DataError, match=r"could not be saved: No space left.*cache_dir="):
        prepare(data, seq_len=16)


def test_invalid_tokenizer_raises_before_reading_corpus(data: DataConfig) -> None:
    wrong = data.model_copy(update={"tokenizer": "nowhere", "sources": ("nowhere either",)})
    with pytest.raises(DataError, match=r"data\.tokenizer='nowhere' does not exist"):
        prepare(wrong, seq_len=16)


def test_real_standard_library(tmp_path: Path) -> None:
    data = DataConfig(max_bytes=300_000, vocab_size=512, cache_dir=str(tmp_path))
    prepared = prepare(data, seq_len=64)
    assert len(prepared.tokenizer) == 512
    division = split(data)
    assert "".join(texts_of(prepared, "held_out")) == "".join(d.text for d in division.held_out())


def write(tmp_path: Path, texts: list[str], tokenizer=None) -> np.ndarray:
    found = [Document(name=f"doc {n}", text=text) for n, text in enumerate(texts)]
    tokenizer = tokenizer or train_bpe(texts, 300)
    path = tmp_path / "tokens.bin"
    return write_tokens(path, found, tokenizer, on_written=lambda more: None).open()


def test_long_documents_are_encoded_in_chunks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(token_file, "CHUNK_CHARACTERS", 64)
    monkeypatch.setattr(token_file, "BATCH_CHARACTERS", 128)
    texts = ["a line of text\n" * 30, "x" * 500, "short", "y" * 64, "z" * 65]
    tokenizer = train_bpe(texts, 300)
    tokens = write(tmp_path, texts, tokenizer)
    assert tokenizer.decode(tokens.tolist()) == "".join(t + "<|endoftext|>" for t in texts)
    assert (tokens == tokenizer.eos_token_id).sum() == len(texts)


def test_special_tokens_in_text_are_plain_text(tmp_path: Path) -> None:
    texts = ["before <|endoftext|> after"]
    tokenizer = train_bpe(texts, 300)
    tokens = write(tmp_path, texts, tokenizer)
    assert (tokens == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(tokens[:-1].tolist()) == texts[0]


def test_tokenizer_padding_and_truncation_are_ignored(tmp_path: Path) -> None:
    texts = ["a b c d e f", "a"]
    tokenizer = train_bpe(texts, 300)
    plain = write(tmp_path, texts, tokenizer).tolist()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert write(tmp_path, texts, tokenizer).tolist() == plain
    assert tokenizer.backend_tokenizer.padding is not None  # the caller's own is left alone


def test_large_vocabulary_uses_uint32(tmp_path: Path) -> None:
    tokenizer = train_bpe(["ab"], 300)
    tokenizer.add_tokens([f"<extra {n}>" for n in range(70_000)])
    tokens = write(tmp_path, ["ab"], tokenizer)
    assert tokens.dtype == np.uint32


def test_tokenizer_that_cannot_encode_raises(data: DataConfig, tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "words.json"))
    given = data.model_copy(update={"tokenizer": str(tmp_path / "words.json")})
    with pytest.raises(DataError, match=r"cannot encode one of .* texts/0\.txt to .*UNK"):
        prepare(given, seq_len=16)


def test_metadata_describes_files(data: DataConfig) -> None:
    prepared = prepare(data, seq_len=16)
    meta = json.loads((prepared.train.path.parent / "meta.json").read_text())
    assert meta["train.bin"]["tokens"] == prepared.train.tokens
