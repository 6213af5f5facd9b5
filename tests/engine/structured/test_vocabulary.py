"""Bytes of tokens: those of a text's tokens are the text's, whatever the kind of tokenizer."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moefit
from moefit.checkpoint.tiktoken_file import read_ranked_tokens
from moefit.engine.structured.vocabulary import vocabulary
from tests.checkpoint.test_tiktoken_file import ranks_of, written
from tests.engine.test_detokenize import byte_fallback

TEXTS = ("def main():\n    return 'é😀'", '{"a": [1, 2.5e3], "b": "中文"}', " x  y", "\t\r\n")


def llama(metaspace: bool) -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer as Llama's, or as T5's."""
    pieces = {"<unk>": 0, "\u2581": 1, **{f"<0x{n:02X}>": n + 2 for n in range(256)}}
    for word in ("a", "b", "\u2581a", "ab", "\u2581\u2581", '"', "{", "}"):
        pieces.setdefault(word, len(pieces))
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581", "\u2581")]
    made = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", byte_fallback=True))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")]
    else:
        made.normalizer = normalizers.Replace(" ", "\u2581")
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte-level", "llama", "metaspace", "words", "tiktoken"])
def tokenizer(request, tmp_path_factory):
    if request.param == "byte-level":
        folder = Path(moefit.__file__).parent / "reference_model"
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if request.param == "tiktoken":
        return read_ranked_tokens(written(tmp_path_factory.mktemp("kimi"), ranks_of(TEXTS)))
    if request.param == "words":
        return byte_fallback()
    return llama(request.param == "metaspace")


def test_bytes_of_tokens_add_up(tokenizer) -> None:
    tokens = vocabulary(tokenizer, len(tokenizer)).tokens
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        joined = b"".join(tokens[one] for one in ids)
        assert joined.removeprefix(b" ") == text.encode().removeprefix(b" "), text


def test_control_tokens_and_markers_are_special() -> None:
    tokenizer = llama(metaspace=True)
    tokenizer.add_tokens(["<tool_call>", "[ARGS]", "   ", "word"])
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    found = vocabulary(tokenizer, len(tokenizer) + 3)
    names = {tokenizer.convert_ids_to_tokens(one) for one in found.special if one < len(tokenizer)}
    assert {"<unk>", "</s>", "<tool_call>", "[ARGS]"} <= names
    assert not {"   ", "word", "\u2581a"} & names
    assert {len(tokenizer), len(tokenizer) + 2} <= set(found.special)
    assert len(found.tokens) == len(tokenizer) + 3
