"""What a model will take of memory, from its configuration and its checkpoint's headers.

Owns the estimates behind `MemoryBudget`: interpreter and libraries (measured), weights that are no
experts, KV cache, workspace, what a slot takes of a device. Allocates nothing.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch

from moefit.checkpoint import Checkpoint
from moefit.dsmoe.config import DsMoeConfig
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.host import (
    available_bytes,
    peak_process_bytes,
    process_bytes,
    swap_bytes,
    tightest_limit,
    total_bytes,
)
from moefit.serve.budget import MemoryBudget, format_bytes

# Pages of libraries and of the allocator that only computing touches. Measured by hand: the first
# forward and generate of a model of 50 kB raise the resident set by 60 to 75 MiB
# (tests/test_ledger.py holds the sum to the operating system's figure).
FIRST_USE = 96 << 20
_MIB = 1 << 20
# Bytes for each token of the vocabulary while one is drawn: logits in float64, sorted, with their
# places, as shares and as sums; the same in transformers' `generate`, in float32.
_SAMPLING = 64
_LOG = logging.getLogger(__name__)
_HEADS = ("num_attention_heads", "num_heads", "decoder_attention_heads", "n_heads")


def held_bytes(device: torch.device) -> int:
    """What this process holds of the budget's memory now: on a GPU, what torch has reserved.

    The context that the driver makes on a GPU is not torch's, and not in it.
    """
    return process_bytes() if device.type == "cpu" else torch.cuda.memory_reserved(device)


def peak_held_bytes(device: torch.device) -> int:
    """The most that `held_bytes` has been so far."""
    return peak_process_bytes() if device.type == "cpu" else torch.cuda.max_memory_reserved(device)


def heed_system(budget: MemoryBudget, device: torch.device) -> None:
    """Compare what a budget lets the process take with what the system lets it have.

    A process that outgrows its control group is killed without a word, so that this is said while
    it still can be: what surely does not fit is refused, what may not fit is a warning.

    Args:
        budget: With the total that is asked for.
        device: Of the model; a GPU's memory is none of the host's.

    Raises:
        BudgetTooSmallError: The model's floor is above what the system lets the process have.
        ConfigError: The budget would be filled beyond that; a smaller one works.
    """
    if device.type != "cpu":
        return
    most, limit = total_bytes(), tightest_limit()
    taken = budget.most if budget.total is None else min(budget.total, budget.most)
    free = available_bytes() + process_bytes()
    where = "this machine's memory"
    if limit is not None and limit.nbytes == most:
        where = f"the limit of this process's control group ({limit.file})"
    surely = not swap_bytes() and taken - FIRST_USE > most
    if surely and budget.floor - FIRST_USE > most:
        raise BudgetTooSmallError(
            f"{where} is {format_bytes(most)}, and this model needs at least "
            f"{format_bytes(budget.floor)}; raise it to {budget.floor} bytes, or give a shorter "
            "context"
        )
    if surely:
        asked = "without a budget" if budget.total is None else "in this budget"
        raise ConfigError(
            f"{asked} the model would take {format_bytes(taken)}, but {where} is "
            f"{format_bytes(most)}; give a budget (--memory) of "
            f"{max(budget.floor, min(most, free))} bytes or less, or raise the limit"
        )
    if taken > free or (budget.total is not None and budget.total > most):
        _LOG.warning(
            "warning: the model may take %s, but %s is %s, of which %s are free; if others need "
            "theirs, this process may be killed",
            *(format_bytes(taken), where, format_bytes(most), format_bytes(free)),
        )


def slot_bytes(size: int, device: torch.device) -> int:
    """What a slot of `size` takes of the budget.

    torch reserves GPU memory in segments: 2 MiB for tensors of up to 1 MiB, 20 MiB for those below
    10 MiB, and one of its own, in steps of 2 MiB, for a larger one. What is left over in a segment
    is no slot's, so every slot bears its share of it.

    >>> slot_bytes(9 << 20, torch.device("cuda")) >> 20
    10
    """
    if device.type == "cpu":
        return size
    segment = 2 * _MIB if size <= _MIB else 20 * _MIB
    if size >= 10 * _MIB:
        segment = -(-size // (2 * _MIB)) * 2 * _MIB
    return -(-segment // (segment // size))


def weight_bytes(checkpoint: Checkpoint, names: Iterable[str], dtype: torch.dtype) -> int:
    """Bytes of these tensors once loaded in `dtype`; integers keep their own."""
    spans = [checkpoint.spans[name] for name in names]
    return sum(
        span.nbytes // span.dtype.itemsize * dtype.itemsize
        if span.dtype.is_floating_point
        else span.nbytes
        for span in spans
    )


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token over all layers; an upper bound where layers differ.

    Where there is an encoder, also what it made of the token, which is kept as long.
    """
    text = config.get_text_config(decoder=True)
    heads = _first(text, *_HEADS)
    layers = _first(text, "num_decoder_layers", "num_hidden_layers", "decoder_layers", "num_layers")
    if not heads or not layers:
        return 0
    sides = 2 if config.is_encoder_decoder else 1  # self-attention and cross-attention
    if latent := _first(text, "kv_lora_rank"):  # multi-head latent attention caches what it expands
        per_layer = latent + sum(_first(text, name) or 0 for name in _BESIDE_LATENT)
    else:
        width = _first(text, "hidden_size", "d_model") or 0
        kv_heads = _first(text, "num_key_value_heads") or heads
        head_dim = _first(text, "head_dim", "d_kv", "kv_channels") or width // heads
        per_layer = 2 * kv_heads * head_dim
    encoded = _first(text, "hidden_size", "d_model") or 0 if config.is_encoder_decoder else 0
    return (layers * per_layer * sides + encoded) * dtype.itemsize


_BESIDE_LATENT = ("qk_rope_head_dim", "index_head_dim")


def _expanded_widths(text: Any) -> tuple[int, int]:
    """Of multi-head latent attention: one head's key and value, once expanded; else zeros."""
    if not _first(text, "kv_lora_rank"):
        return 0, 0
    key = sum(_first(text, name) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    return key, _first(text, "v_head_dim") or key


def workspace_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """What a forward pass over `tokens` needs beside weights and cache, logits of one included.

    Counted: the residual stream and what a block makes of it, sixteen tensors of the model's
    width; K rows a token of the routed experts, thrice; two rows of logits in float32, and what
    sampling makes of one; one layer's expanded keys and values of latent attention, thrice; and one
    layer's attention scores, where the family's attention makes them.
    """
    text = config.get_text_config(decoder=True)
    width = _first(text, "hidden_size", "d_model") or 0
    wide = max(
        _first(text, name) or 0
        for name in ("intermediate_size", "moe_intermediate_size", "d_ff", "decoder_ffn_dim")
    )
    k = _experts_per_token(text)
    vocabulary = _first(text, "vocab_size") or 0
    expanded = (_first(text, *_HEADS) or 0) * sum(_expanded_widths(text))
    per_token = (16 * width + 3 * wide + 3 * k * width + 3 * expanded) * dtype.itemsize
    scores = _score_bytes(config, tokens)
    logits = vocabulary * (2 * (4 + dtype.itemsize) + _SAMPLING)
    return FIRST_USE + tokens * per_token + scores + logits


def more_logits_bytes(
    config: Any, tokens: int, dtype: torch.dtype, sequences: int, prompt_logits: int
) -> int:
    """Logits of a step that are not in `workspace_bytes`: of other sequences, and of prompts.

    A row is there as the model made it and in float32; of prompts, as the model made them.
    """
    vocabulary = _first(config.get_text_config(decoder=True), "vocab_size") or 0
    others = (sequences - 1) * vocabulary * (4 + dtype.itemsize)
    return others + min(prompt_logits, tokens * vocabulary * dtype.itemsize)


def _score_bytes(config: Any, tokens: int) -> int:
    """Attention scores [H, T, T] where no kernel avoids them, as many as there are at once.

    That is without SDPA (attention sinks, soft caps), and with it where keys and values differ in
    width. Measured by hand, at 1024 to 1536 tokens: 2 to 2.4 tensors in Switch Transformers'
    encoder, 2.2 in Mixtral, 2.5 in DeepSeek-V3, 3.7 in gpt-oss.
    """
    text = config.get_text_config(decoder=True)
    key, value = _expanded_widths(text)
    if config._attn_implementation != "eager" and key == value:
        return 0
    at_once = 3 if config.is_encoder_decoder else 4
    return at_once * (_first(text, *_HEADS) or 0) * tokens**2 * 4


def _experts_per_token(config: Any) -> int:
    """K; of a DS-MoE, whose rule may be changed while it is served, all that there are."""
    if isinstance(config, DsMoeConfig):
        return config.num_experts
    return _first(config, "num_experts_per_tok", "moe_topk", "top_k_experts") or 1


def _first(config: Any, *names: str) -> int | None:
    """The first of these attributes that is a positive number; of lists the largest entry."""
    for name in names:
        value = _of_all_layers(config, name)
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _of_all_layers(config: Any, name: str) -> Any:
    """The attribute; a list of it by layer where transformers keeps it by layer."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(layer, name, None) or 0 for layer in config.per_layer_config]
    return getattr(config, name, None)
