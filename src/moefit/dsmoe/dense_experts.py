"""Dense training of a stock model: all experts of a block as one wide MLP, in transformers' hook.

Owns the experts implementation `moefit_dense`. After `register_dense_experts()`, any model whose
experts go through transformers' `ExpertsInterface` computes this way from
`model.set_experts_implementation("moefit_dense")` on; with `num_experts_per_tok` equal to
`num_experts` that is DS-MoE's dense training, and the parameters stay the model's own. Knows
nothing of model families, losses or export.

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
    """Make `moefit_dense` known to transformers, and give its name; may be called again."""
    ExpertsInterface.register(DENSE_EXPERTS, dense_experts_forward)
    return DENSE_EXPERTS


def dense_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """y_TD of x_TD, ids_TK and weights_TK; every expert is computed for every token.

    Exact for any K, as an expert that was not chosen gets the score zero, but worth its price
    only for K near E. `experts` is a module that transformers' `use_experts_implementation`
    decorates, and the other parameters' names are that interface's.

    Raises UnsupportedModelError if the experts are not plain stacked matrices.
    """
    reasons = _unsupported(experts)
    if reasons:
        raise UnsupportedModelError(
            f"{type(experts).__name__} cannot be computed as one wide MLP: {'; '.join(reasons)}. "
            'The nearest that works is model.set_experts_implementation("eager")'
        )
    weights = expert_weights(experts)
    routing = Routing(top_k_index, top_k_weights)
    scores_TE = scattered_scores(routing, weights.w_in_EID.shape[0])
    return wide_experts(hidden_states, scores_TE, weights)


def _unsupported(experts: Any) -> list[str]:
    """What of these experts the wide MLP would get wrong."""
    own_gate = type(experts)._apply_gate is not _default_apply_gate
    findings = {
        "its matrices are stored transposed": experts.is_transposed,
        "its gate and up rows are interleaved": experts.has_gate and not experts.is_concatenated,
        "its gate is not act(gate) * up": experts.has_gate and own_gate,
        "it adds biases": experts.has_bias,
        "it normalises each expert's output": experts.has_post_expert_norm,
    }
    return [finding for finding, found in findings.items() if found]
