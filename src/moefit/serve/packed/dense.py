"""Packed dense weights: attention, shared experts, embeddings and output heads, encoded once.

A packed file per matrix holds its codes, then its scales and minima, as the served model has them.
`PackedDense` finds the files of a checkpoint and reads matrices straight into their place. Files of
other weights are ignored with a reason, and the weights are then encoded while the model is loaded.
"""

import hashlib
import mmap
import zlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from moefit.checkpoint.safetensors import SpanReader, bytes_of
from moefit.errors import CheckpointError
from moefit.quant.format import GroupedFormat
from moefit.quant.grouped_int import GroupedMatrix
from moefit.serve.hf.mtp import is_of_mtp
from moefit.serve.hf.quant_linear import encoded_bytes, modules_by_weight, quantizable_modules
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.packed.file import PackedFile, PackedMetadata, read_packed, sample_of

DENSE = "dense-"  # before the format in the names of folders


class PackedDense:
    """Packed dense matrices of a checkpoint by format and name. Thread-safe.

    Args:
        files: By the format's name and the matrix's.
        total: Number of matrices of the model.
        ignored: Why files that exist are not used.
    """

    def __init__(
        self,
        files: Mapping[tuple[str, str], PackedFile] | None = None,
        total: int = 0,
        ignored: tuple[str, ...] = (),
    ):
        self._files, self._total, self.ignored = files or {}, total, ignored

    def __len__(self) -> int:
        return len(self._files)

    def of(self, format: GroupedFormat | None) -> "PackedMatrices":
        """Return the matrices that are packed in a format."""
        name = None if format is None else format.name
        return PackedMatrices(
            {matrix: file for (packed, matrix), file in self._files.items() if packed == name}
        )

    def source(self, format: GroupedFormat | None) -> str:
        """Return where dense weights of a format come from, as text for reports."""
        if format is None:
            return "checkpoint"
        packed = len(self.of(format).names)
        if packed in (0, self._total):
            return "packed" if packed else "encoded while loading"
        return f"packed, but encoded while loading in {self._total - packed} of {self._total}"

    @property
    def texts(self) -> set[str]:
        """The names of the calibration texts."""
        return {one.metadata.text for one in self._files.values() if one.metadata.calibration}


@dataclass(frozen=True, slots=True)
class PackedMatrices:
    """The packed matrices of one format.

    Args:
        files: By name of the matrix.
    """

    files: Mapping[str, PackedFile]

    @property
    def names(self) -> Collection[str]:
        """The names, each of the first module that uses the matrix."""
        return self.files.keys()

    def read(self, name: str, into: GroupedMatrix) -> None:
        """Fill a matrix, and compare it with its checksum.

        Raises:
            CheckpointError: The matrix is damaged or unreadable. Its content is then undefined.
        """
        file = self.files[name]
        span = replace(file.spans[0], name=name)
        offset, checksum = span.offset, 0
        with closing(SpanReader()) as reader:
            for part in (into.codes_RB, into.meta_RMG):
                held = part if part.is_cpu else torch.empty_like(part, device="cpu")
                data = bytes_of(held)
                reader.read_into(replace(span, offset=offset, nbytes=len(data)), data)
                if held is not part:
                    part.copy_(held)
                offset, checksum = offset + len(data), zlib.crc32(data, checksum)
        padding = bytes(span.offset + span.nbytes - offset)
        if damage := file.damage_by(0, zlib.crc32(padding, checksum)):
            raise CheckpointError(damage)


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A matrix that is encoded as part of the dense weights.

    Attributes:
        name: Of the first module that uses it.
        rows: Its output units, or tokens of a vocabulary.
        cols: Its input units, or the width of an embedding.
        itemsize: Bytes of a weight before it is encoded.
    """

    name: str
    rows: int
    cols: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes before it is encoded."""
        return self.rows * self.cols * self.itemsize

    def packed_bytes(self, format: GroupedFormat) -> int:
        """Return the bytes in a packed file, a multiple of the page size."""
        size = encoded_bytes(self.rows, self.cols, format.bits)
        return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def dense_matrices(skeleton: Skeleton) -> list[DenseMatrix]:
    """Return the matrices that `--dense-precision` encodes."""
    weights = modules_by_weight(quantizable_modules(skeleton.model, skeleton.blocks))
    size = skeleton.dtype.itemsize
    shapes = {names[0]: weight.shape for weight, names in weights.items()}
    return [DenseMatrix(name, rows, cols, size) for name, (rows, cols) in shapes.items()]


class DenseLocation:
    """The files of a checkpoint's packed dense weights, and the metadata they must have.

    Args:
        skeleton: The model.
        folder: Of everything that is packed of the checkpoint.
        fingerprint: Of its settings and experts.
    """

    def __init__(self, skeleton: Skeleton, folder: Path, fingerprint: str):
        self._skeleton, self._folder, self._checkpoint = skeleton, folder, fingerprint
        self._source = str(skeleton.checkpoint.folder.absolute())
        self._dtype = str(skeleton.dtype).removeprefix("torch.")

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the checkpoint and its dense weights, with an adapter if there is one."""
        return f"{self._checkpoint} {dense_digest(self._skeleton)}"

    def path(self, format: GroupedFormat, matrix: DenseMatrix) -> Path:
        """Return the path of a matrix's file."""
        return self._folder / f"{DENSE}{format.name}" / f"{matrix.name}.safetensors"

    def metadata(self, format: GroupedFormat, matrix: DenseMatrix) -> PackedMetadata:
        """Return the metadata that a matrix's file must have."""
        return PackedMetadata(
            fingerprint=self.fingerprint,
            format=format.name,
            encoder=format.encoder,
            dtype=self._dtype,
            block=matrix.name,
            source=self._source,
            matrix=f"{matrix.rows} x {matrix.cols}",
        )

    def open(self, format: GroupedFormat, matrix: DenseMatrix) -> PackedFile:
        """Return the header of a matrix's file.

        Raises:
            CheckpointError: The file is damaged, or was made from something else.
        """
        path, wanted = self.path(format, matrix), self.metadata(format, matrix)
        file = read_packed(path)
        found = file.metadata
        if found.fingerprint != wanted.fingerprint:
            other = (
                "other dense weights (before further training, or without the adapter given now)"
                if found.fingerprint.startswith(f"{self._checkpoint} ")
                else f"another checkpoint ({found.source}), not from {self._source}"
            )
            raise CheckpointError(
                f"{path} was packed from {other}; it is not used, `moefit pack` replaces it by the "
                "checkpoint's own"
            )
        same = replace(found, source=wanted.source, calibration="", text="") == wanted
        if not same or [one.nbytes for one in file.spans] != [matrix.packed_bytes(format)]:
            raise CheckpointError(
                f"{path} holds {found.block} ({found.matrix}) in {found.format} ({found.encoder}) "
                f"from {found.dtype}, not {wanted.block} ({wanted.matrix}) in {wanted.format} "
                f"({wanted.encoder}) from {wanted.dtype}; it is not used, `moefit pack` replaces it"
            )
        return file


def open_dense(
    skeleton: Skeleton, folder: Path, fingerprint: str, formats: Iterable[GroupedFormat]
) -> PackedDense:
    """Return what is packed of a checkpoint's dense weights in these formats.

    Args:
        skeleton: The model.
        folder: Of everything that is packed of the checkpoint.
        fingerprint: Of its settings and experts.
        formats: Formats to look for.
    """
    wanted = [one for one in formats if (folder / f"{DENSE}{one.name}").is_dir()]
    if not wanted:
        return PackedDense()
    matrices, files, ignored = dense_matrices(skeleton), {}, []
    location = DenseLocation(skeleton, folder, fingerprint)
    for format in wanted:
        reasons: list[str] = []
        for matrix in matrices:
            try:
                if location.path(format, matrix).is_file():
                    files[format.name, matrix.name] = location.open(format, matrix)
            except (CheckpointError, OSError) as error:  # OSError: no permission, for example
                reasons.append(str(error))
        if reasons:
            more = f" (and {len(reasons) - 1} more files)" if len(reasons) > 1 else ""
            ignored.append(reasons[0] + more)
    return PackedDense(files, len(matrices), tuple(ignored))


def dense_digest(skeleton: Skeleton) -> str:
    """Return a hash of the middle of each dense weight, which further training changes.

    The layer for multi-token prediction is left out, so that a model loaded with it uses the files
    of one without.
    """
    digest = hashlib.sha256()
    with closing(SpanReader()) as reader:
        for name, stored in sorted(skeleton.map.dense_weights.items()):
            if is_of_mtp(skeleton.model, name):
                continue
            for span in stored.spans:
                digest.update(f"{name} {span.dtype} {span.shape}\n".encode())
                digest.update(sample_of(reader, span))
    return digest.hexdigest()[:32]


def buffer_of(format: GroupedFormat, matrix: DenseMatrix) -> Tensor:
    """Return zeroed memory for a matrix as its file has it."""
    return torch.zeros(matrix.packed_bytes(format), dtype=torch.uint8)
