"""Matrices in llama.cpp's k-quants, in the order in which kernels read them.

256 weights of a row, a block, share a float16 or two, and parts of 16 or 32 of them have small
integers as scale and minimum: weight = d * scale * (code - zero) - m * minimum. Codes lie as those
of grouped integers of as many bits, in slabs of 16 rows; metadata lies in the same slabs, with the
words of a block in the place of the values of a group, and takes the bits that it takes in a file
(csrc/scaled/k_quants.h). Nothing is rounded. Everything here is plain torch and is the reference
for the compiled kernels.

Shapes: R rows, C columns, N blocks of a row, B bytes, W words of metadata per block, P parts.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moefit.checkpoint.formats.encoding import StoredCodes
from moefit.checkpoint.gguf.blocks import KBlocks, k_blocks
from moefit.checkpoint.gguf.types import BY_NAME
from moefit.moe.families import ScaledCodes
from moefit.quant.cpu_kernels import kernels
from moefit.quant.grouped_int import GROUP, SLAB, EncodedRows, pack, rows_of, to_slabs, unpack

BLOCK = 256
_GROUPS = BLOCK // GROUP


@dataclass(frozen=True, slots=True)
class _Form:
    """What tells a k-quant from the others.

    Attributes:
        bits: Of a code.
        part: Weights that share a scale.
        minima: Whether parts have minima.
        byte_numbers: Whether a part's numbers take a byte; otherwise each takes 6 bits.
        zero: The code that stands for 0.
    """

    bits: int
    part: int
    minima: bool
    byte_numbers: bool
    zero: int = 0

    @property
    def words(self) -> int:
        """Words of metadata per block."""
        return 1 + self.minima + (8 if self.byte_numbers else 6)


_FORMS = {
    "q2_k": _Form(2, 16, minima=True, byte_numbers=True),
    "q3_k": _Form(3, 16, minima=False, byte_numbers=False, zero=4),
    "q4_k": _Form(4, 32, minima=True, byte_numbers=False),
    "q5_k": _Form(5, 32, minima=True, byte_numbers=False),
    "q6_k": _Form(6, 16, minima=False, byte_numbers=True, zero=32),
}


def k_quant_bytes(rows: int, cols: int, type: str) -> tuple[int, int]:
    """Return the bytes of a matrix's codes, and of its metadata; together those of its blocks.

    >>> sum(k_quant_bytes(16, 256, "q4_k")) * 8 / (16 * 256)
    4.5
    """
    form = _FORMS[type]
    return rows * cols * form.bits // 8, rows * (cols // BLOCK) * form.words * 2


@dataclass(frozen=True, slots=True)
class KQuantMatrix(EncodedRows):
    """A matrix of a k-quant.

    Codes and metadata are interleaved in slabs of 16 rows, so only slices of whole slabs are valid.

    Attributes:
        stored: The format; `codes` is the type's name.
        cols: C, a multiple of 256.
        codes_RB: Codes, uint8.
        meta_RMG: Words of metadata, int16 [R, W, N].
    """

    stored: ScaledCodes
    cols: int
    codes_RB: Tensor
    meta_RMG: Tensor

    @classmethod
    def of(cls, stored: ScaledCodes, cols: int, codes_B: Tensor, meta_B: Tensor) -> Self:
        """Return a matrix over flat memory of the sizes of `k_quant_bytes`."""
        form = _FORMS[stored.codes]
        codes_RB = codes_B.view(-1, cols * form.bits // 8)
        shape = len(codes_RB), form.words, cols // BLOCK
        return cls(stored, cols, codes_RB, meta_B.view(torch.int16).view(shape))

    @classmethod
    def empty(cls, rows: int, cols: int, stored: ScaledCodes) -> Self:
        """Return a matrix with uninitialised memory."""
        sizes = k_quant_bytes(rows, cols, stored.codes)
        return cls.of(stored, cols, *(torch.empty(size, dtype=torch.uint8) for size in sizes))

    @property
    def kind(self) -> int:
        """The number by which kernels know the format (csrc/scaled/k_quants.h)."""
        return 128 + _FORMS[self.stored.codes].bits

    def fill(self, first: int, stored: StoredCodes) -> None:
        """Fill rows of a matrix in host memory from `first` on, with whole blocks as codes."""
        blocks_RB = stored.codes_RB.contiguous()
        assert first + len(blocks_RB) <= self.rows
        assert blocks_RB.shape[1] * BLOCK == self.cols * BY_NAME[self.stored.codes].nbytes
        if (compiled := kernels()) is not None:
            compiled.fill(self, first, blocks_RB)
        else:
            fill_blocks(self, first, blocks_RB)

    def _dense(self) -> Tensor:
        form, blocks = _FORMS[self.stored.codes], self.rows * self.cols // BLOCK
        codes_RB, meta_RMG = rows_of(self.codes_RB, self.meta_RMG)
        words_nW = meta_RMG.transpose(1, 2).reshape(blocks, form.words)
        codes_NB = codes_RB.reshape(blocks * _GROUPS, -1)
        first = 1 + form.minima
        scales_nP, minima_nP = _numbers(form, words_nW[:, first:].int() & 0xFFFF)
        halves_nH = words_nW[:, :first].contiguous().view(torch.float16).float()
        found = KBlocks(
            codes_nV=unpack(codes_NB, form.bits).view(blocks, BLOCK),
            scales_nG=scales_nP,
            d_n1=halves_nH[:, :1],
            minima_nG=minima_nP,
            m_n1=halves_nH[:, 1:] if form.minima else None,
            zero=form.zero,
        )
        return found.values().view(self.rows, self.cols)


def fill_blocks(matrix: KQuantMatrix, first: int, blocks_RB: Tensor) -> None:
    """Fill rows of a matrix from the blocks of a file; the reference of the compiled kernel."""
    form, rows = _FORMS[matrix.stored.codes], len(blocks_RB)
    found = k_blocks(matrix.stored.codes, blocks_RB.view(rows * matrix.cols // BLOCK, -1))
    halves = [found.d_n1, found.m_n1] if found.m_n1 is not None else [found.d_n1]
    words_nW = torch.cat([torch.cat(halves, 1).half().view(torch.int16), _words(form, found)], 1)
    packed_RB = pack(found.codes_nV.view(-1, GROUP), form.bits).view(rows, -1)
    begin = first // SLAB * SLAB
    end = min(matrix.rows, -(-(first + rows) // SLAB) * SLAB)
    codes, meta = rows_of(matrix.codes_RB, matrix.meta_RMG, torch.arange(begin, end))
    codes[first - begin : first - begin + rows] = packed_RB
    meta[first - begin : first - begin + rows] = words_nW.view(rows, -1, form.words).mT
    to_slabs(codes, meta)
    matrix.codes_RB[begin:end], matrix.meta_RMG[begin:end] = codes, meta


def _words(form: _Form, found: KBlocks) -> Tensor:
    """Return the scales and minima of blocks as words, int16 [n, 8] or [n, 6]."""
    scales_nP, minima_nP = found.scales_nG.int(), found.minima_nG
    if form.byte_numbers:
        bytes_nP = scales_nP & 255 if minima_nP is None else scales_nP | minima_nP.int() << 4
        return bytes_nP.to(torch.uint8).view(torch.int16)
    if minima_nP is None:
        four_ng4 = (scales_nP + 32).view(-1, _GROUPS, 4)
    else:
        pairs = scales_nP.view(-1, _GROUPS, 2), minima_nP.int().view(-1, _GROUPS, 2)
        four_ng4 = torch.cat(pairs, dim=2)
    all_ng = (four_ng4 << torch.arange(0, 24, 6)).sum(2, dtype=torch.int32)
    upper_n4 = (all_ng >> 16).to(torch.uint8)
    return torch.cat([all_ng.to(torch.int16), upper_n4.view(torch.int16)], dim=1)


def _numbers(form: _Form, words_nW: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return scales and minima of the parts of blocks, int32 [n, P]; the inverse of `_words`."""
    device = words_nW.device
    if form.byte_numbers:
        bytes_nP = (words_nW[..., None] >> torch.tensor([0, 8], device=device) & 255).flatten(1)
        if form.minima:
            return bytes_nP & 15, bytes_nP >> 4
        return (bytes_nP ^ 128) - 128, None
    upper = words_nW[:, _GROUPS:, None] >> torch.tensor([0, 8], device=device) & 255
    all_ng = words_nW[:, :_GROUPS] | upper.flatten(1) << 16
    four_ng4 = all_ng[..., None] >> torch.arange(0, 24, 6, device=device) & 63
    if form.minima:
        return four_ng4[..., :2].flatten(1), four_ng4[..., 2:].flatten(1)
    return four_ng4.flatten(1) - 32, None
