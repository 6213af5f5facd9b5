"""Tokens in requests and responses."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moefit.errors import ConfigError, RequestTooLargeError
from moefit.evaluate.loading import reference_path
from moefit.server.tokenizer import RequestTokenizer
from tests.engine.test_detokenize import byte_fallback


@pytest.fixture(scope="module")
def words() -> RequestTokenizer:
    return RequestTokenizer(
        AutoTokenizer.from_pretrained(reference_path()), size=4096, max_tokens=100
    )


def test_token_bytes_equal_text(words: RequestTokenizer) -> None:
    for text in ("import os\n", "é😀 漢字 👩\u200d👧", " x"):
        for one in (words, RequestTokenizer(byte_fallback(), size=265, max_tokens=100)):
            said = b"".join(map(one.raw, one.ids(text))).decode()
            assert said.removeprefix(" ") == text.removeprefix(" ")


def test_token_names_are_text_or_bytes(words: RequestTokenizer) -> None:
    assert [words.name(token) for token in words.ids("import os")] == ["import", " os"]
    assert words.name(0) == "<|endoftext|>"
    names = [words.name(token) for token in words.ids("😀")]
    assert all(name.startswith("bytes:\\x") for name in names)
    spaced = RequestTokenizer(byte_fallback(), size=265, max_tokens=100)
    vocabulary = byte_fallback().get_vocab()
    assert spaced.name(vocabulary["▁a"]) == " a"
    assert spaced.name(vocabulary["a"]) == "a"
    assert spaced.name(vocabulary["<0xE2>"]) == "bytes:\\xe2"


def test_every_token_has_a_name(words: RequestTokenizer) -> None:
    names = [words.name(token) for token in range(words.size)]
    assert len(set(names)) == len(names)


def test_too_long_text_is_not_tokenised(words: RequestTokenizer) -> None:
    with pytest.raises(RequestTooLargeError, match="100"):
        words.ids("a" * 100_000)


def test_lone_surrogates_raise(words: RequestTokenizer) -> None:
    with pytest.raises(ConfigError, match="unpaired surrogate"):
        words.ids("\ud83d")


def test_unknown_tokens_raise(words: RequestTokenizer) -> None:
    words.check_ids([0, 4095])
    for wrong in (-1, 4096):
        with pytest.raises(ConfigError, match="0 to 4095"):
            words.check_ids([5, wrong])


def test_missing_tokenizer_uses_token_ids() -> None:
    bare = RequestTokenizer(None, size=10, max_tokens=100)
    assert (bare.text([1, 2]), bare.name(7), bare.raw(7)) == ("", "token_id:7", b"")
    with pytest.raises(ConfigError, match="token ids"):
        bare.ids("text")


def replacing(times: int, part: str = "normalizer") -> PreTrainedTokenizerFast:
    """Return a tokenizer that doubles each letter this many times."""
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    if part == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * times)
    elif part == "pre_tokenizer":
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([level] * times)
    else:
        tokenizer.decoder = decoders.Sequence([decoders.Replace("a", "aa")] * times)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
def test_expanding_normalizers_raise(part: str) -> None:
    RequestTokenizer(replacing(3, part), size=1, max_tokens=100)
    with pytest.raises(ConfigError, match=f"{part}.* 30 rules, which may make"):
        RequestTokenizer(replacing(30, part), size=1, max_tokens=100)
    with pytest.raises(ConfigError, match="1,000 rules"):
        RequestTokenizer(replacing(1000, part), size=1, max_tokens=100)


def test_texts_that_grow_too_long_raise() -> None:
    doubling = RequestTokenizer(replacing(10), size=1, max_tokens=1 << 20)
    assert len(doubling.ids("aa")) == 2048
    with pytest.raises(RequestTooLargeError, match="1024 times"):
        doubling.ids("a" * 100_000)


def test_normalizers_of_real_tokenizers_are_accepted() -> None:
    for normalizer in (
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()],
    ):
        tokenizer = Tokenizer(models.BPE({"a": 0}, []))
        tokenizer.normalizer = normalizers.Sequence(normalizer)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        RequestTokenizer(fast, size=1, max_tokens=1 << 20).ids("a" * 200_000)
