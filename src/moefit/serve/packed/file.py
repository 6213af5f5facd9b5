"""A file of one MoE block's experts in one format: bytes that go into slots as they are.

Owns the layout: a safetensors file whose header is padded with spaces to whole pages, then one
uint8 tensor per expert, exactly a slot's bytes; in the header's remarks a checksum and the measured
error of each expert, what the file was made of, and a checksum of all these remarks. Also how it
comes to be: written beside its place, synced, renamed into it, so that a file with the right name
is whole. Knows nothing of models.
"""

import errno
import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moefit.checkpoint.safetensors import Span, read_header
from moefit.errors import CheckpointError

LAYOUT = 3  # raise it when the same expert would become other bytes of a slot, or the header other
WRITING = ".writing"  # ending of what is not whole
_KIND = "experts packed by moefit"
NO_DISK_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMetadata:
    """What a file is of. `fingerprint` is the checkpoint's, `source` where that lay.

    `calibration` tells the text apart that experts were encoded by, and `text` names it for people;
    both are empty if there was none.
    """

    fingerprint: str
    format: str
    encoder: str
    dtype: str
    block: str
    source: str
    calibration: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """One file's header: an expert's number is its place in each tuple."""

    path: Path
    facts: PackedMetadata
    spans: tuple[Span, ...]
    checksums: tuple[int, ...]
    relative_errors: tuple[float, ...]

    def damage(self, expert: int, data: memoryview) -> str | None:
        """What is wrong with these bytes of an expert; None if they are what was written."""
        if zlib.crc32(data) == self.checksums[expert]:
            return None
        return (
            f"{self.path} is damaged: expert {expert} of {self.facts.block} does not have its "
            f"checksum; pack {self.facts.format} again with `moefit pack --force`, or remove the "
            "file and its experts are encoded while they are read"
        )


def read_packed(path: Path) -> PackedFile:
    """Read a file's header.

    Raises CheckpointError if it is damaged, cut short, or of another layout than ours.
    """
    remarks, spans = read_header(path)
    try:
        if remarks.get("kind") != _KIND:
            raise ValueError("it was not written by `moefit pack`")
        if int(remarks["layout"]) == LAYOUT:
            if remarks["remarks_checksum"] != _checksum(remarks):
                raise ValueError("what its header says does not have its checksum")
            return _parsed(path, remarks, spans)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no sound packed file: {error}; pack it again with `moefit pack --force`"
        ) from error
    raise CheckpointError(
        f"{path} has layout {remarks['layout']}, but this moefit reads and writes layout {LAYOUT}; "
        "pack it again with `moefit pack`"
    )


def _parsed(path: Path, remarks: Any, spans: list[Span]) -> PackedFile:
    checksums = tuple(int(word, 16) for word in remarks["checksums"].split())
    losses = tuple(float(word) for word in remarks["relative_errors"].split())
    spans = sorted(spans, key=lambda span: span.offset)
    if not len(spans) == len(checksums) == len(losses):
        raise ValueError(f"{len(spans)} experts, {len(checksums)} checksums, {len(losses)} errors")
    facts = PackedMetadata(
        **{f.name: str(remarks[f.name]) for f in fields(PackedMetadata) if f.name in remarks}
    )
    return PackedFile(
        path=path, facts=facts, spans=tuple(spans), checksums=checksums, relative_errors=losses
    )


def file_bytes(facts: PackedMetadata, num_experts: int, block_bytes: int) -> int:
    """The size of a whole file."""
    return _start(facts, num_experts, block_bytes) + num_experts * block_bytes


class PackedWriter:
    """Writes one file, expert after expert; use it in a `with`, and `commit` at its end.

    Raises OSError. What was not committed is removed.
    """

    def __init__(self, path: Path, facts: PackedMetadata, num_experts: int, block_bytes: int):
        assert block_bytes % mmap.PAGESIZE == 0, block_bytes
        self._path, self._facts, self._block_bytes = path, facts, block_bytes
        self._num_experts = num_experts
        self._building = path.with_name(f".{path.name}{WRITING}")
        self._checksums: list[int] = []
        self._losses: list[float] = []
        self._start = _start(facts, num_experts, block_bytes)

    def __enter__(self) -> Self:
        # A new file and never an old one's: another process may have that open still.
        self._building.unlink(missing_ok=True)
        self._descriptor = os.open(self._building, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        self._building.unlink(missing_ok=True)

    def write(self, data: memoryview, relative_error: float) -> None:
        """The next expert."""
        assert len(data) == self._block_bytes, (len(data), self._block_bytes)
        self._put(data, self._start + len(self._checksums) * self._block_bytes)
        self._checksums.append(zlib.crc32(data))
        self._losses.append(relative_error)

    def commit(self) -> None:
        """Give the file its name: from now on it is whole, and trusted."""
        assert len(self._checksums) == self._num_experts, len(self._checksums)
        header = _header(self._facts, self._block_bytes, self._checksums, self._losses)
        assert len(header) == self._start
        self._put(memoryview(header), 0)
        os.fsync(self._descriptor)
        # Nobody needs it in memory just now, and the cache may hold what somebody does.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._building.rename(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _put(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._descriptor, data, offset)
            data, offset = data[count:], offset + count


def _start(facts: PackedMetadata, num_experts: int, block_bytes: int) -> int:
    """Where the first expert begins."""
    return len(_header(facts, block_bytes, [0] * num_experts, [0.0] * num_experts))


def _header(
    facts: PackedMetadata, block_bytes: int, checksums: list[int], losses: list[float]
) -> bytes:
    """Its length does not depend on the values of checksums and errors."""
    remarks = {
        "kind": _KIND,
        "layout": str(LAYOUT),
        **asdict(facts),
        "checksums": " ".join(f"{one:08x}" for one in checksums),
        "relative_errors": " ".join(f"{one if one > 1e-30 else 0:.6e}" for one in losses),
    }
    remarks["remarks_checksum"] = _checksum(remarks)
    tensors = {
        f"{facts.block}.{expert}": {
            "dtype": "U8",
            "shape": [block_bytes],
            "data_offsets": [expert * block_bytes, (expert + 1) * block_bytes],
        }
        for expert in range(len(checksums))
    }
    text = json.dumps({"__metadata__": remarks, **tensors}).encode()
    pages = -(-(8 + len(text)) // mmap.PAGESIZE)
    length = pages * mmap.PAGESIZE - 8
    return struct.pack("<Q", length) + text.ljust(length)


def _checksum(remarks: Mapping[str, Any]) -> str:
    """Of the header's remarks but this one."""
    covered = sorted((name, text) for name, text in remarks.items() if name != "remarks_checksum")
    return f"{zlib.crc32(json.dumps(covered).encode()):08x}"
