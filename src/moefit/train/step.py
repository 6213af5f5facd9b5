"""One optimizer step, and the loss on held-out text.

`Stepper` computes losses and gradients over the accumulated batches, clips and updates. `HeldOut`
evaluates on tokens that are never trained on. Neither knows of files or logs.

Shapes: B sequences, T tokens, V vocabulary, L MoE layers, E experts.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, islice, repeat
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefit.dsmoe.losses import RouterLossWeights, language_model_loss, router_loss
from moefit.errors import DivergenceError
from moefit.moe.locality import routing_locality_loss
from moefit.train.data.batches import windows
from moefit.train.expert_dropout import AllowedExperts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Held-out tokens, read at most `limit` at a time in batches of training's size."""

    tokens: np.ndarray
    seq_len: int
    batch_size: int
    limit: int
    bf16: bool

    @torch.no_grad()
    def loss(
        self,
        model: PreTrainedModel,
        stop: Callable[[], bool],
        limit: Callable[[int], dict[str, Any]] = lambda sequences: {},
    ) -> float | None:
        """Mean cross-entropy in eval mode (the inference rule); None as soon as `stop` says so.

        limit: further arguments of a forward pass of so many sequences.
        """
        total, count = 0.0, 0
        model.eval()
        try:
            for window_BL1 in _stacked(self._windows(), self.batch_size):
                if stop():
                    return None
                ids_BL1 = torch.from_numpy(window_BL1.astype(np.int64)).to(model.device)
                total += self._summed(model, ids_BL1, limit(len(ids_BL1)))
                count += ids_BL1.shape[0] * (ids_BL1.shape[1] - 1)
        finally:
            model.train()
        return total / count

    def _windows(self) -> Iterator[np.ndarray]:
        return windows(self.tokens, self.seq_len, self.limit)

    def _summed(self, model: PreTrainedModel, ids_BL1: Tensor, limit: dict[str, Any]) -> float:
        with torch.autocast(ids_BL1.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = model(input_ids=ids_BL1[:, :-1], use_cache=False, **limit).logits
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


class LossFunction(Protocol):
    """Computes the losses of a micro-batch."""

    def __call__(
        self,
        ids_BL1: Tensor,
        mi_scale: Tensor,
        rule: str | None,
        allowed_LBE: Tensor | None = None,
    ) -> Losses:
        """Return language-model loss, router loss, and the routers' logits."""
        ...


def make_losses(
    model: PreTrainedModel,
    weights: RouterLossWeights,
    *,
    compile: bool,
    locality: float = 0.0,
    allowed: AllowedExperts | None = None,
) -> LossFunction:
    """From ids_BL1, the MI weights' scale and a rule to lm loss, router loss, router logits.

    The rule is what the step trains under; None is the model's own (the only one OLMoE knows).
    locality: weight of `routing_locality_loss`, summed over layers. allowed: applies allowed_LBE,
    the experts that each sequence may use. Router losses are of the logits of all experts, for
    they say how the routers choose when all are in memory.

    It serves our own model and transformers' OLMoE alike. Losses are taken here and not inside
    the model because OLMoE would add its own balance loss.
    """

    def losses(
        ids_BL1: Tensor, mi_scale: Tensor, rule: str | None, allowed_LBE: Tensor | None = None
    ) -> Losses:
        more = {} if rule is None else {"rule": rule}
        if allowed is not None:
            more |= allowed.arguments(allowed_LBE)
        output = model(input_ids=ids_BL1, use_cache=False, output_router_logits=True, **more)
        mlp_logits = tuple(output.router_logits)
        attention_logits = tuple(output.get("attention_router_logits", ()))
        lm_loss = language_model_loss(output.logits, ids_BL1)
        router = router_loss(mlp_logits, attention_logits, weights, mi_scale=mi_scale)
        if locality:
            by_sequence = (logits.view(*ids_BL1.shape, -1) for logits in mlp_logits)
            router = router + locality * sum(map(routing_locality_loss, by_sequence))
        return lm_loss, router, mlp_logits, attention_logits

    return torch.compile(losses) if compile else losses


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepper:
    """Carries out steps on one model and optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: LossFunction
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
        allowed: Iterable[Tensor | None] = (),
    ) -> StepResult:
        """Accumulate the gradients of `count` micro-batches ids_BL1, clip, update.

        mi_scale: share of the MI weights in force now. rule: which experts take part, if others
        than the model's training rule says. allowed: allowed_LBE of each micro-batch; those without
        one may use all experts.

        Raises DivergenceError, before any weight changes, if a loss or gradient is not finite.
        """
        lm_total = router_total = 0.0
        mlp_logits: tuple[Tensor, ...] = ()
        attention_logits: tuple[Tensor, ...] = ()
        # A tensor, for torch.compile would make another graph of every new float.
        scale = torch.tensor(mi_scale, device=self.device)
        limits = chain(allowed, repeat(None))
        for ids_BL1, allowed_LBE in zip(micro_batches, limits, strict=False):
            ids_BL1 = ids_BL1.to(self.device, non_blocking=True)
            if allowed_LBE is not None:
                allowed_LBE = allowed_LBE.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                lm_loss, router, mlp_logits, attention_logits = self.losses(
                    ids_BL1, scale, rule, allowed_LBE
                )
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
