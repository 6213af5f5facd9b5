"""One optimizer step, and the loss on held-out text.

Shapes: B sequences, N tokens per sequence, N1 = N + 1, L MoE layers, E experts, V vocabulary,
C sequences with few experts.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, groupby, islice, repeat
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moefit.dsmoe.losses import (
    RouterLossWeights,
    Total,
    identity,
    language_model_loss,
    router_loss,
)
from moefit.errors import DivergenceError
from moefit.moe.locality import routing_locality_loss
from moefit.train.data.batches import model_inputs, windows
from moefit.train.memory.budget_aware import BudgetAware
from moefit.train.memory.expert_dropout import AllowedExperts
from moefit.train.memory.pregated import GateTeacher
from moefit.train.parallel.clock import Clock
from moefit.train.parallel.locality import NodeLocality
from moefit.train.parallel.parallelism import Parallelism, Single


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOutEvaluator:
    """Computes the loss on held-out tokens.

    Attributes:
        tokens: The held-out tokens.
        seq_len: Tokens per window.
        batch_size: Windows per forward pass.
        limit: Most tokens to evaluate.
        bf16: Whether to autocast to bfloat16.
        parallel: Divides the windows among processes.
        document_end: Token that ends a document, whose tokens see no other; None for one stretch.
    """

    tokens: np.ndarray
    seq_len: int
    batch_size: int
    limit: int
    bf16: bool
    parallel: Parallelism = field(default_factory=lambda: Single(clock=Clock(torch.device("cpu"))))
    document_end: int | None = None

    @torch.no_grad()
    def loss(
        self,
        model: PreTrainedModel,
        stop: Callable[[], int],
        limit: Callable[[int], dict[str, Any]] = lambda sequences: {},
    ) -> float | None:
        """Return the mean cross-entropy in nats per token, with the model in eval mode.

        Args:
            model: The model; in train mode afterwards.
            stop: Checked before each batch, alike in all processes; if it returns not 0, the
                result is None.
            limit: Returns further arguments of a forward pass, given its number of sequences.
        """
        total, count = 0.0, 0
        model.eval()
        try:
            found = windows(self.tokens, self.seq_len, self.limit)
            for window_BN1 in _batched(found, self.batch_size):
                if stop():
                    return None
                mine = np.array_split(window_BN1, self.parallel.shares)[self.parallel.mine]
                # A process without a window of its own still gathers weights with the others.
                used = mine if len(mine) else window_BN1[:1]
                ids_BN1 = torch.from_numpy(used.astype(np.int64)).to(model.device)
                loss = self._total_loss(model, ids_BN1, limit(len(ids_BN1)))
                total += loss if len(mine) else 0.0
                count += mine.shape[0] * (mine.shape[1] - 1)
        finally:
            model.train()
        total, count = self.parallel.processes.sums((total, count))
        return total / count

    def _total_loss(self, model: PreTrainedModel, ids_BN1: Tensor, limit: dict[str, Any]) -> float:
        inputs = model_inputs(ids_BN1[:, :-1], self.document_end)
        with torch.autocast(ids_BN1.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = model(**inputs, use_cache=False, **limit).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids_BN1[:, 1:].flatten(), reduction="sum"
        )
        return loss.item()


def _batched(rows: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Stack up to `size` rows of equal length at a time.

    >>> [x.shape for x in _batched([np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(2)], 2)]
    [(2, 3), (1, 3), (1, 2)]
    """
    for _, same_length in groupby(rows, key=len):
        while chunk := list(islice(same_length, size)):
            yield np.stack(chunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Mean losses over the step's micro-batches, and the last one's router logits by layer.

    Losses are of all processes together, logits of this process. The weights of a skipped step have
    not changed.
    """

    lm_loss: float
    router_loss: float
    gradient_norm: float
    mlp_logits: tuple[Tensor, ...]
    attention_logits: tuple[Tensor, ...]


Losses = tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]


class LossFunction(Protocol):
    """Computes the losses of a micro-batch.

    Args:
        ids_BN1: Token ids.
        mi_scale: Factor on the MI weights.
        rule: Training rule; None for the model's own (OLMoE has no other).
        allowed_LBE: True for experts that a sequence may use; None for all.
    """

    def __call__(
        self,
        ids_BN1: Tensor,
        mi_scale: Tensor,
        rule: str | None,
        allowed_LBE: Tensor | None = None,
    ) -> Losses:
        """Return language-model loss, router loss, MLP and attention router logits by layer."""
        ...


class SpikeRule(Protocol):
    """Decides whether a step is skipped, as `SpikeDetector.is_spike` does."""

    def __call__(self, loss: float, norm: float, *, sparse: bool) -> bool:
        """Return whether a step of this loss and gradient norm is skipped."""
        ...


def distillation_loss(student_CNV: Tensor, teacher_CNV: Tensor) -> Tensor:
    """Return the mean over predicted tokens of KL(teacher || student), in nats; 0 without any."""
    student_RV = student_CNV[:, :-1].flatten(0, 1).float().log_softmax(-1)
    teacher_RV = teacher_CNV[:, :-1].flatten(0, 1).float().log_softmax(-1)
    total = F.kl_div(student_RV, teacher_RV, reduction="sum", log_target=True)
    return total / max(1, len(student_RV))


def _twice(ids_BN1: Tensor, allowed_LBE: Tensor, few_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return all sequences with all experts, followed by those of few_B with theirs."""
    everything_LBE = torch.ones_like(allowed_LBE)
    limits_LBE = torch.cat([everything_LBE, allowed_LBE[:, few_B]], dim=1)
    return torch.cat([ids_BN1, ids_BN1[few_B]]), limits_LBE


def make_losses(  # noqa: PLR0913 - the parts of a loss
    model: PreTrainedModel,
    weights: RouterLossWeights,
    *,
    compile: bool,
    locality: float = 0.0,
    budget: BudgetAware | None = None,
    teacher: GateTeacher | None = None,
    allowed: AllowedExperts | None = None,
    distill: float = 0.0,
    total: Total = identity,
    nodes: NodeLocality | None = None,
    document_end: int | None = None,
) -> LossFunction:
    """Return the loss function of a DS-MoE or OLMoE model.

    Losses are computed outside the model because OLMoE would add its own load-balancing loss.
    Router losses are those of the logits of all experts, also where a sequence may use only some.

    Args:
        model: The model.
        weights: Weights of the router losses.
        compile: Whether to use torch.compile.
        locality: Weight of `routing_locality_loss`, summed over layers.
        budget: Adds the loss on choices that a server with few slots would fetch.
        teacher: Adds the loss that keeps pre-gated routers near those that they replace.
        allowed: Limits which experts each sequence may use.
        distill: If not 0, sequences with few experts are computed twice: with all experts, where
            the text is the target, and with few, where the prediction with all experts is. The
            weight of the second.
        total: Adds the sums that router losses depend on over the processes of a batch.
        nodes: Adds LocMoE's locality loss.
        document_end: Token that ends a document, whose tokens see no other; None for one stretch.
    """

    def losses(
        ids_BN1: Tensor, mi_scale: Tensor, rule: str | None, allowed_LBE: Tensor | None = None
    ) -> Losses:
        options: dict[str, Any] = {} if rule is None else {"rule": rule}
        given = len(ids_BN1)
        ids, limits, few_B = ids_BN1, allowed_LBE, None
        if distill and allowed_LBE is not None:
            few_B = ~allowed_LBE.all(-1).all(0)
            ids, limits = _twice(ids_BN1, allowed_LBE, few_B)
        if allowed is not None:
            options |= allowed.arguments(limits)
        options |= model_inputs(ids, document_end)
        output = model(use_cache=False, output_router_logits=True, **options)
        lm_loss = language_model_loss(output.logits[:given], ids_BN1)
        if few_B is not None:
            teacher_CNV = output.logits[:given][few_B].detach()
            loss = distillation_loss(output.logits[given:], teacher_CNV)
            lm_loss = lm_loss + distill * few_B.float().mean() * loss
        mlp_logits, attention_logits = (
            tuple(logits[: len(logits) * given // len(ids)] for logits in layers)
            for layers in (output.router_logits, output.get("attention_router_logits", ()))
        )
        router = router_loss(mlp_logits, attention_logits, weights, mi_scale=mi_scale, total=total)
        by_sequence = [logits.view(*ids_BN1.shape, -1) for logits in mlp_logits]
        if locality:
            router = router + locality * sum(map(routing_locality_loss, by_sequence))
        if budget is not None:
            router = router + budget.loss(by_sequence)
        if teacher is not None:
            router = router + teacher.loss(mlp_logits)
        if nodes is not None:
            router = router + nodes.loss(mlp_logits)
        return lm_loss, router, mlp_logits, attention_logits

    return torch.compile(losses) if compile else losses


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepper:
    """Performs optimizer steps on a model, spread over processes by `parallel`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: LossFunction
    device: torch.device
    bf16: bool
    clip: float
    parallel: Parallelism = field(default_factory=lambda: Single(clock=Clock(torch.device("cpu"))))
    is_spike: SpikeRule = lambda loss, norm, *, sparse: False
    """Whether a step of this loss and gradient norm is skipped."""

    def step(
        self,
        micro_batches: Iterable[Tensor],
        count: int,
        *,
        mi_scale: float = 1.0,
        rule: str | None = None,
        allowed: Iterable[Tensor | None] = (),
        weights: AbstractContextManager[None] | None = None,
    ) -> StepResult:
        """Accumulate gradients, clip them and update the weights.

        Args:
            micro_batches: Token ids [B, N + 1] of each forward pass, of all processes together.
            count: Number of micro-batches.
            mi_scale: Factor on the MI weights.
            rule: Which experts are used; None for the model's training rule.
            allowed: allowed_LBE of each micro-batch; those without one may use all experts.
            weights: Entered while losses and gradients are computed, not for the update: holds
                other weights in the model, such as rounded ones. None changes nothing.

        Raises:
            DivergenceError: A loss or gradient is not finite. The weights have not changed.
        """
        lm_total = router_total = 0.0
        mlp_logits: tuple[Tensor, ...] = ()
        attention_logits: tuple[Tensor, ...] = ()
        # As a tensor, because torch.compile would recompile for each value of a float.
        scale = torch.tensor(mi_scale, device=self.device)
        limits = chain(allowed, repeat(None))
        with weights or nullcontext():
            for ids_BN1, allowed_LBE in zip(micro_batches, limits, strict=False):
                ids_BN1 = self.parallel.share(ids_BN1).to(self.device, non_blocking=True)
                if allowed_LBE is not None:
                    share = self.parallel.share(allowed_LBE, dim=1)
                    allowed_LBE = share.to(self.device, non_blocking=True)
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                    lm_loss, router, mlp_logits, attention_logits = self.losses(
                        ids_BN1, scale, rule, allowed_LBE
                    )
                ((lm_loss + router) / count).backward()
                lm_total += lm_loss.item() / count
                router_total += router.item() / count
        norm = self.parallel.clip(self.model, self.clip)
        processes = self.parallel.processes
        # Means, the norm's too, so that all processes take the same decisions below.
        lm_total, router_total, norm = (
            value / processes.size for value in processes.sums((lm_total, router_total, norm))
        )
        if not self.is_spike(lm_total + router_total, norm, sparse=rule is not None):
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
