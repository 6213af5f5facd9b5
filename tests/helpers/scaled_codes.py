"""Random codes and scales as checkpoints store them, with the values that they stand for."""

import torch
from torch import Tensor

from moefit.checkpoint.formats.encoding import StoredCodes
from moefit.moe.families import ScaledCodes
from moefit.quant.scaled.fill import fill
from moefit.quant.scaled.fp8 import Fp8Matrix
from moefit.quant.scaled.matrix import ScaledMatrix

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# Format and columns that share a scale: longer groups repeat it, in memory as well.
CASES: dict[str, tuple[ScaledCodes, int]] = {
    "mxfp4": (ScaledCodes("mxfp4", "e2m1", "e8m0", 32), 32),
    "int4-32": (ScaledCodes("int4", "int4", "float16", 32), 32),
    "int4-96": (ScaledCodes("int4", "int4", "bfloat16", 32), 96),
    "int4-128-zeros": (ScaledCodes("int4", "int4", "float16", 64, zeros=True), 128),
    "int4-32-zeros": (ScaledCodes("int4", "int4", "bfloat16", 32, zeros=True), 32),
    "int8-32": (ScaledCodes("int8", "int8", "float16", 32), 32),
    "int8-64-zeros": (ScaledCodes("int8", "int8", "bfloat16", 64, zeros=True), 64),
}
SHAPES = ((1, 96), (17, 128), (35, 384))


def random_codes(name: str, rows: int, cols: int, *, seed: int = 0) -> StoredCodes:
    """Return codes and scales of one of `CASES`; the last group may be shorter."""
    kind, group = CASES[name]
    random = torch.Generator().manual_seed(seed)
    width = cols if kind.codes == "int8" else cols // 2
    shape = rows, -(-cols // group)
    if kind.scales == "e8m0":
        scales = torch.randint(118, 128, shape, generator=random, dtype=torch.uint8)
    else:
        scales = (torch.randn(shape, generator=random) / 50).to(getattr(torch, kind.scales))
    most = 256 if kind.codes == "int8" else 16
    zeros = torch.randint(0, most, shape, generator=random, dtype=torch.uint8)
    return StoredCodes(
        codes_RB=torch.randint(0, 256, (rows, width), generator=random, dtype=torch.uint8),
        scales_RG=scales,
        group=group,
        zeros_RG=zeros if kind.zeros else None,
        signed=kind.codes == "int8" and not kind.zeros,
    )


def values(name: str, stored: StoredCodes) -> Tensor:
    """Return the values [R, C] by the plain formula, in float32."""
    kind, codes = CASES[name][0], stored.codes_RB
    if kind.codes != "int8":
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    column = torch.arange(codes.shape[1]) // stored.group
    if kind.codes == "e2m1":
        return E2M1[codes.int()] * (stored.scales_RG.float() - 127).exp2()[:, column]
    if stored.zeros_RG is not None:
        code = codes.float() - stored.zeros_RG.float()[:, column]
    else:
        code = codes.view(torch.int8).float() if stored.signed else codes.float() - 8
    return code * stored.scales_RG.float()[:, column]


def scaled(name: str, rows: int, cols: int, *, seed: int = 0) -> ScaledMatrix:
    """Return a random matrix of one of `CASES`."""
    matrix = ScaledMatrix.empty(rows, cols, CASES[name][0])
    fill(matrix, 0, random_codes(name, rows, cols, seed=seed))
    return matrix


def fp8_codes(rows: int, cols: int, group: int = 128, *, seed: int = 0) -> StoredCodes:
    """Codes with all kinds of values, subnormal ones and both zeros too."""
    random = torch.Generator().manual_seed(seed)
    spread_RC = 4.0 ** torch.randn(rows, cols, generator=random)
    codes_RC = torch.randn(rows, cols, generator=random) * spread_RC
    scales_RG = torch.randn(rows, -(-cols // group), generator=random) / 50
    return StoredCodes(
        codes_RB=codes_RC.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8),
        scales_RG=scales_RG,
        group=group,
    )


def matrix_of(rows: int, cols: int, group: int = 128, *, seed: int = 0) -> Fp8Matrix:
    made = Fp8Matrix.empty(rows, cols)
    made.fill(0, fp8_codes(rows, cols, group, seed=seed))
    return made
