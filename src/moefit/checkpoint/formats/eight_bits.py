"""Weights of 8 bits, one byte each: E4M3 floats (FP8) and integers, with scales of any layout.

DeepSeek-V3, Qwen3-FP8, MiniMax-M2 and GLM store FP8 in blocks of 128 x 128 with `weight_scale_inv`;
modelopt stores one scale per tensor, compressed-tensors one per tensor, row, group or block.
Despite its name, `weight_scale_inv` is what the values are multiplied by.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moefit.checkpoint.formats.encoding import HeldEncoding, Parts, StoredCodes
from moefit.checkpoint.formats.scaling import (
    FP8,
    HELD_SCALES,
    Block,
    Grid,
    grid_shape,
    held_group,
    look_up,
    scale_into,
    scale_values,
)
from moefit.checkpoint.safetensors import Span
from moefit.errors import CheckpointError
from moefit.moe.families import ScaledCodes

INT8 = torch.arange(256, dtype=torch.uint8).view(torch.int8).float()
CODES = {torch.float8_e4m3fn: FP8, torch.int8: INT8}
"""Values by code, for each dtype."""
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
DEFAULT_BLOCK = (128, 128)
FP8_COLUMNS = 128  # that share a scale in memory


def _check_numbers(codes: Tensor) -> None:
    if bool(((codes.view(torch.uint8) & 127) == 127).any()):
        raise CheckpointError("it has values that are not numbers (code 127 or 255)")


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBits(HeldEncoding):
    """Values of one byte, multiplied by a grid of scales.

    Attributes:
        kind: "fp8" or "int8".
        block: Rows and columns that share a scale, as config.json says; None if it does not.
        rounds: Whether products are rounded to the dtype of the scales first, as
            compressed-tensors does; transformers' FP8 multiplies in float32.
    """

    kind: str
    block: Block | None = None
    rounds: bool = False

    @property
    def format(self) -> str:
        """With the size of blocks, if they have two dimensions."""
        if self.block is None or min(self.block) == 1:
            return self.kind
        return "{} in blocks of {} x {}".format(self.kind, *self.block)

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the codes."""
        return parts["weight"].shape

    def check(self, parts: Parts) -> None:
        """Check that scales and zero points fit the codes."""
        weight, scale = parts["weight"], parts["scale"]
        if weight.dtype not in CODES or len(weight.shape) != 2:
            raise CheckpointError(f"codes of {_described(weight)} are not known")
        if scale.dtype not in _SCALES:
            raise CheckpointError(f"scales of {_described(scale)} are not known")
        self._block_of(weight.shape, scale.shape)
        if (zeros := parts.get("zeros")) is not None and zeros.shape != scale.shape:
            raise CheckpointError(
                f"{_described(zeros)} has one zero point per scale, but those are "
                f"{list(scale.shape)}"
            )

    def scaled_codes(self, parts: Parts) -> ScaledCodes | None:
        """Return integers with scales of 16 bits per row or group, or FP8 in blocks of columns."""
        weight, scale = parts["weight"], parts["scale"]
        (rows, cols), block = weight.shape, self._block_of(weight.shape, scale.shape)
        if weight.dtype != torch.int8:
            held = block[1] >= cols or block[1] % FP8_COLUMNS == 0
            return ScaledCodes(self.format, "e4m3", "float32", FP8_COLUMNS) if held else None
        name, group = HELD_SCALES.get(scale.dtype), held_group(block[1], cols)
        if name is None or group is None or block[0] not in (1, rows):
            return None
        return ScaledCodes(self.format, "int8", name, group, "zeros" in parts)

    def stored_codes(self, parts: Mapping[str, Tensor]) -> StoredCodes:
        """Return the bytes themselves; zero points become those of unsigned codes."""
        weight, scale, zeros = parts["weight"], parts["scale"], parts.get("zeros")
        shape = len(weight), weight.shape[1]
        block = self._block_of(shape, tuple(scale.shape))
        row_of = torch.arange(shape[0]) // block[0]
        grid = grid_shape(shape, block)
        if weight.dtype != torch.int8:
            _check_numbers(weight)
            scale = scale_values(scale)
        if zeros is not None:
            zeros = (zeros.view(torch.uint8) ^ 128).view(grid)[row_of]
        return StoredCodes(
            codes_RB=weight.view(torch.uint8),
            scales_RG=scale.view(grid)[row_of],
            group=block[1],
            zeros_RG=zeros,
            signed=weight.dtype == torch.int8,
        )

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write `code * scale`, or `(code - zero) * scale`."""
        weight, scale = parts["weight"], parts["scale"]
        block = self._block_of(tuple(weight.shape), tuple(scale.shape))
        if weight.dtype != torch.int8:
            _check_numbers(weight)
        shape = out.shape[0], out.shape[1]
        codes, table = weight.view(torch.uint8), CODES[weight.dtype]
        zeros = None
        if "zeros" in parts:
            zeros = Grid.of_blocks(parts["zeros"].float(), shape, block)

        def values(rows: slice) -> Tensor:
            found = look_up(table, codes[rows])
            if zeros is not None:
                zeros.apply(Tensor.sub_, found, rows)
            return found

        scales = Grid.of_blocks(scale_values(scale), shape, block)
        scale_into(out, values, scales, scale.dtype if self.rounds else torch.float32)

    def _block_of(self, weight: tuple[int, ...], scale: tuple[int, ...]) -> Block:
        """Return the rows and columns that share a scale.

        The declared block, whose last row and column may be shorter (DeepSeek-V3's
        `kv_a_proj_with_mqa` has 576 rows), comes before a block that divides the matrix.
        """
        rows, cols = weight
        if torch.Size(scale).numel() == 1:
            return rows, cols
        if len(scale) == 1 and scale[0] == rows:
            return 1, cols
        if len(scale) == 2:
            for block in (self.block, DEFAULT_BLOCK):
                if block is not None and grid_shape((rows, cols), block) == scale:
                    return block
            if rows % scale[0] == 0 and cols % scale[1] == 0:
                return rows // scale[0], cols // scale[1]
        raise CheckpointError(
            f"{list(scale)} scales do not divide a weight of {list(weight)}"
            + (f", nor are they blocks of {list(self.block)}" if self.block else "")
        )


def _described(span: Span) -> str:
    return f"{span.name} ({list(span.shape)} {str(span.dtype).removeprefix('torch.')})"
