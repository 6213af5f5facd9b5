"""Root-mean-square normalisation (arXiv 1910.07467), in float32 whatever comes in.

Shapes: D normalised width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DsMoeRMSNorm(nn.Module):
    """x [.., D] -> x / rms(x) * weight, in x's dtype.

    torch's own module leaves its fused kernel when autocast hands it bfloat16 activations with
    float32 weights; computed in float32 it stays on it, and is more exact.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_D: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        y_D = F.rms_norm(x_D.float(), self.weight.shape, self.weight.float(), self.eps)
        return y_D.to(x_D.dtype)
