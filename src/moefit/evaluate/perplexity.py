"""Perplexity of a model on a text, and the active experts and parameters, by inference rule.

Shapes: B sequences, T tokens, R predicted tokens.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moefit.errors import DataError
from moefit.evaluate.evaluated_model import EvaluatedModel, evaluated_model
from moefit.moe.routing import Rule, active_experts
from moefit.serve.hf.guards import refuse_no_numbers

Progress = Callable[[str, int, int], None]
"""Called with a rule and the number of tokens, done and in total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Result for one inference rule.

    Attributes:
        rule: The rule.
        loss: Nats per token.
        perplexity: exp(loss).
        bits_per_byte: Of the text in UTF-8.
        tokens: Predicted tokens.
        mlp_experts: Mean active MLP experts per token and layer.
        attention_experts: Mean active attention experts per token and layer.
        active_parameters: Mean per token, without embeddings and head, as in the DS-MoE paper.
        active_share: The same as a fraction of all.
        tokens_per_second: Of this evaluation, so of prefill.
    """

    rule: str
    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    mlp_experts: float
    attention_experts: float
    active_parameters: int
    active_share: float
    tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A tokenised text, divided into windows.

    Attributes:
        ids_T: Its tokens.
        text_bytes: Its size in UTF-8.
        context: Targets per window.
        max_tokens: Most targets, in windows spread over the text; at least one window.
        batch_size: Windows per batch.
    """

    ids_T: Tensor
    text_bytes: int
    context: int
    max_tokens: int | None = None
    batch_size: int = 8

    @property
    def targets(self) -> int:
        """Number of tokens to predict."""
        return sum(len(window_T) - 1 for window_T in self._windows())

    def batches(self) -> Iterator[Tensor]:
        """Yield token ids [B, context + 1]; adjacent windows share one token."""
        found = [torch.from_numpy(window_T) for window_T in self._windows()]
        full = found if len(found[-1]) == self.context + 1 else found[:-1]
        for first in range(0, len(full), self.batch_size):
            yield torch.stack(full[first : first + self.batch_size])
        if len(full) < len(found):
            yield found[-1][None]

    def _windows(self) -> Iterator[np.ndarray]:
        from moefit.train.data.batches import windows  # serving imports this module without it

        return windows(self.ids_T.numpy(), self.context, self.max_tokens)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    text: Text,
    rules: Sequence[Rule],
    progress: Progress | None = None,
) -> list[Score]:
    """Score a text under each rule; the model's own rule and mode are restored.

    Args:
        model: A DS-MoE or OLMoE.
        text: The text.
        rules: Inference rules.
        progress: Called after each batch.

    Raises:
        DataError: The text has fewer than two tokens.
        ConfigError: A rule selects more experts than there are.
        UnsupportedModelError: The model does not support a rule.
        CheckpointError: The model's output is not finite.
    """
    if len(text.ids_T) < 2:
        raise DataError(f"a text of {len(text.ids_T)} token(s) cannot be predicted; give more text")
    evaluated = evaluated_model(model)
    for rule in rules:
        evaluated.check(rule)
    was_training = model.training
    model.eval()
    try:
        return [_score(model, evaluated, text, rule, progress) for rule in rules]
    finally:
        model.train(was_training)


@dataclass(slots=True)
class _Sums:
    """Running sums over tokens."""

    nats: float = 0.0
    tokens: int = 0
    mlp: float = 0.0
    attention: float = 0.0

    def add(self, more: "_Sums") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(more, name))


def _score(
    model: PreTrainedModel,
    evaluated: EvaluatedModel,
    text: Text,
    rule: Rule,
    progress: Progress | None,
) -> Score:
    sums, targets = _Sums(), text.targets
    with evaluated.use(rule):
        _score_batch(model, next(text.batches()), rule)  # warm-up
        began = time.perf_counter()
        for ids_BT1 in text.batches():
            sums.add(_score_batch(model, ids_BT1, rule))
            if progress is not None:
                progress(str(rule), sums.tokens, targets)
        seconds = time.perf_counter() - began
    return _summary(evaluated, text, rule, sums, seconds)


def _score_batch(model: PreTrainedModel, ids_BT1: Tensor, rule: Rule) -> _Sums:
    ids_BT1 = ids_BT1.to(model.device)
    counted = rule.kind.startswith("threshold")
    output = model(input_ids=ids_BT1[:, :-1], use_cache=False, output_router_logits=counted)
    targets_R = ids_BT1[:, 1:].flatten()
    refuse_no_numbers(output.logits)
    nats = F.cross_entropy(output.logits.flatten(0, 1).float(), targets_R, reduction="sum")
    sums = _Sums(nats=nats.item(), tokens=len(targets_R))
    if counted:
        sums.mlp = len(targets_R) * _mean_active(output.router_logits, rule)
        sums.attention = len(targets_R) * _mean_active(output.attention_router_logits, rule)
    return sums


def _mean_active(logits: Sequence[Tensor], rule: Rule) -> float:
    """Return the mean active experts per token and layer; zero without routers."""
    if not logits:
        return 0.0
    counts = [active_experts(layer.flatten(0, -2).softmax(-1), rule).sum(-1) for layer in logits]
    return torch.stack(counts).float().mean().item()


def _summary(
    evaluated: EvaluatedModel, text: Text, rule: Rule, sums: _Sums, seconds: float
) -> Score:
    measured_mlp = sums.mlp / sums.tokens if rule.kind.startswith("threshold") else 0.0
    measured_attention = sums.attention / sums.tokens if rule.kind == "threshold" else 0.0
    active = evaluated.active(rule, measured_mlp or None, measured_attention or None)
    loss = sums.nats / sums.tokens
    return Score(
        rule=str(rule),
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=loss / math.log(2) * len(text.ids_T) / text.text_bytes,
        tokens=sums.tokens,
        mlp_experts=measured_mlp or float(rule.k or evaluated.num_experts),
        attention_experts=measured_attention or float(evaluated.num_attention_experts),
        active_parameters=active,
        active_share=active / evaluated.total,
        tokens_per_second=sums.tokens / seconds,
    )
