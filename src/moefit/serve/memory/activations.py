"""Estimate the KV cache and the activations of a model from its configuration.

All sizes follow from the transformers configuration, without weights; the constants were measured.
"""

from typing import Any

import torch

from moefit.dsmoe.config import DsMoeConfig
from moefit.moe.routing import Rule
from moefit.quant.kv_int8 import bytes_per_row
from moefit.serve.layer.expert_executor import MAX_ROWS

# Pages of libraries and of the allocator that only computing touches. With torch's own products the
# first forward and generate of a model of 50 kB were measured to raise the resident set by 60 to 75
# MiB, with kernels by 4 to 10 (tests/serve/memory/test_estimate.py compares the sum with the
# operating system's figure).
FIRST_USE = 96 << 20
KERNEL_FIRST_USE = 24 << 20
# Bytes per token of the vocabulary while one token is sampled: logits in float64, sorted, with
# their indices, as probabilities and as sums; the same in transformers' `generate`, in float32.
_SAMPLING = 64
# The first is of models that compute some layers repeatedly, each time with a cache of its own.
_LAYERS = ("total_num_hidden_layers", "num_decoder_layers", "num_hidden_layers")
_LAYERS += ("decoder_layers", "num_layers")
_HEADS = ("num_attention_heads", "num_heads", "decoder_attention_heads", "n_heads")


def needs_whole_prompts(config: Any) -> bool:
    """Return whether the configuration says that prompts cannot be computed in parts.

    Encoders, and routing rules that count experts over all tokens of a batch.
    """
    rule = config.inference_rule if isinstance(config, DsMoeConfig) else "dense"
    return bool(config.is_encoder_decoder) or Rule.parse(rule).kind == "threshold_top_k"


def layers_with_cache(config: Any) -> int:
    """Return the number of layers that hold keys and values; 0 if it is not known."""
    return _first(config.get_text_config(decoder=True), *_LAYERS) or 0


def kv_bytes_per_token(config: Any, dtype: torch.dtype, *, int8: bool = False) -> int:
    """Return the bytes of one token in the KV cache, over all layers.

    Keys and values, and a DS-MoE's router logits where it keeps them (`kept_logit_bytes`). This is
    an upper bound where layers differ. With an encoder it includes the encoder's output for the
    token, which is held for the same time.

    Args:
        config: The model's transformers configuration.
        dtype: Of the model.
        int8: Whether keys and values are int8 with a scale per head, instead of in the dtype.
    """
    text = config.get_text_config(decoder=True)
    heads = _first(text, *_HEADS)
    layers = _first(text, *_LAYERS)
    if not heads or not layers:
        return 0
    sides = 2 if config.is_encoder_decoder else 1  # self-attention and cross-attention
    if latent := _first(text, "kv_lora_rank"):  # multi-head latent attention
        per_layer = latent + sum(_first(text, name) or 0 for name in _LATENT_EXTRAS)
    else:
        width = _first(text, "hidden_size", "d_model") or 0
        kv_heads = _first(text, "num_key_value_heads") or heads
        head_dim = _first(text, "head_dim", "d_kv", "kv_channels") or width // heads
        if int8:
            return layers * 2 * kv_heads * bytes_per_row(head_dim)
        per_layer = 2 * kv_heads * head_dim
    encoded = _first(text, "hidden_size", "d_model") or 0 if config.is_encoder_decoder else 0
    kept = config.kept_logit_bytes if isinstance(config, DsMoeConfig) else 0
    return (layers * per_layer * sides + encoded) * dtype.itemsize + kept


_LATENT_EXTRAS = ("qk_rope_head_dim", "index_head_dim")


def _expanded_widths(text: Any) -> tuple[int, int]:
    """Return the widths of an expanded key and value of latent attention; zeros without it."""
    if not _first(text, "kv_lora_rank"):
        return 0, 0
    key = sum(_first(text, name) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    return key, _first(text, "v_head_dim") or key


def workspace_bytes(
    config: Any,
    tokens: int,
    dtype: torch.dtype,
    *,
    first_use: int = FIRST_USE,
    context: int | None = None,
    copies: bool = False,
) -> int:
    """Return the bytes that a forward pass needs besides weights and cache.

    Per token of the pass: 16 tensors of the model's width for the residual stream and a block's
    intermediates, three of the widest MLP, and three of K rows for the routed experts. Per token of
    the context: three of one layer's expanded keys and values of latent attention, and four of the
    model's width where keys and values are copied. Per row of one call of the experts' kernel:
    hidden units in float32, 16 bits, digits and panels, and outputs in float32. In addition two
    rows of logits, also in float32, with what sampling makes of one, and one layer's attention
    scores where no fused kernel avoids them.

    Args:
        config: The model's transformers configuration.
        tokens: In the pass, over all sequences.
        dtype: Of activations.
        first_use: `FIRST_USE`, or `KERNEL_FIRST_USE` for a model that kernels compute.
        context: Tokens that the pass attends to, over all sequences; None: those of the pass.
        copies: Whether attention copies the keys and values of a layer, as torch's does.
    """
    text = config.get_text_config(decoder=True)
    width = _first(text, "hidden_size", "d_model") or 0
    wide = max(
        _first(text, name) or 0
        for name in (
            "intermediate_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "d_ff",
            "decoder_ffn_dim",
        )
    )
    k = experts_per_token(text)
    vocabulary = _first(text, "vocab_size") or 0
    expanded = (_first(text, *_HEADS) or 0) * sum(_expanded_widths(text))
    context = tokens if context is None else max(context, tokens)
    per_token = (16 * width + 3 * wide + 3 * k * width) * dtype.itemsize
    copied = 4 * width * (context - tokens) if copies else 0
    attended = (3 * expanded * context + copied) * dtype.itemsize
    scores = _score_bytes(config, tokens, context)
    logits = vocabulary * (2 * (4 + dtype.itemsize) + _SAMPLING)
    expert = _first(text, "moe_intermediate_size", "intermediate_size", "d_ff", "decoder_ffn_dim")
    routed = min(MAX_ROWS, k * tokens) * (14 * (expert or 0) + 8 * width)
    return first_use + tokens * per_token + attended + scores + logits + routed


def extra_logits_bytes(
    config: Any, tokens: int, dtype: torch.dtype, rows: int, prompt_logits: int
) -> int:
    """Return the bytes of a step's logits that `workspace_bytes` does not include.

    Args:
        config: The model's transformers configuration.
        tokens: In the step.
        dtype: Of logits; those of sampled tokens exist in float32 too.
        rows: Of sampled and drafted tokens; one of them is in `workspace_bytes`.
        prompt_logits: The largest size in bytes of a prompt's own logits.
    """
    vocabulary = _first(config.get_text_config(decoder=True), "vocab_size") or 0
    others = (rows - 1) * vocabulary * (4 + dtype.itemsize)
    return others + min(prompt_logits, tokens * vocabulary * dtype.itemsize)


def _score_bytes(config: Any, tokens: int, context: int) -> int:
    """Return the bytes of the attention scores [H, T, C] that exist at the same time.

    Zero where a fused kernel avoids them. They exist without SDPA (attention sinks, soft caps), and
    with it where keys and values differ in width. Measured at 1024 to 1536 tokens: 2 to 2.4 such
    tensors in Switch Transformers' encoder, 2.2 in Mixtral, 2.5 in DeepSeek-V3, 3.7 in gpt-oss.
    """
    text = config.get_text_config(decoder=True)
    key, value = _expanded_widths(text)
    if config._attn_implementation != "eager" and key == value:
        return 0
    at_once = 3 if config.is_encoder_decoder else 4
    return at_once * (_first(text, *_HEADS) or 0) * tokens * context * 4


def experts_per_token(config: Any) -> int:
    """Return K; for DS-MoE, whose routing rule may change while serving, all experts."""
    if isinstance(config, DsMoeConfig):
        return config.num_experts
    return _first(config, "num_experts_per_tok", "moe_topk", "top_k_experts") or 1


def _first(config: Any, *names: str) -> int | None:
    """Return the first of these attributes that is positive; of a list its largest entry."""
    for name in names:
        value = _of_all_layers(config, name)
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _of_all_layers(config: Any, name: str) -> Any:
    """Return the attribute; a list of its values where transformers stores it per layer."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(layer, name, None) or 0 for layer in config.per_layer_config]
    return getattr(config, name, None)
