"""CPU attention of a served model: compiled kernels where they apply, else torch.

Registers the attention function `moefit_cpu` with transformers; it computes what `sdpa` does. For
one new token, torch's kernel reads keys and values at a tenth of the memory bandwidth; ours at most
of it.

Shapes: B sequences, T new tokens, H query heads, G KV heads, L keys, C head width.
"""

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from moefit.quant.attention import AttentionOptions, KeySegment, attend, can_attend
from moefit.quant.cpu_kernels import kernels

NAME = "moefit_cpu"
_IGNORED_ARGUMENTS = {
    "position_ids",
    "cache_position",
    "sliding_window",
    "output_attentions",
    "use_cache",
}


_OTHER_ATTENTION = ("position_bias", "softcap", "s_aux", "cache")


def cpu_attention(  # noqa: PLR0913 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return attention as transformers' `sdpa` does.

    Args:
        module: The attention module.
        query: [B, H, T, C].
        key: [B, G, L, C].
        value: [B, G, L, C].
        attention_mask: None for all keys (T = 1) or causal attention (T = L). With a mask, torch
            is used.
        dropout: As in `sdpa`; kernels are only used if 0.
        scaling: Factor of the scores; None for 1 / sqrt(C).
        is_causal: None for the module's own setting.
        others: Further arguments of transformers; kernels are only used if they have no effect.

    Returns:
        [B, T, H, C] in the queries' dtype, and None.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    new, length = query.shape[2], key.shape[2]
    plain = attention_mask is None and not dropout and (new == 1 or (causal and new == length))
    extra = any(isinstance(others[name], Tensor) for name in others.keys() - _IGNORED_ARGUMENTS)
    extra = extra or any(others.get(name) is not None for name in _OTHER_ATTENTION)
    if plain and not extra and not (torch.is_grad_enabled() and query.requires_grad):
        out = _by_kernels(query, key, value, scaling)
        if out is not None:
            return out, None
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **others,
    )


def _by_kernels(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor | None:
    """Compute attention with kernels; return None if they do not support the tensors."""
    compiled = kernels()
    batch, _, new, _ = query.shape
    segments = [
        KeySegment(keys_GLC=key[b], values_GLZ=value[b], past=key.shape[2] - new, new=new)
        for b in range(batch)
    ]
    query_THC = query.transpose(1, 2).flatten(0, 1)
    if compiled is None or not segments or not can_attend(query_THC, segments[0]):
        return None
    out_THZ = attend(compiled, query_THC, segments, AttentionOptions(scale=scaling))
    return out_THZ.view(batch, new, *out_THZ.shape[1:])


def use_kernels(model: PreTrainedModel) -> Callable[[], None]:
    """Use the kernels for a model's attention on a CPU.

    The model is unchanged if its attention is not `sdpa`, if there are no compiled kernels, or if
    its family's code depends on the name of the attention implementation.

    Returns:
        A function that undoes the change.
    """
    before = model.config._attn_implementation
    on_cpu = model.device.type == "cpu"
    if before != "sdpa" or not on_cpu or kernels() is None or _depends_on_name(model):
        return lambda: None
    AttentionInterface.register(NAME, cpu_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME

    def undo() -> None:
        model.config._attn_implementation = before

    return undo


_COMPARED = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\s+in\b)")


def _depends_on_name(model: PreTrainedModel) -> bool:
    files = {type(module).__module__ for module in model.modules()}
    own = [sys.modules[name] for name in files if "modeling_" in name]
    return any(_COMPARED.search(inspect.getsource(module)) for module in own)
