"""Compute a whole model's experts and linear layers with the compiled CPU kernels.

torch's bfloat16 products need matrix units or AVX-512 to be fast; the kernels read bfloat16 weights
at any level and compute all experts of a step in one call. For models that are loaded as a whole,
to evaluate them or generate text; served models have slots instead.

Shapes: T tokens, D model width, E experts, K chosen per token, I rows of an expert's input matrix,
R routed rows.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from moefit.dsmoe.dense_experts import unsupported
from moefit.moe.experts import ExpertWeights, expert_weights, grouped_experts
from moefit.moe.layouts import activation_name
from moefit.moe.routing import Routing
from moefit.quant.cpu_kernels import NATIVE_DTYPES, KernelMlp, Kernels, kernels
from moefit.serve.hf.attention import use_kernels as use_attention_kernels
from moefit.serve.hf.native_linear import use_linear_kernels

KERNEL_EXPERTS = "moefit_kernels"
TOKENS_AT_ONCE = 256  # limits the memory of the experts' outputs

_known: "WeakKeyDictionary[nn.Module, _Stack]" = WeakKeyDictionary()


class _Stack:
    """The kernels' view of a module's stacked experts."""

    def __init__(self, weights: ExpertWeights, activation: str):
        self.pointers = weights.w_in_EID.data_ptr(), weights.w_out_EDF.data_ptr()
        matrices = zip(weights.w_in_EID.unbind(), weights.w_out_EDF.unbind(), strict=True)
        self.mlps = [
            KernelMlp(w_in=w_in, w_out=w_out, activation=activation, gated=weights.gated)
            for w_in, w_out in matrices
        ]


def use_kernels(model: PreTrainedModel) -> bool:
    """Compute a model's inference on a CPU with the kernels from now on.

    Args:
        model: A DS-MoE or OLMoE whose parameters stay where they are.

    Returns:
        Whether anything changed: False without compiled kernels, or on another device.
    """
    if kernels() is None or model.device.type != "cpu":
        return False
    use_linear_kernels(model)
    use_attention_kernels(model)
    ExpertsInterface.register(KERNEL_EXPERTS, kernel_experts_forward)
    model.set_experts_implementation(KERNEL_EXPERTS)
    return True


def kernel_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the chosen experts with the kernels, as transformers' `ExpertsInterface` requires.

    What the kernels do not support is computed by `grouped_experts`: gradients, other dtypes and
    devices, unknown activations.

    Args:
        experts: A module decorated with transformers' `use_experts_implementation`.
        hidden_states: x_TD.
        top_k_index: ids_TK; the id E is padding.
        top_k_weights: weights_TK.

    Returns:
        y_TD.
    """
    weights = expert_weights(experts)
    compiled, routing = kernels(), Routing(top_k_index, top_k_weights)
    stack = None if compiled is None else _stack(experts, weights, hidden_states)
    if compiled is None or stack is None:
        return grouped_experts(hidden_states, routing, weights)
    parts = zip(
        hidden_states.split(TOKENS_AT_ONCE),
        routing.ids_TK.split(TOKENS_AT_ONCE),
        routing.weights_TK.split(TOKENS_AT_ONCE),
        strict=True,
    )
    outputs = [_compute(compiled, stack.mlps, x, Routing(ids, by)) for x, ids, by in parts]
    return torch.cat(outputs) if outputs else torch.zeros_like(hidden_states)


def _compute(
    compiled: Kernels, mlps: Sequence[KernelMlp], x_TD: Tensor, routing: Routing
) -> Tensor:
    num_tokens, num_chosen = routing.ids_TK.shape
    if num_tokens == 1:
        y_RD = _one_token(compiled, mlps, x_TD, routing.ids_TK[0].tolist())
        return compiled.weighted_sum(y_RD, routing.weights_TK, x_TD.dtype)[0]
    ids_R = routing.ids_TK.flatten()
    counts_E = torch.bincount(ids_R, minlength=len(mlps) + 1)[: len(mlps)].tolist()
    routed = sum(counts_E)
    order_R = ids_R.argsort(stable=True)[:routed]
    groups = (order_R // num_chosen).split(counts_E)
    chosen = [number for number, count in enumerate(counts_E) if count]
    output_RD = compiled.experts(x_TD, [mlps[n] for n in chosen], [groups[n] for n in chosen])
    allocate = torch.empty if routed == len(ids_R) else torch.zeros
    y_RD = allocate(num_tokens * num_chosen, x_TD.shape[1])
    y_RD.index_copy_(0, order_R, output_RD)
    return compiled.weighted_sum(y_RD, routing.weights_TK, x_TD.dtype)[0]


def _one_token(
    compiled: Kernels, mlps: Sequence[KernelMlp], x_1D: Tensor, ids_K: Sequence[int]
) -> Tensor:
    """Return y_KD, zeros for padding, without sorting tokens by expert."""
    rows = [row for row, expert in enumerate(ids_K) if expert < len(mlps)]
    allocate = torch.empty if len(rows) == len(ids_K) else torch.zeros
    y_KD = allocate(len(ids_K), x_1D.shape[1])
    if rows:
        compiled.one_token(x_1D, [mlps[ids_K[row]] for row in rows], rows, y_KD)
    return y_KD


def _stack(experts: nn.Module, weights: ExpertWeights, x_TD: Tensor) -> _Stack | None:
    """Return the kernels' view of the experts; None if they cannot compute this call."""
    known = _known.get(experts)
    pointers = weights.w_in_EID.data_ptr(), weights.w_out_EDF.data_ptr()
    if known is None or known.pointers != pointers:
        activation = activation_name(weights.activate, gated=weights.gated)
        matrices = weights.w_in_EID, weights.w_out_EDF
        if activation is None or not all(map(_readable, matrices)) or unsupported(experts):
            return None
        known = _known[experts] = _Stack(weights, activation)
    same = x_TD.device.type == "cpu" and x_TD.dtype == weights.w_in_EID.dtype
    tracked = torch.is_grad_enabled() and (
        x_TD.requires_grad or weights.w_in_EID.requires_grad or weights.w_out_EDF.requires_grad
    )
    return known if same and not tracked else None


def _readable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in NATIVE_DTYPES and weight.is_contiguous()
