"""Unpack grouped integers in a GPU's registers: the Triton counterpart of `grouped_int.py`.

Computes the addresses of codes, scales and minima, and rounds numbers. Importing this module
requires Triton.

Shapes: N output units, G groups, I the 64 weights of a group.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

GROUP = tl.constexpr(64)
SLAB = tl.constexpr(16)
SCALED = tl.constexpr(64)  # kinds from here on are of quant/scaled/matrix.py,
K_QUANT = tl.constexpr(128)  # and from here on of quant/scaled/k_quants.py
FP8 = tl.constexpr(17)
FP8_GROUP = tl.constexpr(128)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def weights(codes, meta, n_N, is_N, g_G, groups, rows, BITS: tl.constexpr):
    """Return float32 weights of some groups of some rows, [N, G, I], zeros outside.

    `BITS` is a number of bits, or the kind of a checkpoint's codes.
    """
    if BITS >= SCALED:
        n_N11, g_1G1 = n_N[:, None, None], g_G[None, :, None]
        here_NG1 = is_N[:, None, None] & (g_G < groups)[None, :, None]
        i_11I = tl.arange(0, GROUP)[None, None, :]
        return _scaled(codes, meta, n_N11, g_1G1, i_11I, here_NG1, groups, rows, BITS)
    is_NG = is_N[:, None] & (g_G < groups)[None, :]
    i_I = tl.arange(0, GROUP)[None, None, :]
    n_N11, g_1G1 = n_N[:, None, None], g_G[None, :, None]
    code_NGI = _codes(codes, n_N11, g_1G1, i_I, is_NG[:, :, None], groups, rows, BITS)
    scale_NG, least_NG = _scale_and_min(meta, n_N[:, None], g_G[None, :], is_NG, groups, rows, BITS)
    return code_NGI.to(tl.float32) * scale_NG[:, :, None] + least_NG[:, :, None]


@triton.jit
def group(codes, meta, n_N, is_N, g, groups, rows, BITS: tl.constexpr):
    """Return one group of some rows: codes [N, I], scales and minima [N], zeros outside."""
    i_I = tl.arange(0, GROUP)[None, :]
    code_NI = _codes(codes, n_N[:, None], g, i_I, is_N[:, None], groups, rows, BITS)
    scale_N, least_N = _scale_and_min(meta, n_N, g, is_N, groups, rows, BITS)
    return code_NI.to(tl.float32), scale_N, least_N


@triton.jit
def fp8_weights(codes, meta, n, column, here, cols):
    """Return float32 weights of 8-bit floats, zeros outside; see quant/scaled/fp8.py."""
    code = tl.load(codes + n.to(tl.int64) * cols + column, mask=here, other=0).to(tl.int32)
    half = ((code & 128) << 8 | (code & 127) << 7).to(tl.int16).to(tl.float16, bitcast=True)
    place = n.to(tl.int64) * tl.cdiv(cols, FP8_GROUP) + column // FP8_GROUP
    return half.to(tl.float32) * tl.load(meta + place, mask=here, other=0)


@triton.jit
def scaled_group(codes, meta, n_N, is_N, g, groups, rows, KIND: tl.constexpr):
    """Return float32 weights [N, I] of one group of a checkpoint's codes, zeros outside."""
    i_1I = tl.arange(0, GROUP)[None, :]
    return _scaled(codes, meta, n_N[:, None], g, i_1I, is_N[:, None], groups, rows, KIND)


@triton.jit
def _scaled(codes, meta, n, g, i, here, groups, rows, KIND: tl.constexpr):
    """Return scale * (value of code - zero); see quant/scaled/matrix.py."""
    if KIND >= K_QUANT:
        return _k_quant(codes, meta, n, g, i, here, groups, rows, KIND % 8)
    CODES: tl.constexpr = KIND % 4
    SCALES: tl.constexpr = KIND // 4 % 4
    TWO: tl.constexpr = KIND // 16 % 2
    COUNT: tl.constexpr = 1 + TWO * (SCALES != 0)
    half = i // 32 * TWO
    code = _codes(codes, n, g, i, here, groups, rows, 8 if CODES == 2 else 4)
    if SCALES == 0:
        word = _part(meta, n, g, 0, here, groups, rows, KIND)
        exponent = (word >> (8 * half)) & 255
        scale = tl.maximum(exponent << 23, 1 << 22).to(tl.float32, bitcast=True)
    else:
        word = _part(meta, n, g, half, here, groups, rows, KIND)
        if SCALES == 1:
            scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            scale = (word << 16).to(tl.float32, bitcast=True)
    if CODES == 0:  # the magnitude's codes 5, 6 and 7 are 1, 2 and 5 more half steps
        size = code & 7
        size += (size > 4).to(tl.int32) + (size > 5).to(tl.int32) + 3 * (size > 6).to(tl.int32)
        value = tl.where(code > 7, -size, size).to(tl.float32) * 0.5
    elif KIND // 32 % 2 == 1:
        zero = (_part(meta, n, g, COUNT, here, groups, rows, KIND) >> (i // 32 * 8)) & 255
        value = (code - zero).to(tl.float32)
    else:
        value = (code - (128 if CODES == 2 else 8)).to(tl.float32)
    return value * scale


@triton.jit
def _k_quant(codes, meta, n, g, i, here, groups, rows, BITS: tl.constexpr):
    """Return d * scale * (code - zero) - m * minimum; see quant/scaled/k_quants.py."""
    MINIMA: tl.constexpr = 1 if BITS == 2 or BITS == 4 or BITS == 5 else 0
    code = _codes(codes, n, g, i, here, groups, rows, BITS)
    if BITS == 2 or BITS == 6:  # a byte for each part of 16
        pair = _word(meta, n, g, 1 + MINIMA + g % 4 * 2 + i // 32, here, groups, rows, BITS)
        number = pair >> (i // 16 % 2 * 8) & 255
        scale = number & 15 if BITS == 2 else (number ^ 128) - 128
        least = number >> 4
    else:  # four numbers of 6 bits for each group
        lower = _word(meta, n, g, 1 + MINIMA + g % 4, here, groups, rows, BITS)
        upper = _word(meta, n, g, 5 + MINIMA + g % 4 // 2, here, groups, rows, BITS)
        numbers = lower | (upper >> (g % 2 * 8) & 255) << 16
        PART: tl.constexpr = 16 if BITS == 3 else 32
        scale = numbers >> (i // PART * 6) & 63
        scale -= 32 if BITS == 3 else 0
        least = numbers >> (i // 32 * 6 + 12) & 63
    zero = 4 if BITS == 3 else 32 if BITS == 6 else 0
    d = _k_half(meta, n, g, 0, here, groups, rows, BITS)
    value = d * scale.to(tl.float32) * (code - zero).to(tl.float32)
    if MINIMA:
        value -= _k_half(meta, n, g, 1, here, groups, rows, BITS) * least.to(tl.float32)
    return value


@triton.jit
def _k_half(meta, n, g, number, here, groups, rows, BITS: tl.constexpr):
    word = _word(meta, n, g, number, here, groups, rows, BITS)
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _word(meta, n, g, word, here, groups, rows, BITS: tl.constexpr):
    """Return a word of the metadata of a group's block; a row has a word of all blocks first."""
    WORDS: tl.constexpr = 10 if BITS == 2 else 9 if BITS == 6 else 7 if BITS == 3 else 8
    blocks = groups // 4
    unit = tl.where(n < rows // SLAB * SLAB, g // 4 * WORDS + word, word * blocks + g // 4)
    found = tl.load(meta + _place(n, unit, WORDS * blocks, rows), mask=here, other=0)
    return found.to(tl.int32) & 0xFFFF


@triton.jit
def _part(meta, n, g, part, here, groups, rows, KIND: tl.constexpr):
    """Return 16 bits of a group's metadata; a row has a part of all groups before the next."""
    TWO: tl.constexpr = KIND // 16 % 2
    PARTS: tl.constexpr = 1 + TWO * (KIND // 4 % 4 != 0) + KIND // 32 % 2
    unit = tl.where(n < rows // SLAB * SLAB, g * PARTS + part, part * groups + g)
    word = tl.load(meta + _place(n, unit, PARTS * groups, rows), mask=here, other=0)
    return word.to(tl.int32) & 0xFFFF


@triton.jit
def _place(n, unit, number, rows):
    """Return the offset of unit `unit` of row n, with `number` units per row; slabs interleave."""
    n = n.to(tl.int64)
    in_slab = n // SLAB * SLAB * number + unit * SLAB + n % SLAB
    return tl.where(n < rows // SLAB * SLAB, in_slab, n * number + unit)


@triton.jit
def _scale_and_min(meta, n, g, here, groups, rows, BITS: tl.constexpr):
    if BITS == 8:
        scale = tl.load(meta + _place(n, g, groups, rows), mask=here, other=0).to(tl.float32)
        least = -128 * scale
    else:
        # In a slab a group's minima follow its scales; a row has all its scales first.
        slab = n < rows // SLAB * SLAB
        first, second = tl.where(slab, 2 * g, g), tl.where(slab, 2 * g + 1, groups + g)
        number = 2 * groups
        scale = tl.load(meta + _place(n, first, number, rows), mask=here, other=0).to(tl.float32)
        least = tl.load(meta + _place(n, second, number, rows), mask=here, other=0).to(tl.float32)
    return scale, least


@triton.jit
def _codes(codes, n, g, i, here, groups, rows, BITS: tl.constexpr):
    """Return codes of weights i of group g of row n; low bits are in the first plane."""
    if BITS == 8:
        code = _byte(codes, n, g, i, here, groups, rows, BITS)
    elif BITS == 2 or BITS == 4:
        code = _field(codes, n, g, 0, i, here, groups, rows, BITS, BITS)
    elif BITS == 3:
        code = _field(codes, n, g, 0, i, here, groups, rows, 2, BITS)
        code |= _field(codes, n, g, 16, i, here, groups, rows, 1, BITS) << 2
    elif BITS == 5:
        code = _field(codes, n, g, 0, i, here, groups, rows, 4, BITS)
        code |= _field(codes, n, g, 32, i, here, groups, rows, 1, BITS) << 4
    else:
        code = _field(codes, n, g, 0, i, here, groups, rows, 4, BITS)
        code |= _field(codes, n, g, 32, i, here, groups, rows, 2, BITS) << 4
    return code


@triton.jit
def _field(
    codes, n, g, first, i, here, groups, rows, WIDTH: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Return the bits of weights i in the plane that starts at byte `first` of a group."""
    byte, shift = first + i % (8 * WIDTH), i // (8 * WIDTH) * WIDTH
    return (_byte(codes, n, g, byte, here, groups, rows, BITS) >> shift) & ((1 << WIDTH) - 1)


@triton.jit
def _byte(codes, n, g, byte, here, groups, rows, BITS: tl.constexpr):
    """Return a byte of a group's codes; the units of a slab are words of 4 bytes."""
    word = _place(n, g * (2 * BITS) + byte // 4, groups * (2 * BITS), rows)
    return tl.load(codes + word * 4 + byte % 4, mask=here, other=0).to(tl.int32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Round float32 to nearest even in another dtype; the interpreter would truncate bfloat16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        word = x.to(tl.int32, bitcast=True)
        word += 0x7FFF + ((word >> 16) & 1)
        x = (word & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
