"""The formats in which an expert can lie in memory: its own dtype, or grouped integers.

Owns which of an expert's tensors are encoded, where each part lies in a slot's bytes, and the plain
computation from each format. Matrices are encoded with rows as output units; vectors (biases) stay
as they are. Knows nothing of slots, files or which expert is where.
"""

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import CheckpointError, ConfigError
from moefit.moe.families import Layout, Tensors, TensorSpec
from moefit.quant.backend import decoded
from moefit.quant.cpu_kernels import Weight
from moefit.quant.encode import Encoder, encode_into
from moefit.quant.grouped_int import (
    PLANES,
    ROWS_AT_ONCE,
    GroupedMatrix,
    codes_bytes,
    groups_of,
    meta_bytes,
    meta_per_group,
)

_ALIGNMENT = 64  # bytes; a cache line, and what vector instructions like
Weights = Mapping[str, Weight]
"""One expert's tensors by short name, some of them encoded."""


class Format(Protocol):
    """How an expert's matrices lie in a slot. Slots of one block may differ in it."""

    @property
    def name(self) -> str:
        """As in `--precision`."""
        ...

    def nbytes(self, specs: Mapping[str, TensorSpec]) -> int:
        """Bytes that a slot of this format takes, in whole pages."""
        ...

    def bind(self, buffer_B: Tensor, specs: Mapping[str, TensorSpec]) -> Weights:
        """The slot's tensors: views into the bytes of its buffer."""
        ...

    def write(self, weights: Weights, native: Tensors, specs: Mapping[str, TensorSpec]) -> None:
        """Fill bound tensors from an expert's own.

        Raises CheckpointError for weights that the format cannot hold.
        """
        ...


@dataclass(frozen=True, slots=True)
class NativeFormat:
    """The checkpoint's own dtype, each tensor on a cache line."""

    @property
    def name(self) -> str:
        """`native`."""
        return "native"

    def nbytes(self, specs: Mapping[str, TensorSpec]) -> int:
        """The tensors' bytes and what aligning them wastes."""
        return _pages(sum(_aligned(spec.nbytes) for spec in specs.values()))

    def bind(self, buffer_B: Tensor, specs: Mapping[str, TensorSpec]) -> Weights:
        """One view per tensor."""
        cut = _Cut(buffer_B)
        return {
            short: cut.take(spec.nbytes).view(spec.dtype).view(spec.shape)
            for short, spec in specs.items()
        }

    def write(self, weights: Weights, native: Tensors, specs: Mapping[str, TensorSpec]) -> None:
        """A copy."""
        for short, tensor in native.items():
            target = weights[short]
            assert isinstance(target, Tensor)
            target.copy_(tensor)


@dataclass(frozen=True, slots=True)
class GroupedFormat:
    """Matrices as integers of `bits` with a scale and a minimum for every 64 of a row."""

    bits: int
    encoder: Encoder = "fitted"

    @property
    def name(self) -> str:
        """`int4`, or `int4-nearest` where the encoder is not the default."""
        return f"int{self.bits}" if self.encoder == "fitted" else f"int{self.bits}-{self.encoder}"

    def nbytes(self, specs: Mapping[str, TensorSpec]) -> int:
        """Codes, scales and minima of the matrices, and the other tensors as they are."""
        return _pages(sum(self._tensor_bytes(spec) for spec in specs.values()))

    def _tensor_bytes(self, spec: TensorSpec) -> int:
        if not is_matrix(spec):
            return _aligned(spec.nbytes)
        rows, cols = matrix_shape(spec)
        sizes = codes_bytes(rows, cols, self.bits), meta_bytes(rows, cols, self.bits)
        return sum(map(_aligned, sizes))

    def bind(self, buffer_B: Tensor, specs: Mapping[str, TensorSpec]) -> Weights:
        """A `GroupedMatrix` per matrix, a view per other tensor."""
        cut = _Cut(buffer_B)
        return {
            short: self._matrix(cut, spec)
            if is_matrix(spec)
            else cut.take(spec.nbytes).view(spec.dtype).view(spec.shape)
            for short, spec in specs.items()
        }

    def _matrix(self, cut: "_Cut", spec: TensorSpec) -> GroupedMatrix:
        rows, cols = matrix_shape(spec)
        codes_B = cut.take(codes_bytes(rows, cols, self.bits))
        meta_B = cut.take(meta_bytes(rows, cols, self.bits))
        meta_shape = rows, meta_per_group(self.bits), groups_of(cols)
        return GroupedMatrix(
            self.bits, cols, codes_B.view(rows, -1), meta_B.view(torch.float16).view(meta_shape)
        )

    def write(self, weights: Weights, native: Tensors, specs: Mapping[str, TensorSpec]) -> None:
        """Encode the matrices, copy the rest."""
        for short, tensor in native.items():
            target = weights[short]
            if isinstance(target, Tensor):
                target.copy_(tensor)
                continue
            weight_RC = tensor.T if specs[short].inputs_first else tensor
            try:
                encode_into(target, weight_RC, self.encoder)
            except CheckpointError as error:
                raise CheckpointError(f"{short}: {error}") from error


NATIVE = NativeFormat()
FORMATS: Mapping[str, Format] = {
    "native": NATIVE,
    **{f"int{bits}": GroupedFormat(bits) for bits in PLANES if bits > 1},
    **{f"int{bits}-nearest": GroupedFormat(bits, "nearest") for bits in PLANES if bits > 1},
}


def parse_format(name: str) -> Format:
    """The format of this name. Raises ConfigError for another, naming the nearest."""
    if name in FORMATS:
        return FORMATS[name]
    known = ", ".join(one for one in FORMATS if not one.endswith("nearest"))
    raise ConfigError(
        f"precision {name!r} does not exist; there are {known}; nearest: {_like(name)}"
    )


def _like(name: str) -> str:
    digits = re.search(r"[0-9]{1,3}", name)
    if not digits:
        return next(iter(get_close_matches(name, FORMATS, n=1)), "int8")
    bits = int(digits[0])
    return "native" if bits > 12 else f"int{min(PLANES, key=lambda width: abs(width - bits))}"


def expert_output(layout: Layout, weights: Weights, x_RD: Tensor) -> Tensor:
    """One expert's unweighted output y_RD, the plain way: decoded, then as the family computes.

    On a CPU, 16-bit rows are filled up to one of few numbers: oneDNN compiles a program for every
    shape and keeps a thousand of them, which took hundreds of MiB
    (tests/serve/memory/test_peak_memory.py).
    """
    rows = len(x_RD)
    if x_RD.device.type == "cpu" and x_RD.dtype.itemsize == 2:
        x_RD = F.pad(x_RD, (0, 0, 0, round_rows(rows) - rows))
    return layout.output(dense_tensors(layout.specs, weights, x_RD.dtype), x_RD)[:rows]


def round_rows(rows: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ...: two in each doubling.

    >>> [round_rows(rows) for rows in (1, 8, 9, 13, 49, 65)]
    [8, 8, 12, 16, 64, 96]
    """
    size = 8
    while size < rows:
        if size * 3 // 2 >= rows:
            return size * 3 // 2
        size *= 2
    return size


def dense_tensors(specs: Mapping[str, TensorSpec], weights: Weights, dtype: torch.dtype) -> Tensors:
    """An expert's tensors as the family computes with them; those encoded are decoded."""
    return {
        short: weight if isinstance(weight, Tensor) else _decoded(weight, specs[short], dtype)
        for short, weight in weights.items()
    }


def _decoded(matrix: GroupedMatrix, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    weight_RC = decoded(matrix, dtype)
    return weight_RC.T if spec.inputs_first else weight_RC


def is_matrix(spec: TensorSpec) -> bool:
    """Whether a tensor is one that grouped formats encode."""
    return len(spec.shape) == 2 and spec.dtype.is_floating_point


def matrix_shape(spec: TensorSpec) -> tuple[int, int]:
    """Output units, input units."""
    rows, cols = spec.shape
    return (cols, rows) if spec.inputs_first else (rows, cols)


def encoding_bytes(format: Format, specs: Mapping[str, TensorSpec]) -> int:
    """The most that encoding or decoding one expert holds beside its slot.

    That is itself in its own dtype, and some rows as float32.
    """
    if isinstance(format, NativeFormat):
        return 0
    widest = max((matrix_shape(spec)[1] for spec in specs.values() if is_matrix(spec)), default=0)
    return sum(spec.nbytes for spec in specs.values()) + ROWS_AT_ONCE * widest * 4 * 8


def weights_in(specs: Mapping[str, TensorSpec]) -> int:
    """Numbers in an expert's matrices."""
    return sum(prod(spec.shape) for spec in specs.values() if is_matrix(spec))


class _Cut:
    """Parts of a buffer, one after the other, each on a cache line."""

    def __init__(self, buffer_B: Tensor):
        self._buffer_B, self._at = buffer_B, 0

    def take(self, size: int) -> Tensor:
        part_B = self._buffer_B[self._at : self._at + size]
        self._at += _aligned(size)
        return part_B


def _aligned(size: int, to: int = _ALIGNMENT) -> int:
    return -(-size // to) * to


def _pages(size: int) -> int:
    return _aligned(size, mmap.PAGESIZE)
