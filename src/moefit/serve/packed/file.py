"""Packed file: the experts of one MoE block in one format, or one dense matrix.

A safetensors file whose header is padded with spaces to whole pages, followed by one uint8 tensor
per expert with exactly the bytes of a slot, or by one with the bytes of the matrix. The header's
metadata has a checksum and the measured error of each, what the file was made from, and a checksum
of the metadata itself. Files are written under a temporary name, synced and renamed, so a file with
its final name is complete.
"""

import errno
import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from moefit.checkpoint.safetensors import Span, SpanReader, read_header
from moefit.errors import CheckpointError, UnsupportedModelError

LAYOUT = 3  # increase when the bytes of a slot or the header change
WRITING = ".writing"  # suffix of incomplete files
RECORDING = ".calibration"  # folder of inputs that were recorded for calibration
_KINDS = ("experts packed by moefit", "dense weights packed by moefit")
_SAMPLE_BYTES = 4096  # of a tensor, for fingerprints
NO_DISK_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMetadata:
    """What a packed file was made from.

    Attributes:
        fingerprint: Identifies the checkpoint.
        format: Name of the format.
        encoder: Name of the format's encoder.
        dtype: Dtype of the checkpoint's weights.
        block: Name of the MoE block, or of the first module that uses the matrix.
        source: Folder of the checkpoint.
        calibration: Digest of the calibration text; empty without calibration.
        text: Name of the calibration text, for display; empty without calibration.
        codes: Which codes of the checkpoint are kept, by tensor; empty if experts are encoded.
        matrix: Rows and columns of a dense matrix; empty for experts.
    """

    fingerprint: str
    format: str
    encoder: str
    dtype: str
    block: str
    source: str
    calibration: str = ""
    text: str = ""
    codes: str = ""
    matrix: str = ""

    @property
    def kind(self) -> str:
        """The codes that are kept, or the encoder."""
        return self.codes or self.encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """The header of a packed file; tuples are indexed by expert."""

    path: Path
    metadata: PackedMetadata
    spans: tuple[Span, ...]
    checksums: tuple[int, ...]
    relative_errors: tuple[float, ...]

    def damage(self, expert: int, data: memoryview) -> str | None:
        """Return an error message if `data` does not match the expert's checksum, else None."""
        return self.damage_by(expert, zlib.crc32(data))

    def damage_by(self, expert: int, checksum: int) -> str | None:
        """Return an error message if the expert, or the matrix, has another checksum."""
        if checksum == self.checksums[expert]:
            return None
        if self.metadata.matrix:
            return (
                f"{self.path} is damaged: {self.metadata.block} does not match its checksum; pack "
                f"it again with `moefit pack --dense-formats {self.metadata.format} --force`, or "
                "remove the file: the matrix is then encoded while the model is loaded"
            )
        return (
            f"{self.path} is damaged: expert {expert} of {self.metadata.block} does not match "
            f"its checksum; pack {self.metadata.format} again with `moefit pack --force`, or "
            "remove the file: its experts are then read from the checkpoint"
        )


def read_packed(path: Path) -> PackedFile:
    """Read the header of a packed file.

    Raises:
        CheckpointError: The file is damaged, truncated, or has another layout.
    """
    try:
        header, spans = read_header(path)
        if header.get("kind") not in _KINDS:
            raise ValueError("it was not written by `moefit pack`")
        if int(header["layout"]) == LAYOUT:
            if header["remarks_checksum"] != _checksum(header):
                raise ValueError("its header does not match its checksum")
            return _parse(path, header, spans)
    except (ValueError, KeyError, TypeError, AttributeError, UnsupportedModelError) as error:
        raise CheckpointError(
            f"{path} is not a valid packed file: {error}; pack it again with `moefit pack --force`"
        ) from error
    raise CheckpointError(
        f"{path} has layout {header['layout']}, but this moefit reads and writes layout {LAYOUT}; "
        "pack it again with `moefit pack`"
    )


def _parse(path: Path, header: Any, spans: list[Span]) -> PackedFile:
    checksums = tuple(int(value, 16) for value in header["checksums"].split())
    errors = tuple(float(value) for value in header["relative_errors"].split())
    spans = sorted(spans, key=lambda span: span.offset)
    if not len(spans) == len(checksums) == len(errors):
        raise ValueError(f"{len(spans)} experts, {len(checksums)} checksums, {len(errors)} errors")
    metadata = PackedMetadata(
        **{f.name: str(header[f.name]) for f in fields(PackedMetadata) if f.name in header}
    )
    return PackedFile(
        path=path,
        metadata=metadata,
        spans=tuple(spans),
        checksums=checksums,
        relative_errors=errors,
    )


def sample_of(reader: SpanReader, span: Span) -> bytes:
    """Return up to 4 KiB from the middle of a tensor. Raises CheckpointError."""
    size = min(_SAMPLE_BYTES, span.nbytes)
    data = bytearray(size)
    middle = span.offset + (span.nbytes - size) // 2
    sample = replace(span, offset=middle, nbytes=size, shape=(size,), dtype=torch.uint8)
    reader.read_into(sample, memoryview(data))
    return bytes(data)


def file_bytes(metadata: PackedMetadata, num_experts: int, block_bytes: int) -> int:
    """Return the size of a packed file in bytes."""
    return _data_offset(metadata, num_experts, block_bytes) + num_experts * block_bytes


class PackedWriter:
    """Write a packed file, one expert after another.

    Use as a context manager and call `commit` at the end; without it, the file is removed.

    Args:
        path: The final name of the file.
        metadata: What the file is made from.
        num_experts: Number of experts of the block.
        block_bytes: Bytes of one expert, a multiple of the page size.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, metadata: PackedMetadata, num_experts: int, block_bytes: int):
        assert block_bytes % mmap.PAGESIZE == 0, block_bytes
        self._path, self._metadata, self._block_bytes = path, metadata, block_bytes
        self._num_experts = num_experts
        self._partial_path = path.with_name(f".{path.name}{WRITING}")
        self._checksums: list[int] = []
        self._errors: list[float] = []
        self._data_start = _data_offset(metadata, num_experts, block_bytes)

    def __enter__(self) -> Self:
        # A new file: another process may still have an old one open.
        self._partial_path.unlink(missing_ok=True)
        self._descriptor = os.open(self._partial_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        self._partial_path.unlink(missing_ok=True)

    def write(self, data: memoryview, relative_error: float) -> None:
        """Append the next expert and its relative error."""
        assert len(data) == self._block_bytes, (len(data), self._block_bytes)
        self._write_at(data, self._data_start + len(self._checksums) * self._block_bytes)
        self._checksums.append(zlib.crc32(data))
        self._errors.append(relative_error)

    def commit(self) -> None:
        """Write the header, sync and rename the file to its final name."""
        assert len(self._checksums) == self._num_experts, len(self._checksums)
        header = _header(self._metadata, self._block_bytes, self._checksums, self._errors)
        assert len(header) == self._data_start
        self._write_at(memoryview(header), 0)
        os.fsync(self._descriptor)
        # The data is not needed in the page cache, which may hold experts that are in use.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._partial_path.rename(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _write_at(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._descriptor, data, offset)
            data, offset = data[count:], offset + count


def _data_offset(metadata: PackedMetadata, num_experts: int, block_bytes: int) -> int:
    """Return the offset of the first expert."""
    return len(_header(metadata, block_bytes, [0] * num_experts, [0.0] * num_experts))


def _header(
    metadata: PackedMetadata, block_bytes: int, checksums: list[int], errors: list[float]
) -> bytes:
    """Return the header; its length does not depend on the checksums and errors."""
    header = {
        "kind": _KINDS[bool(metadata.matrix)],
        "layout": str(LAYOUT),
        **asdict(metadata),
        "checksums": " ".join(f"{one:08x}" for one in checksums),
        "relative_errors": " ".join(f"{one if one > 1e-30 else 0:.6e}" for one in errors),
    }
    header["remarks_checksum"] = _checksum(header)
    tensors = {
        f"{metadata.block}.{expert}": {
            "dtype": "U8",
            "shape": [block_bytes],
            "data_offsets": [expert * block_bytes, (expert + 1) * block_bytes],
        }
        for expert in range(len(checksums))
    }
    text = json.dumps({"__metadata__": header, **tensors}).encode()
    pages = -(-(8 + len(text)) // mmap.PAGESIZE)
    length = pages * mmap.PAGESIZE - 8
    return struct.pack("<Q", length) + text.ljust(length)


def _checksum(header: Mapping[str, Any]) -> str:
    """Return the checksum of the header's entries, except that of the checksum itself."""
    covered = sorted((name, text) for name, text in header.items() if name != "remarks_checksum")
    return f"{zlib.crc32(json.dumps(covered).encode()):08x}"
