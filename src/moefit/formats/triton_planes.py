"""Bit planes taken apart in a GPU's registers: `planes.py` and `matrix.py` in Triton.

Owns where a weight's bits, its scale and its minimum are, and how numbers are rounded. Needs
Triton; knows nothing of products.

Shapes: N output units, G groups, I the 64 weights of a group.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

GROUP = tl.constexpr(64)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def weights(codes, meta, n_N, is_N, g_G, groups, BITS: tl.constexpr):
    """Float32 weights of some groups of some rows, [N, G, I], zeros outside."""
    is_NG = is_N[:, None] & (g_G < groups)[None, :]
    place_NG = n_N.to(tl.int64)[:, None] * groups + g_G[None, :]
    i_I = tl.arange(0, GROUP)[None, None, :]
    code_NGI = _codes((codes + place_NG * (BITS * 8))[:, :, None], i_I, is_NG[:, :, None], BITS)
    scale_NG, least_NG = _scale_and_least(meta, n_N[:, None], g_G[None, :], is_NG, groups, BITS)
    return code_NGI.to(tl.float32) * scale_NG[:, :, None] + least_NG[:, :, None]


@triton.jit
def group(codes, meta, n_N, is_N, g, groups, BITS: tl.constexpr):
    """One group of some rows: codes [N, I], scales and minima [N], zeros outside."""
    place_N = n_N.to(tl.int64) * groups + g
    i_I = tl.arange(0, GROUP)[None, :]
    code_NI = _codes((codes + place_N * (BITS * 8))[:, None], i_I, is_N[:, None], BITS)
    scale_N, least_N = _scale_and_least(meta, n_N, g, is_N, groups, BITS)
    return code_NI.to(tl.float32), scale_N, least_N


@triton.jit
def _scale_and_least(meta, n, g, here, groups, BITS: tl.constexpr):
    if BITS == 8:
        place = n.to(tl.int64) * groups + g
        scale = tl.load(meta + place, mask=here, other=0).to(tl.float32)
        least = -128 * scale
    else:
        place = n.to(tl.int64) * (2 * groups) + g
        scale = tl.load(meta + place, mask=here, other=0).to(tl.float32)
        least = tl.load(meta + place + groups, mask=here, other=0).to(tl.float32)
    return scale, least


@triton.jit
def _codes(start, i, here, BITS: tl.constexpr):
    """Codes of weights i of groups that begin at `start`; low bits lie in the first plane."""
    if BITS == 8:
        code = tl.load(start + i, mask=here, other=0).to(tl.int32)
    elif BITS == 2 or BITS == 4:
        code = _field(start, i, here, BITS)
    elif BITS == 3:
        code = _field(start, i, here, 2) | (_bit(start + 16, i, here) << 2)
    elif BITS == 5:
        code = _field(start, i, here, 4) | (_bit(start + 32, i, here) << 4)
    else:
        code = _field(start, i, here, 4) | (_field(start + 32, i, here, 2) << 4)
    return code


@triton.jit
def _field(start, i, here, WIDTH: tl.constexpr):
    byte, shift = i % (8 * WIDTH), i // (8 * WIDTH) * WIDTH
    return (tl.load(start + byte, mask=here, other=0).to(tl.int32) >> shift) & ((1 << WIDTH) - 1)


@triton.jit
def _bit(start, i, here):
    """Single bits stand in order: those of a group are one word."""
    word = tl.load(start.to(tl.pointer_type(tl.int64)), mask=here, other=0)
    return ((word >> i) & 1).to(tl.int32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Float32 in another dtype, to nearest even. The interpreter would cut bfloat16 off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        word = x.to(tl.int32, bitcast=True)
        word += 0x7FFF + ((word >> 16) & 1)
        x = (word & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
