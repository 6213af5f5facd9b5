"""What is known of the inputs of a matrix: their second moments, and what follows for its columns.

Owns H = E[x x^T], damped, and U, upper triangular, with U^T U = H^-1. When the columns up to i are
fixed, row i of U over its diagonal says how column i's error is best made up for by the rest, and
what is left of it then counts 1 / U_ii^2 (GPTQ, Frantar et al., arXiv 2210.17323, its formulas 2
and 3). Knows nothing of codes.

Shapes: C columns (input units), N observed inputs; P columns in whole groups, G groups, I = 64
columns of one group. A panel [P, I] has the columns of one group, those of the next behind them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.quant.grouped_int import GROUP, groups_of

DAMPING = 0.05  # of the mean moment: inputs not seen look different, and H must have a factor
TOGETHER = 4096  # columns that make up for each other; wider matrices would need memory and hours
_BAND = 512  # columns of H that are made at once
_SMALL = 128  # columns that are inverted at once


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """Of so many columns that make up for each other. Where there is no column, all is zero.

    moments_GPI: H by panels. factor_GPI: U by panels. count_P: what is left of a column's error
    counts so much, beside the mean of its group.
    """

    cols: int
    moments_GPI: Tensor
    factor_GPI: Tensor
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
        # H = V V^T, from the last column on: that is the factor of all columns the other way round.
        lower_CC = torch.linalg.cholesky(moments_CC.flip(0, 1).double())
        return cls._made(moments_CC, lower_CC.flip(0, 1))

    @classmethod
    def _made(cls, moments_CC: Tensor, root_CC: Tensor) -> Self:
        """Of H = V V^T; then U is V^-1, and V is so well-conditioned that float32 will do."""
        cols = len(root_CC)
        count_GI = _padded(root_CC.diagonal().double().square()[None], 1).view(-1, GROUP)
        size_G1 = (cols - GROUP * torch.arange(len(count_GI))).clamp_max(GROUP)[:, None]
        count_GI = (count_GI / (count_GI.sum(1, keepdim=True) / size_G1)).float()
        factor_CC = _inverse(root_CC.float())
        return cls(cols, _panels(moments_CC), _panels(factor_CC), count_GI.flatten())


def moments_of(x_NC: Tensor, count_N: Tensor) -> Sequence[SecondMoments]:
    """Of a matrix's inputs, each of which counts so much; one for every `TOGETHER` columns."""
    root_N1 = count_N.float().sqrt()[:, None]
    return [SecondMoments.of(x_NI.float() * root_N1) for x_NI in x_NC.split(TOGETHER, dim=1)]


def _products(x_NC: Tensor) -> Tensor:
    """x^T x, which is symmetric, so that half of it need not be multiplied."""
    cols = x_NC.shape[1]
    made_CC = torch.empty(cols, cols, device=x_NC.device)
    for first in range(0, cols, _BAND):
        band_BC = x_NC[:, first : first + _BAND].T @ x_NC[:, first:]
        made_CC[first : first + _BAND, first:] = band_BC
        made_CC[first:, first : first + _BAND] = band_BC.T
    return made_CC


def _inverse(upper_CC: Tensor) -> Tensor:
    """Of an upper triangular matrix, by halves, so that most of it is products."""
    cols = len(upper_CC)
    if cols <= _SMALL:
        white_CC = torch.eye(cols, device=upper_CC.device)
        return torch.linalg.solve_triangular(upper_CC, white_CC, upper=True)
    half = cols // 2
    made_CC = torch.zeros_like(upper_CC)
    made_CC[:half, :half] = first_CC = _inverse(upper_CC[:half, :half])
    made_CC[half:, half:] = last_CC = _inverse(upper_CC[half:, half:])
    made_CC[:half, half:] = first_CC @ upper_CC[:half, half:] @ -last_CC
    return made_CC


def _panels(square_CC: Tensor) -> Tensor:
    square_PP = _padded(square_CC.float(), 2)
    return square_PP.view(len(square_PP), -1, GROUP).transpose(0, 1).contiguous()


def _padded(value: Tensor, dimensions: int) -> Tensor:
    """With zeros to whole groups."""
    missing = groups_of(value.shape[-1]) * GROUP - value.shape[-1]
    return F.pad(value, (0, missing) * dimensions)
