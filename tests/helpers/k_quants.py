"""Random blocks of llama.cpp's k-quants, and matrices of them."""

import torch
from torch import Tensor

from moefit.checkpoint.formats.encoding import StoredCodes
from moefit.checkpoint.gguf.blocks import KBlocks, k_blocks
from moefit.checkpoint.gguf.types import BY_NAME
from moefit.moe.families import ScaledCodes
from moefit.quant.scaled.k_quants import KQuantMatrix

BITS_A_WEIGHT = {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
# Where d and m are, m / d for weights around 0, and about how large weights are, over d.
_FACTORS = {
    "q2_k": (80, 82, 1.5, 9),
    "q3_k": (108, None, 0, 37),
    "q4_k": (0, 2, 7.5, 230),
    "q5_k": (0, 2, 15.5, 470),
    "q6_k": (208, None, 0, 1400),
}


def held_as(type: str) -> ScaledCodes:
    return ScaledCodes(type, type, "float16", 256)


def random_blocks(type: str, rows: int, cols: int, *, seed: int = 0, size: float = 0.02) -> Tensor:
    """Return bytes of rows of blocks; weights are around 0 and about as large as `size`."""
    random = torch.Generator().manual_seed(seed)
    d_at, m_at, ratio, spread = _FACTORS[type]
    shape = rows * cols // 256, BY_NAME[type].nbytes
    blocks = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    d_n1 = (0.5 + torch.rand(len(blocks), 1, generator=random)) * size / spread
    blocks[:, d_at : d_at + 2] = d_n1.half().view(torch.uint8)
    if m_at is not None:
        blocks[:, m_at : m_at + 2] = (ratio * d_n1).half().view(torch.uint8)
    return blocks.view(rows, -1)


def of_blocks(type: str, blocks_RB: Tensor) -> KQuantMatrix:
    rows, cols = len(blocks_RB), blocks_RB.shape[1] // BY_NAME[type].nbytes * 256
    matrix = KQuantMatrix.empty(rows, cols, held_as(type))
    matrix.fill(0, codes_of(blocks_RB))
    return matrix


def codes_of(blocks_RB: Tensor) -> StoredCodes:
    empty_RG = torch.empty(len(blocks_RB), 0, dtype=torch.float16)
    return StoredCodes(codes_RB=blocks_RB, scales_RG=empty_RG, group=256)


def k_matrix(type: str, rows: int, cols: int, *, seed: int = 0) -> KQuantMatrix:
    return of_blocks(type, random_blocks(type, rows, cols, seed=seed))


def parts_of(type: str, blocks_RB: Tensor) -> KBlocks:
    return k_blocks(type, blocks_RB.reshape(-1, BY_NAME[type].nbytes))
