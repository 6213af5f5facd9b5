"""One optimizer step, and the loss on held-out text.

`Stepper` computes losses and gradients over the accumulated batches, clips and updates. `HeldOut`
evaluates on tokens that are never trained on. Neither knows of files or logs.

Shapes: B sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefit.dsmoe.losses import RouterLossWeights, language_model_loss, router_loss
from moefit.errors import DivergenceError
from moefit.train.data.batches import windows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Held-out tokens, read at most `limit` at a time in batches of training's size."""

    tokens: np.ndarray
    seq_len: int
    batch_size: int
    limit: int
    bf16: bool

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, stop: Callable[[], bool]) -> float | None:
        """Mean cross-entropy in eval mode (the inference rule); None as soon as `stop` says so."""
        total, count = 0.0, 0
        model.eval()
        try:
            for window_BL1 in _stacked(self._windows(), self.batch_size):
                if stop():
                    return None
                ids_BL1 = torch.from_numpy(window_BL1.astype(np.int64)).to(model.device)
                total += self._summed(model, ids_BL1)
                count += ids_BL1.shape[0] * (ids_BL1.shape[1] - 1)
        finally:
            model.train()
        return total / count

    def _windows(self) -> Iterator[np.ndarray]:
        return windows(self.tokens, self.seq_len, self.limit)

    def _summed(self, model: PreTrainedModel, ids_BL1: torch.Tensor) -> float:
        with torch.autocast(ids_BL1.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = model(input_ids=ids_BL1[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids_BL1[:, 1:].flatten(), reduction="sum"
        )
        return loss.item()


def _stacked(rows: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """`size` rows at once or fewer; a shorter row, as the last one may be, stands alone.

    >>> [x.shape for x in _stacked([np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(2)], 2)]
    [(2, 3), (1, 3), (1, 2)]
    """
    for _, alike in groupby(rows, key=len):
        while chunk := list(islice(alike, size)):
            yield np.stack(chunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Means over the step's micro-batches; logits are the last micro-batch's, one per layer."""

    lm_loss: float
    router_loss: float
    gradient_norm: float
    mlp_logits: tuple[Tensor, ...]
    attention_logits: tuple[Tensor, ...]


Losses = tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]


def make_losses(
    model: PreTrainedModel, weights: RouterLossWeights, *, compile: bool
) -> Callable[[Tensor, Tensor, str | None], Losses]:
    """From ids_BL1, the MI weights' scale and a rule to lm loss, router loss, router logits.

    The rule is what the step trains under; None is the model's own (the only one OLMoE knows).

    It serves our own model and transformers' OLMoE alike. Losses are taken here and not inside
    the model because OLMoE would add its own balance loss.
    """

    def losses(ids_BL1: Tensor, mi_scale: Tensor, rule: str | None) -> Losses:
        ruled = {} if rule is None else {"rule": rule}
        output = model(input_ids=ids_BL1, use_cache=False, output_router_logits=True, **ruled)
        mlp_logits = tuple(output.router_logits)
        attention_logits = tuple(output.get("attention_router_logits", ()))
        lm_loss = language_model_loss(output.logits, ids_BL1)
        router = router_loss(mlp_logits, attention_logits, weights, mi_scale=mi_scale)
        return lm_loss, router, mlp_logits, attention_logits

    return torch.compile(losses) if compile else losses


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepper:
    """Carries out steps on one model and optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: Callable[[Tensor, Tensor, str | None], Losses]
    device: torch.device
    bf16: bool
    clip: float

    def step(
        self,
        micro_batches: Iterable[Tensor],
        count: int,
        *,
        mi_scale: float = 1.0,
        rule: str | None = None,
    ) -> StepResult:
        """Accumulate the gradients of `count` micro-batches ids_BL1, clip, update.

        mi_scale: share of the MI weights in force now. rule: which experts take part, if others
        than the model's training rule says.

        Raises DivergenceError, before any weight changes, if a loss or gradient is not finite.
        """
        lm_total = router_total = 0.0
        mlp_logits: tuple[Tensor, ...] = ()
        attention_logits: tuple[Tensor, ...] = ()
        # A tensor, for torch.compile would make another graph of every new float.
        scale = torch.tensor(mi_scale, device=self.device)
        for ids_BL1 in micro_batches:
            ids_BL1 = ids_BL1.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                lm_loss, router, mlp_logits, attention_logits = self.losses(ids_BL1, scale, rule)
            ((lm_loss + router) / count).backward()
            lm_total += lm_loss.item() / count
            router_total += router.item() / count
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.clip))
        if not (math.isfinite(lm_total + router_total) and math.isfinite(norm)):
            raise DivergenceError(
                f"loss {lm_total:g}, router loss {router_total:g}, gradient norm {norm:g}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(
            lm_loss=lm_total,
            router_loss=router_total,
            gradient_norm=norm,
            mlp_logits=mlp_logits,
            attention_logits=attention_logits,
        )
