"""DS-MoE as a transformers model: decoder layer, base model and language-model head.

The `Rule` by which experts are chosen is read from the configuration in each forward pass:
`training_rule` in train mode, `inference_rule` in eval mode.

Shapes: B sequences, T tokens, D model width, V vocabulary, L layers, E experts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.olmoe.modeling_olmoe import OlmoeRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from moefit.cache_argument import CACHE_NAME, one_cache
from moefit.dsmoe.attention import DsMoeAttention, DsMoeRMSNorm
from moefit.dsmoe.block import (
    DsMoeBlock,
    DsMoeExperts,
    DsMoeGatedExperts,
    DsMoeRouter,
    GrapRouter,
    HashRouter,
)
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.losses import RouterLossWeights, language_model_loss, router_loss
from moefit.dsmoe.previous_token import PreviousToken, Shift, normed_embedding
from moefit.errors import ConfigError
from moefit.moe.routing import Rule, hashed_logits


class DsMoeRotaryEmbedding(OlmoeRotaryEmbedding):
    """transformers' rotary position embedding."""


class DsMoeDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MoE block, each with a residual connection."""

    def __init__(self, config: DsMoeConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DsMoeAttention(config, layer_idx)
        self.mlp = DsMoeBlock(config)
        self.input_layernorm = DsMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DsMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.returns_gate = config.pregated is True

    def forward(
        self,
        x_BTD: Tensor,
        *,
        rule: Rule,
        real_T: Tensor | None,
        allowed_BE: Tensor | None = None,
        gate_BTD: Tensor | None = None,
        shift: Shift | None = None,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the layer; arguments as for `DsMoeAttention` and `DsMoeBlock`.

        Returns:
            The output; with `pregated=True` also the block's inputs, for the next router.
        """
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rule=rule, **kwargs)[0]
        h_BTD = self.post_attention_layernorm(x_BTD)
        y_BTD = x_BTD + self.mlp(h_BTD, rule, real_T, allowed_BE, gate_BTD, shift)
        return (y_BTD, h_BTD) if self.returns_gate else y_BTD


class DsMoePreTrainedModel(PreTrainedModel):
    """Base class: initialisation, and the features that transformers asks about."""

    config: DsMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DsMoeDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012 - of choices
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(DsMoeRouter, index=0, layer_name="mlp"),
        "attention_router_logits": OutputRecorder(DsMoeRouter, index=0, layer_name="self_attn"),
        "hidden_states": DsMoeDecoderLayer,
        "attentions": OutputRecorder(DsMoeAttention, index=1),
    }

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return the experts implementation, by default this model's own, not grouped_mm."""
        return super().get_correct_experts_implementation(requested_experts or "eager")

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches this file for the decorator, which is in block.py.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DsMoeGatedExperts | DsMoeExperts):
            for weight in module.parameters():
                init.normal_(weight, std=std)
        elif isinstance(module, DsMoeRouter):
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
            if isinstance(module, GrapRouter | HashRouter):
                return
            init.normal_(module.weight, std=std)
            if module.embedding_weight is not None:
                init.normal_(module.embedding_up, std=module.embedding_up.shape[1] ** -0.5)
                init.zeros_(module.embedding_bias)
                init.normal_(module.embedding_weight, std=std)


class DsMoeModel(DsMoePreTrainedModel):
    """Embeddings, decoder layers, final norm."""

    def __init__(self, config: DsMoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DsMoeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = DsMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DsMoeRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # noqa: PLR0913 - what Hugging Face models take
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        rule: str | None = None,
        allowed_LBE: Tensor | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Compute the last hidden state [B, T, D]; other arguments as in transformers.

        Args:
            input_ids: [B, T].
            attention_mask: [B, cached + T].
            position_ids: [B, T].
            past_key_values: The KV cache.
            cache: The same under its newer name; give one of them.
            inputs_embeds: [B, T, D], instead of `input_ids`.
            use_cache: Whether to return a KV cache.
            rule: Which experts are used; None for the configuration's rule.
            allowed_LBE: False for MLP experts that a sequence may not use. The rule then chooses
                among the others; see `moe.routing.route_allowed`.
            kwargs: Passed on to the layers.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds` are given.
            ConfigError: The rule is unknown, the KV cache lacks what `pregated` needs, or routers
                that hash token ids are given none.
            UnsupportedModelError: The KV cache cannot hold what `pregated` needs.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = one_cache(past_key_values, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None] + seen
        causal_mask = create_causal_mask(
            self.config, x_BTD, attention_mask, cache, position_ids=position_ids
        )
        if rule is None:
            rule = self.config.training_rule if self.training else self.config.inference_rule
        shared = {
            "rule": Rule.parse(rule),
            "real_T": _real_tokens(attention_mask, x_BTD.shape[1]),
            "position_embeddings": self.rotary_emb(x_BTD, position_ids),
            "attention_mask": causal_mask,
            CACHE_NAME: cache,
        }
        pregated = self.config.pregated
        previous = self._previous(cache, x_BTD, position_ids, attention_mask)
        if self.config.router_type == "hash":
            kwargs["shift"] = self._by_token(input_ids)
        if pregated is True:
            kwargs["gate_BTD"] = None  # the first router is given its own block's inputs
        for index, layer in enumerate(self.layers):
            allowed_BE = None if allowed_LBE is None else allowed_LBE[index]
            if previous is not None:
                kwargs["shift"] = previous.of_block(index)
            x_BTD = layer(x_BTD, **shared, allowed_BE=allowed_BE, **kwargs)
            if pregated is True:
                x_BTD, kwargs["gate_BTD"] = x_BTD
        named: dict[str, Any] = {CACHE_NAME: cache}
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x_BTD), **named)

    def _by_token(self, input_ids: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Return by which logits tokens of these ids are routed."""
        if input_ids is None:
            raise ConfigError(
                "router_type='hash' chooses experts by token ids, but inputs_embeds were given; "
                "give input_ids"
            )
        hashed_BTE = hashed_logits(input_ids, self.config.num_experts)
        return lambda own_BTE: hashed_BTE.to(own_BTE.device)  # layers may be on several

    def _previous(
        self,
        cache: Cache | None,
        x_BTD: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
    ) -> PreviousToken | None:
        """Return by which token each is routed; None for itself."""
        if not self.config.by_token_before:
            return None
        if self.training and self.gradient_checkpointing:
            cache = None  # layers are given none either, and the backward pass repeats them
        embedding_BTD = normed_embedding(x_BTD, self.config.rms_norm_eps)
        return PreviousToken.of(
            cache, position_ids, attention_mask, embedding_BTD, len(self.layers)
        )


def _real_tokens(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Return real_T, False for padding, of the last `length` tokens of a mask [B, cached + T]."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -length:].flatten().bool()


class DsMoeForCausalLM(DsMoePreTrainedModel, GenerationMixin):
    """DS-MoE with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DsMoeConfig):
        super().__init__(config)
        self.model = DsMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_inference_rule(self, rule: str | Rule) -> str:
        """Set the rule of eval mode and return the previous one.

        Raises:
            ConfigError: The rule is unknown, selects more experts than there are, or is not one by
                which the model's routers choose.
        """
        rule = Rule.parse(rule) if isinstance(rule, str) else rule
        self.config.check_rule(rule)
        before, self.config.inference_rule = self.config.inference_rule, str(rule)
        return before

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Compute logits and, with labels, the loss.

        Args:
            input_ids: [B, T].
            attention_mask: [B, cached + T].
            labels: [B, T]; -100 is ignored.
            output_router_logits: Whether to return `router_logits` and `attention_router_logits`,
                one tensor per layer.
            logits_to_keep: Number of last positions, or their indices; 0 for all.
            kwargs: Arguments of `DsMoeModel.forward`.

        Returns:
            `logits` [B, T, V]. With labels also `loss`, cross-entropy plus weighted router losses,
            and `aux_loss`, the router losses alone.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        output_router_logits = output_router_logits or labels is not None  # the losses need them
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_router_logits=output_router_logits,
            output_attention_router_logits=output_router_logits,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        routers = {
            name: outputs[name]
            for name in ("router_logits", "attention_router_logits")
            if output_router_logits
        }
        loss = aux_loss = None
        if labels is not None:
            aux_loss = self._router_loss(routers, _real_tokens(attention_mask, labels.shape[1]))
            loss = language_model_loss(logits, labels) + aux_loss
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        for name, logits_by_layer in routers.items():
            output[name] = logits_by_layer
        return output

    def _router_loss(self, routers: Mapping[str, Any], real_T: Tensor | None) -> Tensor:
        """Return the weighted losses of the routers of both kinds, over real tokens."""
        return router_loss(
            routers["router_logits"],
            routers["attention_router_logits"],
            router_loss_weights(self.config),
            real_T,
        )


def router_loss_weights(config: DsMoeConfig) -> RouterLossWeights:
    """Return the configuration's loss weights; load balancing counts the training rule's top k."""
    return RouterLossWeights(
        mlp_mi=config.mlp_mi_loss_coef,
        attention_mi=config.attention_mi_loss_coef,
        load_balancing=config.load_balancing_loss_coef,
        z=config.z_loss_coef,
        k=Rule.parse(config.training_rule).k or 1,
    )


def register() -> None:
    """Register DS-MoE with transformers' Auto classes; may be called repeatedly."""
    AutoConfig.register("dsmoe", DsMoeConfig, exist_ok=True)
    AutoModel.register(DsMoeConfig, DsMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(DsMoeConfig, DsMoeForCausalLM, exist_ok=True)
