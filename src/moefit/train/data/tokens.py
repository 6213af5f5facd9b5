"""Tokenise the corpus once and cache the token files.

Each side of the split becomes one memory-mapped stream of ids, in a cache folder named by a
fingerprint of text and tokenizer. Folders are written under a temporary name and renamed, so an
interrupted run leaves nothing that a later one would use.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from moefit.checkpoint.model_folder import save_tokenizer
from moefit.errors import ConfigError, DataError
from moefit.folders import cache_root
from moefit.train.data.corpus import Document
from moefit.train.data.split import Split, split
from moefit.train.data.tokenizer import (
    load_tokenizer,
    tokenizer_files,
    train_bpe,
    vocabulary_size,
)
from moefit.train.settings import DataConfig

# Encodings take some 100 bytes per token until their ids are written: about 100 MB per batch.
BATCH_CHARACTERS = 1 << 22
# Longer documents are encoded in chunks to bound memory.
CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """The tokens of one side of the corpus, and the amount of text that they encode."""

    path: Path
    dtype: str
    tokens: int
    text_bytes: int
    documents: int

    def open(self) -> np.memmap:
        """Map the tokens read-only into memory."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))

    def is_complete(self) -> bool:
        """Return whether the file exists and has the expected size."""
        size = self.tokens * np.dtype(self.dtype).itemsize
        return self.path.is_file() and self.path.stat().st_size == size


@dataclass(frozen=True, slots=True, kw_only=True)
class _TextChunk:
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
    """Encode documents into a file.

    Args:
        path: The file.
        found: The documents.
        tokenizer: Encodes them; its end-of-text token follows each document.
        on_written: Called with the bytes of text of each batch.
    """
    # A copy without padding and truncation that encodes `<|endoftext|>` in a text as plain text.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)
    end_of_text = np.array([tokenizer.eos_token_id], dtype).tobytes()
    text_bytes = documents = 0
    with path.open("wb") as file:
        for batch in _batches(found):
            for chunk, encoding in zip(batch, _encode(backend, batch), strict=True):
                file.write(np.array(encoding.ids, dtype).tobytes())
                if chunk.is_last:
                    file.write(end_of_text)
                    documents += 1
            batch_bytes = sum(len(chunk.text.encode()) for chunk in batch)
            text_bytes += batch_bytes
            on_written(batch_bytes)
        tokens = file.tell() // dtype.itemsize
        file.flush()
        os.fsync(file.fileno())  # else a power failure could leave zeros in a file of full size
    return TokenFile(
        path=path, dtype=dtype.name, tokens=tokens, text_bytes=text_bytes, documents=documents
    )


def _encode(backend: Tokenizer, batch: list[_TextChunk]) -> list[Encoding]:
    try:
        return backend.encode_batch_fast([chunk.text for chunk in batch], add_special_tokens=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        names = f"{batch[0].document} to {batch[-1].document}"
        raise DataError(
            f"the tokenizer (data.tokenizer) cannot encode one of the documents {names}: {error}; "
            "use a byte-level tokenizer, or leave it out to train one on the corpus"
        ) from error


def _batches(found: Iterable[Document]) -> Iterator[list[_TextChunk]]:
    batch: list[_TextChunk] = []
    characters = 0
    for document in found:
        for chunk in _chunks(document):
            batch.append(chunk)
            characters += len(chunk.text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _chunks(document: Document) -> Iterator[_TextChunk]:
    """Split a long document, at line breaks where possible."""
    text, start = document.text, 0
    while len(text) - start > CHUNK_CHARACTERS:
        limit = start + CHUNK_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or limit
        yield _TextChunk(text=text[start:end], document=document.name, is_last=False)
        start = end
    yield _TextChunk(text=text[start:], document=document.name, is_last=True)


FORMAT = 1  # increase it when the same documents would yield other tokens
TRAIN, HELD_OUT, TOKENIZER, META = "train.bin", "held_out.bin", "tokenizer", "meta.json"

Progress = Callable[[str, int, int | None], None]
"""Called with a stage and its bytes of text, done and in total (None if unknown)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Token files and tokenizer; equal fingerprints mean equal tokens.

    `shards` has the text of each machine if it is divided among them. `source_ends` says where the
    training tokens of each source end if sources have weights.
    """

    train: TokenFile
    held_out: TokenFile
    tokenizer: PreTrainedTokenizerFast
    fingerprint: str
    shards: tuple[TokenFile, ...] = ()
    source_ends: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _CorpusScan:
    """Fingerprint and size of the corpus, and the training documents of each source."""

    fingerprint: str
    documents: tuple[int, ...]
    train_bytes: int
    held_out_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _PrepareJob:
    """Inputs of the token files."""

    data: DataConfig
    corpus: Split
    scan: _CorpusScan
    given: PreTrainedTokenizerFast | None
    progress: Progress


def prepare(data: DataConfig, *, seq_len: int, progress: Progress | None = None) -> PreparedData:
    """Tokenise a corpus, or return the cached result.

    Args:
        data: The corpus and its tokenizer.
        seq_len: Tokens per training sequence.
        progress: Called as data is read and tokenised.

    Raises:
        DataError: The text cannot be read, has fewer than `seq_len` + 1 tokens to train on or fewer
            than two held-out tokens, or the cache cannot be written.
    """
    progress = progress or (lambda stage, done, total: None)
    # First, so that a wrong tokenizer is reported before a large corpus is read.
    given = None if data.tokenizer is None else load_tokenizer(data.tokenizer)
    corpus = split(data)
    scan = _scan(data, corpus, progress)
    folder = cache_folder(data) / scan.fingerprint
    prepared = _load(folder, scan.fingerprint)
    if prepared is None:
        job = _PrepareJob(data=data, corpus=corpus, scan=scan, given=given, progress=progress)
        try:
            prepared = _make(folder, job)
        except OSError as error:
            raise _unwritable(folder, error) from error
    _check_length(prepared, seq_len)
    if data.weights is None:
        return prepared
    ends = _source_ends(prepared, scan.documents)
    _check_sources(data, ends, seq_len)
    return replace(prepared, source_ends=ends)


def prepare_shards(
    data: DataConfig, whole: PreparedData, machines: int, *, seq_len: int, progress: Progress
) -> PreparedData:
    """Tokenise the sources of each machine apart, with the tokenizer of the whole corpus.

    Args:
        data: The corpus.
        whole: As `prepare` returned it.
        machines: Their number.
        seq_len: Tokens per training sequence.
        progress: Called as data is read and tokenised.

    Raises:
        ConfigError: There are fewer sources than machines, or `max_bytes` is set, which would
            choose other text for held-out than that of the whole corpus.
        DataError: As for `prepare`, of one machine's sources.
    """
    if len(data.sources) < machines:  # they have no weights
        raise ConfigError(
            f"data.shard_by=source divides {len(data.sources)} sources among {machines} machines; "
            f"give at least {machines} sources, or data.shard_by=none"
        )
    if data.max_bytes is not None:
        raise ConfigError(
            "data.max_bytes does not work with data.shard_by=source: a machine's first bytes are "
            "not those of the corpus, whose held-out text they might be; give smaller sources"
        )
    tokenizer = str(whole.train.path.parent / TOKENIZER)
    parts = [
        data.model_copy(update={"sources": data.sources[n::machines], "tokenizer": tokenizer})
        for n in range(machines)
    ]
    shards = tuple(prepare(one, seq_len=seq_len, progress=progress).train for one in parts)
    return replace(whole, shards=shards)


def cache_folder(data: DataConfig) -> Path:
    """Return the folder of cached token files."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    return cache_root() / "data"


def _scan(data: DataConfig, corpus: Split, progress: Progress) -> _CorpusScan:
    """Read the corpus and fingerprint its documents and the tokenizer.

    Settings are not included, so different settings that select the same documents share a cache.
    """
    digest = hashlib.sha256(f"moefit tokens {FORMAT}\n".encode())
    if data.tokenizer is None:
        digest.update(f"bpe {data.vocab_size}\n".encode())
    else:
        for file in tokenizer_files(data.tokenizer):
            digest.update(_entry(file.name, file.read_bytes()))
    done = {TRAIN: 0, HELD_OUT: 0}
    documents = [0] * len(data.sources)
    for side, found in ((TRAIN, corpus.train()), (HELD_OUT, corpus.held_out())):
        digest.update(f"{side}\n".encode())
        for document in found:
            text = document.text.encode()
            digest.update(_entry(document.name, text))
            done[side] += len(text)
            if side == TRAIN:  # held-out documents may be of files of their own
                documents[document.source] += 1
            progress("reading", sum(done.values()), None)
    return _CorpusScan(
        fingerprint=digest.hexdigest()[:32],
        documents=tuple(documents),
        train_bytes=done[TRAIN],
        held_out_bytes=done[HELD_OUT],
    )


def _entry(name: str, content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()} {name!r}\n".encode()


_CHUNK = 1 << 24  # tokens


def _source_ends(prepared: PreparedData, documents: Sequence[int]) -> tuple[int, ...]:
    """Return where the training tokens of each source end, given its number of documents."""
    tokens, end = prepared.train.open(), prepared.tokenizer.eos_token_id
    chunks = range(0, len(tokens), _CHUNK)
    found = [np.flatnonzero(tokens[at : at + _CHUNK] == end) + at + 1 for at in chunks]
    ends = np.concatenate([[0], *found])
    if len(ends) != sum(documents) + 1:
        raise DataError(
            f"the tokenizer (data.tokenizer) writes its end-of-text token {len(ends) - 1} times "
            f"for {sum(documents)} documents, so sources with weights cannot be told apart; give "
            "a tokenizer that writes it after documents only, or no weights"
        )
    return tuple(int(ends[number]) for number in np.cumsum(documents))


def _check_sources(data: DataConfig, ends: Sequence[int], seq_len: int) -> None:
    """Raise DataError for a source of which not even one sequence can be drawn."""
    assert data.weights is not None
    for path, weight, start, end in zip(data.paths, data.weights, (0, *ends), ends, strict=False):
        if weight and end - start <= seq_len:
            raise DataError(
                f"{path} has weight {weight:g}, but {end - start} tokens to train on, and a "
                f"sequence of seq_len={seq_len} needs {seq_len + 1}; give more text there, weight "
                "0, or a file for data.held_out if most of it was held out"
            )


def _load(folder: Path, fingerprint: str) -> PreparedData | None:
    """Return the prepared data in a folder; None if it is missing, damaged or of another format."""
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
        sides = [TokenFile(path=folder / name, **meta[name]) for name in (TRAIN, HELD_OUT)]
        if not all(side.is_complete() for side in sides):
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
    prepared = _load(folder, job.scan.fingerprint)
    assert prepared is not None, f"{folder} was just written, but is damaged"
    return prepared


def _build(building: Path, job: _PrepareJob) -> None:
    tokenizer = job.given
    if tokenizer is None:
        tokenizer = train_bpe(_texts(job), job.data.vocab_size)
    meta: dict[str, object] = {"format": FORMAT}
    total, done = job.scan.train_bytes + job.scan.held_out_bytes, 0

    def on_written(more: int) -> None:
        nonlocal done
        done += more
        job.progress("tokenising", done, total)

    for name, found in ((TRAIN, job.corpus.train()), (HELD_OUT, job.corpus.held_out())):
        file = write_tokens(building / name, found, tokenizer, on_written=on_written)
        meta[name] = {key: value for key, value in asdict(file).items() if key != "path"}
    save_tokenizer(tokenizer, building / TOKENIZER)
    (building / META).write_text(json.dumps(meta, indent=2) + "\n", "utf-8")


def _texts(job: _PrepareJob) -> Iterator[str]:
    done = 0
    for document in job.corpus.train():
        yield document.text
        done += len(document.text.encode())
        job.progress("training the tokenizer", done, job.scan.train_bytes)


def _publish(building: Path, folder: Path) -> None:
    """Rename `building` to `folder`, unless another process has created it in the meantime."""
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
        f"token files cannot be written to {folder}: {error.strerror or error} ({free} bytes are "
        "free there, unfinished files removed); free disk space, or give another folder with "
        "data.cache_dir="
    )


def _check_length(prepared: PreparedData, seq_len: int) -> None:
    """Raise DataError for too little text; held-out text may be shorter than a sequence."""
    found, needed = prepared.train.tokens, seq_len + 1
    if found < needed:
        largest = f" or a seq_len of at most {found - 1}" if found > 2 else ""
        raise DataError(
            f"the text to train on has {found} tokens, but a sequence of seq_len={seq_len} needs "
            f"{needed}; give more text{largest}"
        )
    if prepared.held_out.tokens < 2:
        raise DataError(
            f"the held-out text has {prepared.held_out.tokens} tokens, but at least 2 are needed; "
            "give more text, a larger data.held_out_fraction, or files for data.held_out"
        )
