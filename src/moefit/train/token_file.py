"""A file of token ids: written as a stream, read as a memory map.

Owns the layout (one unsigned integer a token, each document followed by the end-of-text id) and
the encoding of documents in batches. Memory stays the same however large the corpus is. Knows
nothing of caches, nor of how tokens become batches.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from moefit.errors import DataError
from moefit.train.corpus import Document
from moefit.train.tokenizer import vocabulary_size

# An encoding takes some 100 bytes a token until its ids are written, so a batch about 100 MB.
BATCH_CHARACTERS = 1 << 22
# Longer documents are encoded in pieces, so that one huge file doesn't need huge memory.
PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """Where the tokens of one side of the corpus lie, and how much text they stand for."""

    path: Path
    dtype: str
    tokens: int
    text_bytes: int
    documents: int

    def open(self) -> np.memmap:
        """All tokens, read from disk as they are looked at; can't be written to."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))

    def is_whole(self) -> bool:
        """Whether the file is there with exactly the bytes it should have."""
        size = self.tokens * np.dtype(self.dtype).itemsize
        return self.path.is_file() and self.path.stat().st_size == size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    text: str
    document: str
    is_last: bool


def write_tokens(
    path: Path,
    found: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    on_written: Callable[[int], None],
) -> TokenFile:
    """Encode `found` into `path`; `on_written` hears how many more bytes of text are done."""
    backend = _plain(tokenizer)
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)
    end_of_text = np.array([tokenizer.eos_token_id], dtype).tobytes()
    text_bytes = documents = 0
    with path.open("wb") as file:
        for batch in _batches(found):
            for piece, encoding in zip(batch, _encode(backend, batch), strict=True):
                file.write(np.array(encoding.ids, dtype).tobytes())
                if piece.is_last:
                    file.write(end_of_text)
                    documents += 1
            batch_bytes = sum(len(piece.text.encode()) for piece in batch)
            text_bytes += batch_bytes
            on_written(batch_bytes)
        tokens = file.tell() // dtype.itemsize
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave a file of the right size, but empty
    return TokenFile(
        path=path, dtype=dtype.name, tokens=tokens, text_bytes=text_bytes, documents=documents
    )


def _plain(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that neither pads nor cuts, and reads `<|endoftext|>` in a text as any other text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def _encode(backend: Tokenizer, batch: list[_Piece]) -> list[Encoding]:
    texts = [piece.text for piece in batch]
    try:
        return backend.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # all that the tokenizers library raises is bare Exception
        names = f"{batch[0].document} to {batch[-1].document}"
        raise DataError(
            f"the tokenizer (data.tokenizer) can't encode one of the documents {names}: {error}; "
            f"use a byte-level tokenizer, or leave it out to train one on the corpus"
        ) from error


def _batches(found: Iterable[Document]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for document in found:
        for piece in _pieces(document):
            batch.append(piece)
            characters += len(piece.text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _pieces(document: Document) -> Iterator[_Piece]:
    """The document in pieces that end at a line end, if there is one."""
    text, start = document.text, 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or limit
        yield _Piece(text=text[start:end], document=document.name, is_last=False)
        start = end
    yield _Piece(text=text[start:], document=document.name, is_last=True)
