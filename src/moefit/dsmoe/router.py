"""The router of one MoE block, or of one attention layer.

Owns the weights that turn a token into one logit per expert, linear or with one hidden layer.
Knows nothing of what the scores are used for.

Shapes: T tokens, D model width, E experts, W router hidden width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moefit.dsmoe.config import DsMoeConfig


class DsMoeRouter(nn.Module):
    """x [.., D] -> logits [.., E], always computed in float32.

    Two near-equal logits in bfloat16 would make the choice of experts depend on the kernel.
    """

    def __init__(self, config: DsMoeConfig, num_experts: int):
        super().__init__()
        hidden = config.router_hidden_size
        width = config.hidden_size if hidden is None else hidden
        self.hidden = None if hidden is None else nn.Linear(config.hidden_size, hidden)
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits of all experts."""
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if self.hidden is not None:
                bias = self.hidden.bias.float()
                x_TD = F.gelu(F.linear(x_TD, self.hidden.weight.float(), bias))
            return F.linear(x_TD, self.weight.float())

    def scores(self, x_TD: Tensor) -> Tensor:
        """Softmax over all experts, in float32."""
        return self(x_TD).softmax(-1)
