"""Weights of 2, 4 or 8-bit integers packed into int32, with scales and zero points per group.

Three layouts: compressed-tensors packs a row's columns one after the other (`weight_packed`, also
Kimi-K2's); GPTQ and AWQ store the transposed matrix, GPTQ packing input units (`qweight`,
`desc_act` gives each one a group by `g_idx`), AWQ output units in an order of its own. A value is
`(code - zero) * scale`, computed in the dtype of the scales.

Shapes: R rows (output units), C columns (input units), G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moefit.checkpoint.formats.encoding import HeldEncoding, Parts, StoredCodes
from moefit.checkpoint.formats.scaling import (
    HELD_SCALES,
    Grid,
    held_group,
    look_up,
    scale_into,
    values_in_bytes,
)
from moefit.checkpoint.safetensors import Span
from moefit.errors import CheckpointError
from moefit.moe.families import ScaledCodes

BITS = (2, 4, 8)
_TABLES = {bits: values_in_bytes(torch.arange(1 << bits).float()) for bits in BITS}
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
# The column, among eight, of each 4-bit code of an int32 of AWQ, from the lowest.
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_UNITS_AT_ONCE = 256  # that are unpacked, which takes many times their bytes
_MANY_ROWS = 1 << 13  # such as those of an output head, of which fewer units are unpacked at once
_AWQ_CODES = torch.tensor([_AWQ_COLUMNS.index(column) for column in range(8)])


def unpack(packed_RP: Tensor, bits: int) -> Tensor:
    """Return the codes [R, P * 32 / bits] of int32 [R, P] in float32, the lowest bits first."""
    return look_up(_TABLES[bits], packed_RP.contiguous().view(torch.uint8))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows(HeldEncoding):
    """compressed-tensors: codes in rows, offset by half their range; zero points in columns."""

    bits: int

    @property
    def format(self) -> str:
        """With the number of bits."""
        return f"int{self.bits} (compressed-tensors)"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return rows, and columns as far as whole int32 go."""
        *stack, packed = parts["weight"].shape
        return (*stack, packed * 32 // self.bits)

    def check(self, parts: Parts) -> None:
        """Check that scales, zero points and groups fit the codes."""
        rows, cols = self.shape(parts)
        scale = parts["scale"]
        _check_scales(scale.dtype)
        if len(scale.shape) != 2 or scale.shape[0] not in (1, rows) or cols % scale.shape[1]:
            raise CheckpointError(
                f"{list(scale.shape)} scales do not divide a weight of {[rows, cols]}"
            )
        zeros, expected = parts.get("zeros"), (-(-rows * self.bits // 32), scale.shape[1])
        if zeros is not None and (zeros.shape != expected or zeros.dtype != torch.int32):
            raise CheckpointError(f"zero points are {list(zeros.shape)}, not {list(expected)}")
        if (groups := parts.get("groups")) is not None and groups.shape != (cols,):
            raise CheckpointError(f"g_idx is {list(groups.shape)}, not {[cols]}")

    def scaled_codes(self, parts: Parts) -> ScaledCodes | None:
        """Return codes of 4 or 8 bits in groups of consecutive columns."""
        if self.bits == 2 or "groups" in parts:
            return None
        cols, scale = self.shape(parts)[1], parts["scale"]
        return _held(self, scale, cols // scale.shape[1], cols, zeros="zeros" in parts)

    def stored_codes(self, parts: Mapping[str, Tensor]) -> StoredCodes:
        """Return the bytes themselves."""
        packed, scale, zeros = parts["weight"], parts["scale"], parts.get("zeros")
        rows, cols = len(packed), packed.shape[1] * 32 // self.bits
        _check_shape(parts, [rows, cols])
        if zeros is not None:
            zeros = unpack(zeros.T, self.bits)[:, :rows].T.to(torch.uint8)
        return StoredCodes(
            codes_RB=packed.view(torch.uint8),
            scales_RG=scale.expand(rows, -1).contiguous(),
            group=cols // scale.shape[1],
            zeros_RG=zeros,
        )

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write `(code - zero) * scale`; without zero points half the range is zero."""
        packed, scale = parts["weight"], parts["scale"]
        _check_shape(parts, list(out.shape))
        rows, cols = out.shape
        groups = parts.get("groups")
        if groups is not None and bool((groups < 0).all()):
            groups = None  # a placeholder for columns in order
        grid = self._grid(scale.float().expand(rows, -1), groups, cols)
        zeros = None
        if "zeros" in parts:
            codes = unpack(parts["zeros"].T, self.bits)[:, :rows].T
            zeros = self._grid(codes, groups, cols)

        def values(chunk: slice) -> Tensor:
            found = unpack(packed[chunk], self.bits)
            if zeros is None:
                return found.sub_(1 << (self.bits - 1))
            zeros.apply(Tensor.sub_, found, chunk)
            return found

        scale_into(out, values, grid, scale.dtype)

    @staticmethod
    def _grid(values_RG: Tensor, groups: Tensor | None, cols: int) -> Grid:
        count = values_RG.shape[1]
        return Grid(
            values_rc=values_RG,
            row_of=torch.arange(len(values_RG)),
            width=cols // count,
            column_of=None if groups is None else _checked(groups, count),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedColumns(HeldEncoding):
    """GPTQ and AWQ: the transposed matrix [C, R].

    Attributes:
        bits: Of a code.
        awq: AWQ's packing of output units, instead of GPTQ's of input units.
        offset: Added to stored zero points: 1 in GPTQ's first format, 0 in its second and in AWQ.
        in_order: Whether the declaration says that groups are of consecutive input units.
    """

    bits: int
    awq: bool = False
    offset: int = 0
    in_order: bool = False

    @property
    def format(self) -> str:
        """GPTQ or AWQ."""
        return f"int{self.bits} ({'AWQ' if self.awq else 'GPTQ'})"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the model's matrix."""
        rows, cols = parts["weight"].shape
        per_word = 32 // self.bits
        return (cols * per_word, rows) if self.awq else (cols, rows * per_word)

    def check(self, parts: Parts) -> None:
        """Check that scales, zero points and groups fit the codes."""
        rows, cols = self.shape(parts)
        scale, zeros = parts["scale"], parts.get("zeros")
        _check_scales(scale.dtype)
        if len(scale.shape) != 2 or scale.shape[1] != rows:
            raise CheckpointError(f"scales are {list(scale.shape)}, not [groups, {rows}]")
        count = scale.shape[0]
        if "groups" not in parts and cols % count:
            raise CheckpointError(f"{count} groups do not divide {cols} input units")
        expected = count, -(-rows * self.bits // 32)
        if zeros is not None and (zeros.shape != expected or zeros.dtype != torch.int32):
            raise CheckpointError(f"zero points are {list(zeros.shape)}, not {list(expected)}")
        if (groups := parts.get("groups")) is not None and groups.shape != (cols,):
            raise CheckpointError(f"g_idx is {list(groups.shape)}, not {[cols]}")

    def scaled_codes(self, parts: Parts) -> ScaledCodes | None:
        """Return codes of 4 or 8 bits, if groups are of consecutive input units."""
        scale, cols = parts["scale"], self.shape(parts)[1]
        in_order = self.in_order or "groups" not in parts
        if self.bits == 2 or not in_order or cols % scale.shape[0]:
            return None
        return _held(self, scale, cols // scale.shape[0], cols, zeros="zeros" in parts)

    def stored_codes(self, parts: Mapping[str, Tensor]) -> StoredCodes:
        """Return the transposed codes."""
        scale = parts["scale"]
        if self.awq:
            codes_RB = self._joined(parts["weight"])
        else:  # an int32 is of consecutive input units
            codes_RB = parts["weight"].T.contiguous().view(torch.uint8)
        group = codes_RB.shape[1] * 8 // self.bits // len(scale)
        if (groups := parts.get("groups")) is not None and bool(
            (groups != torch.arange(len(groups)) // group).any()
        ):
            raise CheckpointError(
                "g_idx is not in order, but the declaration has no desc_act; give --precision "
                "decoded for experts and --dense-precision decoded for other weights, or correct "
                "quantization_config"
            )
        zeros = self._zeros(parts, codes_RB.shape[0]) if "zeros" in parts else None
        return StoredCodes(
            codes_RB=codes_RB,
            scales_RG=scale.T.contiguous(),
            group=group,
            zeros_RG=None if zeros is None else zeros.T.to(torch.uint8),
        )

    def _joined(self, packed: Tensor) -> Tensor:
        """Return AWQ's codes with two input units per byte, some units at a time."""
        units, words = packed.shape
        joined_RB = torch.empty(words * 32 // self.bits, units // 2, dtype=torch.uint8)
        at_once = _UNITS_AT_ONCE if len(joined_RB) <= _MANY_ROWS else _UNITS_AT_ONCE // 4
        parts = packed.split(at_once), joined_RB.split(at_once // 2, dim=1)
        for part, out_RB in zip(*parts, strict=True):
            codes_CR = self._unpacked_columns(part).to(torch.uint8)
            out_RB.copy_((codes_CR[::2] | codes_CR[1::2] << 4).T)
        return joined_RB

    def _zeros(self, parts: Mapping[str, Tensor], rows: int) -> Tensor:
        """Return zero points [G, R] in float32."""
        codes = self._unpacked_columns(parts["zeros"])[:, :rows]
        return (codes + self.offset).remainder_(1 << self.bits)

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write `(code - zero) * scale`."""
        packed, scale = parts["weight"], parts["scale"]
        rows, cols = out.shape
        if "groups" in parts:
            row_of = _checked(parts["groups"], len(scale))
        else:
            row_of = torch.arange(cols) // (cols // len(scale))
        half = float(1 << (self.bits - 1))
        zeros_GR = torch.full((len(scale), rows), half)
        if "zeros" in parts:
            zeros_GR = self._zeros(parts, rows)
        zeros = Grid(values_rc=zeros_GR, row_of=row_of, width=1)

        def values(chunk: slice) -> Tensor:
            found = self._codes(packed, chunk)
            zeros.apply(Tensor.sub_, found, chunk)
            return found

        grid = Grid(values_rc=scale.float(), row_of=row_of, width=1)
        scale_into(out.T, values, grid, scale.dtype)

    def _codes(self, packed: Tensor, chunk: slice) -> Tensor:
        """Return codes [n, R] of some input units."""
        if self.awq:
            return self._unpacked_columns(packed[chunk])
        per_word = 32 // self.bits
        first, last = chunk.start // per_word, -(-chunk.stop // per_word)
        words = packed[first:last]
        codes = unpack(words.reshape(-1, 1), self.bits).view(*words.shape, per_word)
        codes_CR = codes.transpose(1, 2).reshape(-1, words.shape[1])
        return codes_CR[chunk.start - first * per_word : chunk.stop - first * per_word]

    def _unpacked_columns(self, packed: Tensor) -> Tensor:
        codes = unpack(packed, self.bits)
        if not self.awq:
            return codes
        return codes.view(len(packed), -1, 8)[:, :, _AWQ_CODES].reshape(len(packed), -1)


def _held(
    encoding: "PackedRows | PackedColumns", scale: Span, group: int, cols: int, *, zeros: bool
) -> ScaledCodes | None:
    """Return how memory can hold integers with scales of 16 bits; None if it cannot."""
    name, held = HELD_SCALES.get(scale.dtype), held_group(group, cols)
    if name is None or held is None:
        return None
    return ScaledCodes(encoding.format, f"int{encoding.bits}", name, held, zeros)


def _check_shape(parts: Mapping[str, Tensor], found: list[int]) -> None:
    if "shape" in parts and parts["shape"].tolist() != found:
        raise CheckpointError(
            f"weight_shape is {parts['shape'].tolist()}, but the tensors hold {found}"
        )


def _check_scales(dtype: torch.dtype) -> None:
    if dtype not in _SCALES:
        raise CheckpointError(f"scales of {dtype} are not known")


def _checked(groups: Tensor, count: int) -> Tensor:
    """Return g_idx as an index. Raises CheckpointError if it leads outside the groups."""
    least, most = int(groups.min()), int(groups.max())
    if least < 0 or most >= count:
        raise CheckpointError(
            f"g_idx has values from {least} to {most}, but there are {count} groups"
        )
    return groups.long()
