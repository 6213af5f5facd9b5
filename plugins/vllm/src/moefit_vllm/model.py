"""DS-MoE's decoder in vLLM, on one device or with tensor parallelism.

Shapes: T tokens, D model width, H query heads, G KV heads, E attention experts, C head width. With
tensor parallelism each process has an equal part of the KV heads, with their query heads.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from moefit_vllm.experts import DsMoeBlock, DsMoeRouter
from moefit_vllm.refused import refuse_untested
from moefit_vllm.routing import Rule


class DsMoeAttention(nn.Module):
    """Grouped-query attention; the heads of an attention expert are multiplied by its score."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        heads, kv_heads, width = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        parts = get_tensor_model_parallel_world_size()
        self.kv_heads, self.head_dim = kv_heads // parts, width
        query, key = heads // parts * width, self.kv_heads * width
        self.sizes = [query, key, key]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, width, heads, kv_heads, bias=False, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            heads * width, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
        )
        eps = config.rms_norm_eps
        self.q_norm = RMSNorm(heads * width, eps=eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(kv_heads * width, eps=eps) if config.qk_norm else nn.Identity()
        self.rotary_emb = get_rope(
            width,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=True,
        )
        self.attn = Attention(
            heads // parts,
            width,
            width**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )
        self.rule = Rule.parse(config.inference_rule)
        experts = config.num_attention_experts
        self.gate = DsMoeRouter(config, experts) if experts > 1 else None

    def forward(self, positions: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the output [T, D]."""
        qkv, _ = self.qkv_proj(x_TD)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, _normed(self.q_norm, q), _normed(self.k_norm, k))
        y = self.attn(q, k, v)
        if self.gate is not None:
            gates_TE = self.rule.gates(self.gate(x_TD).softmax(-1)).to(y.dtype)
            grouped = y.view(len(x_TD), self.kv_heads, gates_TE.shape[-1], self.head_dim)
            y = (grouped * gates_TE[:, None, :, None]).reshape(len(x_TD), -1)
        return self.o_proj(y)[0]


def _normed(norm: nn.Module, part: torch.Tensor) -> torch.Tensor:
    """Return this process's part of all heads' norm [T, H * C], which is over all heads."""
    part, parts = part.contiguous(), get_tensor_model_parallel_world_size()
    if parts == 1 or isinstance(norm, nn.Identity):
        return norm(part)
    whole = norm(tensor_model_parallel_all_gather(part))
    return whole.chunk(parts, dim=-1)[get_tensor_model_parallel_rank()].contiguous()


class DsMoeDecoderLayer(nn.Module):
    """Pre-norm attention and MoE block, each with a residual connection."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = DsMoeAttention(vllm_config, f"{prefix}.self_attn")
        self.mlp = DsMoeBlock(config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the output [T, D]."""
        x_TD = x_TD + self.self_attn(positions, self.input_layernorm(x_TD))
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class DsMoeModel(nn.Module):
    """Embeddings, decoder layers, final norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DsMoeDecoderLayer(vllm_config, f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids, positions, inputs_embeds=None):
        """Return the last hidden state [T, D]."""
        x_TD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            x_TD = layer(positions, x_TD)
        return self.norm(x_TD)


class DsMoeForCausalLM(nn.Module):
    """DS-MoE with a language-model head, as vLLM asks for it."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        refuse_untested(config, vllm_config)
        self.config = config
        self.model = DsMoeModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [T, D]."""
        return self.model.embed_tokens(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        """Return the last hidden state [T, D]."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits [T, V]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint; return the names of the parameters that are now loaded."""
        tied = self.config.tie_word_embeddings
        kept = ((name, one) for name, one in weights if not (tied and name == "lm_head.weight"))
        return AutoWeightsLoader(self).load_weights(kept, mapper=self.hf_to_vllm_mapper)
