"""DS-MoE (arXiv 2404.05567) for transformers, in one file beside the weights.

`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` loads it. It computes the
inference rule of config.json (`inference_rule`): `dense`, `top_k:K`, `threshold:EPS` or
`threshold_top_k:EPS`, each with `:renormalize` or without. For training, and for serving within a
memory budget, use moefit (Apache-2.0), which wrote this file.

Shapes: B sequences, T tokens, D model width, E experts, H query heads, G KV heads, C head width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

CACHE = next(
    name
    for name in CausalLMOutputWithPast.__dataclass_fields__
    if name in ("past_key_values", "cache")
)  # transformers 5.24 renamed the KV cache


class DsMoeConfig(PreTrainedConfig):
    """Settings of the model; those of training are kept and not used."""

    model_type = "dsmoe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_attention_experts: int = 1
    num_experts: int = 16
    mlp_type: str = "swiglu"
    router_type: str = "linear"
    score_correction_bias: bool = False
    pregated: bool | str = False
    router_hidden_size: int | None = None
    qk_norm: bool = False
    routed_scaling_factor: float = 1.0
    inference_rule: str = "dense"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class Rule:
    """Which experts a token uses."""

    def __init__(self, text):
        kind, *values = text.split(":")
        self.renormalize = values[-1:] == ["renormalize"]
        self.kind = kind
        self.value = 0.0 if kind == "dense" else float(values[0])  # K, or epsilon

    def weights(self, scores_TE, real_T=None, bias_E=None):
        """Return the weights [T, E], 0 for experts that a token does not use.

        The bias is added where the best are chosen, and not to their weights.
        """
        if self.kind == "dense":
            return scores_TE
        if self.kind == "threshold":
            mask_TE = self._above(scores_TE)
        else:
            k = int(self.value) if self.kind == "top_k" else self._mean(scores_TE, real_T)
            preference_TE = scores_TE
            if bias_E is not None:  # what excludes an expert gives it a score of 0
                preference_TE = (scores_TE + bias_E.float()).masked_fill(scores_TE == 0, -torch.inf)
            ids_TK = preference_TE.topk(k, dim=-1).indices
            mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(-1, ids_TK, True)
        active_TE = scores_TE * mask_TE
        return active_TE / active_TE.sum(-1, keepdim=True) if self.renormalize else active_TE

    def _above(self, scores_TE):
        mask_TE = scores_TE * scores_TE.shape[-1] > self.value
        return mask_TE.scatter(-1, scores_TE.argmax(-1, keepdim=True), True)

    def _mean(self, scores_TE, real_T):
        count_T = self._above(scores_TE).sum(-1).float()
        if real_T is not None:
            count_T = count_T[real_T]
        return max(1, int(count_T.mean().item() + 0.5)) if count_T.numel() else 1


def hashed_logits(ids_BT, num_experts):
    """Return logits [B, T, E] that give each token id one expert, by multiplicative hashing."""
    hashed_BT = (ids_BT.long() * 2654435761) & (2**32 - 1)
    expert_BT = (hashed_BT * num_experts) >> 32
    return 100.0 * F.one_hot(expert_BT, num_experts).float()


class DsMoeRMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_D):
        """Return x [.., D], normalised."""
        y_D = F.rms_norm(x_D.float(), self.weight.shape, self.weight.float(), self.eps)
        return y_D.to(x_D.dtype)


class DsMoeRouter(nn.Module):
    """Scores of experts: a linear or two-layer router, or means of slices, in float32.

    With `kind` hash there are none but those that `shift` makes of token ids.
    """

    def __init__(self, config, num_experts, kind="linear", embedding=False, biased=False):
        super().__init__()
        self.num_experts, self.kind, self.hidden = num_experts, kind, None
        bias_E = torch.zeros(num_experts) if biased else None
        self.register_buffer("e_score_correction_bias", bias_E)
        self.embedding_weight = None
        if embedding:
            wide = 8 * num_experts
            self.embedding_up = nn.Parameter(torch.empty(wide, config.hidden_size))
            self.embedding_bias = nn.Parameter(torch.empty(wide))
            self.embedding_weight = nn.Parameter(torch.empty(num_experts, wide))
        if kind != "linear":
            return
        width = config.router_hidden_size
        if width is not None:
            self.hidden = nn.Linear(config.hidden_size, width)
        self.weight = nn.Parameter(torch.empty(num_experts, width or config.hidden_size))

    def forward(self, x_TD, shift=None):
        """Return the softmax over all experts [.., E]; `shift` changes its logits [B, T, E]."""
        logits_TE = self._logits(x_TD.float())
        if shift is not None:
            logits_TE = shift(logits_TE)
            if self.embedding_weight is not None:
                up, bias = self.embedding_up.float(), self.embedding_bias.float()
                hidden = F.gelu(F.linear(shift.embedding_BTD, up, bias))
                logits_TE = logits_TE + F.linear(hidden, self.embedding_weight.float())
        return logits_TE.softmax(-1)

    def _logits(self, x_TD):
        if self.kind == "hash":
            return x_TD.new_zeros((*x_TD.shape[:-1], self.num_experts))
        if self.kind == "grap":
            return x_TD.unflatten(-1, (self.num_experts, -1)).mean(-1).relu()
        if self.hidden is not None:
            weight, bias = self.hidden.weight.float(), self.hidden.bias.float()
            x_TD = F.gelu(F.linear(x_TD, weight, bias))
        return F.linear(x_TD, self.weight.float())


class RouterLogits(DynamicLayer):
    """A layer of a KV cache that holds a block's router logits of past tokens, as keys."""

    def append(self, logits_BTE):
        """Append logits, and return those of all tokens [B, N, E]."""
        keys_B1TE = logits_BTE[:, None]
        return self.update(keys_B1TE, keys_B1TE[..., :0])[0][:, 0]


class PreviousToken:
    """Routes a token by the logits of the one before (`pregated: previous_token`).

    The first token of a text, with position 0 or after padding, is routed by its own. With
    `previous_token_and_embedding` routers add what they make of the token's normed embedding.
    """

    def __init__(self, cache, position_ids, attention_mask, embedding_BTD, blocks):
        self.cache, self.blocks, self.embedding_BTD = cache, blocks, embedding_BTD
        follows_BT, past = position_ids > 0, 0
        if attention_mask is not None and attention_mask.ndim == 2:
            before_BN = F.pad(attention_mask, (1, 0))[:, :-1].bool()
            follows_BT = follows_BT & before_BN[:, -follows_BT.shape[1] :]
        if cache is not None:
            past = self._prepare(cache)
        if past == 0:
            follows_BT[:, 0] = False
        self.follows_BT = follows_BT

    def _prepare(self, cache):
        """Add layers for logits behind those of keys and values; return the tokens held."""
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"the router logits of past tokens need a DynamicCache: {type(cache)}")
        if not any(isinstance(one, RouterLogits) for one in cache.layers):
            while len(cache.layers) < self.blocks:
                cache.layers.append(DynamicLayer())
            cache.layers.extend(RouterLogits() for _ in range(self.blocks))
        past = cache.get_seq_length()
        if cache.get_seq_length(self.blocks) != past:
            raise ValueError("the KV cache was not filled by this model: it has no router logits")
        return past

    def of_block(self, block):
        """Return the change of the logits of a block's router."""
        return Shift(self, block)

    def shifted(self, block, own_BTE):
        """Keep a block's logits of new tokens; return those of the tokens before."""
        all_BNE, new = own_BTE, own_BTE.shape[1]
        if self.cache is not None:
            all_BNE = self.cache.layers[self.blocks + block].append(own_BTE)
        past = all_BNE.shape[1] - new
        before_BTE = all_BNE[:, past - 1 : -1] if past else own_BTE.roll(1, dims=1)
        follows_BT1 = self.follows_BT[..., None].to(own_BTE.device)
        return torch.where(follows_BT1, before_BTE, own_BTE)


class Shift:
    """From a router's own logits [B, T, E] to those of the tokens before."""

    def __init__(self, previous, block):
        self.previous, self.block = previous, block
        self.embedding_BTD = previous.embedding_BTD

    def __call__(self, own_BTE):
        """Return the logits of the token before each."""
        return self.previous.shifted(self.block, own_BTE)


class DsMoeAttention(nn.Module):
    """Grouped-query attention whose heads are experts; keys and values are shared."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.num_key_value_heads = config.head_dim, kv_heads
        self.num_key_value_groups = heads // kv_heads
        self.scaling, self.attention_dropout = self.head_dim**-0.5, 0.0
        width_q, width_kv = heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width_q, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width_kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width_kv, bias=False)
        self.o_proj = nn.Linear(width_q, config.hidden_size, bias=False)
        eps = config.rms_norm_eps
        self.q_norm = DsMoeRMSNorm(width_q, eps) if config.qk_norm else nn.Identity()
        self.k_norm = DsMoeRMSNorm(width_kv, eps) if config.qk_norm else nn.Identity()
        experts = config.num_attention_experts
        self.gate = DsMoeRouter(config, experts) if experts > 1 else None

    def forward(self, x_BTD, rule, positions, mask, cache):
        """Return the output [B, T, D]."""
        shape = (*x_BTD.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(x_BTD)).view(shape).transpose(1, 2)
        key = self.k_norm(self.k_proj(x_BTD)).view(shape).transpose(1, 2)
        value = self.v_proj(x_BTD).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *positions)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        y_BTHC, _ = attention(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)
        if self.gate is not None:
            scores_BTE = self.gate(x_BTD)
            if rule.kind == "threshold":  # other rules use all attention experts
                scores_BTE = rule.weights(scores_BTE)
            y = y_BTHC.view(*x_BTD.shape[:2], self.num_key_value_heads, -1, self.head_dim)
            y_BTHC = y * scores_BTE.to(y.dtype)[:, :, None, :, None]
        return self.o_proj(y_BTHC.reshape(*x_BTD.shape[:-1], -1))


class DsMoeExperts(nn.Module):
    """Stacked experts: gate and up [E, 2F, D], or up [E, F, D]; down [E, D, F]."""

    def __init__(self, config):
        super().__init__()
        experts, width, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.gated = config.mlp_type == "swiglu"
        if self.gated:
            self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        else:
            self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x_TD, weights_TE):
        """Return the weighted sum of the experts' outputs [T, D], expert by expert."""
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in weights_TE.any(0).nonzero()[:, 0].tolist():
            rows = weights_TE[:, expert].nonzero()[:, 0]
            out = F.linear(self._hidden(x_TD[rows], expert), self.down_proj[expert])
            y_TD.index_add_(0, rows, out.float() * weights_TE[rows, expert, None])
        return y_TD.to(x_TD.dtype)

    def _hidden(self, x_RD, expert):
        if self.gated:
            gate, up = F.linear(x_RD, self.gate_up_proj[expert]).chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.gelu(F.linear(x_RD, self.up_proj[expert]), approximate="tanh")


class DsMoeBlock(nn.Module):
    """A router with its experts, or a single expert without a router."""

    def __init__(self, config):
        super().__init__()
        kind, biased = config.router_type, config.score_correction_bias
        embedding = config.pregated == "previous_token_and_embedding"
        several, experts = config.num_experts > 1, config.num_experts
        self.gate = DsMoeRouter(config, experts, kind, embedding, biased) if several else None
        self.scale = config.routed_scaling_factor
        self.experts = DsMoeExperts(config)

    def forward(self, x_BTD, rule, real_T, gate_BTD, shift):
        """Return the output [B, T, D]."""
        x_TD = x_BTD.flatten(0, 1)
        if self.gate is None:
            weights_TE = x_TD.new_ones((len(x_TD), 1), dtype=torch.float32)
        else:
            scores_TE = self.gate(gate_BTD, shift).flatten(0, 1)
            bias_E = self.gate.e_score_correction_bias
            weights_TE = rule.weights(scores_TE, real_T, bias_E) * self.scale
        return self.experts(x_TD, weights_TE).view_as(x_BTD)


class DsMoeDecoderLayer(nn.Module):
    """Pre-norm attention and MoE block, each with a residual connection."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = DsMoeAttention(config, layer_idx)
        self.mlp = DsMoeBlock(config)
        self.input_layernorm = DsMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DsMoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(  # noqa: PLR0913 - what a layer is given
        self, x_BTD, gate_BTD, shift, rule, real_T, positions, mask, cache
    ):
        """Return the output and the experts' input [B, T, D]; `gate_BTD` None: the router's too."""
        y_BTD = self.self_attn(self.input_layernorm(x_BTD), rule, positions, mask, cache)
        x_BTD = x_BTD + y_BTD
        h_BTD = self.post_attention_layernorm(x_BTD)
        gate_BTD = h_BTD if gate_BTD is None else gate_BTD
        return x_BTD + self.mlp(h_BTD, rule, real_T, gate_BTD, shift), h_BTD


class DsMoePreTrainedModel(PreTrainedModel):
    """What transformers asks about."""

    config_class = DsMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["DsMoeDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012


class DsMoeModel(DsMoePreTrainedModel):
    """Embeddings, decoder layers, final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DsMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = DsMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = OlmoeRotaryEmbedding(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None):
        """Return the last hidden state [B, T, D]."""
        x_BTD = self.embed_tokens(input_ids)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None] + seen
        mask = create_causal_mask(
            self.config, x_BTD, attention_mask, cache, position_ids=position_ids
        )
        real_T = None
        if attention_mask is not None and attention_mask.ndim == 2:
            real_T = attention_mask[:, -x_BTD.shape[1] :].flatten().bool()
        positions = self.rotary_emb(x_BTD, position_ids)
        rule = Rule(self.config.inference_rule)
        pregated, gate_BTD, previous, shift = self.config.pregated, None, None, None
        if self.config.router_type == "hash":
            hashed_BTE = hashed_logits(input_ids, self.config.num_experts)
            shift = lambda own_BTE: hashed_BTE.to(own_BTE.device)  # noqa: E731
        if isinstance(pregated, str):
            width, eps = x_BTD.shape[-1:], self.config.rms_norm_eps
            previous = PreviousToken(
                cache,
                position_ids,
                attention_mask,
                F.rms_norm(x_BTD.float(), width, eps=eps),
                len(self.layers),
            )
        for index, layer in enumerate(self.layers):
            if previous is not None:
                shift = previous.of_block(index)
            x_BTD, h_BTD = layer(x_BTD, gate_BTD, shift, rule, real_T, positions, mask, cache)
            gate_BTD = h_BTD if pregated is True else None
        return self.norm(x_BTD)


class DsMoeForCausalLM(DsMoePreTrainedModel, GenerationMixin):
    """DS-MoE with a language-model head, for inference."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = DsMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(  # noqa: PLR0913 - what Hugging Face models take
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        use_cache=None,
        logits_to_keep=0,
        labels=None,
        **others,
    ):
        """Return the logits [B, T, V] and the KV cache; arguments as in transformers.

        With `labels` [B, T] also the loss: the mean cross-entropy of the next token, without the
        routers' losses, which only training has. Labels of -100 are ignored.
        """
        _refuse(others)
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        x_BTD = self.model(input_ids, attention_mask, position_ids, cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(x_BTD[:, keep])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(x_BTD.device)
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV)
        output[CACHE] = cache
        return output


def _refuse(others):
    """Raise ValueError for outputs that are requested and not computed here."""
    names = ("output_hidden_states", "output_attentions", "output_router_logits")
    asked = [f"{name}=True" for name in names if others.get(name)]
    if others.get("return_dict") is False:
        asked.append("return_dict=False")
    if others.get("inputs_embeds") is not None:
        asked.append("inputs_embeds")
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: this file takes token ids, and returns logits, KV cache and loss "
            "by name; leave it out, or load the folder with moefit"
        )
