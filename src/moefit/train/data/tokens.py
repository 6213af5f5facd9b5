"""The corpus as tokens, made once and kept.

Owns the cache of token files: its fingerprint, its layout and its soundness. A folder of the
cache is built under another name and renamed into place, so what has the right name is whole,
whenever a process was killed and however many were at it. Knows nothing of batches or models.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from moefit.errors import DataError
from moefit.folders import cache_root
from moefit.train.config import DataConfig
from moefit.train.corpus import Document
from moefit.train.split import Split, split
from moefit.train.token_file import TokenFile, write_tokens
from moefit.train.tokenizer import load_tokenizer, save_tokenizer, tokenizer_files, train_bpe

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
class _Job:
    """What it takes to make the token files."""

    data: DataConfig
    division: Split
    survey: _Survey
    given: PreTrainedTokenizerFast | None
    report: Progress


def prepare(data: DataConfig, *, seq_len: int, progress: Progress | None = None) -> PreparedData:
    """Tokenise the corpus of `data`, or find that this was done before.

    Raises DataError if either side is shorter than one sequence of `seq_len` tokens and the
    token that follows it.
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
                _Job(data=data, division=division, survey=survey, given=given, report=report),
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


def _make(folder: Path, job: _Job) -> PreparedData:
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


def _build(building: Path, job: _Job) -> None:
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


def _trained(job: _Job) -> PreTrainedTokenizerFast:
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
    shortest = min(prepared.train.tokens, prepared.held_out.tokens)
    if shortest > seq_len:
        return
    side = "train" if prepared.train.tokens == shortest else "held-out"
    more = "more text" if side == "train" else "more text, a larger data.held_out_fraction"
    largest = f"a seq_len of at most {shortest - 1}" if shortest > 1 else "files for data.held_out"
    raise DataError(
        f"the {side} text has {shortest} tokens, but a sequence of seq_len={seq_len} takes "
        f"{seq_len + 1}; give {more} or {largest}"
    )


def _silent(stage: str, done: int, total: int | None) -> None:
    pass
