"""Turn the corpus into token files once, and find them again.

Documents are tokenised into one memory-mapped stream of ids per side of the split, in a cache
folder whose fingerprint covers sources, split and tokenizer. Files are written beside their place
and renamed, so an interrupted run leaves nothing that a later one would trust.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from moefit.errors import DataError
from moefit.folders import cache_root
from moefit.train.config import DataConfig
from moefit.train.data.corpus import Document
from moefit.train.data.split import Split, split
from moefit.train.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    tokenizer_files,
    train_bpe,
    vocabulary_size,
)

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
class _TextPiece:
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


def _encode(backend: Tokenizer, batch: list[_TextPiece]) -> list[Encoding]:
    texts = [piece.text for piece in batch]
    try:
        return backend.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # all that the tokenizers library raises is bare Exception
        names = f"{batch[0].document} to {batch[-1].document}"
        raise DataError(
            f"the tokenizer (data.tokenizer) can't encode one of the documents {names}: {error}; "
            f"use a byte-level tokenizer, or leave it out to train one on the corpus"
        ) from error


def _batches(found: Iterable[Document]) -> Iterator[list[_TextPiece]]:
    batch: list[_TextPiece] = []
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


def _pieces(document: Document) -> Iterator[_TextPiece]:
    """The document in pieces that end at a line end, if there is one."""
    text, start = document.text, 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or limit
        yield _TextPiece(text=text[start:end], document=document.name, is_last=False)
        start = end
    yield _TextPiece(text=text[start:], document=document.name, is_last=True)


FORMAT = 1  # raise it when the same documents would become other tokens
TRAIN, HELD_OUT, TOKENIZER, META = "train.bin", "held_out.bin", "tokenizer", "meta.json"

Progress = Callable[[str, int, int | None], None]
"""Hears a stage, how many bytes of text it has done, and of how many (None: not known)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """What training and evaluation read; the same fingerprint means the same tokens."""

    train: TokenFile
    held_out: TokenFile
    tokenizer: PreTrainedTokenizerFast
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Survey:
    """What one reading of the corpus shows, before any of it is encoded."""

    fingerprint: str
    train_bytes: int
    held_out_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _PrepareJob:
    """What it takes to make the token files."""

    data: DataConfig
    division: Split
    survey: _Survey
    given: PreTrainedTokenizerFast | None
    report: Progress


def prepare(data: DataConfig, *, seq_len: int, progress: Progress | None = None) -> PreparedData:
    """Tokenise the corpus of `data`, or find that this was done before.

    Raises DataError if the text to train on is shorter than one sequence of `seq_len` tokens and
    the token that follows it, or the held-out text shorter than two tokens.
    """
    report = progress or _silent
    # First, so that a wrong tokenizer is heard of before a large corpus is read.
    given = None if data.tokenizer is None else load_tokenizer(data.tokenizer)
    division = split(data)
    survey = _survey(data, division, report)
    folder = cache_folder(data) / survey.fingerprint
    prepared = _load(folder, survey.fingerprint)
    if prepared is None:
        try:
            prepared = _make(
                folder,
                _PrepareJob(
                    data=data, division=division, survey=survey, given=given, report=report
                ),
            )
        except OSError as error:
            raise _unwritable(folder, error) from error
    _check_length(prepared, seq_len)
    return prepared


def cache_folder(data: DataConfig) -> Path:
    """Where token files are kept."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    return cache_root() / "data"


def _survey(data: DataConfig, division: Split, report: Progress) -> _Survey:
    """Fingerprint all that decides the tokens: which text lies where, and the tokenizer.

    The settings themselves don't enter: two ways of asking for the same documents share a cache.
    """
    digest = hashlib.sha256(f"moefit tokens {FORMAT}\n".encode())
    if data.tokenizer is None:
        digest.update(f"bpe {data.vocab_size}\n".encode())
    else:
        for file in tokenizer_files(data.tokenizer):
            digest.update(_entry(file.name, file.read_bytes()))
    done = {TRAIN: 0, HELD_OUT: 0}
    for side, found in ((TRAIN, division.train()), (HELD_OUT, division.held_out())):
        digest.update(f"{side}\n".encode())
        for document in found:
            text = document.text.encode()
            digest.update(_entry(document.name, text))
            done[side] += len(text)
            report("reading", sum(done.values()), None)
    return _Survey(
        fingerprint=digest.hexdigest()[:32],
        train_bytes=done[TRAIN],
        held_out_bytes=done[HELD_OUT],
    )


def _entry(name: str, content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()} {name!r}\n".encode()


def _load(folder: Path, fingerprint: str) -> PreparedData | None:
    """What `folder` holds, or None if that is nothing, damaged or of another layout."""
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
        sides = [TokenFile(path=folder / name, **meta[name]) for name in (TRAIN, HELD_OUT)]
        if not all(side.is_whole() for side in sides):
            return None
        tokenizer = load_tokenizer(folder / TOKENIZER)
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return PreparedData(
        train=sides[0], held_out=sides[1], tokenizer=tokenizer, fingerprint=fingerprint
    )


def _make(folder: Path, job: _PrepareJob) -> PreparedData:
    building = folder.parent / f"{folder.name}.{os.getpid()}-{secrets.token_hex(4)}"
    building.mkdir(parents=True)
    try:
        _build(building, job)
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    prepared = _load(folder, job.survey.fingerprint)
    assert prepared is not None, f"{folder} was just written, but isn't sound"
    return prepared


def _build(building: Path, job: _PrepareJob) -> None:
    tokenizer = _trained(job) if job.given is None else job.given
    meta: dict[str, object] = {"format": FORMAT}
    total, done = job.survey.train_bytes + job.survey.held_out_bytes, 0

    def on_written(more: int) -> None:
        nonlocal done
        done += more
        job.report("tokenising", done, total)

    for name, found in ((TRAIN, job.division.train()), (HELD_OUT, job.division.held_out())):
        file = write_tokens(building / name, found, tokenizer, on_written=on_written)
        meta[name] = {key: value for key, value in asdict(file).items() if key != "path"}
    save_tokenizer(tokenizer, building / TOKENIZER)
    (building / META).write_text(json.dumps(meta, indent=2) + "\n", "utf-8")


def _trained(job: _PrepareJob) -> PreTrainedTokenizerFast:
    texts = _counted(job.division.train(), job.survey.train_bytes, job.report)
    return train_bpe(texts, job.data.vocab_size)


def _counted(found: Iterator[Document], total: int, report: Progress) -> Iterator[str]:
    done = 0
    for document in found:
        yield document.text
        done += len(document.text.encode())
        report("training the tokenizer", done, total)


def _publish(building: Path, folder: Path) -> None:
    """Give `building` its name, unless another process has put a sound one there meanwhile."""
    if _load(folder, folder.name) is not None:
        return
    damaged = building.with_name(f"{building.name}.damaged")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(damaged)
    try:
        building.rename(folder)
    except OSError:
        if _load(folder, folder.name) is None:
            raise
    finally:
        shutil.rmtree(damaged, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> DataError:
    existing = next((p for p in folder.absolute().parents if p.is_dir()), Path("/"))
    free = shutil.disk_usage(existing).free
    return DataError(
        f"token files can't be kept in {folder}: {error.strerror or error} ({free} bytes are free "
        f"there, unfinished files removed); free some space, or name another folder with "
        f"data.cache_dir="
    )


def _check_length(prepared: PreparedData, seq_len: int) -> None:
    """Held-out text may be shorter than a sequence: it is read in one shorter window then."""
    found, needed = prepared.train.tokens, seq_len + 1
    if found < needed:
        largest = f" or a seq_len of at most {found - 1}" if found > 2 else ""
        raise DataError(
            f"the text to train on has {found} tokens, but a sequence of seq_len={seq_len} takes "
            f"{needed}; give more text{largest}"
        )
    if prepared.held_out.tokens < 2:
        raise DataError(
            f"the held-out text has {prepared.held_out.tokens} tokens, and there is nothing to "
            "predict in fewer than 2; give more text, a larger data.held_out_fraction, or files "
            "for data.held_out"
        )


def _silent(stage: str, done: int, total: int | None) -> None:
    pass
