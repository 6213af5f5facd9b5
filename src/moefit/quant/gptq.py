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
from moefit.quant.encode import LARGEST, check_finite, encode, encode_into
from moefit.quant.format import Format, Weights
from moefit.quant.grouped_int import GROUP, GroupedMatrix, groups_of, pack, to_slabs
from moefit.quant.moments import SecondMoments, moments_of

_PRODUCTS = (F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)


def expert_inputs(
    layout: Layout, tensors: Tensors, x_ND: Tensor
) -> tuple[Mapping[str, Tensor], Tensor]:
    """The inputs [N, C] of each matrix by short name, and the expert's output [N, D]."""
    with _InputRecorder(tensors) as heard:
        y_ND = layout.output(tensors, x_ND)
    return heard.inputs, y_ND


class _InputRecorder(TorchFunctionMode):
    """Keeps the left side of products whose right side is one of `tensors`."""

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
    """Fill `target`. Raises CheckpointError as `encode` does."""
    check_finite(weight_RC)
    assert sum(known.cols for known in moments) == weight_RC.shape[1]
    compiled = kernels()
    first = 0
    for known in moments:
        if compiled:
            compiled.compensate(weight_RC, target, first, known, sweeps)
        else:
            span = _ColumnSpan(weight_RC[:, first : first + known.cols], known, target.bits)
            span.round()
            if target.bits < 8:
                span.sweep(sweeps)
            span.write(target, first // GROUP)
        first += known.cols
    to_slabs(target.codes_RB, target.meta_RMG)


class _ColumnSpan:
    """Columns that make up for each other: weight = scale * code + least, group by group."""

    def __init__(self, weight_RC: Tensor, known: SecondMoments, bits: int):
        rows, self._cols = weight_RC.shape
        self._weight_CR = weight_RC.float().T.contiguous()
        self._known, self._bits = known, bits
        self._lowest, self._highest = (1, 255) if bits == 8 else (0, 2**bits - 1)
        groups = groups_of(self._cols)
        self._code_PR, self._off_PR = torch.zeros(2, groups * GROUP, rows)
        self._scale_GR, self._least_GR = torch.empty(2, groups, rows)

    def _groups(self) -> Iterator[tuple[int, slice]]:
        """Their columns."""
        for group, first in enumerate(range(0, self._cols, GROUP)):
            yield group, slice(first, min(first + GROUP, self._cols))

    def round(self) -> None:
        """Once over all columns, from the first to the last."""
        error_PR = torch.zeros_like(self._off_PR)  # over the factor's diagonal
        for group, here in self._groups():
            factor_CI = self._known.factor_GPI[group, :, : here.stop - here.start]
            made_up_IR = factor_CI[: here.start].T @ error_PR[: here.start]
            rest_IR = (self._weight_CR[here] - made_up_IR).clamp_(-LARGEST, LARGEST)
            count_I = self._known.count_P[here]
            fitted = encode(rest_IR.T.contiguous(), self._bits, moments_C=count_I)
            _, meta_RM1 = fitted.by_row()
            self._scale_GR[group] = meta_RM1[:, 0, 0]
            self._least_GR[group] = (
                -128 * self._scale_GR[group] if self._bits == 8 else meta_RM1[:, 1, 0]
            )
            error_PR[here] = self._round_group(group, here, rest_IR, factor_CI[here])
            scale_R, least_R = self._scale_GR[group], self._least_GR[group]
            self._off_PR[here] = self._weight_CR[here] - (self._code_PR[here] * scale_R + least_R)

    def _round_group(self, group: int, here: slice, rest_IR: Tensor, factor_II: Tensor) -> Tensor:
        """Each column's error over its diagonal; `rest_IR` is used up."""
        scale_R, least_R = self._scale_GR[group], self._least_GR[group]
        divisor_R, error_IR = _divisor(scale_R), torch.empty_like(rest_IR)
        for i, rest_R in enumerate(rest_IR):
            code_R = ((rest_R - least_R) / divisor_R).round_().clamp_(self._lowest, self._highest)
            self._code_PR[here.start + i] = code_R
            error_IR[i] = (rest_R - code_R * scale_R - least_R) / factor_II[i, i]
            rest_IR[i + 1 :].addr_(factor_II[i, i + 1 :], error_IR[i], alpha=-1)
        return error_IR

    def sweep(self, times: int) -> None:
        """Over all groups: the best scale and minimum for the codes, then the best codes."""
        for _ in range(times):
            for group, here in self._groups():
                moments_PI = self._known.moments_GPI[group, :, : here.stop - here.start]
                pull_IR = moments_PI.T @ self._off_PR
                self._regrid(group, here, pull_IR, moments_PI[here])
                self._recode(group, here, pull_IR, moments_PI[here])

    def _regrid(self, group: int, here: slice, pull_IR: Tensor, moments_II: Tensor) -> None:
        """`pull_IR`, what the outputs want of each weight, H (W - W^), is kept up to date."""
        code_IR = self._code_PR[here]
        told_IR = moments_II @ code_IR
        a_R, b_R, c = (code_IR * told_IR).sum(0), told_IR.sum(0), moments_II.sum()
        u_R, v_R = (code_IR * pull_IR).sum(0), pull_IR.sum(0)
        det_R = a_R * c - b_R.square()
        sound_R = det_R > 1e-4 * a_R * c  # codes that are all alike leave scale and minimum open
        det_R = det_R.where(sound_R, 1.0)
        scale_R = _half_row(self._scale_GR[group] + (c * u_R - b_R * v_R) / det_R)
        least_R = _half_row(self._least_GR[group] + (a_R * v_R - b_R * u_R) / det_R)
        s_R, t_R = scale_R - self._scale_GR[group], least_R - self._least_GR[group]
        gain_R = 2 * (s_R * u_R + t_R * v_R)
        gain_R -= s_R.square() * a_R + 2 * s_R * t_R * b_R + t_R.square() * c
        better_R = sound_R & (gain_R > 0) & (scale_R > 0)
        self._scale_GR[group] = scale_R.where(better_R, self._scale_GR[group])
        self._least_GR[group] = least_R.where(better_R, self._least_GR[group])
        moved_IR = (code_IR * s_R + t_R) * better_R
        self._off_PR[here] -= moved_IR
        pull_IR -= moments_II @ moved_IR

    def _recode(self, group: int, here: slice, pull_IR: Tensor, moments_II: Tensor) -> None:
        """As `_regrid`, code by code; `pull_IR` is used up."""
        scale_R, off_IR = self._scale_GR[group], self._off_PR[here]
        divisor_R = _divisor(scale_R)
        for i, code_R in enumerate(self._code_PR[here]):
            best_R = code_R + pull_IR[i] / (moments_II[i, i] * divisor_R)
            best_R.round_().clamp_(self._lowest, self._highest)
            moved_R = (best_R - code_R) * scale_R
            code_R.copy_(best_R)
            off_IR[i] -= moved_R
            pull_IR[i + 1 :].addr_(moments_II[i, i + 1 :], moved_R, alpha=-1)

    def write(self, target: GroupedMatrix, first: int) -> None:
        """Into the matrix's groups from this one on, row after row."""
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
            target.meta_RMG[:, 1, first : first + groups] = self._least_GR.T


def _half_row(value_R: Tensor) -> Tensor:
    return value_R.clamp(-LARGEST, LARGEST).half().float()


def _divisor(scale_R: Tensor) -> Tensor:
    """A group of equal weights has scale 0; its codes don't matter."""
    return scale_R.where(scale_R.abs() > 0, 1.0)


class CalibratedExpert:
    """An expert's own tensors, and the rows by which it is judged: x_ND, what each counts."""

    def __init__(self, layout: Layout, native: Tensors, x_ND: Tensor, count_N: Tensor):
        self._layout, self._native = layout, native
        self._x_ND, self._count_N = x_ND.float(), count_N
        with torch.inference_mode():
            inputs, self._y_ND = expert_inputs(layout, _in_float(native), self._x_ND)
            self._moments: Mapping[str, Sequence[SecondMoments]] = {
                short: moments_of(input_NC, count_N) for short, input_NC in inputs.items()
            }

    def encode(self, weights: Weights) -> None:
        """Fill bound tensors. Raises CheckpointError for weights that no format can hold."""
        for short, tensor in self._native.items():
            target = weights[short]
            if isinstance(target, Tensor):
                target.copy_(tensor)
                continue
            weight_RC = tensor.T if self._layout.specs[short].inputs_first else tensor
            try:
                if short in self._moments:
                    encode_gptq(target, weight_RC, self._moments[short])
                else:
                    encode_into(target, weight_RC, "fitted")
            except CheckpointError as error:
                raise CheckpointError(f"{short}: {error}") from error

    def relative_error(self, format: Format, weights: Weights) -> float:
        """|y - y^|^2 / |y|^2 over the rows; 0 for an expert that gives nothing."""
        with torch.inference_mode():
            tensors = _in_float(format.decode(weights, self._layout.specs, torch.float32))
            off_ND = self._layout.output(tensors, self._x_ND).sub_(self._y_ND)
        square = float(self._y_ND.square().sum(-1) @ self._count_N)
        return float(off_ND.square().sum(-1) @ self._count_N) / square if square else 0.0


def _in_float(tensors: Tensors) -> Tensors:
    return {short: tensor.float() for short, tensor in tensors.items()}
