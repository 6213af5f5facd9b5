"""Values of GGUF's blocks, in float32: each type's layout, with the operations of llama.cpp.

The layouts are those of `ggml-quants.c`; values equal `gguf.quants.dequantize` bit for bit. Types
of 1 to 3 bits that are looked up in grids are left to that package, which has the grids.

Shapes: n blocks of B bytes, V values per block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moefit.checkpoint.gguf.types import BY_NAME
from moefit.errors import CheckpointError, ConfigError

_IQ4 = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
).float()
_MXFP4 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]).float()
_MASKS = {1: 0x01010101, 2: 0x03030303, 4: 0x0F0F0F0F}  # of the lowest codes of four bytes
# Eight bytes by byte: each of its bits, times 16.
_SIXTEENS = (
    (torch.arange(256, dtype=torch.int32)[:, None] >> torch.arange(8, dtype=torch.int32) & 1)
    .to(torch.uint8)
    .mul(16)
    .view(torch.int64)
    .view(-1)
)
Decode = Callable[[Tensor], Tensor]
_Parts = tuple[Tensor, Tensor, Tensor | None]
"""Codes [n, 256], and integers [n, G]: scales, and minima if there are any."""


def decode_blocks(type: str, blocks_nB: Tensor) -> Tensor:
    """Return the values [n, V] of blocks, in float32.

    Args:
        type: The type's name, such as `q4_k`.
        blocks_nB: The bytes of whole blocks, uint8.

    Raises:
        CheckpointError: A scale is not finite. The message needs no name.
        ConfigError: The type needs the package `gguf`, which is not installed.
    """
    decode = _DECODERS.get(type)
    return _of_package(type, blocks_nB) if decode is None else decode(blocks_nB)


def require_package(type: str) -> None:
    """Raise ConfigError if a type's values need the package `gguf` and it is not installed."""
    if type not in _DECODERS:
        _package(type)


def _package(type: str) -> Any:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            f"weights of type {type} are decoded by the package gguf, which is not installed; run "
            "pip install 'moefit[gguf]'"
        ) from error


def _of_package(type: str, blocks_nB: Tensor) -> Tensor:
    package = _package(type)
    number = package.GGMLQuantizationType[type.upper()]
    values = torch.from_numpy(package.quants.dequantize(blocks_nB.numpy(), number))
    return _finite(values).view(len(blocks_nB), BY_NAME[type].values)


def _planes(bytes_ngw: Tensor, bits: int) -> Tensor:
    """Return the codes [n, g, 8 / bits, w] in groups of w bytes: all lowest ones come first.

    Four bytes are shifted at a time, as an int32; w is a multiple of 4.
    """
    # A copy: what is contiguous because it is one block may have any stride.
    words = torch.empty(bytes_ngw.shape, dtype=torch.uint8).copy_(bytes_ngw).view(torch.int32)
    n, g, w = words.shape
    planes = torch.empty(n, g, 8 // bits, w, dtype=torch.int32)
    for number in range(8 // bits):
        torch.bitwise_right_shift(words, number * bits, out=planes[:, :, number])
    return planes.bitwise_and_(_MASKS[bits]).view(torch.uint8)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Return `table[codes]`, for which torch has a quicker function."""
    return table.index_select(0, codes.reshape(-1).int()).view(*codes.shape, -1).squeeze(-1)


def _finite(scales: Tensor) -> Tensor:
    if not bool(scales.isfinite().all()):
        raise CheckpointError("it has scales that are not finite")
    return scales


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at a byte of each block as float32 [n, 1]."""
    return _finite(blocks[:, at : at + 2].contiguous().view(torch.float16).float())


def _nibbles(blocks: Tensor, at: int) -> Tensor:
    """Return the 32 codes of 4 bits that begin at a byte."""
    return _planes(blocks[:, None, at : at + 16], 4).view(-1, 32)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Return 32 bits, value i's being bit i, times 16."""
    return _look_up(_SIXTEENS, blocks[:, at : at + 4]).view(torch.uint8)


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks, 2).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks, 4).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks, 6) | _fifth_bits(blocks, 2)
    return codes.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks, 8) | _fifth_bits(blocks, 4)
    return codes.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(_half(blocks, 0))


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _look_up(_IQ4, _nibbles(blocks, 2)).mul_(_half(blocks, 0))


def _mxfp4(blocks: Tensor) -> Tensor:
    exponents = blocks[:, :1].int()
    if bool((exponents == 255).any()):
        raise CheckpointError("it has scales that are not finite")
    # Values are stored doubled, and so is the power of two that halves them: 2^(e - 128).
    bits = torch.where(exponents < 2, 0x00200000 << exponents, (exponents - 1) << 23)
    return _look_up(_MXFP4, _nibbles(blocks, 1)).mul_(bits.view(torch.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class KBlocks:
    """Blocks of a k-quant by what they consist of: d * scale * (code - zero) - m * minimum.

    Attributes:
        codes_nV: Codes, uint8.
        scales_nG: Integers, each of which belongs to 256 / G codes.
        d_n1: What scales are multiplied by, in float32.
        minima_nG: Integers; None if the type has none.
        m_n1: What minima are multiplied by.
        zero: The code that stands for 0.
    """

    codes_nV: Tensor
    scales_nG: Tensor
    d_n1: Tensor
    minima_nG: Tensor | None = None
    m_n1: Tensor | None = None
    zero: int = 0

    def values(self) -> Tensor:
        """Return the values, in float32."""
        minima_nG = None
        if self.minima_nG is not None and self.m_n1 is not None:
            minima_nG = self.m_n1 * self.minima_nG.float()
        codes_nV = self.codes_nV.float()
        if self.zero:
            codes_nV.sub_(self.zero)
        return _scaled(self.d_n1 * self.scales_nG.float(), codes_nV, minima_nG)


def k_factors(type: str, blocks_nB: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return d and m of the blocks of a k-quant, in float32 [n, 1]. Raises as `k_blocks` does."""
    form = _K_QUANTS[type]
    return _half(blocks_nB, form.d), None if form.m is None else _half(blocks_nB, form.m)


def k_blocks(type: str, blocks_nB: Tensor) -> KBlocks:
    """Return what the blocks of a k-quant consist of.

    Args:
        type: One of `K_QUANTS`.
        blocks_nB: The bytes of whole blocks, uint8.

    Raises:
        CheckpointError: d or m is not finite. The message needs no name.
    """
    (d_n1, m_n1), form = k_factors(type, blocks_nB), _K_QUANTS[type]
    codes_nV, scales_nG, minima_nG = form.parts(blocks_nB)
    return KBlocks(
        codes_nV=codes_nV,
        scales_nG=scales_nG,
        d_n1=d_n1,
        minima_nG=minima_nG,
        m_n1=m_n1,
        zero=form.zero,
    )


def _scaled(scales_nG: Tensor, codes: Tensor, minima_nG: Tensor | None = None) -> Tensor:
    """Return `scale * code - minimum` [n, 256]; each of G scales belongs to 256 / G codes."""
    values = codes.reshape(*scales_nG.shape, -1).float().mul_(scales_nG[..., None])
    if minima_nG is not None:
        values.sub_(minima_nG[..., None])
    return values.view(len(scales_nG), 256)


def _q2_k(blocks: Tensor) -> _Parts:
    codes, numbers = _planes(blocks[:, 16:80].view(-1, 2, 32), 2), blocks[:, :16]
    return codes.view(-1, 256), numbers & 15, numbers >> 4


def _q3_k(blocks: Tensor) -> _Parts:
    low = _planes(blocks[:, None, 96:104], 4).view(-1, 16)
    high = _planes(blocks[:, None, 104:108], 2).view(-1, 16)
    codes = _planes(blocks[:, 32:96].view(-1, 2, 32), 2).view(-1, 256)
    third_bits = _planes(blocks[:, None, :32], 1).view(-1, 256)
    return codes | (third_bits << 2), (low | (high << 4)).to(torch.int8).sub_(32), None


def _q4_k(blocks: Tensor) -> _Parts:
    return _planes(blocks[:, 16:144].view(-1, 4, 32), 4).view(-1, 256), *_six_bits(blocks)


def _q5_k(blocks: Tensor) -> _Parts:
    high = _planes(blocks[:, None, 16:48], 1).view(-1, 256)
    low = _planes(blocks[:, 48:176].view(-1, 4, 32), 4).view(-1, 256)
    return low | (high << 4), *_six_bits(blocks)


def _six_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and minima [n, 8] of Q4_K and Q5_K, of 6 bits each in 12 bytes."""
    low, minimum, mixed = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat([low & 63, (mixed & 15) | ((low >> 2) & 48)], dim=1)
    return scales, torch.cat([minimum & 63, (mixed >> 4) | ((minimum >> 2) & 48)], dim=1)


def _q6_k(blocks: Tensor) -> _Parts:
    low = _planes(blocks[:, :128].view(-1, 2, 64), 4).view(-1, 256)
    high = _planes(blocks[:, 128:192].view(-1, 2, 32), 2).view(-1, 256)
    return low | (high << 4), blocks[:, 192:208].contiguous().view(torch.int8), None


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=-1).view(-1, 8)
    high = torch.stack([(blocks[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
    scales = (low | (high.view(-1, 8) << 4)).float().sub_(32).mul_(_half(blocks, 0))
    codes = _planes(blocks[:, 8:136].view(-1, 8, 16), 4)
    return _scaled(scales, _look_up(_IQ4, codes))


@dataclass(frozen=True, slots=True)
class _KQuant:
    """Where a block has d and m, the code that stands for 0, and how the rest is found."""

    d: int
    m: int | None
    zero: int
    parts: Callable[[Tensor], _Parts]


_K_QUANTS = {
    "q2_k": _KQuant(80, 82, 0, _q2_k),
    "q3_k": _KQuant(108, None, 4, _q3_k),
    "q4_k": _KQuant(0, 2, 0, _q4_k),
    "q5_k": _KQuant(0, 2, 0, _q5_k),
    "q6_k": _KQuant(208, None, 32, _q6_k),
}
K_QUANTS = tuple(_K_QUANTS)


def _k_decoder(type: str) -> Decode:
    return lambda blocks: k_blocks(type, blocks).values()


_DECODERS: dict[str, Decode] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    **{type: _k_decoder(type) for type in K_QUANTS},
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "mxfp4": _mxfp4,
}
OWN = tuple(_DECODERS)
"""Types that are decoded without the package `gguf`."""
