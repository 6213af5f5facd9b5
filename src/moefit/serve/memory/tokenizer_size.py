"""What a model's tokenizer takes of memory, from its files and before it is loaded.

Owns the estimate for each kind of tokenizer, and what is read of the files for it. The constants
were measured with tokenizers of 32,000, 151,000 and 256,000 tokens, short and long ones, loaded by
transformers 5.23 (tests/serve/memory/test_tokenizer_size.py holds them to the operating system's
figures). Knows nothing of models or budgets.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Words that a tokenizer remembers the tokens of (10,000 of them), tokens whose text a server
# remembers (`server/tokenizer.py`), and modules of transformers that only tokenizers need.
TABLES = 8 << 20
_MODULES = 6 << 20  # code that only reading a tokenizer needs
_CHUNK = 1 << 20
_ENTRY = re.compile(rb'":\s*\d')  # "token": 17
_PIECE = re.compile(rb'\[\s*"((?:[^"\\]|\\.)*)",\s*-?\d')  # ["token", -7.25]
_UNIGRAM = re.compile(rb'"type":\s*"Unigram"')
# Files that transformers makes tokenizers of; the first one alone where it is there.
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
          "spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model")  # fmt: skip
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True, slots=True)
class TokenizerSize:
    """Bytes that a tokenizer takes.

    Args:
        held: What the process holds of it once it is loaded, with what serving remembers of tokens.
        reading: What it takes beyond the process while it is being read, at the peak.
    """

    held: int
    reading: int


def tokenizer_size(folder: Path) -> TokenizerSize:
    """Return what the tokenizer in a model's folder takes.

    A vocabulary is in memory as maps in both directions; merges as a map of pairs; the pieces of a
    Unigram model also as a tree with a node for every beginning of a piece, which takes far more
    than all else. While a tokenizer is read its file is there once as text, once parsed, and its
    vocabulary in Python and in Rust.

    Args:
        folder: Of the model. Nothing is loaded; files are scanned for what they have.

    Returns:
        The sizes; both are zero for a folder without a tokenizer.
    """
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    if not files:
        return TokenizerSize(0, 0)
    if files[0].name == _FILES[0]:  # transformers looks at no other then
        del files[1:]
    nbytes, entries = sum(file.stat().st_size for file in files), sum(map(_entries, files))
    copies = 0 if _is_generic(folder) else 170 * entries + 11 * nbytes // 4
    if any(_is_unigram(file) for file in files):
        pieces = _PIECE.findall(files[0].read_bytes())
        held = _MODULES + 430 * len(pieces) + 360 * inner_nodes(pieces) + copies
        return TokenizerSize(held=TABLES + held, reading=TABLES + held + 290 * len(pieces))
    held = _MODULES + 250 * entries + 2 * nbytes + copies
    reading = max(held, _MODULES + 1100 * entries + 5 * nbytes)
    return TokenizerSize(held=TABLES + held, reading=TABLES + reading)


def _is_generic(folder: Path) -> bool:
    """Whether no class of transformers' keeps the vocabulary in Python beside the library's."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("tokenizer_class") in _GENERIC


def inner_nodes(words: list[bytes]) -> int:
    """Return how many nodes with children the tree of these words' bytes has.

    >>> inner_nodes([b"ab", b"ac", b"abcd"])
    4
    """
    nodes = leaves = 0
    before = b""
    for word in sorted(words):
        shared = _shared(before, word)
        nodes += len(word) - shared
        leaves += shared < len(before)
        before = word
    return nodes - leaves - bool(before) + 1


def _shared(one: bytes, other: bytes) -> int:
    """How many bytes two words begin with alike."""
    shortest = min(len(one), len(other))
    return next((at for at in range(shortest) if one[at] != other[at]), shortest)


def _is_unigram(file: Path) -> bool:
    return any(_UNIGRAM.search(chunk) for chunk in _chunks(file))


def _entries(file: Path) -> int:
    """How many tokens a file has, or a few more."""
    if file.suffix == ".json":
        return sum(len(_ENTRY.findall(chunk)) for chunk in _chunks(file))
    if file.suffix == ".txt":
        return 0 if file.name == "merges.txt" else sum(c.count(b"\n") for c in _chunks(file))
    return file.stat().st_size // 12  # a piece of SentencePiece's takes that or more


def _chunks(file: Path) -> Iterator[bytes]:
    """A file in parts, of which each but the first begins with the end of the one before."""
    end = b""
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            yield end + chunk
            end = chunk[-8:]
