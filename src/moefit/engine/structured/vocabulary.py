"""The bytes of each token, which decide whether a grammar allows it.

Byte-level tokenizers (GPT-2's form, to which tiktoken files are converted too) write a byte as one
of 256 letters, SentencePiece writes a space as U+2581 and single bytes as <0xE2>. Tokens of other
tokenizers are decoded behind themselves, so that a word keeps its leading space.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_MARKER = re.compile(r"[<\[(]\S*[>\])]|\s*[|｜]\S*[|｜]\s*")
_CHUNK = 4096  # tokens converted to Python strings at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens as a grammar sees them.

    Attributes:
        tokens: Bytes of each token id; empty for ids without text.
        special: Ids that text never matches: control tokens, markers such as <tool_call>, and ids
            without text. A grammar names them by id.
    """

    tokens: Sequence[bytes]
    special: Collection[int]


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer.

    Args:
        tokenizer: The model's tokenizer.
        size: Token ids of the model; those beyond the tokenizer's have no text.
    """
    added = {id: token for id, token in tokenizer.added_tokens_decoder.items() if id < size}
    known = min(len(tokenizer), size)
    tokens: list[bytes] = []
    for begin in range(0, known, _CHUNK):
        tokens += _bytes_of(tokenizer, range(begin, min(begin + _CHUNK, known)))
    tokens += [b""] * (size - known)
    special = {id for id, token in added.items() if token.special or _is_marker(token.content)}
    for id, token in added.items():
        tokens[id] = token.content.encode()
    special |= {id for id, text in enumerate(tokens) if not text}
    return Vocabulary(tokens=tokens, special=special)


def _is_marker(text: str) -> bool:
    """Return whether an added token marks structure rather than being text.

    >>> [_is_marker(text) for text in ("<tool_call>", "[ARGS]", "<|end|>", "    ", "def")]
    [True, True, True, False, False]
    """
    return _MARKER.fullmatch(text) is not None


def _bytes_of(tokenizer: PreTrainedTokenizerBase, ids: range) -> list[bytes]:
    decoder = _decoder(tokenizer)
    if "ByteLevel" in decoder:
        return [_byte_level(piece) for piece in _pieces(tokenizer, ids)]
    if "ByteFallback" in decoder or "\u2581" in decoder:
        return [_sentencepiece(piece) for piece in _pieces(tokenizer, ids)]
    return [_decoded(tokenizer, token) for token in ids]


def _decoder(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the rules by which tokens become text, as JSON; empty if they are Python code."""
    part = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if part is None:
        return ""
    try:
        state = part.__getstate__()
    except Exception:  # noqa: BLE001 - a decoder written in Python
        return ""
    text = state.decode() if isinstance(state, bytes) else str(state)
    return text.encode().decode("unicode_escape") if "\\u2581" in text else text


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: range) -> list[str]:
    return [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(ids))]


def _byte_level(piece: str) -> bytes:
    r"""Return the bytes of a piece in GPT-2's letters.

    >>> _byte_level("Ġcaf\u00c3\u00a9"[:5]), _byte_level("中")
    (b' caf\xc3', b'\xe4\xb8\xad')
    """
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    return piece.encode()


def _sentencepiece(piece: str) -> bytes:
    r"""Return the bytes of a SentencePiece piece.

    >>> _sentencepiece("\u2581a"), _sentencepiece("<0xE2>")
    (b' a', b'\xe2')
    """
    if match := _BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("\u2581", " ").encode()


def _decoded(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    once, twice = (_text(tokenizer, ids) for ids in ([token], [token, token]))
    return twice[len(once) :].encode()


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
