"""Perplexity of a model on a text, under each inference rule asked for.

Owns how held-out text is cut (windows of `context` tokens, every token but the first a target
exactly once) and what a rule costs (experts and parameters active per token, measured). What a
family of models makes of a rule is in `subject.py`. Knows nothing of training.

Shapes: B sequences, T tokens, E experts.
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
from moefit.evaluate.subject import EvaluatedModel, evaluated_model
from moefit.moe.routing import Rule, active_experts
from moefit.serve.hf.guards import refuse_no_numbers

Progress = Callable[[str, int, int], None]
"""Hears a rule, and how many tokens of how many are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one rule gave. Loss in nats per token; tokens/s are of this evaluation (prefill).

    `active_parameters` is without embeddings and head, as in the DS-MoE paper, a mean per token.
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
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A tokenised text, the UTF-8 bytes it had, and the context length it is read in.

    With `max_tokens`, about that many are targets, in windows spread over the text; never more,
    unless one window has more.
    """

    ids_T: Tensor
    text_bytes: int
    context: int
    max_tokens: int | None = None
    batch_size: int = 8

    @property
    def targets(self) -> int:
        """How many tokens `batches` gives to predict."""
        return sum(len(window_T) - 1 for window_T in self._windows())

    def batches(self) -> Iterator[Tensor]:
        """ids [B, context + 1]; neighbours share one token, so all but the first are targets."""
        found = [torch.from_numpy(window_T) for window_T in self._windows()]
        whole = found if len(found[-1]) == self.context + 1 else found[:-1]
        for first in range(0, len(whole), self.batch_size):
            yield torch.stack(whole[first : first + self.batch_size])
        if len(whole) < len(found):
            yield found[-1][None]

    def _windows(self) -> Iterator[np.ndarray]:
        from moefit.train.data.batches import windows  # serving imports this module, not that one

        return windows(self.ids_T.numpy(), self.context, self.max_tokens)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    text: Text,
    rules: Sequence[Rule],
    progress: Progress | None = None,
) -> list[Score]:
    """Score a text under each rule; the model's own rule and mode are left as they were.

    Bits per byte is the mean loss over all predicted tokens times tokens in all, over the text's
    bytes. Raises DataError for fewer than two tokens, ConfigError for a rule that asks for more
    experts than there are, UnsupportedModelError for a rule that the model's family lacks,
    CheckpointError where the model computes no finite numbers.
    """
    if len(text.ids_T) < 2:
        raise DataError(f"a text of {len(text.ids_T)} token(s) cannot be predicted; give more text")
    subject = evaluated_model(model)
    for rule in rules:
        subject.check(rule)
    was_training = model.training
    model.eval()
    try:
        return [_score(model, subject, text, rule, progress or _no_progress) for rule in rules]
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
    model: PreTrainedModel, subject: EvaluatedModel, text: Text, rule: Rule, progress: Progress
) -> Score:
    sums, targets = _Sums(), text.targets
    with subject.use(rule):
        # The first call of all pays for what later ones find ready; no rule shall be the one.
        _batch(model, next(text.batches()), rule)
        began = time.perf_counter()
        for ids_BL1 in text.batches():
            sums.add(_batch(model, ids_BL1, rule))
            progress(str(rule), sums.tokens, targets)
        seconds = time.perf_counter() - began
    return _summary(subject, text, rule, sums, seconds)


def _batch(model: PreTrainedModel, ids_BL1: Tensor, rule: Rule) -> _Sums:
    ids_BL1 = ids_BL1.to(model.device)
    counted = rule.kind.startswith("threshold")
    output = model(input_ids=ids_BL1[:, :-1], use_cache=False, output_router_logits=counted)
    targets_R = ids_BL1[:, 1:].flatten()
    refuse_no_numbers(output.logits)
    nats = F.cross_entropy(output.logits.flatten(0, 1).float(), targets_R, reduction="sum")
    sums = _Sums(nats=nats.item(), tokens=len(targets_R))
    if counted:
        sums.mlp = len(targets_R) * _mean_active(output.router_logits, rule)
        sums.attention = len(targets_R) * _mean_active(output.attention_router_logits, rule)
    return sums


def _mean_active(logits: Sequence[Tensor], rule: Rule) -> float:
    """Mean active experts per token and layer; zero without routers."""
    if not logits:
        return 0.0
    counts = [active_experts(layer.flatten(0, -2).softmax(-1), rule).sum(-1) for layer in logits]
    return torch.stack(counts).float().mean().item()


def _summary(subject: EvaluatedModel, text: Text, rule: Rule, sums: _Sums, seconds: float) -> Score:
    measured_mlp = sums.mlp / sums.tokens if rule.kind.startswith("threshold") else 0.0
    measured_attention = sums.attention / sums.tokens if rule.kind == "threshold" else 0.0
    active = subject.active(rule, measured_mlp or None, measured_attention or None)
    loss = sums.nats / sums.tokens
    return Score(
        rule=str(rule),
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=loss / math.log(2) * len(text.ids_T) / text.text_bytes,
        tokens=sums.tokens,
        mlp_experts=measured_mlp or float(rule.k or subject.num_experts),
        attention_experts=measured_attention or float(subject.num_attention_experts),
        active_parameters=active,
        active_share=active / subject.total,
        tokens_per_second=sums.tokens / seconds,
    )


def _no_progress(rule: str, done: int, total: int) -> None:
    pass
