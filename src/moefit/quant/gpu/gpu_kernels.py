"""Call the Triton kernels: the counterpart of `cpu_kernels.py` for tensors on a GPU.

A linear layer is one launch; the experts of a block are two, for any mixture of formats, which a
table of addresses describes. Importing this module requires Triton, so only `backend.py` does, when
a GPU is used. In Triton's interpreter (TRITON_INTERPRET=1) it runs on the CPU.

Shapes: T tokens, D model width, F expert width, I input units, O output units, R routed rows.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import cdiv

from moefit.moe.routing import plain_weighted_sum
from moefit.quant.cpu_kernels import (
    NATIVE_DTYPES,
    KernelMatrix,
    KernelMlp,
    Weight,
    join_tokens,
)
from moefit.quant.gpu.triton_kernels import (
    MIXED,
    decode_kernel,
    down_kernel,
    hidden_kernel,
    linear_kernel,
)
from moefit.quant.gpu.triton_planes import FP8, SCALED
from moefit.quant.grouped_int import EncodedRows, groups_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens in a tile: output units in it. Tensor cores need 16 tokens or more; one token uses none.
_TILES = {1: 16, 16: 32, 64: 64}
_SHARE = 8  # One in so many tokens is expected per expert. Tiles are chosen by the number of all
# tokens, so that an expert's outputs do not depend on which others are in the same call.
_OPTIONS = {"enable_fp_fusion": True}
_GROUPS = 4  # read at a time by a program with one token: whole cache lines at 4 bits


class TritonKernels:
    """Triton kernels, run on the GPU of their inputs; see `Backend`."""

    level = "triton"

    def linear(
        self,
        x_TI: Tensor,
        weight: Weight | KernelMatrix,
        dtype: torch.dtype = torch.float32,
        bias_O: Tensor | None = None,
    ) -> Tensor:
        """Return x W^T + bias, [T, O] in `dtype`; the bias is float32 and added before rounding."""
        weight = weight.weight if isinstance(weight, KernelMatrix) else weight
        x_TI = _contiguous(x_TI)
        (rows, cols), tokens = _shape(weight), len(x_TI)
        assert x_TI.shape[1] == cols
        y_TO = x_TI.new_empty(tokens, rows, dtype=torch.float32)
        if y_TO.numel():
            tile = _tile(tokens, x_TI.dtype)
            grid = cdiv(rows, _TILES[tile]), cdiv(tokens, tile)
            codes, meta, kind = _parts(weight)
            with torch.cuda.device_of(x_TI):
                linear_kernel[grid](
                    x_TI, codes, meta, y_TO, tokens, rows, cols,
                    KIND=kind, TOKENS=tile, ROWS=_TILES[tile], GROUPS=_GROUPS, **_OPTIONS,
                )  # fmt: skip
        return (y_TO if bias_O is None else y_TO.add_(bias_O)).to(dtype)

    def decode(self, matrix: EncodedRows, dtype: torch.dtype) -> Tensor:
        """Return the weights [O, I]."""
        codes_RB, meta_RMG, kind = _parts(matrix)
        out_OI = torch.empty(matrix.rows, matrix.cols, dtype=dtype, device=codes_RB.device)
        if out_OI.numel():
            grid = cdiv(matrix.rows, _TILES[1]), cdiv(groups_of(matrix.cols), _GROUPS)
            with torch.cuda.device_of(out_OI):
                decode_kernel[grid](
                    codes_RB, meta_RMG, out_OI, *out_OI.shape,
                    KIND=kind, ROWS=_TILES[1], GROUPS=_GROUPS, **_OPTIONS,
                )  # fmt: skip
        return out_OI

    def experts(
        self, x_TD: Tensor, mlps: Sequence[KernelMlp], tokens: Sequence[Sequence[int] | Tensor]
    ) -> Tensor:
        """Compute each expert for its tokens; return unweighted float32 y_RD, expert by expert.

        Hidden units are rounded to the tokens' dtype where torch would round them.
        """
        x_TD = _contiguous(x_TD)
        assert all(x_TD.shape[1] == mlp.argument.w_in.cols for mlp in mlps)
        counts = [len(mine) for mine in tokens]
        y_RD = x_TD.new_empty(sum(counts), x_TD.shape[1], dtype=torch.float32)
        if not y_RD.numel():
            return y_RD
        tile = 1 if len(x_TD) == 1 else _tile(max(16, len(x_TD) // _SHARE), x_TD.dtype)
        table = _table(mlps, counts, tile)
        native = {kind for row in table for kind in (row[2], row[5])} & {*NATIVE_DTYPES.values()}
        assert native <= {NATIVE_DTYPES[x_TD.dtype]}, (
            "native weights must have the tokens' dtype, as in torch"
        )
        tiles, token_R = (
            _on(torch.tensor(table), x_TD.device),
            _on(join_tokens(tokens), x_TD.device),
        )
        one, inner = mlps[0], mlps[0].argument.w_out.cols
        h_RF = x_TD.new_empty(len(y_RD), inner)
        shape = {"TOKENS": tile, "ROWS": _TILES[tile], "GROUPS": _GROUPS, **_OPTIONS}
        with torch.cuda.device_of(x_TD):
            hidden_kernel[len(table), cdiv(inner, _TILES[tile])](
                x_TD, token_R, tiles, h_RF, inner, x_TD.shape[1],
                KIND=_kind({row[2] for row in table}),
                ACTIVATION=one.activation, GATED=one.gated, **shape,
            )  # fmt: skip
            down_kernel[len(table), cdiv(y_RD.shape[1], _TILES[tile])](
                h_RF, tiles, y_RD, y_RD.shape[1], inner,
                KIND=_kind({row[5] for row in table}), **shape,
            )  # fmt: skip
        return y_RD

    def one_token(
        self, x_1D: Tensor, mlps: Sequence[KernelMlp], rows: Sequence[int], y_KD: Tensor
    ) -> None:
        """Write each expert's unweighted output for one token to its row of float32 y_KD."""
        made_ND = self.experts(x_1D, mlps, [(0,)] * len(mlps))
        y_KD[_on(torch.tensor(rows), y_KD.device)] = made_ND

    def token(
        self, x_1D: Tensor, mlps: Sequence[KernelMlp], weights_1K: Tensor, *, energy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return one token's weighted sum of experts: `one_token`, then `weighted_sum`."""
        y_KD = self.experts(x_1D, mlps, [(0,)] * len(mlps))
        return self.weighted_sum(y_KD, weights_1K, x_1D.dtype, energy=energy)

    def weighted_sum(
        self, y_RD: Tensor, weights_TK: Tensor, dtype: torch.dtype, *, energy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the weighted sum of outputs; see `plain_weighted_sum`."""
        return plain_weighted_sum(y_RD, weights_TK, dtype, energy=energy)


def _table(mlps: Sequence[KernelMlp], counts: Sequence[int], tile: int) -> list[tuple[int, ...]]:
    """Return a row per tile: both matrices (codes, scales, kind), first routed row, row count."""
    table, begin = [], 0
    for mlp, count in zip(mlps, counts, strict=True):
        into, out = mlp.argument.w_in, mlp.argument.w_out
        addresses = into.codes, into.meta or 0, into.kind, out.codes, out.meta or 0, out.kind
        table += [(*addresses, begin + at, min(tile, count - at)) for at in range(0, count, tile)]
        begin += count
    return table


def _kind(kinds: set[int]) -> int:
    if len(kinds) == 1:
        return kinds.pop()
    scaled = [kind for kind in kinds if kind == FP8.value or kind >= SCALED.value]
    assert len(scaled) <= 1, "the experts of a block are stored alike"
    return -scaled[0] if scaled else MIXED.value


def _tile(tokens: int, dtype: torch.dtype) -> int:
    """Return the smallest tile for this many tokens, or the largest; float32 has small tiles."""
    largest = 16 if dtype == torch.float32 else max(_TILES)
    return min(largest, next((tile for tile in _TILES if tokens <= tile), largest))


def _on(host: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device, copied asynchronously if it is not there yet."""
    if host.device == device or device.type != "cuda":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def _contiguous(x_TI: Tensor) -> Tensor:
    return (x_TI if x_TI.dtype in _DTYPES else x_TI.float()).contiguous()


def _shape(weight: Weight) -> tuple[int, int]:
    if not isinstance(weight, Tensor):
        return weight.rows, weight.cols
    rows, cols = weight.shape
    return rows, cols


def _parts(weight: Weight) -> tuple[Tensor, Tensor, int]:
    """Return codes, scales and kind; a native matrix is passed as both codes and scales."""
    if not isinstance(weight, Tensor):
        return weight.codes_RB, weight.meta_RMG, weight.kind
    return weight, weight, NATIVE_DTYPES[weight.dtype]
