"""Read documents from plain text, JSONL, Parquet and Hugging Face datasets.

Documents have the same names and order on every machine.
"""

import difflib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

from moefit.errors import DataError
from moefit.train.data.sources import JSONL_SUFFIX, PARQUET_SUFFIX, HubDataset, TextFile, parts

BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text, and its name relative to its source.

    `source` is the source's number, from 0.
    """

    name: str
    text: str
    source: int = 0


def documents(
    sources: Sequence[str], *, text_key: str, excluding: Sequence[str] = ()
) -> Iterator[Document]:
    """Yield the documents of each source, sorted by path, without empty ones.

    Args:
        sources: As in `DataConfig.sources`. A file in two sources is read once.
        text_key: Key or column of the text in JSONL, Parquet and datasets.
        excluding: Sources whose files are skipped.

    Raises:
        DataError: A source cannot be read, or there is no text.
    """
    is_empty = True
    for number, found in enumerate(parts(sources, excluding=excluding)):
        for document in chain.from_iterable(_read(part, text_key) for part in found):
            if document.text:
                is_empty = False
                yield replace(document, source=number)
    if is_empty:
        outside = f" outside {', '.join(excluding)}" if excluding else ""
        raise DataError(
            f"there is no text in {', '.join(sources) or 'an empty list of sources'}{outside}; "
            "give a file or folder with text, or 'stdlib'"
        )


def _read(part: TextFile | HubDataset, text_key: str) -> Iterator[Document]:
    if isinstance(part, HubDataset):
        yield from _read_hub(part, text_key)
        return
    readers = {JSONL_SUFFIX: _read_jsonl, PARQUET_SUFFIX: _read_parquet}
    reader = readers.get(part.path.suffix.lower(), _read_plain)
    try:
        yield from reader(part, text_key)
    except OSError as error:
        raise DataError(
            f"{part.path} cannot be read ({error.strerror or error}); "
            "make it readable or remove it from data.sources"
        ) from error


def _read_plain(part: TextFile, text_key: str) -> Iterator[Document]:
    raw = part.path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if part.in_stdlib:  # its tests contain wrongly encoded files on purpose
            return
        raise _not_utf8(f"{part.path}", error.start, raw[error.start]) from error
    yield Document(name=part.name, text=text.removeprefix(BYTE_ORDER_MARK))


def _read_jsonl(part: TextFile, text_key: str) -> Iterator[Document]:
    offset = 0
    with part.path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{part.path}, line {number}"
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(where, offset + error.start, raw[error.start]) from error
            offset += len(raw)
            line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                text = _text_of(_json_object(line, where), text_key, where)
                yield Document(name=f"{part.name}:{number}", text=text)


def _read_parquet(part: TextFile, text_key: str) -> Iterator[Document]:
    parquet = _optional("pyarrow.parquet", f"reading {part.path}")
    try:
        with parquet.ParquetFile(part.path) as file:
            _check_key(file.schema_arrow.names, text_key, f"{part.path}")
            batches = file.iter_batches(columns=[text_key])
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from _rows(rows, part.name, text_key)
    except ValueError as error:  # the base of pyarrow's errors
        raise DataError(
            f"{part.path} is not valid Parquet ({error}); write it again, or as {JSONL_SUFFIX}"
        ) from error


def _read_hub(part: HubDataset, text_key: str) -> Iterator[Document]:
    datasets = _optional("datasets", f"reading {part.name}")
    try:
        rows = datasets.load_dataset(part.dataset, name=part.config, split=part.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        config = f" with configuration {part.config!r}," if part.config else " with"
        raise DataError(
            f"dataset {part.dataset!r}{config} split {part.split!r} cannot be loaded: {error}; "
            f"check the names on huggingface.co (hf:DATASET@CONFIG:SPLIT), or give its downloaded "
            f"{PARQUET_SUFFIX} files as source"
        ) from error
    _check_key(rows.column_names, text_key, part.name)
    yield from _rows(rows.select_columns([text_key]), part.name, text_key)


def _rows(rows: Iterable[Mapping[str, Any]], name: str, text_key: str) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        text = _text_of(row, text_key, f"{name}, row {number}")
        yield Document(name=f"{name}:{number}", text=text)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); JSONL has one object per line") from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply; give a flat object per line") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where} contains a JSON {type(row).__name__}, but JSONL has one object per line, "
            f'such as {{"text": "..."}}'
        )
    return cast(dict[str, Any], row)


def _text_of(row: Mapping[str, Any], text_key: str, where: str) -> str:
    """Return the text of a row; null, common in published datasets, counts as empty."""
    _check_key(row, text_key, where)
    text = row[text_key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {text_key!r} is of type {type(text).__name__}, not text; "
            "set data.text_key to a key with text"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON escapes can contain a lone surrogate
        raise DataError(
            f"{where}: character {error.start} of {text_key!r} is a lone surrogate, which UTF-8 "
            "cannot encode; remove or replace it"
        ) from error
    return text


def _check_key(keys: Iterable[str], text_key: str, where: str) -> None:
    present = list(keys)
    if text_key in present:
        return
    close = difflib.get_close_matches(text_key, present, n=1) or present[:1]
    hint = f"give data.text_key={close[0]}" if close else "leave it out"
    raise DataError(
        f"{where} has no {text_key!r} (data.text_key); it has {', '.join(present) or 'nothing'}; "
        f"{hint}"
    )


def _not_utf8(where: str, offset: int, byte: int) -> DataError:
    return DataError(
        f"{where} is not UTF-8: byte {offset} is 0x{byte:02x}; convert the file, for example "
        f"with `iconv -f LATIN1 -t UTF-8`, or leave it out of data.sources"
    )


def _optional(module: str, purpose: str) -> Any:
    """Import a module of the `datasets` extra, which most runs do not need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed; "
            f"run `pip install 'moefit[datasets]'`, or give {JSONL_SUFFIX} or text files"
        ) from error
