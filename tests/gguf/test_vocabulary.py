"""Vocabularies for GGUF: each kind of tokenizer, its metadata, and those that are refused."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from moefit.errors import UnsupportedModelError
from moefit.gguf.vocabulary import _SPLITS, TokenType, vocabulary_of
from moefit.train.data.tokenizer import train_bpe

TEXT = ["the cat sat on the mat, and 1234 other cats did not sit there"] * 3
SPLITS = {name: regex for regex, name in _SPLITS.items()}


def byte_level(split, **model) -> Tokenizer:
    backend = Tokenizer(models.BPE(**model))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def by_regex(regex) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece(*, prepends: bool = True) -> Tokenizer:
    replace = normalizers.Replace(" ", "▁")
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁"), replace] if prepends else [replace]
    backend.normalizer = normalizers.Sequence(steps)
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *pieces], show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def fast(backend, **special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_our_own_tokenizer():
    tokenizer = train_bpe(TEXT, 300)
    found = vocabulary_of(tokenizer, len(tokenizer) + 2)
    assert (found.model, found.split) == ("gpt2", "smollm")
    assert found.tokens[:-2] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert found.tokens[-1] == f"[PAD{len(tokenizer) + 1}]"
    end = tokenizer.eos_token_id
    assert found.special["eos"] == end and found.types[end] == TokenType.control
    assert found.types[-2:] == [TokenType.unused] * 2
    assert found.types.count(TokenType.normal) == len(tokenizer) - 1
    assert found.merges and all(len(pair.split(" ")) == 2 for pair in found.merges)
    assert (found.adds_bos, found.adds_eos, found.scores) == (False, False, None)


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe"])
def test_splits_by_regex(name):
    ignores = name == "llama-bpe"
    backend = byte_level(by_regex(SPLITS[name]), ignore_merges=ignores)
    assert vocabulary_of(fast(backend), 300).split == name
    other = byte_level(by_regex(SPLITS[name]), ignore_merges=not ignores)
    with pytest.raises(UnsupportedModelError, match="ignore_merges"):
        vocabulary_of(fast(other), 300)


def test_gpt2_split_with_first_token_and_template():
    backend = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    end = backend.token_to_id("<end>")
    backend.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", end)]
    )
    tokenizer = fast(backend, bos_token="<end>", eos_token="<end>", chat_template="{{ x }}")
    found = vocabulary_of(tokenizer, 300)
    assert found.split == "gpt-2"
    assert (found.adds_bos, found.adds_eos) == (True, False)
    assert (found.special["bos"], found.chat_template) == (end, "{{ x }}")


@pytest.mark.parametrize("prepends", [True, False])
def test_sentencepiece(prepends):
    backend = sentencepiece(prepends=prepends)
    found = vocabulary_of(fast(backend, bos_token="<s>", unk_token="<unk>"), 400)
    assert (found.model, found.split, found.adds_space) == ("llama", "default", prepends)
    assert found.types[backend.token_to_id("<0x41>")] == TokenType.byte
    assert found.types[backend.token_to_id("<unk>")] == TokenType.unknown
    assert found.scores is not None and found.merges is None
    merges = ["".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    assert "at" in merges
    for text in merges:
        assert found.scores[backend.token_to_id(text)] == -merges.index(text)


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits text"),
        (lambda: byte_level(by_regex(r"\w+")), "splits text"),
        (lambda: byte_level(pre_tokenizers.Whitespace()), "splits text"),
        (lambda: Tokenizer(models.WordPiece({"a": 0}, unk_token="a")), "of type WordPiece"),
    ],
)
def test_others_are_refused(backend, words):
    with pytest.raises(UnsupportedModelError, match=f"{words}.*--no-tokenizer"):
        vocabulary_of(fast(backend()), 300)


def test_normalisation_is_refused_but_not_nfc():
    backend = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.normalizer = normalizers.NFC()
    assert vocabulary_of(fast(backend), 300).split == "gpt-2"
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(UnsupportedModelError, match="Lowercase"):
        vocabulary_of(fast(backend), 300)


def test_ids_beyond_the_model_are_refused():
    tokenizer = train_bpe(TEXT, 300)
    with pytest.raises(UnsupportedModelError, match="vocab_size is 260"):
        vocabulary_of(tokenizer, 260)
