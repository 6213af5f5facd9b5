"""One weight of a quantised checkpoint, presented as the tensor that it stands for.

An `Encoding` knows how one format stores a matrix; there is one module per format beside this one.
`EncodedTensor` is such a matrix, or a stack of them with one per expert, under the name, shape and
dtype that an unquantised checkpoint would have. Nothing here knows of models or experts.

Values are computed in chunks of rows, so that decoding needs little memory besides its result.

Shapes: E experts, R rows (output units), C columns (input units).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from moefit.checkpoint.safetensors import Span, SpanReader
from moefit.errors import CheckpointError
from moefit.moe.families import ScaledCodes

CHUNK = 1 << 17  # values decoded at a time: they and their codes stay in a core's cache
_CHUNK_BYTES = 16  # per value of a chunk: codes, indices, and float32 twice
Parts = Mapping[str, Span]
"""Where the tensors of one weight are, by what they are for: "weight", "scale", "zeros", ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCodes:
    """Some rows of a matrix as the checkpoint has them: codes, and scales of groups of columns.

    Attributes:
        codes_RB: A row's codes in bytes, the first in the lowest bits; of llama.cpp's k-quants, a
            row's blocks as the file has them.
        scales_RG: Scales; bytes are exponents with a bias of 127. Blocks of k-quants have theirs.
        group: Columns that share a scale.
        zeros_RG: Zero points, uint8, if there are any.
        signed: Whether codes of 8 bits are two's complement.
    """

    codes_RB: Tensor
    scales_RG: Tensor
    group: int
    zeros_RG: Tensor | None = None
    signed: bool = False


class CodesTarget(Protocol):
    """A matrix in memory that holds codes as a checkpoint stores them."""

    def fill(self, first: int, stored: StoredCodes) -> None:
        """Fill rows from `first` on."""
        ...


class Encoding(ABC):
    """How a format stores a matrix. Instances hold what the tensors do not say, and are equal
    for matrices that are stored alike."""

    __slots__ = ()

    @property
    @abstractmethod
    def format(self) -> str:
        """The format's name for reports, such as `fp8 in blocks of 128 x 128`."""

    @abstractmethod
    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the matrix, or of the stack of matrices, that the tensors hold."""

    @abstractmethod
    def check(self, parts: Parts) -> None:
        """Check the shapes and dtypes of one matrix's tensors against each other.

        Raises:
            CheckpointError: They contradict each other. The message needs no name.
        """

    @abstractmethod
    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the values of one matrix.

        Args:
            parts: Tensors that `check` has accepted.
            out: The matrix in the orientation of the model; any floating-point dtype.

        Raises:
            CheckpointError: A scale is not finite, or an index out of range. The message needs no
                name. The content of `out` is then undefined.
        """


class HeldEncoding(Encoding):
    """A format that memory can hold as it is stored, at least in some checkpoints."""

    __slots__ = ()

    @abstractmethod
    def scaled_codes(self, parts: Parts) -> ScaledCodes | None:
        """Return how memory can hold one matrix as it is stored; None if it cannot."""

    @abstractmethod
    def stored_codes(self, parts: Mapping[str, Tensor]) -> StoredCodes:
        """Return the codes and scales of one matrix.

        Args:
            parts: Tensors that `check` has accepted and of which `scaled_codes` is not None.

        Raises:
            CheckpointError: The values cannot be held so. The message needs no name.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTensor:
    """A weight that is stored as several tensors, or a stack of such weights.

    Attributes:
        name: The weight's name in an unquantised checkpoint.
        shape: Its shape there.
        dtype: Of the values that are read.
        encoding: How it is stored.
        parts: Pairs of purpose and location. A stack's tensors have one row per expert, except
            those of one element, which all share.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: Encoding
    parts: tuple[tuple[str, Span], ...]

    @property
    def format(self) -> str:
        """How it is stored, for reports."""
        return self.encoding.format

    @property
    def spans(self) -> tuple[Span, ...]:
        """The byte ranges that hold the weight."""
        return tuple(span for _, span in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(span.nbytes for _, span in self.parts)

    @property
    def working_bytes(self) -> int:
        """Bytes held in memory while reading, besides the values; codes are rearranged."""
        copies = 1 if self.scaled_codes is None else 3
        return copies * self.nbytes + _CHUNK_BYTES * min(prod(self.shape), 2 * CHUNK)

    def row(self, index: int) -> "EncodedTensor":
        """Return one matrix of a stack."""
        parts = tuple(
            (purpose, span if _is_shared(span) else span.row(index)) for purpose, span in self.parts
        )
        return replace(self, name=f"{self.name}[{index}]", shape=self.shape[1:], parts=parts)

    def in_stack(self) -> "EncodedTensor":
        """Return it as the only row of a first axis."""
        return replace(self, shape=(1, *self.shape))

    def check(self) -> None:
        """Raise CheckpointError if the tensors contradict each other."""
        if self._is_stack:
            if odd := [
                f"{span.name} {list(span.shape)}"
                for _, span in self.parts
                if not _is_shared(span) and span.shape[:1] != self.shape[:1]
            ]:
                raise CheckpointError(
                    f"{self.name} holds {self.shape[0]} matrices, but {odd[0]} does not have one "
                    "row for each; copy or download the checkpoint again"
                )
            self.row(0).check()
            return
        with _named(self):
            self.encoding.check(dict(self.parts))

    def read(self, reader: SpanReader) -> Tensor:
        """Return the values in a new tensor. Raises as `read_into` does."""
        values = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(reader, values)
        return values

    def read_into(self, reader: SpanReader, out: Tensor) -> None:
        """Read and decode the weight.

        Args:
            reader: Reads the files.
            out: Gets the values; of this shape, and any floating-point dtype.

        Raises:
            CheckpointError: The tensors cannot be read, or their values are damaged. The content of
                `out` is then undefined.
        """
        if self._is_stack:
            for index in range(self.shape[0]):
                self.row(index).read_into(reader, out[index])
            return
        tensors = {purpose: span.read(reader) for purpose, span in self.parts}
        with _named(self):
            self.encoding.decode_into(tensors, out.view(self.encoding.shape(dict(self.parts))))

    @property
    def scaled_codes(self) -> ScaledCodes | None:
        """How memory can hold the matrix as it is stored; None if it cannot."""
        if self._is_stack or not isinstance(self.encoding, HeldEncoding):
            return None
        return self.encoding.scaled_codes(dict(self.parts))

    def read_codes(self, reader: SpanReader) -> StoredCodes:
        """Read the matrix as it is stored, of which `scaled_codes` is not None.

        Raises:
            CheckpointError: The tensors cannot be read, or their values are damaged.
        """
        assert isinstance(self.encoding, HeldEncoding)
        tensors = {purpose: span.read(reader) for purpose, span in self.parts}
        with _named(self):
            found = self.encoding.stored_codes(tensors)
            if not _are_sound(found.scales_RG):  # decoding knows which of them are meant
                values = torch.empty(self.shape[-2:], dtype=self.dtype)
                self.encoding.decode_into(tensors, values)
        return found

    @property
    def _is_stack(self) -> bool:
        """Whether the stored tensors have an axis of matrices, unlike after `in_stack`."""
        return len(self.encoding.shape(dict(self.parts))) == 3


def _are_sound(scales: Tensor) -> bool:
    """Return whether all scales are finite and none is zero."""
    if scales.dtype == torch.uint8:
        return (
            scales.numel() == 0 or int(scales.numpy().max()) != 255
        )  # torch takes ten times as long
    return bool((scales.isfinite() & (scales != 0)).all())


def _is_shared(span: Span) -> bool:
    return prod(span.shape) == 1


class _named:
    """Add the weight's name, and what to do, to a CheckpointError of its encoding."""

    def __init__(self, weight: EncodedTensor):
        self._weight = weight

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CheckpointError):
            weight, advice = self._weight, "; copy or download the checkpoint again"
            raise CheckpointError(
                f"{weight.name} ({weight.encoding.format}): {error}"
                f"{'' if '; give ' in str(error) else advice}"
            ) from error
