"""Load and call the compiled CPU kernels.

Checks arguments and calls the functions of `quant.library` through ctypes. Without the library
everything is computed in torch; `MOEFIT_KERNELS` forces a level.
"""

import ctypes
import logging
import os
from collections.abc import Sequence
from ctypes import Array, Structure, addressof, byref, c_void_p
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import ConfigError
from moefit.graphs import all_outside_of_graphs
from moefit.moe.routing import Routing, plain_weighted_sum
from moefit.quant.grouped_int import GROUP, ROWS_AT_ONCE, EncodedRows, GroupedMatrix, groups_of
from moefit.quant.library import (
    LEVELS,
    SWITCH,
    ExpertStruct,
    Level,
    MatrixStruct,
    available_levels,
    level_note,
    library,
)
from moefit.quant.moments import SecondMoments

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity", "clamped")
ELEMENTWISE = ("silu", "sigmoid")
NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 16}  # of any tensor
Weight = Tensor | EncodedRows
_LOG = logging.getLogger(__name__)


class KernelMatrix:
    """A weight with its C struct, built once. Keeps the weight's memory alive."""

    def __init__(self, weight: Weight):
        self.weight = weight
        self.matrix = _matrix(weight)
        self.rows, self.cols = self.matrix.rows, self.matrix.cols

    def __reduce__(self) -> tuple[type["KernelMatrix"], tuple[Weight]]:
        """Copy and pickle the weight; pointers are made anew."""
        return KernelMatrix, (self.weight,)


class KernelMlp:
    """An expert's matrices and activation: down(act(gate) * up), or down(act(in)); see `MlpShape`.

    `biases` are those of both, contiguous and of one dtype, or None. `shape` is the number of
    inputs, hidden units and outputs.
    """

    def __init__(
        self,
        *,
        w_in: Weight,
        w_out: Weight,
        activation: str,
        gated: bool,
        biases: tuple[Tensor, Tensor] | None = None,
    ):
        self.w_in, self.w_out, self.biases = w_in, w_out, biases
        self.activation, self.gated = activation, gated
        self.argument = ExpertStruct(_matrix(w_in), _matrix(w_out), 0, 0)
        into, out = self.argument.w_in, self.argument.w_out
        self.shape = into.cols, out.cols, out.rows
        hidden = into.rows // 2 if gated else into.rows
        assert hidden == out.cols, (
            f"the first matrix computes {hidden} hidden units, the second takes {out.cols}"
        )
        if biases is not None:
            assert biases[0].dtype == biases[1].dtype and all(map(Tensor.is_contiguous, biases))
            assert [one.numel() for one in biases] == [into.rows, out.rows]
            addresses = [one.data_ptr() for one in biases]
            self.argument.in_bias, self.argument.out_bias = addresses
            self.argument.bias_kind = NATIVE_DTYPES[biases[0].dtype]
        self.address = addressof(self.argument)


@all_outside_of_graphs
class Kernels:
    """The compiled library at one instruction set level; see `Backend`."""

    def __init__(self, library: ctypes.CDLL, level: Level):
        self._library, self.level = library, level
        self._level = LEVELS.index(level)

    def linear(
        self,
        x_TI: Tensor,
        weight: Weight | KernelMatrix,
        dtype: torch.dtype = torch.float32,
        bias_O: Tensor | None = None,
    ) -> Tensor:
        """Return x W^T + bias, [T, O] in `dtype`; the bias is float32 and added before rounding."""
        weight = weight if isinstance(weight, KernelMatrix) else KernelMatrix(weight)
        assert x_TI.shape[1] == weight.cols
        x_TI = _contiguous(x_TI if x_TI.dtype == dtype else x_TI.float())
        y_TO = x_TI.new_empty(len(x_TI), weight.rows)
        self._library.moefit_linear(
            self._level, weight.matrix, x_TI.data_ptr(), len(x_TI), NATIVE_DTYPES[x_TI.dtype],
            None if bias_O is None else bias_O.data_ptr(), y_TO.data_ptr(),
        )  # fmt: skip
        return y_TO.to(dtype)

    def fill(
        self,
        matrix: EncodedRows,
        first: int,
        codes_RB: Tensor,
        flip: int = 0,
        meta_RMG: Tensor | None = None,
    ) -> None:
        """Fill rows from `first` on; see `quant.scaled.fill.fill_rows` and `k_quants.fill_blocks`.

        Args:
            matrix: Of a checkpoint's codes, in host memory.
            first: The first row.
            codes_RB: Codes as the checkpoint has them, consecutive rows; blocks of k-quants.
            flip: Number that each byte is combined with by exclusive or.
            meta_RMG: Metadata, row by row, which k-quants have in their blocks.
        """
        assert codes_RB.is_contiguous() and (meta_RMG is None or meta_RMG.is_contiguous())
        self._library.moefit_fill(
            _matrix(matrix), first, len(codes_RB), codes_RB.data_ptr(), codes_RB.shape[1], flip,
            None if meta_RMG is None else meta_RMG.data_ptr(),
        )  # fmt: skip

    def decode(self, matrix: EncodedRows, dtype: torch.dtype) -> Tensor:
        """Return the weights [O, I]."""
        out_OI = torch.empty(matrix.rows, matrix.cols, dtype=dtype)
        if dtype in NATIVE_DTYPES:
            self._decode(matrix, out_OI)
            return out_OI
        for part, target_OI in zip(matrix.split(), out_OI.split(ROWS_AT_ONCE), strict=True):
            target_OI.copy_(self._decode(part, torch.empty(target_OI.shape)))
        return out_OI

    def _decode(self, matrix: EncodedRows, out_OI: Tensor) -> Tensor:
        kind = NATIVE_DTYPES[out_OI.dtype]
        self._library.moefit_decode(self._level, _matrix(matrix), out_OI.data_ptr(), kind)
        return out_OI

    def encode(
        self,
        weight_RC: Tensor,
        target: GroupedMatrix,
        *,
        fitted: bool,
        moments_C: Tensor | None = None,
    ) -> int | None:
        """Encode weights on a CPU into `target`.

        Args:
            weight_RC: Weights.
            target: Matrix to fill.
            fitted: Whether to minimise the squared error instead of rounding to nearest.
            moments_C: Mean squares of the inputs, which weight the columns' errors.

        Returns:
            Index in the flattened matrix of a weight that is not finite or beyond float16; the
            content of `target` is then undefined. None if there is no such weight.
        """
        known = weight_RC.dtype in NATIVE_DTYPES
        weight_RC = (weight_RC if known else weight_RC.float()).contiguous()
        moments_P = None if moments_C is None else _padded(moments_C[None])
        assert (target.rows, target.cols) == tuple(weight_RC.shape)
        assert target.codes_RB.is_contiguous() and target.meta_RMG.is_contiguous()
        bad = self._library.moefit_encode(
            self._level, _matrix(weight_RC), target.bits, int(fitted),
            None if moments_P is None else moments_P.data_ptr(),
            target.codes_RB.data_ptr(), target.meta_RMG.data_ptr(),
        )  # fmt: skip
        return None if bad < 0 else bad

    def compensate(
        self,
        weight_RC: Tensor,
        target: GroupedMatrix,
        first: int,
        known: SecondMoments,
        sweeps: int,
    ) -> None:
        """Encode columns from `first` on with GPTQ, as `gptq._ColumnSpan` does in torch.

        Args:
            weight_RC: Finite weights on a CPU.
            target: Matrix to fill.
            first: First column, a multiple of 64.
            known: Second moments of the columns, which also give their number.
            sweeps: Passes of improvement over all groups.
        """
        known_dtype = weight_RC.dtype in NATIVE_DTYPES
        weight_RC = (weight_RC if known_dtype else weight_RC.float()).contiguous()
        assert (target.rows, target.cols) == tuple(weight_RC.shape)
        assert first % GROUP == 0 and first + known.cols <= target.cols
        assert target.codes_RB.is_contiguous() and target.meta_RMG.is_contiguous()
        self._library.moefit_compensate(
            self._level, _matrix(weight_RC), first, known.cols,
            known.factor_GPI.data_ptr(), known.moments_GPI.data_ptr(), known.count_P.data_ptr(),
            target.bits, sweeps, target.codes_RB.data_ptr(), target.meta_RMG.data_ptr(),
        )  # fmt: skip

    def experts(
        self, x_TD: Tensor, mlps: Sequence[KernelMlp], tokens: Sequence[Sequence[int] | Tensor]
    ) -> Tensor:
        """Compute each expert for its tokens; return unweighted float32 y_RD, expert by expert.

        Hidden units are rounded where torch would round them.
        """
        array, first = (ExpertStruct * len(mlps))(), 0
        for number, (mlp, its_tokens) in enumerate(zip(mlps, tokens, strict=True)):
            array[number] = mlp.argument
            array[number].first, array[number].rows = first, len(its_tokens)
            first += len(its_tokens)
        width = mlps[0].shape[2] if mlps else x_TD.shape[1]
        y_RD = torch.empty(first, width, dtype=torch.float32)
        if not first:
            return y_RD
        token_R = join_tokens(tokens)
        if first < len(x_TD):  # the kernel prepares all tokens that it is given
            x_TD, token_R = x_TD[token_R], torch.arange(first)
        self._run(mlps, array, token_R, x_TD, y_RD)
        return y_RD

    def one_token(
        self, x_1D: Tensor, mlps: Sequence[KernelMlp], rows: Sequence[int], y_KD: Tensor
    ) -> None:
        """Write each expert's unweighted output for one token to its row of float32 y_KD."""
        array = (ExpertStruct * len(mlps))()
        for number, (mlp, row) in enumerate(zip(mlps, rows, strict=True)):
            array[number] = mlp.argument
            array[number].first, array[number].rows = row, 1
        self._run(mlps, array, None, x_1D, y_KD)

    def token(
        self, x_1D: Tensor, mlps: Sequence[KernelMlp], weights_1K: Tensor, *, energy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return one token's weighted sum of experts: `one_token`, then `weighted_sum`."""
        one = _alike(mlps, x_1D)
        if x_1D.dtype not in NATIVE_DTYPES or weights_1K.dtype not in NATIVE_DTYPES:
            y_KD = torch.empty(len(mlps), one.argument.w_out.rows, dtype=torch.float32)
            self.one_token(x_1D, mlps, range(len(mlps)), y_KD)
            return self.weighted_sum(y_KD, weights_1K, x_1D.dtype, energy=energy)
        x_1D, weights_1K = x_1D.contiguous(), weights_1K.contiguous()
        y_1D = x_1D.new_empty(1, one.argument.w_out.rows)
        energy_K = torch.empty(len(mlps), dtype=torch.float32) if energy else None
        addresses = (c_void_p * len(mlps))(*[mlp.address for mlp in mlps])
        self._library.moefit_token(
            self._level, addresses, len(mlps), x_1D.data_ptr(), NATIVE_DTYPES[x_1D.dtype],
            weights_1K.data_ptr(), NATIVE_DTYPES[weights_1K.dtype], int(one.gated),
            ACTIVATIONS.index(one.activation), y_1D.data_ptr(),
            None if energy_K is None else energy_K.data_ptr(),
        )  # fmt: skip
        return y_1D, energy_K

    def _run(
        self,
        mlps: Sequence[KernelMlp],
        array: Any,
        token_R: Tensor | None,
        x_TD: Tensor,
        y_RD: Tensor,
    ) -> None:
        """Compute all experts; `token_R` is None if there is only one token."""
        one, x_TD = _alike(mlps, x_TD), _contiguous(x_TD)
        assert y_RD.is_contiguous() and y_RD.dtype == torch.float32
        assert y_RD.shape[1] == one.shape[2], f"{one.shape[2]} outputs, but rows of {y_RD.shape[1]}"
        scratch = groups_of(max(one.argument.w_in.rows, one.shape[1])) * GROUP
        h_RQ = torch.empty(len(y_RD), scratch, dtype=torch.float32)
        self._library.moefit_experts(
            self._level, array, len(mlps), None if token_R is None else token_R.data_ptr(),
            len(y_RD), x_TD.data_ptr(), len(x_TD), NATIVE_DTYPES[x_TD.dtype],
            h_RQ.data_ptr(), scratch, int(one.gated), ACTIVATIONS.index(one.activation),
            y_RD.data_ptr(),
        )  # fmt: skip

    def attention(
        self, struct: Structure, segments: Array[Any], query_THC: Tensor, out_THZ: Tensor
    ) -> None:
        """Compute attention into out_THZ; called by `quant.attention.attend`."""
        self._library.moefit_attention(
            self._level, byref(struct), segments, len(segments), query_THC.data_ptr(),
            out_THZ.data_ptr(),
        )  # fmt: skip

    def write_rows(self, rows: Any) -> None:
        """Round keys or values into an int8 cache; called by `quant.kv_int8.write_rows`."""
        self._library.moefit_write_rows(self._level, rows)

    def norm(self, address: int, x: Tensor, rows: int, y: Tensor) -> None:
        """Compute a norm into y; called by `quant.layers.layer_operations.NormKernel`."""
        self._library.moefit_norm(self._level, address, x.data_ptr(), rows, y.data_ptr())

    def route(self, address: int, logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> None:
        """Compute a router's choice; called by `quant.layers.layer_operations.RoutingKernel`."""
        self._library.moefit_route(
            address, logits_TE.data_ptr(), len(logits_TE), weights_TK.data_ptr(), ids_TK.data_ptr()
        )

    def router(self, address: int, x_TD: Tensor, logits_TE: Tensor, made: Routing) -> None:
        """Compute a router; called by `quant.layers.layer_operations.RouterKernel`."""
        self._library.moefit_router(
            self._level, address, x_TD.data_ptr(), NATIVE_DTYPES[x_TD.dtype], len(x_TD),
            logits_TE.data_ptr(), made.weights_TK.data_ptr(), made.ids_TK.data_ptr(),
        )  # fmt: skip

    def rotate(
        self,
        rotation: Structure,
        cos: Tensor,
        sin: Tensor,
        pairs: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """Rotate queries and keys; called by `quant.layers.layer_operations.RotaryKernel`."""
        (x0, y0), *others = pairs
        x1, y1 = others[0] if others else (x0, y0)
        self._library.moefit_rotate(
            self._level, byref(rotation), cos.data_ptr(), sin.data_ptr(),
            x0.data_ptr(), y0.data_ptr(), x1.data_ptr(), y1.data_ptr(),
        )  # fmt: skip

    def block(  # noqa: PLR0913 - the arguments of the C function
        self,
        address: int,
        segments: Array[Any],
        tokens: int,
        x_TD: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        results: tuple[Tensor, Tensor],
        choice: Structure | None,
    ) -> None:
        """Compute an attention block; see `quant.layers.attention_block`."""
        self._library.moefit_block(
            self._level, address, segments, len(segments), x_TD.data_ptr(), tokens,
            cos_TR.data_ptr(), sin_TR.data_ptr(), results[0].data_ptr(), results[1].data_ptr(),
            None if choice is None else addressof(choice),
        )  # fmt: skip

    def elementwise(self, function: str, x: Tensor) -> Tensor:
        """Return a function of each element, one of `ELEMENTWISE`, of values in `NATIVE_DTYPES`."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._library.moefit_elementwise(
            self._level, ELEMENTWISE.index(function), x.data_ptr(), x.numel(),
            NATIVE_DTYPES[x.dtype], y.data_ptr(),
        )  # fmt: skip
        return y

    def add_shared(self, address: int, x_TD: Tensor, y_TD: Tensor) -> None:
        """Add a shared expert's output to y_TD; see `quant.layers.shared_expert`."""
        assert x_TD.dtype == y_TD.dtype and x_TD.shape == y_TD.shape
        self._library.moefit_add_shared(
            self._level,
            address,
            x_TD.data_ptr(),
            len(x_TD),
            NATIVE_DTYPES[x_TD.dtype],
            y_TD.data_ptr(),
        )

    def latent_queries(self, heads: Any, query_THC: Tensor, width: int) -> Tensor:
        """Return queries for latents, float32 [T, H, width]; called by `quant.latent`."""
        assert query_THC.is_contiguous()
        y_THC = torch.empty(*query_THC.shape[:2], width, dtype=torch.float32)
        self._library.moefit_latent_queries(
            self._level, byref(heads), query_THC.data_ptr(), NATIVE_DTYPES[query_THC.dtype],
            len(query_THC), y_THC.data_ptr(),
        )  # fmt: skip
        return y_THC

    def latent_values(self, heads: Any, x_THC: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Return values of summed latents, [T, H, width]; called by `quant.latent`."""
        assert x_THC.is_contiguous() and x_THC.dtype == torch.float32
        y_THV = torch.empty(*x_THC.shape[:2], width, dtype=dtype)
        self._library.moefit_latent_values(
            self._level, byref(heads), x_THC.data_ptr(), NATIVE_DTYPES[dtype], len(x_THC),
            y_THV.data_ptr(),
        )  # fmt: skip
        return y_THV

    def keep_torch_on_one_thread(self, begin: bool) -> None:
        """Keep operations of torch that this thread calls on it until the next call with False."""
        self._library.moefit_one_thread(int(begin))

    def layers(self, *arguments: Any) -> int:
        """Compute several decoder layers; called by `quant.layers.decoder_layers`."""
        return int(self._library.moefit_layers(self._level, *arguments))

    def resident_rows(self, *arguments: Any) -> None:
        """Compute a layer's resident experts; called by `quant.layers.decoder_layers`."""
        self._library.moefit_resident_rows(self._level, *arguments)

    def weighted_sum(
        self, y_RD: Tensor, weights_TK: Tensor, dtype: torch.dtype, *, energy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the result of `plain_weighted_sum`; only energies differ by rounding."""
        if any(one not in NATIVE_DTYPES for one in (dtype, weights_TK.dtype, y_RD.dtype)):
            return plain_weighted_sum(y_RD, weights_TK, dtype, energy=energy)
        rows, width = y_RD.shape
        assert rows == weights_TK.numel()
        y_TD = torch.empty(len(weights_TK), width, dtype=dtype)
        energy_R = torch.empty(rows, dtype=torch.float32) if energy else None
        y_RD, weights_TK = y_RD.contiguous(), weights_TK.contiguous()
        kinds = (NATIVE_DTYPES[one] for one in (y_RD.dtype, weights_TK.dtype, dtype))
        y_kind, weights_kind, kind = kinds
        self._library.moefit_weighted_sum(
            self._level, y_RD.data_ptr(), y_kind, *weights_TK.shape, width, weights_TK.data_ptr(),
            weights_kind, kind, y_TD.data_ptr(), None if energy_R is None else energy_R.data_ptr(),
        )  # fmt: skip
        return y_TD, energy_R


@cache
def kernels(level: str | None = None) -> Kernels | None:
    """Return the compiled kernels, or None if there are none or `torch` is selected.

    Args:
        level: Highest instruction set level to use; by default that of the environment variable
            MOEFIT_KERNELS, or the best of this processor.

    Raises:
        ConfigError: The level is unknown.
    """
    wanted = level or os.environ.get(SWITCH) or LEVELS[-1]
    if level is None and (note := level_note()):
        _LOG.warning("warning: %s", note)
    if wanted not in (*LEVELS, "torch"):
        raise ConfigError(f"{SWITCH}={wanted!r} is none of {', '.join(LEVELS)} and torch")
    compiled = library() if wanted in LEVELS else None
    if compiled is None:
        return None
    last = LEVELS.index(cast(Level, wanted))
    allowed: list[Level] = [one for one in available_levels() if LEVELS.index(one) <= last]
    return Kernels(compiled, allowed[-1])


def status() -> str:
    """Return the level in use, or `torch` and the reason."""
    if compiled := kernels():
        return compiled.level
    return f"torch: {SWITCH}=torch" if library() else "torch: not compiled"


def join_tokens(tokens: Sequence[Sequence[int] | Tensor]) -> Tensor:
    """Return the token index of each routed row, int64 [R], expert by expert."""
    if all(isinstance(part, Tensor) for part in tokens):
        return torch.cat([part for part in tokens if isinstance(part, Tensor)])
    return torch.tensor([int(token) for part in tokens for token in part])


def _alike(mlps: Sequence[KernelMlp], x_TD: Tensor) -> KernelMlp:
    """Return the first expert, whose shape and activation the kernel takes for those of all."""
    first = mlps[0]
    kind = first.shape, first.activation, first.gated
    for number, one in enumerate(mlps):
        assert (one.shape, one.activation, one.gated) == kind, (
            f"expert {number} is {one.shape} {one.activation}, others are {first.shape} "
            f"{first.activation}: one call computes experts of one shape (inputs, hidden units, "
            "outputs) and activation"
        )
    width = x_TD.shape[1]
    assert first.shape[0] == width, f"experts take {first.shape[0]} inputs, but tokens have {width}"
    return first


def _contiguous(x_TI: Tensor) -> Tensor:
    return (x_TI if x_TI.dtype in NATIVE_DTYPES else x_TI.float()).contiguous()


def _padded(x_TI: Tensor) -> Tensor:
    """Return float32 inputs, padded with zeros to whole groups."""
    missing = -x_TI.shape[1] % GROUP
    x_TI = x_TI.float().contiguous()
    return F.pad(x_TI, (0, missing)) if missing else x_TI


def _matrix(weight: Weight) -> MatrixStruct:
    if not isinstance(weight, Tensor):
        assert weight.codes_RB.is_contiguous() and weight.meta_RMG.is_contiguous()
        codes, meta = weight.codes_RB.data_ptr(), weight.meta_RMG.data_ptr()
        return MatrixStruct(codes, meta, weight.rows, weight.cols, weight.kind)
    assert weight.is_contiguous()
    return MatrixStruct(weight.data_ptr(), None, *weight.shape, NATIVE_DTYPES[weight.dtype])
