"""Parse the header of a GGUF file, or of the files that it is split into.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header holds
metadata, among it the vocabulary with some hundred thousand strings, and the location of every
tensor. Long lists are skipped and read when they are needed, since most commands need none, and the
`gguf` package's reader holds the file mapped and an object per string. No weights are read.
"""

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from moefit.checkpoint.gguf.types import TYPES, GgmlType
from moefit.checkpoint.model_folder import LFS, LFS_POINTER
from moefit.checkpoint.safetensors import Span
from moefit.errors import CheckpointError, UnsupportedModelError, in_brief, printable

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q",
            12: "<d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_LONG = 1024  # entries; longer lists are read when they are needed
_MAX_ENTRIES = 100_000  # of metadata; real files have some fifty
_MAX_TENSORS = 1_000_000
_MAX_DIMS = 4
_MAX_STRING = 64 << 20  # bytes; the longest are chat templates
_ALIGNMENT = 32
_PARSE_ERRORS = (OSError, ValueError, LookupError, OverflowError, struct.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredList:
    """A long list of the metadata, which has not been read.

    Attributes:
        path: The file.
        offset: Of its first entry in the file.
        kind: Number of the type of its entries.
        length: The number of entries.
        nbytes: Bytes of all entries in the file.
    """

    path: Path
    offset: int
    kind: int
    length: int
    nbytes: int

    def read(self) -> list[Any]:
        """Return the entries. Raises CheckpointError."""
        with _errors(self.path), self.path.open("rb") as file:
            file.seek(self.offset)
            return list(_Reader(file, self.path).entries(self.kind, self.length))


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor of a file.

    Attributes:
        type: How its values are stored.
        shape: Of its values, in the order of torch: the last axis is contiguous.
        span: Its bytes; of a quantised type uint8 [..., bytes of a row], otherwise of its dtype.
    """

    type: GgmlType
    shape: tuple[int, ...]
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What the header says.

    Attributes:
        path: The file, or the first of several.
        metadata: Values by key; lists longer than a thousand entries are `StoredList`.
        tensors: By name, those of all parts.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def spans(self) -> dict[str, Span]:
        """The bytes of each tensor."""
        return {name: one.span for name, one in self.tensors.items()}

    @property
    def architecture(self) -> str:
        """Name of the graph in llama.cpp that computes the model."""
        return str(self.metadata.get("general.architecture"))

    def listed(self, key: str) -> list[Any] | None:
        """Return a list of the metadata; None if there is none of this key."""
        found = self.metadata.get(key)
        if isinstance(found, StoredList):
            return found.read()
        return found if isinstance(found, list) else None


def read_gguf(path: Path) -> GgufHeader:
    """Return the header of a GGUF file.

    Args:
        path: The file. Of several parts (`-00001-of-00003.gguf`) the first; the others lie beside.

    Raises:
        CheckpointError: A file is missing, damaged or cut short.
        UnsupportedModelError: A tensor has a type that is not known.
    """
    metadata, tensors = _read_file(path)
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or not 1 <= count < 100_000:
        raise CheckpointError(f"{path} has split.count {count!r}; copy or download it again")
    if count > 1:
        tensors = {**tensors, **_other_parts(path, count)}
        expected = metadata.get("split.tensors.count", len(tensors))
        if expected != len(tensors):
            raise CheckpointError(
                f"the {count} parts of {path} have {len(tensors):,} tensors, but should have "
                f"{expected!r}; copy or download them again"
            )
    return GgufHeader(path=path, metadata=metadata, tensors=tensors)


def first_part(path: Path) -> Path:
    """Return the first of the parts that a file is one of.

    >>> first_part(Path("m-00002-of-00003.gguf")).name, first_part(Path("m.gguf")).name
    ('m-00001-of-00003.gguf', 'm.gguf')
    """
    found = _PART.search(path.name)
    return (
        path.with_name(f"{path.name[: found.start()]}-00001-of-{found[2]}.gguf") if found else path
    )


def _other_parts(path: Path, count: int) -> dict[str, GgufTensor]:
    found = _PART.search(path.name)
    if found is None or found[1] != "00001":
        raise CheckpointError(
            f"{path} is one of {count} parts, whose first is needed, under its own name "
            f"(NAME-00001-of-{count:05}.gguf) and with the others beside it"
        )
    parts = [
        path.with_name(f"{path.name[: found.start()]}-{number:05}-of-{count:05}.gguf")
        for number in range(2, count + 1)
    ]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of its {count} parts ({', '.join(missing[:3])}); put "
            "them beside it"
        )
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        tensors.update(_read_file(part)[1])
    return tensors


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    with _errors(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            reader = _Reader(file, path)
            reader.check_magic()
            counts = reader.number("<Q"), reader.number("<Q")
            if counts[1] > _MAX_ENTRIES or counts[0] > _MAX_TENSORS:
                raise ValueError(f"it would have {counts[0]:,} tensors, {counts[1]:,} entries")
            metadata = dict(reader.entry() for _ in range(counts[1]))
            tensors = [reader.tensor() for _ in range(counts[0])]
            start = file.tell()
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment % 8:
            raise ValueError(f"general.alignment is {alignment!r}")
        start += -start % alignment
        for name, one in tensors:
            if one.span.offset % alignment:
                raise ValueError(f"{name} does not begin at a multiple of {alignment} bytes")
        found = {
            name: replace(one, span=replace(one.span, offset=start + one.span.offset))
            for name, one in tensors
        }
        if len(found) != len(tensors):
            raise ValueError("it has two tensors of the same name")
    end = max((one.span.offset + one.span.nbytes for one in found.values()), default=0)
    if end > size:
        raise CheckpointError(
            f"{path} is cut short: {size:,} bytes, but its tensors end at {end:,}; copy or "
            "download it again"
        )
    return metadata, found


class _errors:
    """Turn errors of parsing into a CheckpointError about the file."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _PARSE_ERRORS):
            raise CheckpointError(
                f"{self._path} is damaged: {in_brief(error)}; copy or download it again"
            ) from error


class _Reader:
    """Reads values from a position in a file."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        self._size = path.stat().st_size

    def check_magic(self) -> None:
        """Raise ValueError for anything else than a GGUF file of a known version."""
        begin = self._file.read(len(LFS))
        if begin == LFS:
            raise ValueError(LFS_POINTER)
        if begin[:4] != _MAGIC:
            raise ValueError(f"it begins with {begin[:4]!r} instead of GGUF")
        self._file.seek(4)
        if (version := self.number("<I")) not in _VERSIONS:
            big = " (its bytes are in the order of another kind of processor)"
            raise ValueError(
                f"it is of version {version}{big if version & 0xFFFF == 0 else ''}; "
                f"{' and '.join(map(str, _VERSIONS))} can be read"
            )

    def number(self, code: str) -> Any:
        """Return the next number of a `struct` code."""
        return struct.unpack(code, self._bytes(struct.calcsize(code)))[0]

    def entry(self) -> tuple[str, Any]:
        """Return a key of the metadata, and its value."""
        key = self._string()
        if printable(key) != key:
            raise ValueError(f"the key {key!r} has control characters")
        return key, self._value(self.number("<I"))

    def tensor(self) -> tuple[str, GgufTensor]:
        """Return a tensor; its offset counts from the beginning of the data."""
        name = self._string()
        if printable(name) != name:
            raise ValueError(f"the tensor's name {name!r} has control characters")
        if (dims := self.number("<I")) > _MAX_DIMS:
            raise ValueError(f"{name} has {dims} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dims))[::-1]
        number, offset = self.number("<I"), self.number("<Q")
        if (type := TYPES.get(number)) is None:
            raise UnsupportedModelError(
                f"{self._path}: {name} is of GGML type number {number}, which is not known; what "
                f"can be read is {', '.join(one.name for one in TYPES.values())}"
            )
        if not shape or math.prod(shape) == 0 or math.prod(shape) >= 1 << 60:
            raise ValueError(f"{name} has the shape {list(shape)}")
        if shape[-1] % type.values:
            raise ValueError(
                f"{name} has rows of {shape[-1]} values, which do not divide into blocks of "
                f"{type.values} as {type.name} has them"
            )
        row = shape[-1] // type.values * type.nbytes
        span = Span(
            name=name,
            path=self._path,
            offset=offset,
            nbytes=math.prod(shape[:-1]) * row,
            dtype=type.dtype or torch.uint8,
            shape=shape if type.dtype else (*shape[:-1], row),
        )
        return name, GgufTensor(type=type, shape=shape, span=span)

    def entries(self, kind: int, length: int) -> Iterator[Any]:
        """Yield the entries of a list."""
        if kind in _SCALARS:
            code, size = _SCALARS[kind][-1], struct.calcsize(_SCALARS[kind])
            yield from struct.unpack(f"<{length}{code}", self._bytes(length * size))
        else:
            for _ in range(length):
                yield self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"a value of its metadata is of type number {kind}")
        inner, length = self.number("<I"), self.number("<Q")
        if inner == _ARRAY or length > self._size:
            raise ValueError(f"a list of its metadata has {length:,} entries of type {inner}")
        if length <= _LONG:
            return list(self.entries(inner, length))
        offset = self._file.tell()
        self._skip(inner, length)
        return StoredList(
            path=self._path,
            offset=offset,
            kind=inner,
            length=length,
            nbytes=self._file.tell() - offset,
        )

    def _skip(self, kind: int, length: int) -> None:
        if kind in _SCALARS:
            self._file.seek(length * struct.calcsize(_SCALARS[kind]), 1)
            return
        for _ in range(length):
            self._bytes(self._length())

    def _string(self) -> str:
        return self._bytes(self._length()).decode(errors="replace")

    def _length(self) -> int:
        if (length := self.number("<Q")) > _MAX_STRING:
            raise ValueError(f"a text of its header would have {length:,} bytes")
        return length

    def _bytes(self, count: int) -> bytes:
        if count > self._size or len(found := self._file.read(count)) < count:
            raise ValueError("it ends within its header")
        return found
