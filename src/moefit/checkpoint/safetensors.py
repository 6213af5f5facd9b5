"""Read safetensors checkpoints: parse and validate headers, and read tensors on demand.

The format is that of https://github.com/huggingface/safetensors. Tensors are read with positional
reads into memory of the caller. Files are not memory-mapped, because mapped pages count as memory
of this process.
"""

import json
import math
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from moefit.checkpoint.direct_file import DirectFile
from moefit.checkpoint.model_folder import LFS, LFS_POINTER, other_weights, read_json
from moefit.errors import CheckpointError, UnsupportedModelError, in_brief, printable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Dtypes of the format that cannot be read; a checkpoint that has them is not damaged.
UNREADABLE = {
    "F4": "4-bit floats, two to a byte",
    "F6_E2M3": "6-bit floats",
    "F6_E3M2": "6-bit floats",
    "F8_E4M3FNUZ": "8-bit floats without negative zero",
    "F8_E5M2FNUZ": "8-bit floats without negative zero",
}
_MAX_HEADER = 64 << 20  # bytes; the largest models have about 10 MB in all files together
_MAX_TENSORS = 1_000_000  # of a whole checkpoint; the largest models have about 250,000
_MAX_DIMS = 16
_MAX_READ = 1 << 30  # bytes per call; Linux reads at most 2 GiB minus a page
_ATTEMPTS = 3
# RecursionError: deeply nested JSON.
_PARSE_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
Read = Callable[[int, memoryview, int], int]
"""Like `os.preadv` with one buffer: (file descriptor, buffer, offset) -> number of bytes read."""


class StoredTensor(Protocol):
    """A tensor of a checkpoint: a `Span`, or several that a format of `formats/` decodes."""

    @property
    def name(self) -> str:
        """Its name in an unquantised checkpoint."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its values once read."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape once read."""
        ...

    @property
    def format(self) -> str:
        """How it is stored, for reports: a dtype, or the name of a format."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        ...

    @property
    def spans(self) -> "tuple[Span, ...]":
        """The byte ranges that hold it."""
        ...

    @property
    def working_bytes(self) -> int:
        """Bytes held in memory while reading, besides the values."""
        ...

    def row(self, index: int) -> "StoredTensor":
        """Return row `index` of the first axis."""
        ...

    def in_stack(self) -> "StoredTensor":
        """Return it as the only row of a first axis."""
        ...

    def read(self, reader: "SpanReader") -> Tensor:
        """Read it into a new tensor. Raises CheckpointError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Location of one tensor in a file: `nbytes` bytes from `offset`, in row-major order."""

    name: str
    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def format(self) -> str:
        """Name of the dtype."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def spans(self) -> "tuple[Span, ...]":
        """This span alone."""
        return (self,)

    @property
    def working_bytes(self) -> int:
        """0: bytes are read straight into place."""
        return 0

    def row(self, index: int) -> "Span":
        """Return the span of row `index` of the first axis."""
        size = self.nbytes // self.shape[0]
        return replace(
            self,
            name=f"{self.name}[{index}]",
            offset=self.offset + index * size,
            nbytes=size,
            shape=self.shape[1:],
        )

    def part(self, index: int, count: int) -> "Span":
        """Return part `index` of `count` equal parts of the first axis."""
        rows = self.shape[0] // count
        return replace(self, shape=(count, rows, *self.shape[1:])).row(index)

    def in_stack(self) -> "Span":
        """Return the span as the only row of a first axis."""
        return replace(self, shape=(1, *self.shape))

    def read(self, reader: "SpanReader") -> Tensor:
        """Read the span into a new tensor. Raises CheckpointError."""
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        if self.nbytes:
            reader.read_into(self, bytes_of(data))
        return data.view(self.dtype).view(self.shape)


def value_bytes(tensor: StoredTensor) -> int:
    """Return the bytes of a tensor's values in memory."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def pread(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read into the buffer from an offset; return the number of bytes read."""
    return os.preadv(descriptor, [buffer], offset)


class SpanReader:
    """Read spans of files, each of which is opened once and kept open. Thread-safe.

    Args:
        read: Reads from a file. With another than `pread` there are no direct reads.
    """

    def __init__(self, read: Read = pread):
        self._read = read
        self._descriptors: dict[Path, int] = {}
        self._direct: dict[Path, DirectFile] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
            while self._direct:
                self._direct.popitem()[1].close()

    def read_into(self, span: Span, buffer: memoryview) -> None:
        """Read a span without leaving its pages in the page cache.

        Args:
            span: What to read. A failed read is retried twice.
            buffer: Destination of exactly `span.nbytes` bytes.

        Raises:
            CheckpointError: Reading failed. The buffer's content is then undefined.
        """
        assert len(buffer) == span.nbytes, (len(buffer), span)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._fill(buffer, span)
                return
            except OSError as error:
                if attempt == _ATTEMPTS:
                    raise CheckpointError(
                        f"{span.path.name}: {span.name} cannot be read after {_ATTEMPTS} attempts "
                        f"({error.strerror or error}); the model can still be used, its next step "
                        "tries again"
                    ) from error
                time.sleep(0.01 * 4**attempt)

    def version(self, path: Path) -> tuple[int, int]:
        """Return what changes when an open file is written to: its time, in ns, and its size."""
        found = os.fstat(self._files(path)[0])
        return found.st_mtime_ns, found.st_size

    def _fill(self, buffer: memoryview, span: Span) -> None:
        descriptor, direct = self._files(span.path)
        done = first = 0 if direct is None else direct.read(span.offset, buffer)
        while done < span.nbytes:
            part = buffer[done : done + _MAX_READ]
            count = self._read(descriptor, part, span.offset + done)
            if count == 0:
                raise OSError(f"the file ends at byte {span.offset + done}")
            done += count
        if first < done:  # the copy in the page cache is not needed
            rest = span.offset + first, span.nbytes - first
            os.posix_fadvise(descriptor, *rest, os.POSIX_FADV_DONTNEED)

    def _files(self, path: Path) -> tuple[int, DirectFile | None]:
        """Return a file's descriptor, and the file for direct reads if there are any."""
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
                os.posix_fadvise(self._descriptors[path], 0, 0, os.POSIX_FADV_RANDOM)
                if self._read is pread:
                    self._direct[path] = DirectFile(self._descriptors[path])
            return self._descriptors[path], self._direct.get(path)


class Checkpoint:
    """An open folder of safetensors files, or GGUF file. Thread-safe; also a context manager.

    Attributes:
        spans: Location of each tensor by name.
        weights: The tensors of a model by name: the spans, or what `formats/find.py` makes of them
            in a quantised checkpoint.
        folder: The folder, or the GGUF file.

    Args:
        folder: As above.
        spans: The tensors of a file in another format; None to read those of safetensors.
        read: Reads from a file.

    Raises:
        CheckpointError: The folder has no safetensors, or a shard is missing or damaged.
    """

    def __init__(
        self, folder: Path, spans: Mapping[str, Span] | None = None, *, read: Read = pread
    ):
        self.folder = folder
        self.spans: Mapping[str, Span] = dict(_all_spans(folder)) if spans is None else spans
        self.weights: Mapping[str, StoredTensor] = self.spans
        self.reader = SpanReader(read)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self.reader.close()

    def tensor(self, stored: StoredTensor) -> Tensor:
        """Read a tensor into memory of its own."""
        return stored.read(self.reader)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as writable bytes."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    array: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


class LazyTensor:
    """A tensor that is read when indexed, with the interface that transformers' loader uses."""

    def __init__(self, checkpoint: Checkpoint, stored: StoredTensor):
        self._checkpoint, self._stored = checkpoint, stored

    def __getitem__(self, key: Any) -> Tensor:
        return self._checkpoint.tensor(self._stored)[key]

    def get_shape(self) -> list[int]:
        """Return the shape, as safetensors' slices do."""
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        """Return the dtype's name in the safetensors format."""
        return next(name for name, dtype in DTYPES.items() if dtype == self._stored.dtype)


def _all_spans(folder: Path) -> Iterator[tuple[str, Span]]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(
                f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints can be "
                "read in place (transformers' save_pretrained writes them)"
                + (f". {found}" if (found := other_weights(folder)) else "")
            )
        yield from ((span.name, span) for span in read_header(folder / SINGLE)[1])
        return
    shard_of = weight_map(index)
    shards = sorted(set(shard_of.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards ({', '.join(missing[:3])}); "
            "copy or download them again"
        )
    spans: dict[str, Span] = {}
    for shard in shards:
        spans.update((span.name, span) for span in read_header(folder / shard)[1])
        if len(spans) > _MAX_TENSORS:
            raise CheckpointError(
                f"{folder} has more than {_MAX_TENSORS:,} tensors, which no known model has; copy "
                "or download it again"
            )
    if absent := sorted(set(shard_of) - set(spans)):
        raise CheckpointError(
            f"{INDEX} names {len(absent)} tensors that its shards lack ({', '.join(absent[:3])})"
        )
    yield from spans.items()


def weight_map(index: Path) -> dict[str, str]:
    """Return the shard of each tensor. Raises CheckpointError."""
    try:
        found: dict[str, str] = read_json(index, limit=4 * _MAX_HEADER)["weight_map"]
        for shard in found.values():
            _refuse_outside(shard)
    except _PARSE_ERRORS as error:
        raise CheckpointError(f"{index} cannot be read: {in_brief(error)}") from error
    return found


def _refuse_outside(shard: Any) -> None:
    """Raise unless a shard's path is inside the checkpoint's folder.

    The file may be a symbolic link to a place outside: the Hub's cache consists of these.
    """
    if not isinstance(shard, str):
        raise TypeError(f"weight_map has {shard!r} where a file's name belongs")
    path = PurePosixPath(shard)
    if not path.parts or path.is_absolute() or ".." in path.parts or printable(shard) != shard:
        raise ValueError(f"weight_map names {shard!r}, which is no file in the checkpoint's folder")


def read_header(path: Path) -> tuple[Mapping[str, Any], list[Span]]:
    """Return a safetensors file's metadata and the location of its tensors.

    Raises:
        CheckpointError: The file is damaged or truncated.
        UnsupportedModelError: A tensor has a dtype that cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(len(LFS))
            if begin == LFS:
                raise ValueError(LFS_POINTER)
            (length,) = struct.unpack("<Q", begin[:8])
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"its header would have {length:,} bytes")
            file.seek(8)
            header: dict[str, Any] = json.loads(file.read(length))
        metadata: dict[str, Any] = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise TypeError("its __metadata__ is no object")
        if len(header) > _MAX_TENSORS:
            raise ValueError(f"it has {len(header):,} tensors, which no known model has")
        spans = [_span(path, 8 + length, name, entry) for name, entry in header.items()]
    except (*_PARSE_ERRORS, struct.error) as error:
        raise CheckpointError(
            f"{path} is damaged: {in_brief(error)}; copy or download it again"
        ) from error
    end = max((span.offset + span.nbytes for span in spans), default=8 + length)
    if end > size:
        raise CheckpointError(
            f"{path} is cut short: {size:,} bytes, but its tensors end at {end:,}; "
            "copy or download it again"
        )
    return metadata, spans


def _span(path: Path, start: int, name: str, entry: dict[str, Any]) -> Span:
    if printable(name) != name:
        raise ValueError(f"the tensor's name {name!r} has control characters")
    begin, end = entry["data_offsets"]
    if (meaning := UNREADABLE.get(str(entry["dtype"]))) is not None:
        raise UnsupportedModelError(
            f"{path}: {name} is of dtype {entry['dtype']} ({meaning}), which is sound but cannot "
            "be read so far; give the model that it was made from, in bfloat16 or float16"
        )
    if not isinstance(entry["dtype"], str):
        raise TypeError(f"{name} has a dtype that is no text")
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path} is damaged, or of a newer kind: {name} is of dtype {entry['dtype']!r}, and "
            f"what can be read is {', '.join(DTYPES)}"
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has a shape or offsets that are no whole numbers")
    if len(shape) > _MAX_DIMS:
        raise ValueError(f"{name} has {len(shape)} dimensions, more than {_MAX_DIMS}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} {list(shape)} {entry['dtype']} cannot be {end - begin} bytes")
    return Span(
        name=name, path=path, offset=start + begin, nbytes=end - begin, dtype=dtype, shape=shape
    )
