"""Packed store: a checkpoint's experts as slots hold them, written once by `moefit pack`.

Finds the packed files of a checkpoint, checks that they were made from it, and reads experts into
slots with one positional read each. A checksum verifies the first read of each expert. Files that
do not match are ignored, and `PackedStore.ignored` says why.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from moefit.checkpoint.config import read_config
from moefit.checkpoint.safetensors import Span, SpanReader, bytes_of
from moefit.checkpoint.sources import ExpertSource
from moefit.errors import CheckpointError
from moefit.folders import cache_root, is_gguf
from moefit.moe.families import MoeBlock
from moefit.quant.format import NATIVE, Format, GroupedFormat, keeps_codes
from moefit.serve.cache.slot import Slot
from moefit.serve.hf.mtp import is_of_mtp
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.packed.dense import DENSE, PackedDense, open_dense
from moefit.serve.packed.file import PackedFile, PackedMetadata, read_packed, sample_of

_SAMPLED_EXPERTS = 16  # per block, for the fingerprint


class PackedStore:
    """Packed experts by block name, expert number and format. Thread-safe.

    A file that is packed again meanwhile is used from the first read on that the old one, or what
    is known of it, does not serve.

    Attributes:
        dense: Packed dense weights.
        ignored: For each file that exists but is not used, the reason.
    """

    def __init__(
        self,
        files: Mapping[tuple[str, str], PackedFile],
        ignored: tuple[str, ...] = (),
        dense: PackedDense | None = None,
    ):
        self.dense = PackedDense() if dense is None else dense
        self._reader = SpanReader()
        self._files = {key: _Opened(file, self._reader) for key, file in files.items()}
        self.ignored = (*ignored, *self.dense.ignored)
        self._verified: set[tuple[Path, tuple[int, int], int]] = set()
        self._lock = threading.Lock()
        self._newer: list[SpanReader] = []  # of files that were packed again

    def has(self, block: str, format: Format) -> bool:
        """Return whether a block's experts are packed in a format."""
        return (block, format.name) in self._files

    def path(self, block: str, format: Format) -> Path:
        """Return the packed file of a block in a format."""
        return self._files[block, format.name].file.path

    def read(self, block: str, expert: int, into: Slot) -> int:
        """Read an expert into a slot.

        Args:
            block: Name of the block.
            expert: Number of the expert.
            into: The slot; its format must be packed.

        Returns:
            The number of bytes read.

        Raises:
            CheckpointError: The expert is damaged or unreadable. The slot's content is undefined.
        """
        key = block, into.format.name
        opened = self._files[key]
        on_cpu = into.buffer_B.device.type == "cpu"
        data_B = into.buffer_B if on_cpu else torch.empty(into.nbytes, dtype=torch.uint8)
        try:
            self._read(opened, expert, bytes_of(data_B))
        except CheckpointError:
            if (newer := self._packed_again(key, opened)) is None:
                raise
            self._read(newer, expert, bytes_of(data_B))
        if not on_cpu:
            into.buffer_B.copy_(data_B)
        return into.nbytes

    def _read(self, opened: "_Opened", expert: int, data: memoryview) -> None:
        """Read an expert, and verify it the first time. Raises CheckpointError."""
        file, reader = opened
        span = replace(file.spans[expert], name=f"expert {expert} of {file.metadata.block}")
        reader.read_into(span, data)
        read = file.path, reader.version(file.path), span.offset
        if read in self._verified:
            return
        if damage := file.damage(expert, data):
            raise CheckpointError(damage)
        self._verified.add(read)

    def _packed_again(self, key: tuple[str, str], known: "_Opened") -> "_Opened | None":
        """Return the file that has replaced one since its header was read; None if none has."""
        with self._lock:
            if (opened := self._files[key]) is not known:
                return opened  # found by another thread
            path = known.file.path
            try:
                found, stat = read_packed(path), path.stat()
                same = known.reader.version(path) == (stat.st_mtime_ns, stat.st_size)
            except (CheckpointError, OSError):
                return None
            if (same and found == known.file) or not _holds_the_same(found, known.file):
                return None
            self._newer.append(SpanReader())
            self._files[key] = _Opened(found, self._newer[-1])
            return self._files[key]

    def relative_errors(self, block: str, format: Format) -> tuple[float, ...]:
        """Return the error of each expert, as measured when it was packed.

        Without calibration that is |W - W^|^2 / |W|^2 over the expert's matrices W, with
        calibration |y - y^|^2 / |y|^2 over its outputs y on the calibration text.
        """
        return self._files[block, format.name].file.relative_errors

    def calibration(self, block: str, format: Format) -> str:
        """Return the digest of a block's calibration text; empty without calibration."""
        return self._files[block, format.name].file.metadata.calibration

    @property
    def texts(self) -> list[str]:
        """Return the names of the calibration texts."""
        about = [one.file.metadata for one in self._files.values()]
        experts = {metadata.text for metadata in about if metadata.calibration}
        return sorted(experts | self.dense.texts)

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for reader in (self._reader, *self._newer):
                reader.close()


class _Opened(NamedTuple):
    """A file as its header was read, and what reads it."""

    file: PackedFile
    reader: SpanReader


def _holds_the_same(file: PackedFile, other: PackedFile) -> bool:
    """Return whether two files hold the same experts in one format, calibrated or not."""
    one, two = (
        replace(each.metadata, source="", calibration="", text="") for each in (file, other)
    )
    sizes, others = ([span.nbytes for span in each.spans] for each in (file, other))
    return one == two and sizes == others


def can_be_packed(format: Format, block: MoeBlock) -> bool:
    """Return whether a block's slots of a format differ from what the checkpoint has.

    Codes of a quantised checkpoint lie in several tensors there, and in another order.
    """
    return format.is_encoded or keeps_codes(format, block.layout.specs)


def unpacked_bytes(blocks: Iterable[tuple[MoeBlock, Format, int]], packed: PackedStore) -> int:
    """Return what packing a checkpoint's own codes would write, if that makes reading faster.

    Args:
        blocks: Each with the format and the number of its slots.
        packed: What is packed already.

    Returns:
        Bytes of files; 0 if there are no such codes, or they are packed or in memory.
    """
    unpacked = [
        (block, slots < block.num_experts)
        for block, format, slots in blocks
        if keeps_codes(format, block.layout.specs) and not packed.has(block.name, format)
    ]
    if not any(is_read for _, is_read in unpacked):
        return 0
    return sum(block.num_experts * NATIVE.nbytes(block.layout.specs) for block, _ in unpacked)


def open_packed(
    skeleton: Skeleton, formats: Iterable[Format], dense: Iterable[GroupedFormat | None] = ()
) -> PackedStore:
    """Return the packed store of a checkpoint, which may be empty.

    Args:
        skeleton: The model; its dtype must be the one that was packed.
        formats: Formats of experts to look for.
        dense: Formats of dense weights to look for; None stands for the checkpoint's own.
    """
    wanted = [
        (format, index, block)
        for format in formats
        if format.is_encoded or _any_has(format.name)
        for index, block in enumerate(skeleton.blocks)
        if can_be_packed(format, block)
    ]
    dense = [one for one in dense if one is not None and _any_has(f"{DENSE}{one.name}")]
    if not wanted and not dense:  # the fingerprint need not be computed
        return PackedStore({})
    location = PackedLocation(skeleton)
    files: dict[tuple[str, str], PackedFile] = {}
    ignored: list[str] = []
    for format, index, block in wanted:
        try:
            if location.path(format, index).is_file():
                files[block.name, format.name] = location.open(format, index)
        except (CheckpointError, OSError) as error:  # OSError: no permission, for example
            ignored.append(str(error))
    found = open_dense(skeleton, location.folder, location.fingerprint, dense)
    if not files and not ignored and not found:
        ignored = outdated(location)
    return PackedStore(files, tuple(ignored), found)


def _any_has(name: str) -> bool:
    """Return whether any checkpoint has a folder of this name in the packed stores."""
    return next(packed_root().glob(f"*/{name}"), None) is not None


class PackedLocation:
    """The folder of a checkpoint's packed files, and the metadata they must have.

    Attributes:
        fingerprint: See `fingerprint`.
        folder: The folder of the packed files.
    """

    def __init__(self, skeleton: Skeleton):
        self._skeleton = skeleton
        self.fingerprint = fingerprint(skeleton)
        self.source = str(skeleton.checkpoint.folder.absolute())
        dtype = str(skeleton.dtype).removeprefix("torch.")
        self.folder = packed_root() / f"{self.fingerprint}-{dtype}"
        self._dtype = dtype

    def path(self, format: Format, index: int) -> Path:
        """Return the path of the packed file of block number `index`."""
        return self.folder / format.name / f"block-{index:03d}.safetensors"

    def metadata(self, format: Format, index: int) -> PackedMetadata:
        """Return the metadata that the file of block number `index` must have."""
        return PackedMetadata(
            fingerprint=self.fingerprint,
            format=format.name,
            encoder=format.encoder,
            dtype=self._dtype,
            block=self._skeleton.blocks[index].name,
            source=self.source,
            codes=_codes(format, self._skeleton.blocks[index]),
        )

    def open(self, format: Format, index: int) -> PackedFile:
        """Return the header of the file of block number `index`.

        Raises:
            CheckpointError: The file is damaged, or was made from something else.
        """
        file, expected = read_packed(self.path(format, index)), self.metadata(format, index)
        if file.metadata.fingerprint != expected.fingerprint:
            raise CheckpointError(
                f"{file.path} was packed from another checkpoint ({file.metadata.source}), not "
                f"from {expected.source}; it is not used, `moefit pack` replaces it"
            )
        block = self._skeleton.blocks[index]
        sizes = [format.nbytes(block.layout.specs)] * block.num_experts
        same = replace(file.metadata, source=expected.source, calibration="", text="") == expected
        if not same or [span.nbytes for span in file.spans] != sizes:
            raise CheckpointError(
                f"{file.path} holds {len(file.spans)} experts of {file.metadata.block} in "
                f"{file.metadata.format} ({file.metadata.kind}) from {file.metadata.dtype}, not "
                f"{len(sizes)} of {block.name} in {expected.format} ({expected.kind}) from "
                f"{expected.dtype}, of {sizes[0]:,} bytes each; it is not used, `moefit pack` "
                "replaces it"
            )
        return file


def _codes(format: Format, block: MoeBlock) -> str:
    """Return which codes of the checkpoint slots hold, by tensor; empty for other formats.

    A later version may hold more of a checkpoint's formats as they are.
    """
    if not keeps_codes(format, block.layout.specs):
        return ""
    held = ((name, spec.stored) for name, spec in block.layout.specs.items() if spec.stored)
    return ", ".join(
        f"{name}: {one.codes} with {one.scales} of {one.group}{' and zeros' * one.zeros}"
        for name, one in held
    )


def packed_root() -> Path:
    """Return the folder of all packed stores."""
    return cache_root() / "packed"


def outdated(location: PackedLocation) -> list[str]:
    """Return a message for each packed store of an earlier checkpoint in the same folder."""
    messages: list[str] = []
    for folder in sorted(packed_root().glob("*-*")):
        first = next(folder.glob("*/*.safetensors"), None)
        if folder == location.folder or first is None:
            continue
        with suppress(CheckpointError, OSError):
            metadata = read_packed(first).metadata
            of_experts = metadata.fingerprint.split(" ")[0]  # a dense matrix's has more
            if metadata.source == location.source and of_experts != location.fingerprint:
                messages.append(
                    f"{folder} was packed from another checkpoint, which was in "
                    f"{location.source} then; it is not used and can be removed"
                )
    return messages


def fingerprint(skeleton: Skeleton) -> str:
    """Return a hash that identifies a checkpoint without reading all of it.

    The hash covers the settings, each tensor's name, dtype, shape and position (from the headers),
    the sizes of the files, and 4 KiB of up to 16 experts per block, of each of an expert's tensors
    at least once, except the layer for multi-token prediction. It distinguishes other models,
    conversions and further training, and does not depend on the folder's path or time stamps. It
    misses changes of a few weights or of dense weights alone; run `moefit pack --force` then.
    """
    checkpoint = skeleton.checkpoint
    digest = hashlib.sha256(_settings(checkpoint.folder))
    for name, span in sorted(checkpoint.spans.items()):
        entry = (name, span.path.name, span.offset, span.nbytes, str(span.dtype), *span.shape)
        digest.update(repr(entry).encode())
    for path in sorted({span.path for span in checkpoint.spans.values()}):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    with closing(SpanReader()) as reader:
        for block, sources in skeleton.map.experts.items():
            if is_of_mtp(skeleton.model, block):
                continue  # a model loaded without it uses the same files
            for span in _sampled(sources):
                digest.update(sample_of(reader, span))
    return digest.hexdigest()[:32]


def _settings(folder: Path) -> bytes:
    """Return config.json, or the settings that a GGUF file has in its place."""
    if is_gguf(folder):
        return repr(sorted(read_config(folder).items())).encode()
    return (folder / "config.json").read_bytes()


def _sampled(sources: Sequence[ExpertSource]) -> Iterator[Span]:
    """Yield a tensor of each sampled expert in turn, and each of an expert's tensors at least once.

    The number of the expert gives the turn where that reaches all tensors, as in earlier versions;
    it does not if the experts' distance and the number of tensors have a common divisor.
    """
    experts = range(0, len(sources), -(-len(sources) // _SAMPLED_EXPERTS))
    number = max((len(sources[expert].spans) for expert in experts), default=0)
    turns = experts
    if len({expert % number for expert in experts}) < number:
        turns = range(max(len(experts), number))
    for place, turn in enumerate(turns):
        spans = sources[experts[place % len(experts)]].spans
        yield spans[turn % len(spans)]
