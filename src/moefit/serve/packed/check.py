"""Verify a packed store: compare everything that is packed of a checkpoint with its checksums."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moefit.checkpoint.safetensors import SpanReader, bytes_of
from moefit.errors import CheckpointError
from moefit.quant.format import FORMATS, Format, GroupedFormat
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.packed.build import check_packable
from moefit.serve.packed.dense import DENSE, DenseLocation, dense_matrices
from moefit.serve.packed.dense_build import dense_formats_of
from moefit.serve.packed.file import PackedFile
from moefit.serve.packed.store import PackedLocation, can_be_packed


@dataclass(slots=True, kw_only=True)
class CheckResult:
    """What `check_packed` found.

    Attributes:
        folder: The folder of the packed files.
        formats: Of experts.
        dense_formats: Of dense weights.
        files: Files that could be opened.
        experts: Experts read.
        matrices: Dense matrices read.
        bytes_read: Bytes of both.
        problems: A sentence for each damaged expert or matrix, and invalid or missing file.
    """

    folder: Path
    formats: list[str] = field(default_factory=list)
    dense_formats: list[str] = field(default_factory=list)
    files: int = 0
    experts: int = 0
    matrices: int = 0
    bytes_read: int = 0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable values."""
        return {**asdict(self), "folder": str(self.folder)}


def check_packed(
    skeleton: Skeleton,
    formats: Sequence[Format] | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    dense_formats: Sequence[Format] | None = None,
) -> CheckResult:
    """Verify the packed files of a checkpoint.

    Args:
        skeleton: The model.
        formats: Formats of experts to check.
        progress: Callback with the bytes checked and in total.
        dense_formats: Formats of dense weights to check. All that are packed are checked if neither
            is given, and nothing of the other if one is.

    Raises:
        ConfigError: One of the formats cannot be packed.
        CheckpointError: Nothing is packed.
    """
    for format in formats or ():
        check_packable(format, skeleton)
    location = PackedLocation(skeleton)
    folder = location.folder
    existing = [one for one in FORMATS.values() if (folder / one.name).is_dir()]
    encoded = [one for one in FORMATS.values() if isinstance(one, GroupedFormat)]
    dense = [one for one in encoded if (folder / f"{DENSE}{one.name}").is_dir()]
    if not existing and not dense:
        raise CheckpointError(
            f"nothing of {location.source} is packed in {folder}; run `moefit pack` first"
        )
    if formats is not None or dense_formats is not None:
        existing, dense = list(formats or ()), dense_formats_of(dense_formats or ())
    result = CheckResult(
        folder=folder,
        formats=[format.name for format in existing],
        dense_formats=[format.name for format in dense],
    )
    files = [
        *_files(skeleton, location, existing, result.problems),
        *_dense_files(skeleton, location, dense, result.problems),
    ]
    total = sum(span.nbytes for file in files for span in file.spans)
    with closing(SpanReader()) as reader:
        for file in files:
            _check_file(file, reader, result)
            if progress is not None:
                progress(result.bytes_read, total)
    return result


def _files(
    skeleton: Skeleton, location: PackedLocation, formats: Sequence[Format], problems: list[str]
) -> Iterator[PackedFile]:
    """Yield the files of experts, and add what is wrong with the others to `problems`."""
    for format in formats:
        for index, block in enumerate(skeleton.blocks):
            if not can_be_packed(format, block):
                continue
            if not location.path(format, index).is_file():
                problems.append(f"{block.name} is not packed in {format.name}")
                continue
            try:
                yield location.open(format, index)
            except CheckpointError as error:
                problems.append(str(error))


def _dense_files(
    skeleton: Skeleton,
    location: PackedLocation,
    formats: Sequence[GroupedFormat],
    problems: list[str],
) -> Iterator[PackedFile]:
    """Yield the files of dense weights, and add what is wrong with the others to `problems`."""
    if not formats:
        return
    matrices = dense_matrices(skeleton)
    dense = DenseLocation(skeleton, location.folder, location.fingerprint)
    for format in formats:
        for matrix in matrices:
            if not dense.path(format, matrix).is_file():
                problems.append(f"{matrix.name} is not packed in {format.name}")
                continue
            try:
                yield dense.open(format, matrix)
            except CheckpointError as error:
                problems.append(str(error))


def _check_file(file: PackedFile, reader: SpanReader, result: CheckResult) -> None:
    result.files += 1
    for expert, span in enumerate(file.spans):
        data = bytes_of(torch.empty(span.nbytes, dtype=torch.uint8))
        if file.metadata.matrix:
            result.matrices += 1
        else:
            result.experts += 1
        result.bytes_read += span.nbytes
        try:
            reader.read_into(span, data)
        except CheckpointError as error:
            result.problems.append(str(error))
            continue
        if damage := file.damage(expert, data):
            result.problems.append(damage)
