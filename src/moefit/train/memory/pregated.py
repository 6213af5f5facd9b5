"""Teach pre-gated routers the choice of the routers that they replace.

A fine-tune from a model whose routers are given their own block's inputs begins with these routers,
given the inputs of the block before, or those of the token before. A loss keeps their choice near
the one that the old routers, frozen, make from the token's own inputs of the block: the mean over
tokens of KL(old || new), summed over blocks (as in ReMoE's gate-only fine-tune, arXiv 2605.27081).

Shapes: B sequences, T tokens, D model width, E experts.
"""

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moefit.checkpoint.config import read_config
from moefit.dsmoe.block import DsMoeBlock, DsMoeRouter
from moefit.errors import ConfigError
from moefit.train.config import TrainConfig
from moefit.train.model import initial_folder


class GateTeacher:
    """The old routers, frozen, and what their blocks are given in the present pass.

    Args:
        model: A pre-gated model with the weights that training begins with.
        weight: Of the loss.
    """

    def __init__(self, model: PreTrainedModel, weight: float):
        blocks = [one for one in model.modules() if isinstance(one, DsMoeBlock)]
        self.weight = weight
        # With `pregated=True` the first block's router is given what the old one was.
        self._first = int(model.config.pregated is True)
        self._old: list[DsMoeRouter] = []
        self._inputs: dict[int, Tensor] = {}
        for number, block in enumerate(blocks):
            assert block.gate is not None
            self._old.append(copy.deepcopy(block.gate).requires_grad_(False))
            block.register_forward_pre_hook(self._hook(number))

    @classmethod
    def of(cls, config: TrainConfig, model: PreTrainedModel) -> Self | None:
        """Return the teacher of a run; None if it has none. Call this before the first step.

        Raises:
            ConfigError: The model is not pre-gated, begins with random weights or those of a
                pre-gated model, or the run is compiled.
        """
        weight = config.loss.gate_kl
        if not weight:
            return None
        given = f"loss.gate_kl={weight:g}"
        if not getattr(model.config, "pregated", False):
            raise ConfigError(
                f"{given} has no effect, because only pre-gated routers differ from those that "
                "they begin with; leave it out, or give model.pregated=true or "
                "previous_token_and_embedding"
            )
        if config.start_from is None:
            raise ConfigError(
                f"{given} keeps routers near those of start_from, which is not given; leave it "
                "out, or give a model or run to start from"
            )
        if config.compile:
            raise ConfigError(f"{given} does not work with compile=true; give compile=false")
        before = read_config(initial_folder(config.start_from)).get("pregated", False)
        if before:
            raise ConfigError(
                f"{given} keeps routers near the choice that those of start_from make from their "
                f"own block's inputs, but {config.start_from!r} has pregated={before}, whose "
                "routers are given others; leave it out, or start from a model that is not "
                "pre-gated"
            )
        return cls(model, weight)

    def loss(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the weighted loss of the last pass.

        Args:
            logits: The routers' logits [B * T, E] by block; of the first rows of the pass.
        """
        total = logits[0].new_zeros(())
        for number in range(self._first, len(logits)):
            new_TE = logits[number].flatten(0, -2).float().log_softmax(-1)
            with torch.no_grad():
                old_TE = self._old[number](self._inputs[number][: len(new_TE)]).log_softmax(-1)
            kl = F.kl_div(new_TE, old_TE.to(new_TE), reduction="batchmean", log_target=True)
            total = total + kl
        self._inputs.clear()
        return self.weight * total

    def _hook(self, number: int):
        def keep(block: nn.Module, given: tuple[Tensor, ...]) -> None:
            if block.training:  # not those of held-out text
                self._inputs[number] = given[0].detach().flatten(0, 1)

        return keep
