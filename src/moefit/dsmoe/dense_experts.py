"""Dense training of transformers' MoE models: all experts of a block as one wide MLP.

After `register_dense_experts()`, `model.set_experts_implementation("moefit_dense")` applies to any
model whose experts use transformers' `ExpertsInterface`. With `num_experts_per_tok` equal to
`num_experts` this is DS-MoE's dense training, on the model's own parameters.

Shapes: T tokens, D model width, K chosen per token, E experts.
"""

from typing import Any

from torch import Tensor
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

from moefit.errors import UnsupportedModelError
from moefit.moe.experts import expert_weights, scattered_scores, wide_experts
from moefit.moe.routing import Routing

DENSE_EXPERTS = "moefit_dense"


def register_dense_experts() -> str:
    """Register `moefit_dense` with transformers and return its name; may be called repeatedly."""
    ExpertsInterface.register(DENSE_EXPERTS, dense_experts_forward)
    return DENSE_EXPERTS


def dense_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute every expert for every token, as transformers' `ExpertsInterface` requires.

    Exact for any K, because experts that were not chosen have a score of zero, but efficient only
    for K near E.

    Args:
        experts: A module decorated with transformers' `use_experts_implementation`.
        hidden_states: x_TD.
        top_k_index: ids_TK.
        top_k_weights: weights_TK.

    Returns:
        y_TD.

    Raises:
        UnsupportedModelError: The experts are not plain stacked matrices.
    """
    if reasons := unsupported(experts):
        raise UnsupportedModelError(
            f"{type(experts).__name__} cannot be computed as one wide MLP: {'; '.join(reasons)}. "
            'The nearest that works is model.set_experts_implementation("eager")'
        )
    weights = expert_weights(experts)
    routing = Routing(top_k_index, top_k_weights)
    scores_TE = scattered_scores(routing, weights.w_in_EID.shape[0])
    return wide_experts(hidden_states, scores_TE, weights)


def unsupported(experts: Any) -> list[str]:
    """Return the properties of experts that the wide MLP does not support."""
    own_gate = type(experts)._apply_gate is not _default_apply_gate
    reasons = {
        "its matrices are stored transposed": experts.is_transposed,
        "its gate and up rows are interleaved": experts.has_gate and not experts.is_concatenated,
        "its gate is not act(gate) * up": experts.has_gate and own_gate,
        "it adds biases": experts.has_bias,
        "it normalises each expert's output": experts.has_post_expert_norm,
    }
    return [reason for reason, applies in reasons.items() if applies]
