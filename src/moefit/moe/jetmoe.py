"""JetMoE's MoE block with its experts given from outside.

JetMoE computes router, experts and bias in one module (transformers' `JetMoeMoE`), so there is no
experts module that could be replaced. Owns the block that takes its place: the family's own router
and bias around the narrow waist. Knows nothing of how the experts are computed.

Shapes: B sequences, T tokens, D model width, E experts, K chosen per token.
"""

from torch import Tensor, nn
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE


class ServedJetMoe(nn.Module):
    """`experts(x_TD, ids_TK, weights_TK) -> y_TD` between a block's router and its bias."""

    def __init__(self, block: JetMoeMoE, experts: nn.Module):
        super().__init__()
        self.router, self.bias, self.experts = block.router, block.bias, experts

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_TD = x_BTD.flatten(0, 1)
        *_, logits_TE = self.router(x_TD)  # the rest is the same choice, sorted by expert
        chosen_TK, ids_TK = logits_TE.topk(self.router.top_k, dim=-1)
        y_TD = self.experts(x_TD, ids_TK, chosen_TK.softmax(-1).type_as(x_TD))
        return y_TD.view_as(x_BTD) + self.bias
