"""Triton kernels: products with encoded matrices, which are decoded in registers.

`triton_planes.py` unpacks the weights. For one token, weights are decoded and multiplied in float32
and summed once at the end. For more tokens, weights are decoded to the tokens' dtype and passed to
the tensor cores group by group. The error of rounding to bfloat16 is smaller than that of the
format, except with 8 bits, where it is similar; so there the codes, which bfloat16 represents
exactly, are multiplied, and each group's sum is scaled. Importing this module requires Triton.

Shapes: T tokens, N output units, G groups, I the 64 weights of a group, C columns, F expert width.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportReturnType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from moefit.quant.gpu.triton_planes import (
    FP8,
    GROUP,
    INTERPRETED,
    SCALED,
    fp8_weights,
    group,
    rounded,
    scaled_group,
    weights,
)

FLOAT32, BFLOAT16, FLOAT16 = (
    tl.constexpr(0),
    tl.constexpr(1),
    tl.constexpr(16),
)  # kinds of native matrices
# Kind of matrices that differ by tile; native ones must have the tokens' dtype. Smaller numbers are
# the negative kind of a checkpoint's codes that are among them.
MIXED = tl.constexpr(-1)
FIELDS = tl.constexpr(8)  # of a tile: codes, meta, kind of both matrices; first routed row, rows


@triton.jit
def linear_kernel(
    x, codes, meta, y, tokens, rows, cols,
    KIND: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Compute y_NT = x_TC W^T in float32; one program per tile of rows and tokens."""
    n_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t_T = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    y_NT = _product(
        x, t_T, t_T < tokens, codes, meta, n_N, n_N < rows, cols, rows, KIND, TOKENS, ROWS, GROUPS
    )
    _store(y, y_NT, t_T, t_T < tokens, n_N, rows)


@triton.jit
def hidden_kernel(
    x, token_R, tiles, h, inner, cols, KIND: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Compute h_RF = act(gate) * up, or act(in), of routed rows; round where torch rounds.

    One program computes some hidden units of one tile, which is some rows of one expert.
    """
    tile = tiles + tl.program_id(0) * FIELDS
    n_N = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t_T = tl.arange(0, TOKENS)
    row_T, is_T = tl.load(tile + 6) + t_T, t_T < tl.load(tile + 7)
    token_T = tl.load(token_R + row_T, mask=is_T, other=0)
    codes, meta, kind = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    is_N = n_N < inner
    rows = 2 * inner if GATED else inner
    h_NT = _any_product(
        x, token_T, is_T, codes, meta, kind, n_N, is_N, cols, rows, KIND, TOKENS, ROWS, GROUPS
    )
    DTYPE: tl.constexpr = h.dtype.element_ty
    h_NT = _activated(rounded(h_NT, DTYPE).to(tl.float32), ACTIVATION)
    if GATED:
        up_NT = _any_product(
            x, token_T, is_T, codes, meta, kind, inner + n_N, is_N, cols, rows,
            KIND, TOKENS, ROWS, GROUPS,
        )  # fmt: skip
        h_NT = rounded(h_NT, DTYPE).to(tl.float32) * rounded(up_NT, DTYPE).to(tl.float32)
    _store(h, h_NT, row_T, is_T, n_N, inner)


@triton.jit
def down_kernel(
    h, tiles, y, rows, cols,
    KIND: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Compute y_RD = h_RF W^T with each routed row's expert, in float32."""
    tile = tiles + tl.program_id(0) * FIELDS
    n_N = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t_T = tl.arange(0, TOKENS)
    row_T, is_T = tl.load(tile + 6) + t_T, t_T < tl.load(tile + 7)
    codes, meta, kind = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    y_NT = _any_product(
        h, row_T, is_T, codes, meta, kind, n_N, n_N < rows, cols, rows, KIND, TOKENS, ROWS, GROUPS
    )
    _store(y, y_NT, row_T, is_T, n_N, rows)


@triton.jit
def decode_kernel(
    codes, meta, out, rows, cols, KIND: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Decode the weights [N, C] into the dtype of `out`."""
    n_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g_G = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    col_GI = g_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    place_NGI = n_N.to(tl.int64)[:, None, None] * cols + col_GI[None]
    is_NGI = (n_N < rows)[:, None, None] & (col_GI < cols)[None]
    if KIND == FP8:
        weight_NGI = fp8_weights(codes, meta, n_N[:, None, None], col_GI[None], is_NGI, cols)
    else:
        weight_NGI = weights(codes, meta, n_N, n_N < rows, g_G, tl.cdiv(cols, GROUP), rows, KIND)
    tl.store(out + place_NGI, rounded(weight_NGI, out.dtype.element_ty), mask=is_NGI)


@triton.constexpr_function
def _native(dtype):
    return FLOAT32 if dtype == tl.float32 else BFLOAT16 if dtype == tl.bfloat16 else FLOAT16


@triton.jit
def _store(y, y_NT, row_T, is_T, n_N, rows):
    place_NT = row_T.to(tl.int64)[None, :] * rows + n_N[:, None]
    is_NT = is_T[None, :] & (n_N < rows)[:, None]
    tl.store(y + place_NT, rounded(y_NT, y.dtype.element_ty), mask=is_NT)


@triton.jit
def _any_product(
    x, row_T, is_T, codes, meta, kind, n_N, is_N, cols, rows, KIND: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """`_product` with matrices given as addresses, of a constant or a per-tile kind."""
    if KIND >= 0:
        y_NT = _at(x, row_T, is_T, codes, meta, n_N, is_N, cols, rows, KIND, TOKENS, ROWS, GROUPS)
    else:
        y_NT = tl.zeros((ROWS, TOKENS), tl.float32)
        for bits in tl.static_range(2, 9):
            if bits != 7:
                if kind == bits:
                    y_NT = _at(
                        x,
                        row_T,
                        is_T,
                        codes,
                        meta,
                        n_N,
                        is_N,
                        cols,
                        rows,
                        bits,
                        TOKENS,
                        ROWS,
                        GROUPS,
                    )
        if KIND < MIXED:
            if kind == -KIND:
                y_NT = _at(
                    x, row_T, is_T, codes, meta, n_N, is_N, cols, rows, -KIND, TOKENS, ROWS, GROUPS
                )
        NATIVE: tl.constexpr = _native(x.dtype.element_ty)
        if kind == NATIVE:
            y_NT = _at(
                x, row_T, is_T, codes, meta, n_N, is_N, cols, rows, NATIVE, TOKENS, ROWS, GROUPS
            )
    return y_NT


@triton.jit
def _at(
    x, row_T, is_T, codes, meta, n_N, is_N, cols, rows, KIND: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    if KIND == FLOAT32:
        codes = codes.to(tl.pointer_type(tl.float32))
    elif KIND == BFLOAT16:
        codes = codes.to(tl.pointer_type(tl.bfloat16))
    elif KIND == FLOAT16:
        codes = codes.to(tl.pointer_type(tl.float16))
    else:
        codes = codes.to(tl.pointer_type(tl.uint8))
    codes = tl.multiple_of(codes, 16)
    if KIND == FP8:
        meta = meta.to(tl.pointer_type(tl.float32))
    elif KIND >= SCALED:
        meta = meta.to(tl.pointer_type(tl.int16))
    else:
        meta = meta.to(tl.pointer_type(tl.float16))
    meta = tl.multiple_of(meta, 16)
    return _product(x, row_T, is_T, codes, meta, n_N, is_N, cols, rows, KIND, TOKENS, ROWS, GROUPS)


@triton.jit
def _product(
    x, row_T, is_T, codes, meta, n_N, is_N, cols, rows, KIND: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Return W x_TC^T for a tile of rows and tokens, [ROWS, TOKENS] float32; 0 outside."""
    if TOKENS == 1:
        y_NT = _one_token(
            x + tl.sum(row_T) * cols, codes, meta, n_N, is_N, cols, rows, KIND, ROWS, GROUPS
        )
    else:
        y_NT = tl.zeros((ROWS, TOKENS), tl.float32)
        groups = tl.cdiv(cols, GROUP)
        x_1T = x + (row_T.to(tl.int64) * cols)[None, :]
        for g in range(0, groups):
            col_I = g * GROUP + tl.arange(0, GROUP)
            x_IT = tl.load(
                x_1T + col_I[:, None], mask=is_T[None, :] & (col_I < cols)[:, None], other=0
            )
            if KIND == FLOAT32 or KIND == BFLOAT16 or KIND == FLOAT16:
                place_NI = n_N.to(tl.int64)[:, None] * cols + col_I[None, :]
                is_NI = is_N[:, None] & (col_I < cols)[None, :]
                y_NT = _dot(tl.load(codes + place_NI, mask=is_NI, other=0), x_IT, y_NT)
            elif KIND == FP8:
                is_NI = is_N[:, None] & (col_I < cols)[None, :]
                weight_NI = fp8_weights(codes, meta, n_N[:, None], col_I[None, :], is_NI, cols)
                y_NT = _dot(rounded(weight_NI, x_IT.dtype), x_IT, y_NT)
            elif KIND >= SCALED:
                weight_NI = scaled_group(codes, meta, n_N, is_N, g, groups, rows, KIND)
                y_NT = _dot(rounded(weight_NI, x_IT.dtype), x_IT, y_NT)
            else:
                code_NI, scale_N, least_N = group(codes, meta, n_N, is_N, g, groups, rows, KIND)
                if KIND == 8:
                    sum_NT = _dot(rounded(code_NI - 128, x_IT.dtype), x_IT, None)
                    y_NT += sum_NT * scale_N[:, None]
                else:
                    weight_NI = code_NI * scale_N[:, None] + least_N[:, None]
                    y_NT = _dot(rounded(weight_NI, x_IT.dtype), x_IT, y_NT)
    return y_NT


@triton.jit
def _one_token(
    x, codes, meta, n_N, is_N, cols, rows,
    KIND: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(cols, GROUP)
    sum_NGI = tl.zeros((ROWS, GROUPS, GROUP), tl.float32)
    for first in range(0, groups, GROUPS):
        g_G = first + tl.arange(0, GROUPS)
        col_GI = g_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x_GI = tl.load(x + col_GI, mask=col_GI < cols, other=0).to(tl.float32)
        if KIND == FLOAT32 or KIND == BFLOAT16 or KIND == FLOAT16:
            place_NGI = n_N.to(tl.int64)[:, None, None] * cols + col_GI[None]
            is_NGI = is_N[:, None, None] & (col_GI < cols)[None]
            weight_NGI = tl.load(codes + place_NGI, mask=is_NGI, other=0).to(tl.float32)
        elif KIND == FP8:
            is_NGI = is_N[:, None, None] & (col_GI < cols)[None]
            weight_NGI = fp8_weights(codes, meta, n_N[:, None, None], col_GI[None], is_NGI, cols)
        else:
            weight_NGI = weights(codes, meta, n_N, is_N, g_G, groups, rows, KIND)
        sum_NGI += weight_NGI * x_GI[None]
    return tl.sum(tl.sum(sum_NGI, 2), 1)[:, None]


@triton.jit
def _dot(w_NI, x_IT, sum_NT):
    """Return W x + sum in float32; different dtypes, and the interpreter, use float32 inputs."""
    if INTERPRETED or x_IT.dtype != w_NI.dtype:
        x_IT, w_NI = x_IT.to(tl.float32), w_NI.to(tl.float32)
    return tl.dot(w_NI, x_IT, sum_NT, input_precision="ieee")


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """Apply an activation of `moe/layouts.py`; NaN is preserved."""
    if ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(z) = 2 / (1 + exp(-2z))
        x = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu2":
        x = tl.where(x < 0, 0.0, x * x)
    return x
