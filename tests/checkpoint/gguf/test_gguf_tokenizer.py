"""Tokenizers from GGUF metadata: read back what is written, and refuse what is not known."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

from moefit.checkpoint.gguf.header import GgufHeader
from moefit.checkpoint.gguf.tokenizer import SPLITS, tokenizer_of
from moefit.errors import CheckpointError, UnsupportedModelError
from moefit.gguf.vocabulary import Vocabulary, vocabulary_of
from moefit.train.data.tokenizer import train_bpe

TEXTS = (
    "the cat sat on the mat, and 1234 other cats did not",
    "It's 1234 cats,  isn't it?\n\n\tdef cat(x):\n        return x ** 2",
    "naïve café: “cats” 漢字 🙂 ½",
    "<s> the</s> cat",
    "",
)
SIZE = 420


class Metadata(dict[str, Any]):
    """Collects what a `GGUFWriter` is given."""

    def __getattr__(self, name: str) -> Any:
        keys = {
            "token_list": "tokens",
            "token_types": "token_type",
            "token_merges": "merges",
            "token_scores": "scores",
            "tokenizer_model": "model",
            "tokenizer_pre": "pre",
        }
        key = name.removeprefix("add_")
        before = "tokenizer" if key == "chat_template" else "tokenizer.ggml"
        # of add_add_bos_token, one "add_" is left
        key = f"{before}.{keys.get(key, key)}"
        return lambda value: self.__setitem__(key, value)


def read_back(vocabulary: Vocabulary, **changes: Any) -> Any:
    metadata = Metadata()
    vocabulary.write(metadata)
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return tokenizer_of(GgufHeader(path=Path("m.gguf"), metadata=metadata, tensors={}))


def trained(backend: Tokenizer, special: list[str]) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXTS[0], TEXTS[1]] * 3, trainer)
    return backend


def byte_level(name: str) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(one), behavior="isolated") for one in SPLITS[name]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return trained(backend, ["<s>", "</s>"])


def sentencepiece() -> Tokenizer:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=SIZE, special_tokens=["<unk>", "<s>", "</s>", *pieces], show_progress=False
    )
    backend.train_from_iterator([TEXTS[0]] * 3, trainer)
    return backend


def check_equal(mine: Any, expected: Any) -> None:
    for text in TEXTS:
        ids = expected(text)["input_ids"]
        assert mine(text)["input_ids"] == ids
        assert mine.decode(ids) == expected.decode(ids)


def test_our_own_tokenizer_is_read_back() -> None:
    expected = train_bpe(TEXTS, 300)
    mine = read_back(vocabulary_of(expected, 310))
    check_equal(mine, expected)
    assert len(mine) == len(expected)  # without placeholders
    assert mine.eos_token_id == expected.eos_token_id


def test_deepseek_splits_at_cases_and_scripts() -> None:
    def pieces(name: str, text: str) -> list[str]:
        splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in SPLITS[name]]
        )
        return [piece for piece, _ in splitter.pre_tokenize_str(text)]

    assert pieces("deepseek-llm", "ab Cd, 漢字12 𝐀\n") == [
        *("ab", " Cd", ",", " ", "漢字", "12", " 𝐀", "\n")
    ]
    assert pieces("deepseek-coder", "ab, 漢字12") == ["ab", ",", " ", "漢字", "1", "2"]


def test_marks_belong_to_words_of_qwen35() -> None:
    text = "cafe\u0301s, it\u2019S I'M 12 \u0905\u093f!\n\n  \u0301x"
    split = pre_tokenizers.Split(Regex(SPLITS["qwen35"][0]), behavior="isolated")
    judge = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    assert split.pre_tokenize_str(text) == judge.pre_tokenize_str(text)
    older = pre_tokenizers.Split(Regex(SPLITS["qwen2"][0]), behavior="isolated")
    assert split.pre_tokenize_str(text) != older.pre_tokenize_str(text)


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe"])
def test_byte_level_is_read_back(name: str) -> None:
    backend = byte_level(name)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    expected = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}",
    )
    mine = read_back(vocabulary_of(expected, SIZE))
    check_equal(mine, expected)
    assert mine.decode(mine(TEXTS[3])["input_ids"], skip_special_tokens=True) == " the cat"
    chat = [{"role": "user", "content": "the cat"}]
    assert mine.apply_chat_template(chat) == expected.apply_chat_template(chat)


def test_sentencepiece_is_read_back() -> None:
    backend = sentencepiece()
    expected = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    check_equal(read_back(vocabulary_of(expected, SIZE)), expected)


def test_unknown_kinds_are_refused() -> None:
    vocabulary = vocabulary_of(train_bpe(TEXTS, 300), 300)
    with pytest.raises(UnsupportedModelError, match="kind 't5'; gpt2"):
        read_back(vocabulary, model="t5")
    with pytest.raises(UnsupportedModelError, match="splits text as 'viking'; known are gpt-2"):
        read_back(vocabulary, pre="viking")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "no_vocab"}, "has no tokenizer.*token ids"),
        ({"tokens": []}, "0 tokens"),
        ({"token_type": [1]}, "1 types"),
        ({"model": "llama"}, "0 scores"),
        ({"merges": ["no such"]}, "cannot be read"),
    ],
)
def test_damage_is_an_error(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_back(vocabulary_of(train_bpe(TEXTS, 300), 300), **changes)
