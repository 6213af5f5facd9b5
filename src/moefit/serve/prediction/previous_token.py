"""Read the experts of all blocks before a step begins, in exact mode.

Models with `pregated: previous_token` route a token by the router logits of the token before, which
lie in the KV cache; with `previous_token_and_embedding` what routers make of the token's embedding
is added to them. So before a step of one token per sequence the choice of every block is known.
Nothing is guessed: all experts that blocks lack are requested at once, in the order of the blocks,
as far as there are slots, and read while the blocks before are computed. Outputs do not depend on
it.

Shapes: B sequences, E experts.
"""

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moefit.cache_argument import given_cache
from moefit.dsmoe.block import DsMoeRouter
from moefit.dsmoe.config import PREVIOUS_AND_EMBEDDING
from moefit.dsmoe.previous_token import logits_of_last, normed_embedding
from moefit.moe.routing import Routing, Rule
from moefit.serve.cache.swaps import SharedState
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.prediction.pregated import most_wanted, read_absent

_LOG = logging.getLogger(__name__)


class KnownChoices:
    """The choice of every block, known since the step began: a `Predictor` that is never wrong.

    Args:
        model: The model.
        blocks: Number of its blocks.
    """

    def __init__(self, model: PreTrainedModel, blocks: int):
        self._model, self._blocks = model, blocks
        self._cache: weakref.ref[Any] | None = None
        self._sees_embedding = model.config.pregated == PREVIOUS_AND_EMBEDDING
        self._embedding_BD: Tensor | None = None

    def begin(self, named: dict[str, Any]) -> None:
        """Take the arguments of the forward pass that begins."""
        ids_BT, cache = named.get("input_ids"), given_cache(named)
        few = isinstance(ids_BT, Tensor) and ids_BT.shape[1] == 1
        self._cache = weakref.ref(cache) if few and cache is not None else None
        self._embedding_BD = None
        if self._sees_embedding and self._cache is not None:
            assert isinstance(ids_BT, Tensor)
            with torch.inference_mode():
                x_BD = self._model.get_input_embeddings()(ids_BT[:, 0])
                self._embedding_BD = normed_embedding(x_BD, self._model.config.rms_norm_eps)

    def logits(self, block: int) -> Tensor | None:
        """Return the logits [B, E] by which a block that is not computed yet will route.

        None unless the step has one token per sequence, each with one before it.
        """
        cache = None if self._cache is None else self._cache()
        if cache is None:
            return None
        logits_BE = logits_of_last(cache, block, self._blocks)
        if logits_BE is None or not self._sees_embedding:
            return logits_BE
        assert self._embedding_BD is not None
        return logits_BE + self._router(block).logits_of_embedding(self._embedding_BD)

    def _router(self, block: int) -> DsMoeRouter:
        router = self._model.get_submodule(f"model.layers.{block}.mlp.gate")
        assert isinstance(router, DsMoeRouter)
        return router

    def scores(self, block: int, ahead: int, x_TD: Tensor) -> Tensor | None:
        """Return scores whose largest a later block chooses [T, E]; see `Predictor`."""
        if block + ahead >= self._blocks:
            return None
        logits_BE = self.logits(block + ahead)
        if logits_BE is None or len(logits_BE) != len(x_TD):
            return None
        bias_E = self._router(block + ahead).e_score_correction_bias
        scores_BE = logits_BE.softmax(-1)
        return scores_BE if bias_E is None else scores_BE + bias_E

    def choice(self, block: int) -> Sequence[int]:
        """Return the experts that a block will choose, most wanted first; none if unknown."""
        logits_BE = self.logits(block)
        if logits_BE is None:
            return ()
        rule = Rule.parse(self._model.config.inference_rule)
        bias_E = self._router(block).e_score_correction_bias
        return most_wanted(logits_BE.softmax(-1), rule, bias_E)


class StepReader:
    """Reads what blocks lack before each step begins; a `StepWatcher` only by its place.

    Args:
        model: The model, which is given a hook until `close`.
        blocks: The served blocks, in order.
        shared: Their state.

    Attributes:
        choices: What is known of the step.
        failure: The error after which it was switched off; empty if there was none.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[VirtualExperts], shared: SharedState
    ):
        self._blocks, self._shared = blocks, shared
        self.choices = KnownChoices(model, len(blocks))
        self.trial, self.failure = None, ""  # nothing is tried: reading early is never wasted
        self._hook: RemovableHandle = model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def close(self) -> None:
        """Remove the hook."""
        self._hook.remove()

    def chosen(self, block: int, routing: Routing) -> None:
        """The choice is the one that was known."""

    def read(self, block: int, x_TD: Tensor) -> None:
        """Nothing is left to read: all blocks' experts are requested when a step begins."""

    def computed(self, block: int) -> None:
        """Nothing follows the end of a block."""

    def _begin(self, _model: nn.Module, _given: Any, named: dict[str, Any]) -> None:
        self.choices.begin(named)
        with self._shared.lock:
            if self._shared.watcher is not self or not self._may_read():
                return
            try:
                self._read()
            except Exception as error:  # noqa: BLE001 - the step fetches its experts anyway
                self._shared.watcher = None
                self.failure = f"{type(error).__name__}: {error}"
                _LOG.warning("nothing is read early any more: %s", self.failure, exc_info=error)

    def _may_read(self) -> bool:
        """Return whether the step fetches its experts: not while experts are only recorded."""
        policy = self._shared.policy
        fetches = policy.mode == "exact" and policy.residency == "manager"
        return fetches and all(one.recorder is None for one in self._blocks)

    def _read(self) -> None:
        for number, experts in enumerate(self._blocks):
            if len(experts.slot_table.residents) == experts.num_experts:
                continue
            with torch.inference_mode():
                read_absent(experts, self.choices.choice(number))
