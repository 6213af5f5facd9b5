"""Train with the experts that a server holds in few bits, so that rounding costs less.

In a rounded step each expert is encoded and decoded as in serving, forward and backward pass
compute with the result, and the gradient is applied to the unrounded weights (straight-through
estimator, arXiv 1308.3432). The format of each expert is drawn anew in each step, depending only
on the seed and the step, so that any mixture of these formats is learned.

Shapes: E experts, R rows (output units), C columns.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.errors import ConfigError
from moefit.quant.backend import decoded
from moefit.quant.encode import encode
from moefit.quant.format import FORMATS, GroupedFormat
from moefit.train.config import TrainConfig
from moefit.train.settings import RoundingConfig

_STREAM = 0x0B17  # separates these random numbers from others of the same seed
_MATRICES = ("gate_up_proj", "up_proj", "down_proj")  # of stacked experts, rows are output units


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """The rounding of one run.

    Attributes:
        settings: As configured.
        formats: That experts are drawn from.
        seed: Of the run.
        begin_step: The last step, counted from 1, without rounding; 0 if none.
    """

    settings: RoundingConfig
    formats: tuple[GroupedFormat, ...]
    seed: int
    begin_step: int

    @classmethod
    def of(cls, config: TrainConfig, model: PreTrainedModel, processes: int = 1) -> Self | None:
        """Return the rounding of a run; None if it has none.

        Args:
            config: The run's configuration.
            model: Its model.
            processes: That train together.

        Raises:
            ConfigError: A format does not exist or does not round, no step is left to round, or
                there are many processes.
        """
        settings = config.rounding
        if settings is None:
            return None
        if int(model.config.num_experts) < 2:
            raise ConfigError(
                "rounding has no effect, because a model with model.num_experts=1 has no routed "
                "experts; leave it out, or give model.num_experts=2 or more"
            )
        if processes > 1:
            raise ConfigError(
                f"rounding encodes whole experts, which {processes} processes hold in parts; train "
                "with one process, or leave out rounding"
            )
        if config.trainable != "all":
            raise ConfigError(
                f"rounding trains experts, which trainable={config.trainable} leaves as they are; "
                "give trainable=all, or leave out rounding"
            )
        begin_step = round(settings.begin * config.steps)
        if begin_step >= config.steps:
            raise ConfigError(
                f"rounding.begin={settings.begin:g} of steps={config.steps} leaves no rounded "
                f"step; the latest that works is begin={(config.steps - 1) / config.steps:.12g}"
            )
        formats = tuple(map(_grouped, settings.formats))
        return cls(settings=settings, formats=formats, seed=config.seed, begin_step=begin_step)

    def active_at(self, step: int) -> bool:
        """Return whether `step`, counted from 1, computes with rounded experts."""
        return step > self.begin_step

    def draw(self, step: int, layers: int, num_experts: int) -> list[list[GroupedFormat]]:
        """Return the format of each expert in a step, by layer.

        Args:
            step: Counted from 1.
            layers: Number of MoE layers.
            num_experts: E.
        """
        generator = np.random.default_rng([self.seed, _STREAM, step])
        drawn = generator.integers(len(self.formats), size=(layers, num_experts))
        return [[self.formats[number] for number in layer] for layer in drawn]

    @contextmanager
    def applied(self, model: PreTrainedModel, step: int) -> Iterator[None]:
        """Hold rounded experts in the model for the duration of the context.

        The backward pass belongs into the context, the update of the weights does not.

        Args:
            model: The model.
            step: Counted from 1; nothing is rounded before `begin_step` has passed.

        Raises:
            CheckpointError: A weight cannot be encoded: it is NaN, infinite or beyond float16.
        """
        if not self.active_at(step):
            yield
            return
        matrices = expert_matrices(model)
        num_experts = len(next(iter(matrices[0].values())))
        formats = self.draw(step, len(matrices), num_experts)
        kept = [{name: p.detach().clone() for name, p in one.items()} for one in matrices]
        try:
            with torch.no_grad():
                for layer, formats_E in zip(matrices, formats, strict=True):
                    for parameter in layer.values():
                        parameter.copy_(rounded(parameter, formats_E))
            yield
        finally:
            with torch.no_grad():
                for layer, before in zip(matrices, kept, strict=True):
                    for name, parameter in layer.items():
                        parameter.copy_(before[name])


def expert_matrices(model: PreTrainedModel) -> list[Mapping[str, Tensor]]:
    """Return the stacked matrices [E, R, C] of each layer's experts by name, in model order.

    Args:
        model: A DS-MoE or an OLMoE.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        if last in _MATRICES and module.endswith("experts"):
            found.setdefault(module, {})[last] = parameter
    return list(found.values())


def rounded(weights_ERC: Tensor, formats_E: list[GroupedFormat]) -> Tensor:
    """Return experts as a server computes with them: encoded in these formats and decoded.

    Args:
        weights_ERC: One matrix of each expert.
        formats_E: The format of each expert.

    Raises:
        CheckpointError: A weight cannot be encoded.
    """
    result_ERC = torch.empty_like(weights_ERC)
    for format_ in set(formats_E):
        experts = [index for index, one in enumerate(formats_E) if one == format_]
        # Groups lie within a row, so that rows of several experts can be encoded as one matrix.
        rows_RC = weights_ERC.detach()[experts].flatten(0, 1).float()
        matrix = encode(rows_RC, format_.bits, format_.encoder)
        values_RC = decoded(matrix, weights_ERC.dtype).to(weights_ERC.device)
        result_ERC[experts] = values_RC.unflatten(0, (len(experts), -1))
    return result_ERC


def _grouped(name: str) -> GroupedFormat:
    format_ = FORMATS.get(name)
    if not isinstance(format_, GroupedFormat):
        known = ", ".join(key for key, one in FORMATS.items() if isinstance(one, GroupedFormat))
        raise ConfigError(
            f"rounding.formats contains {name!r}, which training cannot round to; there are {known}"
        )
    return format_
