"""What is known of the inputs of a matrix: their second moments, and what follows for its columns.

Owns H = E[x x^T], damped, and its factor. With H = V V^T, V upper triangular, the columns before i
fixed and their errors r, the outputs are best if column i is rounded from w_i + (V_0i r_0 + ... +
V_i-1,i r_i-1) / V_ii: what is left after that is V_ii^2 times the square of the column's own error
(GPTQ, Frantar et al., arXiv 2210.17323, its formulas 2 and 3, with U = V^-1 there; written so, no
inverse is needed). Knows nothing of codes.

Shapes: C columns (input units), N observed inputs; P columns in whole groups, G groups, I = 64
columns of one group. A panel [P, I] has the columns of one group, those of the next behind them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.formats.matrix import groups_of
from moefit.formats.planes import GROUP

DAMPING = 0.05  # of the mean moment: inputs not seen look different, and H must have a factor
TOGETHER = 4096  # columns that make up for each other; wider matrices would need memory and hours
_BAND = 512  # columns of H that are made at once


@dataclass(frozen=True, slots=True)
class Moments:
    """Of so many columns that make up for each other. Where there is no column, all is zero.

    moments_GPI: H by panels. carry_GPI: V over its diagonal, column by column, by panels.
    count_P: what a column's own error counts, V_ii^2, beside the mean of its group.
    """

    cols: int
    moments_GPI: Tensor
    carry_GPI: Tensor
    count_P: Tensor

    @classmethod
    def of(cls, x_NC: Tensor) -> Self:
        """No inputs at all are as good as white ones; so are inputs that are beyond float32."""
        moments_CC = _products(x_NC)
        mean = float(moments_CC.diagonal().mean())
        if not 0 < mean < torch.inf:
            white_CC = torch.eye(len(moments_CC), device=x_NC.device)
            return cls._made(white_CC, white_CC)
        moments_CC /= mean
        moments_CC.diagonal().add_(DAMPING)
        # The factor from the last column on is that of all columns the other way round.
        lower_CC = torch.linalg.cholesky(moments_CC.double().flip(0, 1))
        return cls._made(moments_CC, lower_CC.flip(0, 1))

    @classmethod
    def _made(cls, moments_CC: Tensor, factor_CC: Tensor) -> Self:
        diagonal_C = factor_CC.diagonal()
        carry_CC = (factor_CC / diagonal_C).float()
        cols = len(diagonal_C)
        count_GI = _padded(diagonal_C.double().square()[None], 1).view(-1, GROUP)
        size_G1 = (cols - GROUP * torch.arange(len(count_GI))).clamp_max(GROUP)[:, None]
        count_GI = (count_GI / (count_GI.sum(1, keepdim=True) / size_G1)).float()
        return cls(cols, _panels(moments_CC), _panels(carry_CC), count_GI.flatten())


def moments_of(x_NC: Tensor, count_N: Tensor) -> Sequence[Moments]:
    """Of a matrix's inputs, each of which counts so much; one for every `TOGETHER` columns."""
    root_N1 = count_N.float().sqrt()[:, None]
    return [Moments.of(x_NI.float() * root_N1) for x_NI in x_NC.split(TOGETHER, dim=1)]


def _products(x_NC: Tensor) -> Tensor:
    """x^T x, which is symmetric, so that half of it need not be multiplied."""
    cols = x_NC.shape[1]
    made_CC = torch.empty(cols, cols, device=x_NC.device)
    for first in range(0, cols, _BAND):
        band_BC = x_NC[:, first : first + _BAND].T @ x_NC[:, first:]
        made_CC[first : first + _BAND, first:] = band_BC
        made_CC[first:, first : first + _BAND] = band_BC.T
    return made_CC


def _panels(square_CC: Tensor) -> Tensor:
    square_PP = _padded(square_CC.float(), 2)
    return square_PP.view(len(square_PP), -1, GROUP).transpose(0, 1).contiguous()


def _padded(value: Tensor, dimensions: int) -> Tensor:
    """With zeros to whole groups."""
    missing = groups_of(value.shape[-1]) * GROUP - value.shape[-1]
    return F.pad(value, (0, missing) * dimensions)
