"""One optimizer step: losses, gradients, update.

Owns what is computed between two batches. Knows nothing of data, files or how often it runs.

Shapes: B sequences, L1 tokens a sequence plus the last target, T tokens, E experts.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefit.dsmoe.objective import RouterLossWeights, language_model_loss, router_loss
from moefit.errors import DivergenceError


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
