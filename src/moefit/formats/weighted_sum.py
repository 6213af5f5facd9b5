"""A token's expert outputs added up: the plain way, which kernels are compared with.

Owns the order (that of the token's choice) and where it is rounded. torch's own sum takes another
order for other widths.

Shapes: T tokens, K chosen per token, D model width, R = T * K rows.
"""

import torch
from torch import Tensor


def plain_weighted_sum(
    y_RD: Tensor, weights_TK: Tensor, dtype: torch.dtype, *, energy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y_TD in `dtype`, of outputs y_RD; energy: also |weight * output|^2 by row, float32 [R]."""
    weighted_RD = y_RD.to(dtype) * weights_TK.reshape(-1, 1)
    energy_R = weighted_RD.float().square().sum(-1) if energy else None
    total_TD = y_RD.new_zeros(len(weights_TK), y_RD.shape[1], dtype=torch.float32)
    for part_TD in weighted_RD.view(*weights_TK.shape, -1).unbind(1):
        total_TD += part_TD.float()
    return total_TD.to(dtype), energy_R
