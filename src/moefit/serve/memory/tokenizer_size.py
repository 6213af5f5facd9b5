"""Estimate the memory of a tokenizer from its files, before it is loaded.

The constants were measured with tokenizers of 32,000, 151,000 and 256,000 tokens, short and long
ones, loaded by transformers 5.23 (tests/serve/memory/test_tokenizer_size.py compares the estimates
with the operating system's figures).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

from moefit.checkpoint.gguf.header import read_gguf
from moefit.checkpoint.gguf.tokenizer import has_vocabulary, vocabulary_size
from moefit.checkpoint.model_folder import read_json_or_empty
from moefit.folders import is_gguf

# A tokenizer's cache of 10,000 words, a server's cache of tokens' texts (`server/tokenizer.py`),
# and modules of transformers that only tokenizers need.
TOKENIZER_CACHES = 8 << 20
_MODULES = 6 << 20  # code that only reading a tokenizer needs
_CHUNK = 1 << 20
_ENTRY = re.compile(rb'":\s*\d')  # "token": 17
_PIECE = re.compile(rb'\[\s*"((?:[^"\\]|\\.)*)",\s*-?\d')  # ["token", -7.25]
_UNIGRAM = re.compile(rb'"type":\s*"Unigram"')
# Files from which transformers builds tokenizers; only the first is used where it exists.
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
          "spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model")  # fmt: skip
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True, slots=True)
class TokenizerSize:
    """Memory of a tokenizer in bytes.

    Args:
        held: Once it is loaded, with serving's caches of tokens.
        reading: Peak while it is read.
    """

    held: int
    reading: int


def tokenizer_size(folder: Path) -> TokenizerSize:
    """Return the memory that the tokenizer of a model takes.

    A vocabulary is stored as maps in both directions, merges as a map of pairs, and the pieces of a
    Unigram model also as a prefix tree, which takes far more than the rest. While a tokenizer is
    read, its file exists as text and parsed, and its vocabulary both in Python and in Rust.

    Args:
        folder: Of the model, or its GGUF file. Files are scanned, not loaded.

    Returns:
        The sizes; both are zero for a folder without a tokenizer.
    """
    if is_gguf(folder):
        header = read_gguf(folder)
        return _size(*vocabulary_size(header)) if has_vocabulary(header) else TokenizerSize(0, 0)
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    if not files:
        return TokenizerSize(0, 0)
    if files[0].name == _FILES[0]:  # transformers ignores the others then
        del files[1:]
    nbytes, entries = sum(file.stat().st_size for file in files), sum(map(_entries, files))
    copies = 0 if _is_generic(folder) else 170 * entries + 11 * nbytes // 4
    if any(_is_unigram(file) for file in files):
        pieces = _PIECE.findall(files[0].read_bytes())
        held = _MODULES + 430 * len(pieces) + 360 * inner_nodes(pieces) + copies
        held += TOKENIZER_CACHES
        return TokenizerSize(held=held, reading=held + 290 * len(pieces))
    return _size(entries, nbytes, copies)


def _size(entries: int, nbytes: int, copies: int = 0) -> TokenizerSize:
    held = _MODULES + 250 * entries + 2 * nbytes + copies
    reading = max(held, _MODULES + 1100 * entries + 5 * nbytes)
    return TokenizerSize(held=TOKENIZER_CACHES + held, reading=TOKENIZER_CACHES + reading)


def _is_generic(folder: Path) -> bool:
    """Return whether transformers stores no second copy of the vocabulary in Python."""
    config = read_json_or_empty(folder / "tokenizer_config.json")
    return config.get("tokenizer_class") in _GENERIC


def inner_nodes(words: list[bytes]) -> int:
    """Return the number of nodes with children in the prefix tree of these words' bytes.

    >>> inner_nodes([b"ab", b"ac", b"abcd"])
    4
    """
    nodes = leaves = 0
    before = b""
    for word in sorted(words):
        shared = len(commonprefix([before, word]))  # noqa: RUF071 - of bytes, as meant
        nodes += len(word) - shared
        leaves += shared < len(before)
        before = word
    return nodes - leaves - bool(before) + 1


def _is_unigram(file: Path) -> bool:
    return any(_UNIGRAM.search(chunk) for chunk in _chunks(file))


def _entries(file: Path) -> int:
    """Return the number of tokens in a file, or slightly more."""
    if file.suffix == ".json":
        return sum(len(_ENTRY.findall(chunk)) for chunk in _chunks(file))
    if file.suffix == ".txt":
        return 0 if file.name == "merges.txt" else sum(c.count(b"\n") for c in _chunks(file))
    return file.stat().st_size // 12  # a SentencePiece piece takes at least 12 bytes


def _chunks(file: Path) -> Iterator[bytes]:
    """Yield a file in chunks; each but the first begins with the end of the previous one."""
    end = b""
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            yield end + chunk
            end = chunk[-8:]
