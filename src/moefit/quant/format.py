"""Formats in which an expert is held in memory: the checkpoint's own, or grouped integers.

`Format` is the interface that the rest of the package uses. A format defines which tensors are
encoded, where each lies in a slot's buffer, how they are encoded and decoded, how large the error
is, and when kernels are used. Matrices are encoded with rows as output units; other tensors, such
as biases, are copied unchanged.

Shapes: R rows (output units, or routed rows of x and y), C columns, D model width, B bytes.
"""

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import CheckpointError, ConfigError
from moefit.moe.families import Layout, Tensors, TensorSpec
from moefit.quant.backend import Backend, backend, decoded
from moefit.quant.cpu_kernels import NATIVE_DTYPES, Weight
from moefit.quant.encode import Encoder, encode_into
from moefit.quant.error_model import GAUSSIAN, relative_error
from moefit.quant.grouped_int import (
    PLANES,
    ROWS_AT_ONCE,
    GroupedMatrix,
    codes_bytes,
    groups_of,
    meta_bytes,
    meta_per_group,
)
from moefit.quant.scaled.held import held_bytes, held_matrix

_ALIGNMENT = 64  # bytes: a cache line, and the width of the widest vector instructions
Specs = Mapping[str, TensorSpec]
"""Shape and dtype of an expert's tensors by short name."""
Weights = Mapping[str, Weight]
"""One expert's tensors by short name; some may be encoded."""


class Format(Protocol):
    """How one expert's tensors are stored in a slot. Slots of one block may differ in format."""

    @property
    def name(self) -> str:
        """Name as given to `--precision`."""
        ...

    @property
    def is_encoded(self) -> bool:
        """Whether experts are encoded, instead of being stored in the model's dtype."""
        ...

    @property
    def encoder(self) -> str:
        """Name of the encoder; empty if nothing is encoded."""
        ...

    @property
    def uses_calibration(self) -> bool:
        """Whether recorded inputs can change how an expert is encoded."""
        ...

    @property
    def expected_error(self) -> float:
        """Relative squared error of the weights if they are normally distributed."""
        ...

    @property
    def dense_format(self) -> "GroupedFormat | None":
        """The format of dense weights in this precision; None if they are not encoded."""
        ...

    def nbytes(self, specs: Specs) -> int:
        """Return the size of a slot of this format in bytes, a multiple of the page size."""
        ...

    def bind(self, buffer_B: Tensor, specs: Specs) -> Weights:
        """Return the expert's tensors as views into a slot's buffer."""
        ...

    def encode(self, weights: Weights, native: Tensors, specs: Specs) -> None:
        """Fill bound tensors from an expert's tensors in the model's dtype.

        Raises:
            CheckpointError: The format cannot represent a weight.
        """
        ...

    def decode(self, weights: Weights, specs: Specs, dtype: torch.dtype) -> Tensors:
        """Return the tensors that the family's code computes with; encoded ones in `dtype`."""
        ...

    def relative_error(self, weights: Weights, native: Tensors, specs: Specs) -> float:
        """Return |W - W^|^2 / |W|^2 over the encoded matrices; 0 if nothing is encoded."""
        ...

    def encoding_bytes(self, specs: Specs) -> int:
        """Return an upper bound on the bytes that encoding an expert needs besides its slot."""
        ...

    def decoding_bytes(self, specs: Specs) -> int:
        """Return the bytes that a decoded expert occupies besides its slot."""
        ...


@dataclass(frozen=True, slots=True)
class NativeFormat:
    """As the checkpoint has the tensors, or in the model's dtype; nothing is rounded.

    Codes of a quantised checkpoint are held as they are if `TensorSpec.stored` says how.

    Args:
        decoded: Whether quantised matrices are held in the model's dtype too.
    """

    decoded: bool = False
    is_encoded = uses_calibration = False
    encoder = ""
    expected_error = 0.0
    dense_format = None

    @property
    def name(self) -> str:
        """`native` or `decoded`."""
        return "decoded" if self.decoded else "native"

    def nbytes(self, specs: Specs) -> int:
        """Return the size of the aligned tensors."""
        return _round_to_pages(sum(sum(map(_align, self._sizes(one))) for one in specs.values()))

    def _sizes(self, spec: TensorSpec) -> tuple[int, ...]:
        if spec.stored is None or self.decoded:
            return (spec.nbytes,)
        return held_bytes(*matrix_shape(spec), spec.stored)

    def bind(self, buffer_B: Tensor, specs: Specs) -> Weights:
        """Return a view per tensor, or its codes."""
        cut = _BufferCutter(buffer_B)
        return {short: self._take(cut, spec) for short, spec in specs.items()}

    def _take(self, cut: "_BufferCutter", spec: TensorSpec) -> Weight:
        if spec.stored is None or self.decoded:
            return cut.take_tensor(spec)
        codes_B, meta_B = (cut.take(size) for size in self._sizes(spec))
        return held_matrix(spec.stored, matrix_shape(spec)[1], codes_B, meta_B)

    def encode(self, weights: Weights, native: Tensors, specs: Specs) -> None:
        """Copy the tensors, none of which may be held as codes."""
        for short, tensor in native.items():
            target = weights[short]
            assert isinstance(target, Tensor)
            target.copy_(tensor)

    def decode(self, weights: Weights, specs: Specs, dtype: torch.dtype) -> Tensors:
        """Return decoded matrices, and the other tensors themselves."""
        return _decode(weights, specs, dtype)

    def relative_error(self, weights: Weights, native: Tensors, specs: Specs) -> float:
        """Return 0."""
        return 0.0

    def encoding_bytes(self, specs: Specs) -> int:
        """Return 0."""
        return 0

    def decoding_bytes(self, specs: Specs) -> int:
        """Return the size of matrices in the model's dtype that are held as codes."""
        held = (one for one in specs.values() if one.stored is not None and not self.decoded)
        return sum(one.nbytes for one in held)


@dataclass(frozen=True, slots=True)
class GroupedFormat:
    """Matrices as integers of `bits` bits, with a scale and a minimum per 64 weights of a row."""

    bits: int
    encoder: Encoder = "fitted"
    is_encoded = True

    @property
    def name(self) -> str:
        """`int4`, or `int4-nearest` if the encoder is not the default."""
        return f"int{self.bits}" if self.encoder == "fitted" else f"int{self.bits}-{self.encoder}"

    @property
    def uses_calibration(self) -> bool:
        """Whether the encoder minimises an error; rounding to nearest does not."""
        return self.encoder != "nearest"

    @property
    def expected_error(self) -> float:
        """The value of `GAUSSIAN`, whichever the encoder."""
        return GAUSSIAN[f"int{self.bits}"]

    @property
    def dense_format(self) -> "GroupedFormat":
        """This format."""
        return self

    def nbytes(self, specs: Specs) -> int:
        """Return the size of codes, scales and minima of the matrices, and of other tensors."""
        return _round_to_pages(sum(self._tensor_bytes(spec) for spec in specs.values()))

    def _tensor_bytes(self, spec: TensorSpec) -> int:
        if not is_matrix(spec):
            return _align(spec.nbytes)
        rows, cols = matrix_shape(spec)
        sizes = codes_bytes(rows, cols, self.bits), meta_bytes(rows, cols, self.bits)
        return sum(map(_align, sizes))

    def bind(self, buffer_B: Tensor, specs: Specs) -> Weights:
        """Return a `GroupedMatrix` per matrix and a view per other tensor."""
        cut = _BufferCutter(buffer_B)
        return {
            short: self._take_matrix(cut, spec) if is_matrix(spec) else cut.take_tensor(spec)
            for short, spec in specs.items()
        }

    def _take_matrix(self, cut: "_BufferCutter", spec: TensorSpec) -> GroupedMatrix:
        rows, cols = matrix_shape(spec)
        codes_B = cut.take(codes_bytes(rows, cols, self.bits))
        meta_B = cut.take(meta_bytes(rows, cols, self.bits))
        meta_shape = rows, meta_per_group(self.bits), groups_of(cols)
        return GroupedMatrix(
            self.bits, cols, codes_B.view(rows, -1), meta_B.view(torch.float16).view(meta_shape)
        )

    def encode(self, weights: Weights, native: Tensors, specs: Specs) -> None:
        """Encode the matrices and copy the other tensors."""
        for short, tensor in native.items():
            target = weights[short]
            if isinstance(target, Tensor):
                target.copy_(tensor)
                continue
            assert isinstance(target, GroupedMatrix)
            try:
                encode_into(target, _output_rows(tensor, specs[short]), self.encoder)
            except CheckpointError as error:
                raise CheckpointError(f"{short}: {error}") from error

    def decode(self, weights: Weights, specs: Specs, dtype: torch.dtype) -> Tensors:
        """Return the decoded matrices and the other tensors themselves."""
        return _decode(weights, specs, dtype)

    def relative_error(self, weights: Weights, native: Tensors, specs: Specs) -> float:
        """Return the error over all matrices together."""
        return relative_error(
            (matrix, _output_rows(native[short], specs[short]))
            for short, matrix in weights.items()
            if isinstance(matrix, GroupedMatrix)
        )

    def encoding_bytes(self, specs: Specs) -> int:
        """Return the size of the expert in the model's dtype, and of some rows in float32."""
        widest = max(
            (matrix_shape(spec)[1] for spec in specs.values() if is_matrix(spec)), default=0
        )
        return self.decoding_bytes(specs) + ROWS_AT_ONCE * widest * 4 * 8

    def decoding_bytes(self, specs: Specs) -> int:
        """Return the size of the expert in the model's dtype."""
        return sum(spec.nbytes for spec in specs.values())


NATIVE, DECODED = NativeFormat(), NativeFormat(decoded=True)
FORMATS: Mapping[str, Format] = {
    NATIVE.name: NATIVE,
    **{f"int{bits}": GroupedFormat(bits) for bits in PLANES if bits > 1},
    **{f"int{bits}-nearest": GroupedFormat(bits, "nearest") for bits in PLANES if bits > 1},
    DECODED.name: DECODED,
}


def parse_format(name: str) -> Format:
    """Return the format with this name.

    Raises:
        ConfigError: There is no such format; the message names the nearest.
    """
    if name in FORMATS:
        return FORMATS[name]
    known = ", ".join(one for one in FORMATS if not one.endswith("nearest"))
    raise ConfigError(
        f"precision {name!r} does not exist; there are {known}; nearest: {_nearest_name(name)}"
    )


def _nearest_name(name: str) -> str:
    digits = re.search(r"[0-9]{1,3}", name)
    if not digits:
        return next(iter(get_close_matches(name, FORMATS, n=1)), "int8")
    bits = int(digits[0])
    return "native" if bits > 12 else f"int{min(PLANES, key=lambda width: abs(width - bits))}"


def expert_output(layout: Layout, format: Format, weights: Weights, x_RD: Tensor) -> Tensor:
    """Return one expert's unweighted output y_RD, for experts that no kernel computes as a whole.

    Products with encoded matrices are computed by kernels where the layout allows it, everything
    else in torch from decoded weights. On a CPU, 16-bit inputs of those are padded to one of few
    row counts: oneDNN compiles a program for every shape and caches a thousand of them, which took
    hundreds of MiB (tests/serve/memory/test_peak_memory.py).
    """
    kernels = backend(x_RD.device)
    held = any(not isinstance(one, Tensor) for one in weights.values())
    if kernels and held and x_RD.dtype in NATIVE_DTYPES:
        product = partial(_kernel_product, kernels, weights)
        others = {short: one for short, one in weights.items() if isinstance(one, Tensor)}
        if (found_RD := layout.output_by(product, others, x_RD)) is not None:
            return found_RD
    rows = len(x_RD)
    if x_RD.device.type == "cpu" and x_RD.dtype.itemsize == 2:
        x_RD = F.pad(x_RD, (0, 0, 0, round_rows(rows) - rows))
    return layout.output(format.decode(weights, layout.specs, x_RD.dtype), x_RD)[:rows]


def _kernel_product(
    kernels: Backend, weights: Weights, short: str, x_RI: Tensor, bias: Tensor | None
) -> Tensor:
    bias_O = None if bias is None else bias.float()
    return kernels.linear(x_RI, weights[short], x_RI.dtype, bias_O)


def round_rows(rows: int) -> int:
    """Round up to 8, 12, 16, 24, 32, 48, ...: two sizes in each doubling.

    >>> [round_rows(rows) for rows in (1, 8, 9, 13, 49, 65)]
    [8, 8, 12, 16, 64, 96]
    """
    size = 8
    while size < rows:
        if size * 3 // 2 >= rows:
            return size * 3 // 2
        size *= 2
    return size


def slot_kind(format: Format, specs: Specs) -> str:
    """Return a name that is equal for slots of equal size only if experts of both can fill them."""
    if format.is_encoded or format == DECODED:
        return format.name
    return "+".join([format.name, *(str(one.stored) for one in specs.values() if one.stored)])


def keeps_codes(format: Format, specs: Specs) -> bool:
    """Return whether slots of a format hold codes of a quantised checkpoint as they are."""
    return format == NATIVE and any(spec.stored is not None for spec in specs.values())


def is_matrix(spec: TensorSpec) -> bool:
    """Return whether encoded formats encode this tensor, rather than copying it."""
    return len(spec.shape) == 2 and spec.dtype.is_floating_point


def matrix_shape(spec: TensorSpec) -> tuple[int, int]:
    """Return the number of output units and of input units."""
    rows, cols = spec.shape
    return (cols, rows) if spec.inputs_first else (rows, cols)


def weights_in(specs: Specs) -> int:
    """Return the number of weights in an expert's matrices."""
    return sum(prod(spec.shape) for spec in specs.values() if is_matrix(spec))


def _decode(weights: Weights, specs: Specs, dtype: torch.dtype) -> Tensors:
    return {
        short: weight
        if isinstance(weight, Tensor)
        else _output_rows(decoded(weight, dtype), specs[short])
        for short, weight in weights.items()
    }


def _output_rows(weight: Tensor, spec: TensorSpec) -> Tensor:
    """Transpose between the family's orientation and rows of output units, in either direction."""
    return weight.T if spec.inputs_first else weight


class _BufferCutter:
    """Cuts a buffer into consecutive parts, each aligned to a cache line."""

    def __init__(self, buffer_B: Tensor):
        self._buffer_B, self._offset = buffer_B, 0

    def take(self, size: int) -> Tensor:
        part_B = self._buffer_B[self._offset : self._offset + size]
        self._offset += _align(size)
        return part_B

    def take_tensor(self, spec: TensorSpec) -> Tensor:
        return self.take(spec.nbytes).view(spec.dtype).view(spec.shape)


def _align(size: int, to: int = _ALIGNMENT) -> int:
    return -(-size // to) * to


def _round_to_pages(size: int) -> int:
    return _align(size, mmap.PAGESIZE)
