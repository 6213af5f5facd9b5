"""The compiled kernels: found, checked and called.

Owns the border to `csrc/`: pointers go in, nothing is kept. Where the library was not built (no
compiler at installation) `kernels()` is None and everything runs in torch, as the plain way in
`matrix.py` does. Knows nothing of models or slots.

Shapes: T tokens, D model width, F expert width, I input units, O output units, K chosen per token,
R routed rows.
"""

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from ctypes import POINTER, Structure, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import ConfigError
from moefit.formats.matrix import ROWS_AT_ONCE, GroupedMatrix, groups_of
from moefit.formats.planes import GROUP

Level = Literal["portable", "avx2", "avx512"]
LEVELS: tuple[Level, ...] = ("portable", "avx2", "avx512")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
VERSION = 1  # of the border, as csrc/experts.cpp has it
SWITCH = "MOEFIT_KERNELS"  # environment: a level, or `torch` for none
FEW = 16  # tokens of a matrix; above, decoding it once and multiplying in torch is faster
NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 16}
Weight = Tensor | GroupedMatrix


class _Matrix(Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("meta", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("kind", c_int64),
    )


class _Expert(Structure):
    _fields_ = (("w_in", _Matrix), ("w_out", _Matrix), ("first", c_int64), ("rows", c_int64))


class Argument:
    """A weight as kernels take it, looked up once. Keeps the weight's memory."""

    def __init__(self, weight: Weight):
        self.weight = weight
        self.matrix = _matrix(weight)
        self.rows, self.cols = self.matrix.rows, self.matrix.cols


class Mlp:
    """An expert's two matrices and what is between them: down(act(gate) * up), or down(act(in))."""

    def __init__(self, *, w_in: Weight, w_out: Weight, activation: str, gated: bool):
        self.w_in, self.w_out = w_in, w_out
        self.activation, self.gated = activation, gated
        self.argument = _Expert(_matrix(w_in), _matrix(w_out), 0, 0)


class Kernels:
    """The library, used at one level of instructions."""

    def __init__(self, library: ctypes.CDLL, level: Level):
        self._library, self.level = library, level
        self._level = LEVELS.index(level)
        library.moefit_linear.argtypes = [
            c_int64,
            POINTER(_Matrix),
            c_void_p,
            c_int64,
            c_int64,
            c_void_p,
        ]
        library.moefit_decode.argtypes = [c_int64, POINTER(_Matrix), c_void_p, c_int64]
        library.moefit_experts.argtypes = [
            c_int64, POINTER(_Expert), c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p,
            c_int64, c_int64, c_int64, c_int64, c_void_p,
        ]  # fmt: skip

    def linear(self, x_TI: Tensor, weight: Weight | Argument) -> Tensor:
        """x W^T, float32 [T, O]."""
        weight = weight if isinstance(weight, Argument) else Argument(weight)
        assert x_TI.shape[1] == weight.cols
        x_TP = _padded(x_TI)
        tokens, width = x_TP.shape
        y_TO = torch.empty(tokens, weight.rows)
        self._library.moefit_linear(
            self._level, weight.matrix, x_TP.data_ptr(), width, tokens, y_TO.data_ptr()
        )
        return y_TO

    def decode(self, matrix: GroupedMatrix, dtype: torch.dtype) -> Tensor:
        """The weights [O, I]."""
        out_OI = torch.empty(matrix.rows, matrix.cols, dtype=dtype)
        if dtype in (torch.float32, torch.bfloat16):
            self._decode(matrix, out_OI)
            return out_OI
        for part, target_OI in zip(matrix.split(), out_OI.split(ROWS_AT_ONCE), strict=True):
            target_OI.copy_(self._decode(part, torch.empty(target_OI.shape)))
        return out_OI

    def _decode(self, matrix: GroupedMatrix, out_OI: Tensor) -> Tensor:
        half = int(out_OI.dtype == torch.bfloat16)
        self._library.moefit_decode(self._level, _matrix(matrix), out_OI.data_ptr(), half)
        return out_OI

    def experts(self, x_TD: Tensor, mlps: Sequence[Mlp], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Each expert over the tokens given for it, unweighted: y_RD, one expert after the other.

        Float32, but with bfloat16 tokens hidden units are rounded where torch would round them.
        """
        assert all(x_TD.shape[1] == mlp.argument.w_in.cols for mlp in mlps)
        array, first = (_Expert * len(mlps))(), 0
        for number, (mlp, mine) in enumerate(zip(mlps, tokens, strict=True)):
            array[number] = mlp.argument
            array[number].first, array[number].rows = first, len(mine)
            first += len(mine)
        if not first:
            return torch.empty(0, x_TD.shape[1])
        x_TP = _padded(x_TD)
        token_R = torch.tensor([token for mine in tokens for token in mine])
        one, w_out = mlps[0], mlps[0].argument.w_out
        scratch = groups_of(max(one.argument.w_in.rows, w_out.cols)) * GROUP
        h_RQ, y_RD = torch.empty(first, scratch), torch.empty(first, w_out.rows)
        self._library.moefit_experts(
            self._level, array, len(mlps), token_R.data_ptr(), x_TP.data_ptr(), *x_TP.shape,
            h_RQ.data_ptr(), scratch, int(one.gated),
            ACTIVATIONS.index(one.activation), int(x_TD.dtype == torch.bfloat16), y_RD.data_ptr(),
        )  # fmt: skip
        return y_RD


@cache
def kernels(level: str | None = None) -> Kernels | None:
    """The compiled kernels at `level`, or at the best that this processor has; None without.

    The environment variable MOEFIT_KERNELS holds a level, or `torch` for none; ConfigError is
    raised for anything else.
    """
    wanted = level or os.environ.get(SWITCH) or LEVELS[-1]
    if wanted not in (*LEVELS, "torch"):
        raise ConfigError(f"{SWITCH}={wanted!r} is none of {', '.join(LEVELS)} and torch")
    library = _library() if wanted in LEVELS else None
    if library is None:
        return None
    best = int(library.moefit_best_level())
    return Kernels(library, LEVELS[min(best, LEVELS.index(cast(Level, wanted)))])


def decoded(matrix: GroupedMatrix, dtype: torch.dtype) -> Tensor:
    """The weights [O, I], by kernels where there are some."""
    compiled = kernels() if matrix.codes_RB.device.type == "cpu" else None
    return compiled.decode(matrix, dtype) if compiled else matrix.dense(dtype)


def status() -> str:
    """What computes from formats: a level, or torch and why."""
    if compiled := kernels():
        return compiled.level
    return f"torch: {SWITCH}=torch" if _library() else "torch: not compiled"


@cache
def _library() -> ctypes.CDLL | None:
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        with suppress(OSError):  # built for another system
            library = ctypes.CDLL(str(path))
            if _version(library) == VERSION:
                library.moefit_best_level.restype = c_int64
                return library
    return None


def _version(library: ctypes.CDLL) -> int:
    """What the library was built from; one left over from earlier sources has none, or another."""
    if not hasattr(library, "moefit_version"):
        return 0
    library.moefit_version.restype = c_int64
    return int(library.moefit_version())


def _padded(x_TI: Tensor) -> Tensor:
    """Float32 tokens with zeros to whole groups."""
    missing = -x_TI.shape[1] % GROUP
    x_TI = x_TI.float().contiguous()
    return F.pad(x_TI, (0, missing)) if missing else x_TI


def _matrix(weight: Weight) -> _Matrix:
    if isinstance(weight, GroupedMatrix):
        assert weight.codes_RB.is_contiguous() and weight.meta_RMG.is_contiguous()
        codes, meta = weight.codes_RB.data_ptr(), weight.meta_RMG.data_ptr()
        return _Matrix(codes, meta, weight.rows, weight.cols, weight.bits)
    assert weight.is_contiguous()
    return _Matrix(weight.data_ptr(), None, *weight.shape, NATIVE_DTYPES[weight.dtype])
