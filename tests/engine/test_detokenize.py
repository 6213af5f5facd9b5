"""Incremental detokenization against decoding all tokens at once."""

import random
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moefit.engine.detokenize import IncrementalDetokenizer, special_texts
from moefit.evaluate.loading import reference_path

SMILEY, FAMILY = "\N{GRINNING FACE}", "\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL}"
WORLD = f"def f(x): return 'naïve {SMILEY} 漢字 {FAMILY} Ωmega' # ­­\n\n"


@cache
def reference() -> PreTrainedTokenizerBase:
    """Byte-level BPE: characters outside its training text take several tokens."""
    return AutoTokenizer.from_pretrained(reference_path())


@cache
def byte_fallback() -> PreTrainedTokenizerBase:
    """A tokenizer like Llama 2's: words begin with a marker, unknown characters are bytes."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{b:02X}>": b + 2 for b in range(256)}
    for piece in ("▁", "a", "b", "▁a", "▁b", "▁ab", "."):
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def whole(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def streamed(stream: IncrementalDetokenizer, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


def cut(text: str, stops: list[str]) -> str:
    """Reference: search every prefix of the text for one that ends in a stop text."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(st.lists(st.integers(0, 4095), max_size=60))
def test_incremental_text_equals_full_decoding(tokens: list[int]) -> None:
    tokenizer = reference()
    text = "".join(streamed(IncrementalDetokenizer(tokenizer), tokens))
    plain = whole(tokenizer, tokens)
    assert plain.startswith(text)
    assert set(plain[len(text) :]) <= {"\ufffd"}
    assert len(plain) - len(text) <= 3


@given(st.text(max_size=40), st.data())
def test_text_is_complete_and_valid(text: str, data: st.DataObject) -> None:
    text = data.draw(st.just(text.replace("\ufffd", "")))
    tokenizer = data.draw(st.sampled_from([reference(), byte_fallback()]))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = whole(tokenizer, tokens)
    parts = streamed(IncrementalDetokenizer(tokenizer), tokens)
    assert "".join(parts) == expected
    assert "\ufffd" not in "".join(parts)


@given(
    st.lists(st.sampled_from(["a", "b", "ab", " a", "\n", SMILEY, "é"]), max_size=12),
    st.lists(st.text(alphabet=["a", "b", " ", "\n", SMILEY], min_size=1, max_size=4), max_size=3),
    st.sampled_from([reference, byte_fallback]),
)
def test_first_complete_stop_text_ends_output(pieces, stops, make) -> None:
    tokenizer = make()
    tokens = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    stream = IncrementalDetokenizer(tokenizer, stops)
    text = "".join(streamed(stream, tokens))
    plain = whole(tokenizer, tokens)
    assert text == cut(plain, stops)
    assert stream.stopped == (cut(plain, stops) != plain)


@given(st.lists(st.integers(0, 264), max_size=60))
def test_invalid_utf8_is_replaced(tokens: list[int]) -> None:
    parts = streamed(IncrementalDetokenizer(byte_fallback(), ["ab"]), tokens)
    "".join(parts).encode()


def test_partial_characters_are_held_back() -> None:
    tokenizer = reference()
    tokens = tokenizer(SMILEY)["input_ids"]
    assert len(tokens) > 1, "else this shows nothing"
    parts = streamed(IncrementalDetokenizer(tokenizer), tokens)
    assert parts == [*[""] * (len(tokens) - 1), SMILEY, ""]


def test_unfinished_character_is_not_returned() -> None:
    tokenizer = reference()
    tokens = tokenizer("ok" + SMILEY)["input_ids"][:-1]
    assert "".join(streamed(IncrementalDetokenizer(tokenizer), tokens)) == "ok"


def test_special_tokens_are_skipped() -> None:
    tokenizer = reference()
    assert tokenizer.eos_token in special_texts(tokenizer).values()
    tokens = tokenizer("one")["input_ids"]
    mixed = [0, *tokens, 0, 0, *tokens]
    assert "".join(streamed(IncrementalDetokenizer(tokenizer), mixed)) == "oneone"


@cache
def turns() -> PreTrainedTokenizerBase:
    """A tokenizer with two turn markers, one special and one ordinary."""
    tokenizer = AutoTokenizer.from_pretrained(reference_path())
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("yes<|im_end|>more", ["<|im_end|>"], "yes"),
        ("yes<|im_start|>x<|im_end|>more", ["<|im_end|>"], "yesx"),
        ("yes<|im_end|>\nmore", ["<|im_end|>\n"], "yes"),
        ("yes<|im_end|>no\nmore<|im_end|>\n!", ["<|im_end|>\n"], "yesno\nmore"),
        ("one two<|im_end|>more", [" two<|im_end|>"], "one"),
        ("one two<|im_end|>more", ["x<|im_end|>"], "one twomore"),
        ("a<|im_end|><|im_start|>b", ["<|im_end|><|im_start|>"], "a"),
        ("a<|im_end|>b", ["ab"], ""),  # what is given has it
        ("a<|im_end|>b", ["<|im_start|>", "ab"], ""),
        ("a<|im_end|>b", ["<", ">", "im_end"], "ab"),
        ("a<tool>b", ["<tool>"], "a"),
        ("é😀<|im_end|>é", ["<|im_end|>"], "é😀"),
        ("é😀<|im_end|>é", ["😀<|im_end|>é"], "é"),
    ],
)
def test_stop_texts_of_special_tokens(text: str, stops: list[str], expected: str) -> None:
    tokens = turns()(text)["input_ids"]
    stream = IncrementalDetokenizer(turns(), stops)
    assert "".join(streamed(stream, tokens)) == expected
    assert stream.stopped == (expected != text.replace("<|im_end|>", ""))


def test_text_before_special_stop_text_is_exact() -> None:
    tokenizer = turns()
    broken = tokenizer(SMILEY)["input_ids"][:-1]
    end = tokenizer("<|im_end|>")["input_ids"]
    stream = IncrementalDetokenizer(tokenizer, ["<|im_end|>"])
    assert streamed(stream, [*tokenizer("ok")["input_ids"], *broken, *end])[-2:] == ["", ""]
    assert stream.stopped


def test_eos_token_may_complete_stop_text() -> None:
    tokenizer = turns()
    stream = IncrementalDetokenizer(tokenizer, ["two<|im_end|>"])
    text = "".join(map(stream.push, tokenizer("one two")["input_ids"]))
    (end,) = tokenizer("<|im_end|>")["input_ids"]
    assert text + stream.end(end) + stream.finish() == "one "
    assert stream.stopped


def test_possible_stop_text_is_held_back() -> None:
    tokenizer = reference()
    first, second = tokenizer("x")["input_ids"], tokenizer("<EN")["input_ids"]
    stream = IncrementalDetokenizer(tokenizer, ["<END>"])
    assert "".join(map(stream.push, first)) == "x"
    assert "".join(map(stream.push, second)) == ""
    assert not stream.stopped
    assert "".join(map(stream.push, tokenizer("x")["input_ids"])) == "<ENx"


def test_held_back_text_is_returned_at_end() -> None:
    tokenizer = reference()
    stream = IncrementalDetokenizer(tokenizer, ["<END>"])
    assert "".join(streamed(stream, tokenizer("x<EN")["input_ids"])) == "x<EN"
    assert not stream.stopped


def test_nothing_follows_stop_text() -> None:
    tokenizer = reference()
    stream = IncrementalDetokenizer(tokenizer, ["\n"])
    text = "".join(streamed(stream, tokenizer("one\ntwo")["input_ids"]))
    assert (text, stream.stopped, stream.push(tokenizer("x")["input_ids"][0])) == ("one", True, "")


def test_first_word_keeps_space_after_prompt() -> None:
    tokenizer = byte_fallback()
    vocabulary = tokenizer.get_vocab()
    prompt, answer = [vocabulary["▁a"]], [vocabulary["▁b"]]
    assert "".join(streamed(IncrementalDetokenizer(tokenizer), answer)) == "b"
    assert "".join(streamed(IncrementalDetokenizer(tokenizer, after=prompt), answer)) == " b"


@pytest.mark.parametrize("make", [reference, byte_fallback])
def test_long_output_is_decoded_in_windows(make) -> None:
    tokenizer, longest = make(), 0

    class Watched:
        added_tokens_decoder = tokenizer.added_tokens_decoder

        def decode(self, tokens: list[int], **how: bool) -> str:
            nonlocal longest
            longest = max(longest, len(tokens))
            return tokenizer.decode(tokens, **how)

    rng = random.Random(0)
    words = [rng.choice(["a", "ab", SMILEY, "\x80", "b."]) for _ in range(500)]
    tokens = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    text = "".join(streamed(IncrementalDetokenizer(Watched()), tokens))  # pyright: ignore[reportArgumentType]
    assert text == whole(tokenizer, tokens)
    assert longest < 60
