"""A tensor of a GGUF file as an encoded weight: rows of blocks, in the file's order of rows.

`GgmlBlocks` is one matrix; the others make one matrix of two: gate and up projections as gpt-oss
(`Interleaved`) and Granite (`GateAboveUp`) have them, keys and values of MLA (`LatentHeads`).

Shapes: R rows (output units), C columns (input units).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moefit.checkpoint.formats.encoding import Encoding, HeldEncoding, Parts, StoredCodes
from moefit.checkpoint.formats.scaling import held_group, row_chunks
from moefit.checkpoint.gguf.blocks import K_QUANTS, decode_blocks, k_factors, require_package
from moefit.checkpoint.gguf.types import BY_NAME
from moefit.errors import CheckpointError
from moefit.moe.families import ScaledCodes

# Types whose blocks are codes and one scale each, which memory can hold as they are: kinds of codes
# and scales as in `ScaledCodes`, and where a block's codes begin.
_HELD = {
    "q8_0": ("int8", "float16", 2),
    "q4_0": ("int4", "float16", 2),
    "mxfp4": ("e2m1", "e8m0", 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgmlBlocks(HeldEncoding):
    """Rows of blocks. The only part, `weight`, is uint8 [R, bytes of a row], or of a plain dtype.

    Attributes:
        type: The type's name, such as `q4_k`; `f32`, `f16` and `bf16` are plain.
        pairs: If not 0, the number of heads whose rows are stored in pairs of rotated units, where
            transformers has the first units of all pairs before the second ones.
        transposed: Whether the model holds the matrix with input units in rows.
    """

    type: str
    pairs: int = 0
    transposed: bool = False

    @property
    def format(self) -> str:
        """The type's name, or the dtype's."""
        plain = BY_NAME[self.type].dtype
        return self.type if plain is None else str(plain).removeprefix("torch.")

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the values."""
        shape = self.stored_shape(parts["weight"].shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def check(self, parts: Parts) -> None:
        """Check that rows are whole blocks, and that heads divide them."""
        weight, type = parts["weight"], BY_NAME[self.type]
        require_package(self.type)
        if weight.dtype != (type.dtype or torch.uint8):
            raise CheckpointError(f"{weight.dtype} does not hold values of type {self.type}")
        if type.dtype is None and weight.shape[-1] % type.nbytes:
            raise CheckpointError(f"rows of {weight.shape[-1]} bytes are no whole blocks")
        if self.pairs and weight.shape[0] % (2 * self.pairs):
            raise CheckpointError(f"{weight.shape[0]} rows do not divide into {self.pairs} heads")

    def scaled_codes(self, parts: Parts) -> ScaledCodes | None:
        """Return types whose blocks are codes and one scale, and k-quants."""
        if self.type in K_QUANTS and not self.pairs:
            block = BY_NAME[self.type].values
            return ScaledCodes(self.type, self.type, "float16", block, transposed=self.transposed)
        if self.type not in _HELD or self.pairs:
            return None
        codes, scales, _ = _HELD[self.type]
        block = BY_NAME[self.type].values
        group = held_group(block, self.stored_shape(parts["weight"].shape)[-1])
        if group is None:
            return None
        return ScaledCodes(self.type, codes, scales, group, transposed=self.transposed)

    def stored_codes(self, parts: Mapping[str, Tensor]) -> StoredCodes:
        """Return the codes in the order of columns: a block has the first half in low bits.

        Those of k-quants are whole blocks, whose scales are part of them.
        """
        if self.type in K_QUANTS:
            return _whole_blocks(self.type, parts["weight"])
        codes, scales, begin = _HELD[self.type]
        type, stored = BY_NAME[self.type], parts["weight"]
        blocks_RGB = stored.view(len(stored), -1, type.nbytes)
        bytes_RGB, scales_RGB = blocks_RGB[..., begin:], blocks_RGB[..., :begin]
        if codes != "int8":
            bytes_RGB = _all_neighbours(bytes_RGB)
        scales_RG = scales_RGB.contiguous().view(*scales_RGB.shape[:2], -1)
        return StoredCodes(
            codes_RB=bytes_RGB.flatten(1),
            scales_RG=(scales_RG if scales == "e8m0" else scales_RG.view(torch.float16))[..., 0],
            group=type.values,
            signed=codes == "int8",
        )

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the values."""
        stored = parts["weight"]
        if self.pairs:
            stored = stored[unpaired(len(stored), self.pairs)]
        matrix_RC = out.T if self.transposed else out
        if stored.dtype != torch.uint8:
            matrix_RC.copy_(stored.view(matrix_RC.shape))
            return
        type = BY_NAME[self.type]
        rows, cols = matrix_RC.shape
        for chunk in row_chunks(rows, cols):
            values = decode_blocks(self.type, stored[chunk].reshape(-1, type.nbytes))
            matrix_RC[chunk] = values.view(-1, cols)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the values of a tensor of this shape, in the file's order."""
        type = BY_NAME[self.type]
        *rows, last = shape
        cols = last if type.dtype else last // type.nbytes * type.values
        return (*rows, cols)


@dataclass(frozen=True, slots=True, kw_only=True)
class _GateAndUp(HeldEncoding):
    """Two matrices [R, C], `gate` and `up`, that are one in the model; or two vectors.

    Attributes:
        gate: How the first is stored.
        up: How the second is stored.
    """

    gate: GgmlBlocks
    up: GgmlBlocks

    @property
    def format(self) -> str:
        """The types' names."""
        return "/".join(sorted({self.gate.format, self.up.format}))

    def check(self, parts: Parts) -> None:
        """Check both, and that their shapes are equal."""
        gate, up = {"weight": parts["gate"]}, {"weight": parts["up"]}
        self.gate.check(gate)
        self.up.check(up)
        if self.gate.shape(gate) != self.up.shape(up):
            raise CheckpointError(
                f"gate is {list(self.gate.shape(gate))}, but up {list(self.up.shape(up))}"
            )

    def scaled_codes(self, parts: Parts) -> ScaledCodes | None:
        """Return the type of both, if it is the same and can be held."""
        found = self.gate.scaled_codes({"weight": parts["gate"]})
        return found if found == self.up.scaled_codes({"weight": parts["up"]}) else None

    def _stored(self, parts: Mapping[str, Tensor]) -> tuple[StoredCodes, StoredCodes]:
        gate = self.gate.stored_codes({"weight": parts["gate"]})
        return gate, self.up.stored_codes({"weight": parts["up"]})


@dataclass(frozen=True, slots=True, kw_only=True)
class Interleaved(_GateAndUp):
    """Gate and up as columns of one matrix [C, 2 * R] in turn; vectors become one of [2 * R]."""

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the joint matrix, or vector."""
        *rows, cols = self.gate.shape({"weight": parts["gate"]})
        return (*rows, 2 * cols)

    def stored_codes(self, parts: Mapping[str, Tensor]) -> StoredCodes:
        """Return the rows of both in turn."""
        gate, up = self._stored(parts)
        return replace(
            gate,
            codes_RB=torch.stack([gate.codes_RB, up.codes_RB], dim=1).flatten(0, 1),
            scales_RG=torch.stack([gate.scales_RG, up.scales_RG], dim=1).flatten(0, 1),
        )

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the values of both."""
        self.gate.decode_into({"weight": parts["gate"]}, out[..., 0::2])
        self.up.decode_into({"weight": parts["up"]}, out[..., 1::2])


@dataclass(frozen=True, slots=True, kw_only=True)
class GateAboveUp(_GateAndUp):
    """Gate and up as one matrix [2 * R, C], gate first."""

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the joint matrix, or stack of matrices."""
        *rest, rows, cols = self.gate.shape({"weight": parts["gate"]})
        return (*rest, 2 * rows, cols)

    def stored_codes(self, parts: Mapping[str, Tensor]) -> StoredCodes:
        """Return the rows of gate, then those of up."""
        gate, up = self._stored(parts)
        return replace(
            gate,
            codes_RB=torch.cat([gate.codes_RB, up.codes_RB]),
            scales_RG=torch.cat([gate.scales_RG, up.scales_RG]),
        )

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the values of both."""
        gate_RC, up_RC = out.chunk(2)
        self.gate.decode_into({"weight": parts["gate"]}, gate_RC)
        self.up.decode_into({"weight": parts["up"]}, up_RC)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentHeads(Encoding):
    """The projection from the latent state of MLA to heads, [H * (N + V), L].

    llama.cpp stores it per head: the part for keys transposed, [H, L, N], because it multiplies
    queries by it, and the part for values, [H, V, L]. H heads, L width of the latent state, N and V
    units of a key that are not rotated, and of a value.

    Attributes:
        keys: How the first is stored.
        values: How the second is stored.
    """

    keys: GgmlBlocks
    values: GgmlBlocks

    @property
    def format(self) -> str:
        """The types' names."""
        return "/".join(sorted({self.keys.format, self.values.format}))

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the projection."""
        (heads, latent, keys), values = self._shapes(parts)
        return (heads * (keys + values[1]), latent)

    def check(self, parts: Parts) -> None:
        """Check both, and that heads and the latent state are the same."""
        self.keys.check({"weight": parts["keys"]})
        self.values.check({"weight": parts["values"]})
        keys, values = self._shapes(parts)
        if keys[0] != values[0] or keys[1] != values[2]:
            raise CheckpointError(f"keys are {[*keys]}, but values {[*values]}")

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the rows of each head: first those for keys, then those for values."""
        keys_HLN, values_HVL = (
            _stack(how, parts[name]) for how, name in ((self.keys, "keys"), (self.values, "values"))
        )
        out_HRL = out.view(len(keys_HLN), -1, out.shape[-1])
        number = keys_HLN.shape[-1]
        out_HRL[:, :number] = keys_HLN.transpose(1, 2)
        out_HRL[:, number:] = values_HVL

    def _shapes(self, parts: Parts) -> tuple[tuple[int, ...], tuple[int, ...]]:
        keys = self.keys.shape({"weight": parts["keys"]})
        values = self.values.shape({"weight": parts["values"]})
        if len(keys) != 3 or len(values) != 3:
            raise CheckpointError(
                f"keys are {[*keys]} and values {[*values]}, not one matrix a head"
            )
        return keys, values


def _stack(how: GgmlBlocks, stored: Tensor) -> Tensor:
    """Return the values of a stack of matrices in float32."""
    shape = how.stored_shape(tuple(stored.shape))
    values = torch.empty(shape)
    how.decode_into({"weight": stored.flatten(0, 1)}, values.flatten(0, 1))
    return values


def _whole_blocks(type: str, stored_RB: Tensor) -> StoredCodes:
    """Return the blocks of a k-quant as codes; raise CheckpointError for scales not finite."""
    k_factors(type, stored_RB.view(-1, BY_NAME[type].nbytes))
    scales_RG = torch.empty(len(stored_RB), 0, dtype=torch.float16)
    return StoredCodes(codes_RB=stored_RB, scales_RG=scales_RG, group=BY_NAME[type].values)


def _all_neighbours(bytes_RGB: Tensor) -> Tensor:
    """Return `_neighbours`, some rows at a time."""
    out_RGB = torch.empty_like(bytes_RGB, memory_format=torch.contiguous_format)
    for part, out in zip(bytes_RGB.split(_ROWS_AT_ONCE), out_RGB.split(_ROWS_AT_ONCE), strict=True):
        out.copy_(_neighbours(part))
    return out_RGB


def _neighbours(bytes_RGB: Tensor) -> Tensor:
    """Return codes of 4 bits with neighbours in a byte, from blocks whose halves share bytes."""
    halves = torch.cat([bytes_RGB & 15, bytes_RGB >> 4], dim=-1)
    return halves[..., ::2] | halves[..., 1::2] << 4


_ROWS_AT_ONCE = 256  # whose codes are moved, which takes four times their bytes


def unpaired(rows: int, heads: int) -> Tensor:
    """Return the stored row for each row of the model, for rows stored in pairs.

    >>> unpaired(4, 1).tolist()
    [0, 2, 1, 3]
    """
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
