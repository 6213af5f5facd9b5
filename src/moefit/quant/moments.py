"""Second moments of a matrix's inputs, factored for GPTQ.

Computes H = E[x x^T], damped, and the upper triangular U with U^T U = H^-1. With columns up to i
fixed, row i of U divided by its diagonal is the best correction of the following columns for an
error in column i, and the remaining error has weight 1 / U_ii^2 (GPTQ, Frantar et al., arXiv
2210.17323, equations 2 and 3).

Shapes: C columns (input units), N observed inputs; P columns in whole groups, G groups, I = 64
columns of one group. A panel [P, I] has the columns of one group; panels are consecutive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.quant.grouped_int import GROUP, groups_of

DAMPING = 0.05  # of the mean moment, for inputs that were not observed; keeps H invertible
MAX_COLUMNS = 4096  # that compensate each other; more would need too much memory and time
_BAND = 512  # columns of H that are computed at once
_SMALL = 128  # columns that are inverted at once


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """Second moments of columns that compensate each other. Padding columns are zero.

    Attributes:
        cols: Number of columns.
        moments_GPI: H in panels.
        factor_GPI: U in panels.
        count_P: Weight of the remaining error of each column, relative to the mean of its group.
    """

    cols: int
    moments_GPI: Tensor
    factor_GPI: Tensor
    count_P: Tensor

    @classmethod
    def of(cls, x_NC: Tensor) -> Self:
        """Compute from inputs; use the identity for no inputs, and for values beyond float32."""
        moments_CC = _products(x_NC)
        mean = float(moments_CC.diagonal().mean())
        if not 0 < mean < torch.inf:
            identity_CC = torch.eye(len(moments_CC), device=x_NC.device)
            return cls._from_root(identity_CC, identity_CC)
        moments_CC /= mean
        moments_CC.diagonal().add_(DAMPING)
        # H = V V^T with V upper triangular: the Cholesky factor of H with columns reversed.
        lower_CC = torch.linalg.cholesky(moments_CC.flip(0, 1).double())
        return cls._from_root(moments_CC, lower_CC.flip(0, 1))

    @classmethod
    def _from_root(cls, moments_CC: Tensor, root_CC: Tensor) -> Self:
        """Compute from H = V V^T; U = V^-1, and V is well-conditioned enough for float32."""
        cols = len(root_CC)
        count_GI = _padded(root_CC.diagonal().double().square()[None], 1).view(-1, GROUP)
        size_G1 = (cols - GROUP * torch.arange(len(count_GI))).clamp_max(GROUP)[:, None]
        count_GI = (count_GI / (count_GI.sum(1, keepdim=True) / size_G1)).float()
        factor_CC = _inverse(root_CC.float())
        return cls(cols, _panels(moments_CC), _panels(factor_CC), count_GI.flatten())


def moments_of(x_NC: Tensor, count_N: Tensor) -> Sequence[SecondMoments]:
    """Return moments of inputs with weights `count_N`, one for every `MAX_COLUMNS` columns."""
    root_N1 = count_N.float().sqrt()[:, None]
    return [SecondMoments.of(x_NI.float() * root_N1) for x_NI in x_NC.split(MAX_COLUMNS, dim=1)]


def _products(x_NC: Tensor) -> Tensor:
    """Return x^T x, computing only half of the symmetric matrix."""
    cols = x_NC.shape[1]
    result_CC = torch.empty(cols, cols, device=x_NC.device)
    for first in range(0, cols, _BAND):
        band_BC = x_NC[:, first : first + _BAND].T @ x_NC[:, first:]
        result_CC[first : first + _BAND, first:] = band_BC
        result_CC[first:, first : first + _BAND] = band_BC.T
    return result_CC


def _inverse(upper_CC: Tensor) -> Tensor:
    """Invert an upper triangular matrix by halves, so that most of the work is products."""
    cols = len(upper_CC)
    if cols <= _SMALL:
        identity_CC = torch.eye(cols, device=upper_CC.device)
        return torch.linalg.solve_triangular(upper_CC, identity_CC, upper=True)
    half = cols // 2
    result_CC = torch.zeros_like(upper_CC)
    result_CC[:half, :half] = first_CC = _inverse(upper_CC[:half, :half])
    result_CC[half:, half:] = last_CC = _inverse(upper_CC[half:, half:])
    result_CC[:half, half:] = first_CC @ upper_CC[:half, half:] @ -last_CC
    return result_CC


def _panels(square_CC: Tensor) -> Tensor:
    square_PP = _padded(square_CC.float(), 2)
    return square_PP.view(len(square_PP), -1, GROUP).transpose(0, 1).contiguous()


def _padded(value: Tensor, dimensions: int) -> Tensor:
    """Pad with zeros to whole groups."""
    missing = groups_of(value.shape[-1]) * GROUP - value.shape[-1]
    return F.pad(value, (0, missing) * dimensions)
