"""Encode an expert so that the error of its outputs, not of its weights, is small (GPTQ).

Records the inputs of each matrix while the family's own code computes the expert, accumulates their
second moments (`moments.py`), and rounds column after column, correcting the remaining columns for
the error made so far. Formats and kernels are the same as without calibration.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moefit.errors import CheckpointError
from moefit.moe.families import Layout, Tensors
from moefit.quant.cpu_kernels import kernels
from moefit.quant.encode import LARGEST, check_finite, divisor, encode, encode_into, to_half
from moefit.quant.format import Format, Weights
from moefit.quant.grouped_int import GROUP, ROWS_AT_ONCE, GroupedMatrix, groups_of, pack, to_slabs
from moefit.quant.moments import SecondMoments, moments_of

_PRODUCTS = (F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)


def expert_inputs(
    layout: Layout, tensors: Tensors, x_ND: Tensor
) -> tuple[Mapping[str, Tensor], Tensor]:
    """Compute an expert, and return the inputs [N, C] of each matrix and the output [N, D]."""
    with _InputRecorder(tensors) as recorder:
        y_ND = layout.output(tensors, x_ND)
    return recorder.inputs, y_ND


class _InputRecorder(TorchFunctionMode):
    """Record the left operand of products whose right operand is one of `tensors`."""

    def __init__(self, tensors: Tensors):
        super().__init__()
        self._names = {id(tensor): short for short, tensor in tensors.items() if tensor.dim() == 2}
        self.inputs: dict[str, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS and len(args) > 1:
            short = self._names.get(id(args[1]))
            if short is not None:
                self.inputs[short] = args[0].detach().reshape(-1, args[0].shape[-1])
        return func(*args, **(kwargs or {}))


SWEEPS = 3


def encode_gptq(
    target: GroupedMatrix,
    weight_RC: Tensor,
    moments: Sequence[SecondMoments],
    *,
    sweeps: int = SWEEPS,
) -> None:
    """Encode into an existing matrix with GPTQ, then improve codes, scales and minima.

    Args:
        target: The matrix to fill.
        weight_RC: Weights.
        moments: Second moments of consecutive columns, C in all.
        sweeps: Passes of improvement over all groups; formats with 8 bits need none.

    Raises:
        CheckpointError: A weight is NaN, infinite or beyond float16.
    """
    check_finite(weight_RC)
    assert sum(known.cols for known in moments) == weight_RC.shape[1]
    compiled = kernels()
    first = 0
    for known in moments:
        if compiled:
            compiled.compensate(weight_RC, target, first, known, sweeps)
        else:
            parts = zip(target.split(), weight_RC.split(ROWS_AT_ONCE), strict=True)
            for part, part_RC in parts:
                span = _ColumnSpan(part_RC[:, first : first + known.cols], known, target.bits)
                span.round()
                if target.bits < 8:
                    span.sweep(sweeps)
                span.write(part, first // GROUP)
        first += known.cols
    to_slabs(target.codes_RB, target.meta_RMG)


class _ColumnSpan:
    """Columns whose errors compensate each other: weight = scale * code + minimum, by group.

    The torch reference of the kernel `compensate`; `pull_IR` is H (W - W^), the gradient of the
    outputs' squared error up to a factor of -2.
    """

    def __init__(self, weight_RC: Tensor, known: SecondMoments, bits: int):
        rows, self._cols = weight_RC.shape
        self._weight_CR = weight_RC.float().T.contiguous()
        self._known, self._bits = known, bits
        self._lowest, self._highest = (1, 255) if bits == 8 else (0, 2**bits - 1)
        groups = groups_of(self._cols)
        self._code_PR, self._off_PR = torch.zeros(2, groups * GROUP, rows)
        self._scale_GR, self._min_GR = torch.empty(2, groups, rows)

    def _groups(self) -> Iterator[tuple[int, slice]]:
        """Yield each group and its columns."""
        for group, first in enumerate(range(0, self._cols, GROUP)):
            yield group, slice(first, min(first + GROUP, self._cols))

    def round(self) -> None:
        """Round all columns once, from first to last, and correct the columns that follow."""
        error_PR = torch.zeros_like(self._off_PR)  # over the factor's diagonal
        for group, here in self._groups():
            factor_CI = self._known.factor_GPI[group, :, : here.stop - here.start]
            correction_IR = factor_CI[: here.start].T @ error_PR[: here.start]
            target_IR = (self._weight_CR[here] - correction_IR).clamp_(-LARGEST, LARGEST)
            count_I = self._known.count_P[here]
            fitted = encode(target_IR.T.contiguous(), self._bits, moments_C=count_I)
            _, meta_RM1 = fitted.by_row()
            self._scale_GR[group] = meta_RM1[:, 0, 0]
            self._min_GR[group] = (
                -128 * self._scale_GR[group] if self._bits == 8 else meta_RM1[:, 1, 0]
            )
            error_PR[here] = self._round_group(group, here, target_IR, factor_CI[here])
            scale_R, min_R = self._scale_GR[group], self._min_GR[group]
            self._off_PR[here] = self._weight_CR[here] - (self._code_PR[here] * scale_R + min_R)

    def _round_group(self, group: int, here: slice, target_IR: Tensor, factor_II: Tensor) -> Tensor:
        """Round one group; return each column's error divided by the diagonal of the factor."""
        scale_R, min_R = self._scale_GR[group], self._min_GR[group]
        divisor_R, error_IR = divisor(scale_R), torch.empty_like(target_IR)
        for i, target_R in enumerate(target_IR):
            code_R = ((target_R - min_R) / divisor_R).round_().clamp_(self._lowest, self._highest)
            self._code_PR[here.start + i] = code_R
            error_IR[i] = (target_R - code_R * scale_R - min_R) / factor_II[i, i]
            target_IR[i + 1 :].addr_(factor_II[i, i + 1 :], error_IR[i], alpha=-1)
        return error_IR

    def sweep(self, times: int) -> None:
        """Improve each group: the best scale and minimum for its codes, then the best codes."""
        for _ in range(times):
            for group, here in self._groups():
                moments_PI = self._known.moments_GPI[group, :, : here.stop - here.start]
                pull_IR = moments_PI.T @ self._off_PR
                self._regrid(group, here, pull_IR, moments_PI[here])
                self._recode(group, here, pull_IR, moments_PI[here])

    def _regrid(self, group: int, here: slice, pull_IR: Tensor, moments_II: Tensor) -> None:
        """Fit scale and minimum of a group to its codes; update `pull_IR`."""
        code_IR = self._code_PR[here]
        moment_code_IR = moments_II @ code_IR
        a_R, b_R, c = (code_IR * moment_code_IR).sum(0), moment_code_IR.sum(0), moments_II.sum()
        u_R, v_R = (code_IR * pull_IR).sum(0), pull_IR.sum(0)
        det_R = a_R * c - b_R.square()
        valid_R = det_R > 1e-4 * a_R * c  # equal codes do not determine scale and minimum
        det_R = det_R.where(valid_R, 1.0)
        scale_R = to_half(self._scale_GR[group] + (c * u_R - b_R * v_R) / det_R)
        min_R = to_half(self._min_GR[group] + (a_R * v_R - b_R * u_R) / det_R)
        s_R, t_R = scale_R - self._scale_GR[group], min_R - self._min_GR[group]
        gain_R = 2 * (s_R * u_R + t_R * v_R)
        gain_R -= s_R.square() * a_R + 2 * s_R * t_R * b_R + t_R.square() * c
        better_R = valid_R & (gain_R > 0) & (scale_R > 0)
        self._scale_GR[group] = scale_R.where(better_R, self._scale_GR[group])
        self._min_GR[group] = min_R.where(better_R, self._min_GR[group])
        moved_IR = (code_IR * s_R + t_R) * better_R
        self._off_PR[here] -= moved_IR
        pull_IR -= moments_II @ moved_IR

    def _recode(self, group: int, here: slice, pull_IR: Tensor, moments_II: Tensor) -> None:
        """Choose the best code of each column in turn; `pull_IR` is overwritten."""
        scale_R, off_IR = self._scale_GR[group], self._off_PR[here]
        divisor_R = divisor(scale_R)
        for i, code_R in enumerate(self._code_PR[here]):
            best_R = code_R + pull_IR[i] / (moments_II[i, i] * divisor_R)
            best_R.round_().clamp_(self._lowest, self._highest)
            moved_R = (best_R - code_R) * scale_R
            code_R.copy_(best_R)
            off_IR[i] -= moved_R
            pull_IR[i + 1 :].addr_(moments_II[i, i + 1 :], moved_R, alpha=-1)

    def write(self, target: GroupedMatrix, first: int) -> None:
        """Write to the matrix's groups from `first` on, in row-major order."""
        groups = len(self._scale_GR)
        # Padding repeats the last code.
        missing = groups * GROUP - self._cols
        code_RC = self._code_PR[: self._cols].T.contiguous()
        code_RP = F.pad(code_RC[None], (0, missing), mode="replicate")[0].to(torch.uint8)
        bytes_RB = pack(code_RP.view(-1, GROUP), target.bits).view(len(code_RP), -1)
        start = first * GROUP * target.bits // 8
        target.codes_RB[:, start : start + bytes_RB.shape[1]] = bytes_RB
        target.meta_RMG[:, 0, first : first + groups] = self._scale_GR.T
        if target.bits < 8:
            target.meta_RMG[:, 1, first : first + groups] = self._min_GR.T


class CalibratedExpert:
    """An expert's tensors with recorded inputs, used to encode it and to measure its error.

    Args:
        layout: The family's layout.
        native: The expert's tensors in the model's dtype.
        x_ND: Recorded inputs.
        count_N: Weight of each input in the error.
    """

    def __init__(self, layout: Layout, native: Tensors, x_ND: Tensor, count_N: Tensor):
        self._layout, self._native = layout, native
        self._x_ND, self._count_N = x_ND.float(), count_N
        with torch.inference_mode():
            inputs, self._y_ND = expert_inputs(layout, _in_float(native), self._x_ND)
            self._moments: Mapping[str, Sequence[SecondMoments]] = {
                short: moments_of(input_NC, count_N) for short, input_NC in inputs.items()
            }

    def encode(self, weights: Weights) -> None:
        """Encode into bound tensors of any grouped format.

        Raises:
            CheckpointError: A weight is NaN, infinite or beyond float16.
        """
        for short, tensor in self._native.items():
            target = weights[short]
            if isinstance(target, Tensor):
                target.copy_(tensor)
                continue
            assert isinstance(target, GroupedMatrix)
            weight_RC = tensor.T if self._layout.specs[short].inputs_first else tensor
            try:
                if short in self._moments:
                    encode_gptq(target, weight_RC, self._moments[short])
                else:
                    encode_into(target, weight_RC, "fitted")
            except CheckpointError as error:
                raise CheckpointError(f"{short}: {error}") from error

    def relative_error(self, format: Format, weights: Weights) -> float:
        """Return |y - y^|^2 / |y|^2 of the outputs over all rows; 0 if all outputs are 0."""
        with torch.inference_mode():
            tensors = _in_float(format.decode(weights, self._layout.specs, torch.float32))
            off_ND = self._layout.output(tensors, self._x_ND).sub_(self._y_ND)
        square = float(self._y_ND.square().sum(-1) @ self._count_N)
        return float(off_ND.square().sum(-1) @ self._count_N) / square if square else 0.0


def _in_float(tensors: Tensors) -> Tensors:
    return {short: tensor.float() for short, tensor in tensors.items()}
