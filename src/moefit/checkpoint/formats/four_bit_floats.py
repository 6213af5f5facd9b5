"""Weights of 4-bit floats (E2M1), two in a byte, with a scale per group of a row's columns.

MXFP4: groups of 32 with scales that are powers of two (E8M0), in gpt-oss as `*_blocks` and
`*_scales` of stacked experts whose matrices the model holds transposed. NVFP4: groups of 16 with
E4M3 scales and one scale for the whole weight, by which compressed-tensors divides
(`weight_global_scale`) and modelopt multiplies (`weight_scale_2`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moefit.checkpoint.formats.encoding import HeldEncoding, Parts, StoredCodes
from moefit.checkpoint.formats.scaling import (
    FP4,
    Grid,
    look_up,
    scale_into,
    scale_values,
    values_in_bytes,
)
from moefit.errors import CheckpointError
from moefit.moe.families import ScaledCodes

_VALUES = values_in_bytes(FP4)
MX_GROUP, NV_GROUP = 32, 16
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
_SCALES = (*_EXPONENTS, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitFloats(HeldEncoding):
    """Pairs of E2M1 values with a scale per group.

    Attributes:
        group: Values that share a scale.
        transposed: Whether the model's matrix has input units in rows, unlike the stored one.
        divides: Whether the weight's scale divides the groups' scales instead of multiplying them.
        rounded: Dtype to which products are rounded before anything else.
    """

    group: int
    transposed: bool = False
    divides: bool = False
    rounded: torch.dtype = torch.float32

    @property
    def format(self) -> str:
        """The name that hardware vendors gave it."""
        return "nvfp4" if self.group == NV_GROUP else "mxfp4"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the values; blocks [..., groups, 16] are rows of 32 values each."""
        codes, scale = parts["weight"].shape, parts["scale"].shape
        if len(codes) == len(scale) + 1:
            codes = (*codes[:-2], codes[-2] * codes[-1])
        if len(codes) < 2:
            return tuple(codes)
        *stack, rows, half = codes
        return (*stack, 2 * half, rows) if self.transposed else (*stack, rows, 2 * half)

    def check(self, parts: Parts) -> None:
        """Check that there is one scale per group."""
        weight, scale = parts["weight"], parts["scale"]
        if weight.dtype not in (torch.uint8, torch.int8) or len(weight.shape) not in (2, 3):
            raise CheckpointError(f"{weight.name} {list(weight.shape)} does not hold pairs")
        if scale.dtype not in _SCALES:
            raise CheckpointError(f"{scale.name} has scales of {scale.dtype}")
        values = 2 * torch.Size(weight.shape).numel()
        rows, groups = (*scale.shape, 0, 0)[:2]
        if rows != weight.shape[0] or rows * groups * self.group != values:
            raise CheckpointError(
                f"{list(scale.shape)} scales do not divide {values:,} values into groups of "
                f"{self.group}"
            )

    def scaled_codes(self, parts: Parts) -> ScaledCodes | None:
        """Return MXFP4, whose values are exact in bfloat16; groups of NVFP4 are half as long."""
        if self.group != MX_GROUP or "global" in parts or parts["scale"].dtype not in _EXPONENTS:
            return None
        return ScaledCodes(self.format, "e2m1", "e8m0", MX_GROUP, transposed=self.transposed)

    def stored_codes(self, parts: Mapping[str, Tensor]) -> StoredCodes:
        """Return the bytes themselves."""
        codes_RB = parts["weight"].view(torch.uint8).flatten(1)
        scales_RG = parts["scale"].view(torch.uint8).view(len(codes_RB), -1)
        return StoredCodes(codes_RB=codes_RB, scales_RG=scales_RG, group=self.group)

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write `value * scale`."""
        scale = parts["scale"]
        codes_RB = parts["weight"].view(torch.uint8).flatten(1)
        scales_RG = scale_values(scale)
        if "global" in parts:
            factor = parts["global"].float().reshape(())
            if not bool(factor.isfinite()) or float(factor) == 0:
                raise CheckpointError(f"its global scale is {float(factor)}")
            scales_RG = scales_RG / factor if self.divides else scales_RG * factor
        matrix_RC = out.T if self.transposed else out
        shape = matrix_RC.shape[0], matrix_RC.shape[1]
        scale_into(
            matrix_RC,
            lambda rows: look_up(_VALUES, codes_RB[rows]),
            Grid.of_blocks(scales_RG, shape, (1, self.group)),
            self.rounded,
        )
