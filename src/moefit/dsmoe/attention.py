"""Mixture of attention heads as gated grouped-query attention (DS-MoE section 3.2, eq. 7-8).

Includes the root-mean-square normalisation (arXiv 1910.07467) that attention and the decoder layers
use, computed in float32 (float64 for such inputs).

Shapes: B sequences, T tokens, D model width, E attention experts, H query heads, G KV heads, C head
width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import apply_rotary_pos_emb, eager_attention_forward

from moefit.cache_argument import one_cache
from moefit.dsmoe.block import DsMoeRouter
from moefit.dsmoe.config import DsMoeConfig
from moefit.moe.routing import Rule, active_experts, at_least_float32, masked_scores


class DsMoeRMSNorm(nn.Module):
    """Root-mean-square normalisation: x / rms(x) * weight, in x's dtype.

    Computed in float32. Under autocast, with bfloat16 inputs and float32 weights, torch's own
    module would not use its fused kernel.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_D: Tensor) -> Tensor:
        """Return x [.., D] normalised over its last dimension."""
        wide_D, weight_D = at_least_float32(x_D), at_least_float32(self.weight)
        y_D = F.rms_norm(wide_D, self.weight.shape, weight_D, self.eps)
        return y_D.to(x_D.dtype)


class DsMoeAttention(nn.Module):
    """Causal self-attention with rotary positions, gated by a router if it has experts."""

    def __init__(self, config: DsMoeConfig, layer_idx: int):
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width_q = config.num_attention_heads * self.head_dim
        width_kv = self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width_q, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width_kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width_kv, bias=False)
        self.o_proj = nn.Linear(width_q, config.hidden_size, bias=False)
        eps = config.rms_norm_eps
        self.q_norm = DsMoeRMSNorm(width_q, eps) if config.qk_norm else nn.Identity()
        self.k_norm = DsMoeRMSNorm(width_kv, eps) if config.qk_norm else nn.Identity()
        experts = config.num_attention_experts
        self.gate = DsMoeRouter(config, experts) if experts > 1 else None

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        rule: Rule,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: Cosines and sines of the rotary positions.
            attention_mask: As transformers' attention functions expect it.
            past_key_values: The KV cache.
            cache: The same under its newer name; give one of them.
            rule: Inference rule of the attention experts.
            kwargs: Passed on to the attention function.

        Returns:
            Output [B, T, D], and attention weights if the attention function returns them.
        """
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states)).view(head_shape).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states)).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if (kv_cache := one_cache(past_key_values, cache)) is not None:
            key, value = kv_cache.update(key, value, self.layer_idx, kwargs=kwargs)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        output_BTHC, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if self.gate is not None:
            output_BTHC = self._apply_gate(output_BTHC, hidden_states, rule)
        return self.o_proj(output_BTHC.reshape(*input_shape, -1)), weights

    def _apply_gate(self, output_BTHC: Tensor, hidden_states: Tensor, rule: Rule) -> Tensor:
        """Multiply each head's output by its expert's score.

        Only `threshold` deactivates attention experts (DS-MoE section 4.3). All heads are computed
        in any case: with over 60% of the attention experts active, gathering tokens costs more than
        it saves.
        """
        assert self.gate is not None
        scores_BTE = self.gate.scores(hidden_states)
        if rule.kind == "threshold":
            mask_BTE = active_experts(scores_BTE, rule)
            scores_BTE = masked_scores(scores_BTE, mask_BTE, renormalize=rule.renormalize)
        batch, length = scores_BTE.shape[:2]
        grouped_BTGEC = output_BTHC.view(batch, length, self.num_key_value_heads, -1, self.head_dim)
        return grouped_BTGEC * scores_BTE.to(output_BTHC.dtype)[:, :, None, :, None]


def attention_reference(module: DsMoeAttention, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute the paper's sum by expert and head with all experts active; a slow reference.

    Args:
        module: Attention with experts.
        x_BTD: Hidden states.
        cos: Cosines of the rotary positions.
        sin: Their sines.

    Returns:
        Output [B, T, D].
    """
    assert module.gate is not None
    scores_BTE = module.gate.scores(x_BTD)
    batch, length, width = x_BTD.shape
    experts, kv_heads, head_dim = scores_BTE.shape[-1], module.num_key_value_heads, module.head_dim
    w_q = module.q_proj.weight.view(kv_heads, experts, head_dim, width)
    w_o = module.o_proj.weight.view(width, kv_heads, experts, head_dim)
    k_BTGC = (x_BTD @ module.k_proj.weight.T).view(batch, length, kv_heads, head_dim)
    v_BTGC = (x_BTD @ module.v_proj.weight.T).view(batch, length, kv_heads, head_dim)
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=x_BTD.device).tril()
    y_BTD = torch.zeros_like(x_BTD)
    for expert in range(experts):
        for head in range(kv_heads):
            q_BTC = x_BTD @ w_q[head, expert].T
            q_BTC, k_BTC = apply_rotary_pos_emb(q_BTC[:, None], k_BTGC[:, None, :, head], cos, sin)
            logits_BTT = (q_BTC @ k_BTC.transpose(-1, -2))[:, 0] * module.scaling
            attention_BTT = logits_BTT.masked_fill(~causal_TT, float("-inf")).softmax(-1)
            head_BTC = attention_BTT @ v_BTGC[:, :, head]
            y_BTD = y_BTD + scores_BTE[..., expert, None] * (head_BTC @ w_o[:, head, expert].T)
    return y_BTD
