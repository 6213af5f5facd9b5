"""Read the experts of a pre-gated model one block early, in exact mode.

In a pre-gated model the router of the next block is given the inputs of the present one, so its
choice is known before the present block's experts are computed. Nothing is guessed: all experts
that the next block lacks are read while this one and the next attention block are computed, as far
as there are slots. Outputs do not depend on it.

Shapes: T tokens, D model width, E experts.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefit.dsmoe.block import DsMoeBlock, DsMoeRouter
from moefit.moe.routing import Routing, Rule, route
from moefit.serve.cache.swaps import SharedState
from moefit.serve.layer.moe_layer import VirtualExperts

_LOG = logging.getLogger(__name__)


def is_pregated(model: nn.Module) -> bool:
    """Return whether a model knows experts early, by the block or the token before."""
    return isinstance(model, PreTrainedModel) and bool(getattr(model.config, "pregated", False))


class PreGates:
    """The routers of a pre-gated model, as a `Predictor` that is never wrong one block ahead.

    Args:
        model: The model.
        blocks: The served blocks, in order.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[VirtualExperts]):
        self._model = model
        self._parents = [model.get_submodule(one.block.parent) for one in blocks]

    def scores(self, block: int, ahead: int, x_TD: Tensor) -> Tensor | None:
        """Return scores whose largest the next block chooses [T, E]; None of later ones."""
        if ahead != 1 or block + 1 >= len(self._parents):
            return None
        gate = self._gate(block + 1)
        scores_TE, bias_E = gate.scores(x_TD), gate.e_score_correction_bias
        return scores_TE if bias_E is None else scores_TE + bias_E

    def _gate(self, block: int) -> DsMoeRouter:
        parent = self._parents[block]
        assert isinstance(parent, DsMoeBlock) and parent.gate is not None
        return parent.gate

    def choice(self, block: int, x_TD: Tensor) -> Sequence[int]:
        """Return the experts that the block after `block` will choose, most wanted first."""
        if block + 1 >= len(self._parents):
            return ()
        gate, rule = self._gate(block + 1), Rule.parse(self._model.config.inference_rule)
        return most_wanted(gate.scores(x_TD), rule, gate.e_score_correction_bias)


def most_wanted(scores_TE: Tensor, rule: Rule, bias_E: Tensor | None) -> Sequence[int]:
    """Return the experts that a rule chooses for scores, those of the largest weights first.

    Args:
        scores_TE: A router's.
        rule: The rule.
        bias_E: What the router adds to them for its choice; None for nothing.
    """
    routing = route(scores_TE, rule, None, bias_E)
    num_experts = scores_TE.shape[1]
    weight_E = scores_TE.new_zeros(num_experts + 1)  # the last entry is padding
    weight_E.scatter_add_(0, routing.ids_TK.flatten(), routing.weights_TK.flatten())
    chosen = set(routing.ids_TK.flatten().tolist()) - {num_experts}
    weights = weight_E.tolist()
    return sorted(chosen, key=lambda one: (-weights[one], one))


def read_absent(experts: VirtualExperts, wanted: Sequence[int]) -> None:
    """Start to read those of these experts that a block lacks, as far as there are slots.

    Args:
        experts: The block; the caller holds the lock.
        wanted: What its next step will choose; none of them is evicted.
    """
    table = experts.slot_table
    loading, protected = set(table.filling), set(wanted)
    for expert in wanted:
        if expert in table.residents or expert in loading:
            continue
        with torch.inference_mode():
            if not experts.swaps.prefetch(expert, protected):
                return


class EarlyReader:
    """A `StepWatcher` that reads what the next block lacks.

    Args:
        blocks: The served blocks, in order.
        shared: Their state.
        gates: Know the next block's experts.

    Attributes:
        failure: The error after which it was switched off; empty if there was none.
    """

    def __init__(self, blocks: Sequence[VirtualExperts], shared: SharedState, gates: PreGates):
        self._blocks, self._shared, self.gates = blocks, shared, gates
        self.trial, self.failure = None, ""  # nothing is tried: reading early is never wasted

    def chosen(self, block: int, routing: Routing) -> None:
        """The choice is the one that was known."""

    def computed(self, block: int) -> None:
        """Nothing follows the end of a block."""

    def read(self, block: int, x_TD: Tensor) -> None:
        """Start to read what the next block lacks; see `StepWatcher`."""
        if block + 1 >= len(self._blocks):
            return
        try:
            read_absent(self._blocks[block + 1], self.gates.choice(block, x_TD))
        except Exception as error:  # noqa: BLE001 - the step fetches its experts anyway
            if self._shared.watcher is self:
                self._shared.watcher = None
            self.failure = f"{type(error).__name__}: {error}"
            _LOG.warning("nothing is read early any more: %s", self.failure, exc_info=error)
