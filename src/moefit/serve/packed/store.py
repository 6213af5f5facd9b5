"""The packed store: experts at rest in the formats of slots, made once by `moefit pack`.

Owns where a checkpoint's packed files are, which of them can be trusted, and the way of an expert's
bytes from such a file into a slot: one positional read, and its checksum. A file that is not of
this checkpoint is not used, and why is kept to be said. Knows nothing of how files are made.
"""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import torch

from moefit.checkpoint.safetensors import SpanReader, bytes_of
from moefit.checkpoint.sources import ExpertSource
from moefit.errors import CheckpointError
from moefit.folders import cache_root
from moefit.quant.format import Format
from moefit.serve.cache.slot import Slot
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.packed.file import PackedFile, PackedMetadata, read_packed

_SAMPLED_EXPERTS, _SAMPLE_BYTES = 16, 4096  # of each block, of each such expert


class PackedStore:
    """Experts by block name, number and format. Thread-safe.

    `ignored` says of each file that is there but not used why it is not.
    """

    def __init__(self, files: Mapping[tuple[str, str], PackedFile], ignored: tuple[str, ...] = ()):
        self._files, self.ignored = files, ignored
        self._reader = SpanReader()

    def has(self, block: str, format: Format) -> bool:
        """Whether a block's experts are packed in this format."""
        return (block, format.name) in self._files

    def path(self, block: str, format: Format) -> Path:
        """The file of a block that is packed in this format."""
        return self._files[block, format.name].path

    def read(self, block: str, expert: int, into: Slot) -> int:
        """Fill a slot, whose format is there; the bytes that were read.

        Raises CheckpointError for a damaged or unreadable expert; the slot's content is then
        undefined.
        """
        file = self._files[block, into.format.name]
        span = replace(file.spans[expert], name=f"expert {expert} of {block}")
        on_cpu = into.buffer_B.device.type == "cpu"
        data_B = into.buffer_B if on_cpu else torch.empty(into.nbytes, dtype=torch.uint8)
        data = bytes_of(data_B)
        self._reader.read_into(span, data)
        if damage := file.damage(expert, data):
            raise CheckpointError(damage)
        if not on_cpu:
            into.buffer_B.copy_(data_B)
        return span.nbytes

    def relative_errors(self, block: str, format: Format) -> tuple[float, ...]:
        """Of each expert |W - W^|^2 / |W|^2 over its matrices, measured when it was packed.

        Of calibrated ones |y - y^|^2 / |y|^2 over outputs y on the calibration's text.
        """
        return self._files[block, format.name].relative_errors

    def calibration(self, block: str, format: Format) -> str:
        """What tells the calibration apart that a block was packed with; empty if none was."""
        return self._files[block, format.name].facts.calibration

    @property
    def texts(self) -> list[str]:
        """Names of the texts by which what is packed was calibrated."""
        return sorted({file.facts.text for file in self._files.values() if file.facts.calibration})

    def close(self) -> None:
        """Close all files."""
        self._reader.close()


def open_packed(skeleton: Skeleton, formats: Iterable[Format]) -> PackedStore:
    """What is packed of this checkpoint, in this dtype, in these formats; it may be nothing."""
    wanted = [format for format in formats if format.is_encoded]
    if not wanted:
        return PackedStore({})
    place = PackedLocation(skeleton)
    files: dict[tuple[str, str], PackedFile] = {}
    ignored: list[str] = []
    for format in wanted:
        for index, block in enumerate(skeleton.blocks):
            try:
                if place.path(format, index).is_file():
                    files[block.name, format.name] = place.open(format, index)
            except (CheckpointError, OSError) as error:  # such as a folder that may not be read
                ignored.append(str(error))
    if not files and not ignored:
        ignored = outdated(place)
    return PackedStore(files, tuple(ignored))


class PackedLocation:
    """Where the packed files of one checkpoint in one dtype are, and what they must say."""

    def __init__(self, skeleton: Skeleton):
        self._skeleton = skeleton
        self.fingerprint = fingerprint(skeleton)
        self.source = str(skeleton.checkpoint.folder.absolute())
        dtype = str(skeleton.dtype).removeprefix("torch.")
        self.folder = packed_root() / f"{self.fingerprint}-{dtype}"
        self._dtype = dtype

    def path(self, format: Format, index: int) -> Path:
        """The file of the block with this number."""
        return self.folder / format.name / f"block-{index:03d}.safetensors"

    def facts(self, format: Format, index: int) -> PackedMetadata:
        """What that file says of itself."""
        return PackedMetadata(
            fingerprint=self.fingerprint,
            format=format.name,
            encoder=format.encoder,
            dtype=self._dtype,
            block=self._skeleton.blocks[index].name,
            source=self.source,
        )

    def open(self, format: Format, index: int) -> PackedFile:
        """The file's header. Raises CheckpointError if it is unsound or of something else."""
        file, expected = read_packed(self.path(format, index)), self.facts(format, index)
        if file.facts.fingerprint != expected.fingerprint:
            raise CheckpointError(
                f"{file.path} was packed from another checkpoint ({file.facts.source}), not from "
                f"{expected.source}; it is not used, `moefit pack` replaces it"
            )
        block = self._skeleton.blocks[index]
        sizes = [format.nbytes(block.layout.specs)] * block.num_experts
        same = replace(file.facts, source=expected.source, calibration="", text="") == expected
        if not same or [span.nbytes for span in file.spans] != sizes:
            raise CheckpointError(
                f"{file.path} holds {len(file.spans)} experts of {file.facts.block} in "
                f"{file.facts.format} ({file.facts.encoder}) from {file.facts.dtype}, not "
                f"{len(sizes)} of {block.name} in {expected.format} ({expected.encoder}) from "
                f"{expected.dtype}, of {sizes[0]:,} bytes each; it is not used, `moefit pack` "
                "replaces it"
            )
        return file


def packed_root() -> Path:
    """Where all packed stores are."""
    return cache_root() / "packed"


def outdated(place: PackedLocation) -> list[str]:
    """Of packed stores that were made of this folder's checkpoint before it changed: a remark."""
    remarks: list[str] = []
    for folder in sorted(packed_root().glob("*-*")):
        first = next(folder.glob("*/block-*.safetensors"), None)
        if folder == place.folder or first is None:
            continue
        with suppress(CheckpointError, OSError):
            facts = read_packed(first).facts
            if facts.source == place.source and facts.fingerprint != place.fingerprint:
                remarks.append(
                    f"{folder} was packed from another checkpoint, which {place.source} held then; "
                    "it is not used and can be removed"
                )
    return remarks


def fingerprint(skeleton: Skeleton) -> str:
    """What tells one checkpoint from another without reading it.

    A hash over config.json, every tensor's name, type, shape and place (which is what the headers
    hold), the files' sizes, and 4 KiB of up to 16 experts of each block. So another model, another
    conversion and further training are told apart, wherever the folder lies and however old it is;
    a change of a few weights, or of the tensors that are no experts, is not: run `moefit pack
    --force` after such a change.
    """
    checkpoint = skeleton.checkpoint
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for name, span in sorted(checkpoint.spans.items()):
        entry = (name, span.path.name, span.offset, span.nbytes, str(span.dtype), *span.shape)
        digest.update(repr(entry).encode())
    for path in sorted({span.path for span in checkpoint.spans.values()}):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    with closing(SpanReader()) as reader:
        for sources in skeleton.map.experts.values():
            for expert in range(0, len(sources), -(-len(sources) // _SAMPLED_EXPERTS)):
                digest.update(_sample(reader, sources[expert], expert))
    return digest.hexdigest()[:32]


def _sample(reader: SpanReader, source: ExpertSource, turn: int) -> bytes:
    """From the middle of one of the expert's tensors; they take turns."""
    span = source.spans[turn % len(source.spans)]
    size = min(_SAMPLE_BYTES, span.nbytes)
    data = bytearray(size)
    middle = span.offset + (span.nbytes - size) // 2
    sample = replace(span, offset=middle, nbytes=size, shape=(size,), dtype=torch.uint8)
    reader.read_into(sample, memoryview(data))
    return bytes(data)
