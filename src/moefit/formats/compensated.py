"""From weights to codes with an eye on the inputs: each column's error is made up for in the rest.

Owns the encoding of one matrix where the second moments of its inputs are known, H = E[x x^T]: what
is kept small is the error of the outputs, tr((W - W^) H (W - W^)^T). Column after column is
rounded, and what that did to the outputs is taken back in the columns that are still to come (GPTQ,
Frantar et al., arXiv 2210.17323, its formulas 2 and 3). A group's scale and minimum are found by
`fitted` when its first column's turn comes; a column's error there counts as what the later ones
cannot make up for. Then, in a few sweeps, each group's scale and minimum, and each code, are set to
what is best while all others stay (coordinate descent), which never makes the error larger. The
result is a `GroupedMatrix` like any other.

Shapes: R rows (output units), C columns (input units), N observed inputs, G groups, I columns of
one group. Columns come first here, so that one column's weights lie side by side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moefit.formats.encoders import LARGEST, encode, refuse_unsound
from moefit.formats.matrix import GroupedMatrix, groups_of
from moefit.formats.planes import GROUP, pack

DAMPING = 0.05  # of the mean moment: inputs not seen look different, and H must be inverted
TOGETHER = 4096  # columns that make up for each other; wider matrices would need memory and hours
SWEEPS = 3


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of the inputs of so many columns: H, damped, and U with U^T U = H^-1.

    U is upper triangular. When the columns before i are fixed, row i of U over its diagonal says
    how column i's error is best made up for by the rest.
    """

    moments_CC: Tensor
    factor_CC: Tensor

    @classmethod
    def of(cls, x_NC: Tensor) -> Self:
        """No inputs at all are as good as white ones."""
        moments_CC = (x_NC.T @ x_NC).double()
        mean = moments_CC.diagonal().mean()
        if not mean > 0:
            white_CC = torch.eye(len(moments_CC), device=x_NC.device)
            return cls(white_CC, white_CC)
        moments_CC /= mean
        moments_CC.diagonal().add_(DAMPING)
        inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(moments_CC))
        return cls(moments_CC.float(), torch.linalg.cholesky(inverse_CC, upper=True).float())


def moments_of(x_NC: Tensor, count_N: Tensor) -> Sequence[Moments]:
    """Of a matrix's inputs, each of which counts so much; one for every `TOGETHER` columns."""
    root_N1 = count_N.float().sqrt()[:, None]
    return [Moments.of(x_NI.float() * root_N1) for x_NI in x_NC.split(TOGETHER, dim=1)]


def encode_compensated(
    target: GroupedMatrix, weight_RC: Tensor, moments: Sequence[Moments], *, sweeps: int = SWEEPS
) -> None:
    """Fill `target`. Raises CheckpointError as `encode` does."""
    refuse_unsound(weight_RC)
    codes_RGI = torch.empty(target.rows, groups_of(target.cols), GROUP, dtype=torch.uint8)
    group = 0
    for part_RC, known in zip(weight_RC.split(TOGETHER, dim=1), moments, strict=True):
        span = _Span(part_RC, known, target.bits)
        span.round()
        if target.bits < 8:
            span.sweep(sweeps)
        for first, end in span.groups():
            code_RI = span.code_CR[first:end].T.to(torch.uint8)
            codes_RGI[:, group, : end - first] = code_RI
            codes_RGI[:, group, end - first :] = code_RI[:, -1:]
            target.meta_RMG[:, 0, group] = span.scale_GR[first // GROUP]
            if target.bits < 8:
                target.meta_RMG[:, 1, group] = span.least_GR[first // GROUP]
            group += 1
    target.codes_RB.copy_(pack(codes_RGI.view(-1, GROUP), target.bits).view(target.codes_RB.shape))


class _Span:
    """Columns that make up for each other: weight = scale * code + least, group by group."""

    def __init__(self, weight_RC: Tensor, moments: Moments, bits: int):
        self._weight_CR = weight_RC.float().T.contiguous()
        self._moments, self._bits = moments, bits
        self._lowest, self._highest = (1, 255) if bits == 8 else (0, 2**bits - 1)
        cols, rows = self._weight_CR.shape
        self.code_CR = torch.empty(cols, rows)
        self.scale_GR, self.least_GR = torch.empty(2, groups_of(cols), rows)

    def groups(self) -> Iterator[tuple[int, int]]:
        """Where each begins and ends."""
        for first in range(0, len(self.code_CR), GROUP):
            yield first, min(first + GROUP, len(self.code_CR))

    def round(self) -> None:
        """Once over all columns, from the first to the last."""
        rest_CR, factor_CC = self._weight_CR.clone(), self._moments.factor_CC
        for group, (first, end) in enumerate(self.groups()):
            part_IR = rest_CR[first:end].clamp_(-LARGEST, LARGEST)
            count_I = factor_CC.diagonal()[first:end].square().reciprocal()
            fitted = encode(part_IR.T.contiguous(), self._bits, moments_C=count_I)
            self.scale_GR[group] = fitted.meta_RMG[:, 0, 0]
            self.least_GR[group] = (
                -128 * self.scale_GR[group] if self._bits == 8 else fitted.meta_RMG[:, 1, 0]
            )
            error_IR = self._round_group(group, part_IR, factor_CC[first:end, first:end])
            rest_CR[end:].addmm_(factor_CC[first:end, end:].T, error_IR, alpha=-1)

    def _round_group(self, group: int, part_IR: Tensor, factor_II: Tensor) -> Tensor:
        """Each column's error over its diagonal; `part_IR` is used up."""
        scale_R, least_R = self.scale_GR[group], self.least_GR[group]
        divisor_R, error_IR = _divisor(scale_R), torch.empty_like(part_IR)
        for i, weight_R in enumerate(part_IR):
            code_R = ((weight_R - least_R) / divisor_R).round_().clamp_(self._lowest, self._highest)
            self.code_CR[group * GROUP + i] = code_R
            error_IR[i] = (weight_R - code_R * scale_R - least_R) / factor_II[i, i]
            part_IR[i + 1 :].addr_(factor_II[i, i + 1 :], error_IR[i], alpha=-1)
        return error_IR

    def sweep(self, times: int) -> None:
        """Over all groups: the best scale and minimum for the codes, then the best codes."""
        moments_CC = self._moments.moments_CC
        pull_CR = moments_CC @ (self._weight_CR - self._dense()) if times else torch.empty(0)
        for _ in range(times):
            for group, (first, end) in enumerate(self.groups()):
                moments_II, pull_IR = moments_CC[first:end, first:end], pull_CR[first:end].clone()
                moved_IR = self._regrid(group, pull_IR, moments_II)
                moved_IR += self._recode(group, pull_IR, moments_II)
                pull_CR.addmm_(moments_CC[:, first:end], moved_IR, alpha=-1)

    def _dense(self) -> Tensor:
        scale_CR, least_CR = (
            value_GR.repeat_interleave(GROUP, 0)[: len(self.code_CR)]
            for value_GR in (self.scale_GR, self.least_GR)
        )
        return self.code_CR * scale_CR + least_CR

    def _regrid(self, group: int, pull_IR: Tensor, moments_II: Tensor) -> Tensor:
        """By how much the group's weights move; `pull_IR` = H (W - W^) is kept up to date."""
        code_IR = self.code_CR[group * GROUP :][: len(pull_IR)]
        told_IR = moments_II @ code_IR
        a_R, b_R, c = (code_IR * told_IR).sum(0), told_IR.sum(0), moments_II.sum()
        u_R, v_R = (code_IR * pull_IR).sum(0), pull_IR.sum(0)
        det_R = a_R * c - b_R.square()
        sound_R = det_R > 1e-4 * a_R * c  # codes that are all alike leave scale and minimum open
        det_R = det_R.where(sound_R, 1.0)
        scale_R = _half(self.scale_GR[group] + (c * u_R - b_R * v_R) / det_R)
        least_R = _half(self.least_GR[group] + (a_R * v_R - b_R * u_R) / det_R)
        s_R, t_R = scale_R - self.scale_GR[group], least_R - self.least_GR[group]
        gain_R = 2 * (s_R * u_R + t_R * v_R)
        gain_R -= s_R.square() * a_R + 2 * s_R * t_R * b_R + t_R.square() * c
        better_R = sound_R & (gain_R > 0) & (scale_R > 0)
        self.scale_GR[group] = scale_R.where(better_R, self.scale_GR[group])
        self.least_GR[group] = least_R.where(better_R, self.least_GR[group])
        moved_IR = (code_IR * s_R + t_R) * better_R
        pull_IR -= moments_II @ moved_IR
        return moved_IR

    def _recode(self, group: int, pull_IR: Tensor, moments_II: Tensor) -> Tensor:
        """As `_regrid`, code by code."""
        scale_R, moved_IR = self.scale_GR[group], torch.empty_like(pull_IR)
        divisor_R = _divisor(scale_R)
        for i, code_R in enumerate(self.code_CR[group * GROUP :][: len(pull_IR)]):
            best_R = code_R + pull_IR[i] / (moments_II[i, i] * divisor_R)
            best_R.round_().clamp_(self._lowest, self._highest)
            moved_IR[i] = (best_R - code_R) * scale_R
            code_R.copy_(best_R)
            pull_IR.addr_(moments_II[i], moved_IR[i], alpha=-1)
        return moved_IR


def _half(value_R: Tensor) -> Tensor:
    return value_R.clamp(-LARGEST, LARGEST).half().float()


def _divisor(scale_R: Tensor) -> Tensor:
    """A group of equal weights has scale 0; its codes don't matter."""
    return scale_R.where(scale_R.abs() > 0, 1.0)
