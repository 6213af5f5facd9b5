"""Train with experts absent, so that a model loses little when only some are in memory.

`ExpertDropout` draws the experts that each sequence may use, depending only on the seed and the
number of the micro-batch. `AllowedExperts` applies such a limit to a model.

Shapes: B sequences, T tokens, L MoE layers, E experts, S experts that a sequence may use.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import OlmoeForCausalLM, PreTrainedModel

from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import ConfigError
from moefit.moe.expert_dropout import KEY, ExpertDropoutRecord, dropout_record
from moefit.moe.routing import Rule, active_experts, route_allowed
from moefit.train.config import TrainConfig
from moefit.train.data.batches import model_inputs
from moefit.train.settings import ExpertDropoutConfig

_STREAM = 0x0D20  # separates these random numbers from others of the same seed
CALIBRATION_BATCHES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDropout:
    """The expert dropout of one run.

    Attributes:
        settings: As configured.
        least: Least number of experts that a sequence may use.
        num_layers: L.
        num_experts: E.
        seed: Of the run.
        begin_step: The last step, counted from 1, in which all experts may be used; 0 if none.
    """

    settings: ExpertDropoutConfig
    least: int
    num_layers: int
    num_experts: int
    seed: int
    begin_step: int

    @classmethod
    def of(cls, config: TrainConfig, model: PreTrainedModel) -> Self | None:
        """Return the dropout of a run; None if it has none.

        Raises:
            ConfigError: The model has no router, `least` does not suit its rules, or `begin` leaves
                no step with experts absent.
        """
        settings = config.expert_dropout
        if settings is None:
            return None
        num_experts = int(model.config.num_experts)
        if num_experts < 2:
            raise ConfigError(
                f"expert_dropout.order={settings.order} has no effect, because a model with "
                f"model.num_experts={num_experts} has no router; leave out expert_dropout, or "
                "give model.num_experts=2 or more"
            )
        begin_step = round(settings.begin * config.steps)
        if begin_step >= config.steps:
            raise ConfigError(
                f"expert_dropout.begin={settings.begin:g} of steps={config.steps} leaves no step "
                f"with experts absent; the latest that works is begin={_latest(config.steps)}"
            )
        return cls(
            settings=settings,
            least=_least(settings.least, _chosen_per_token(config, model), num_experts),
            num_layers=int(model.config.num_hidden_layers),
            num_experts=num_experts,
            seed=config.seed,
            begin_step=begin_step,
        )

    def begins_at(self, step: int) -> bool:
        """Return whether `step`, counted from 1, is the first with experts absent."""
        return step == self.begin_step + 1

    def active_at(self, step: int) -> bool:
        """Return whether sequences of `step`, counted from 1, may have experts absent."""
        return step > self.begin_step

    def draw(
        self, micro_batch: int, sequences: int, resident_order: Sequence[Sequence[int]]
    ) -> Tensor:
        """Return allowed_LBE, True for experts that a sequence may use.

        Args:
            micro_batch: Number of the micro-batch, counted over the whole run.
            sequences: B.
            resident_order: Per layer, the experts in nested order; may be empty if the order is
                `random`.
        """
        generator = np.random.default_rng([self.seed, _STREAM, micro_batch])
        allowed_LBE = np.ones((self.num_layers, sequences, self.num_experts), dtype=bool)
        for sequence in range(sequences):
            if generator.random() >= self.settings.share:
                continue
            count = self._count(generator)
            nested = self.settings.order == "nested" or (
                self.settings.order == "mixed" and generator.random() < 0.5
            )
            for layer in range(self.num_layers):
                experts = (
                    resident_order[layer] if nested else generator.permutation(self.num_experts)
                )
                allowed_LBE[layer, sequence] = False
                allowed_LBE[layer, sequence, list(experts[:count])] = True
        return torch.from_numpy(allowed_LBE)

    def _count(self, generator: np.random.Generator) -> int:
        if self.settings.sizes == "uniform":
            return int(generator.integers(self.least, self.num_experts))
        counts_S = np.arange(self.least, self.num_experts)
        weights_S = 1.0 / counts_S**2
        return int(generator.choice(counts_S, p=weights_S / weights_S.sum()))

    def record(self, resident_order: Sequence[Sequence[int]]) -> ExpertDropoutRecord:
        """Return the record of this dropout for the checkpoint."""
        ordered = () if self.settings.order == "random" else resident_order
        return ExpertDropoutRecord(
            order=self.settings.order,
            share=self.settings.share,
            least=self.least,
            begin=self.settings.begin,
            resident_order=tuple(tuple(one) for one in ordered),
        )

    def made(self, record: ExpertDropoutRecord | None) -> bool:
        """Return whether a checkpoint with this record was trained with the same dropout."""
        if record is None:
            return False
        return replace(record, held_out_loss=None) == self.record(record.resident_order)

    def counts(self) -> tuple[int, ...]:
        """Return the numbers of experts per layer that the finished model is evaluated with.

        >>> ExpertDropout(settings=ExpertDropoutConfig(order="nested"), least=4, num_layers=1,
        ...     num_experts=16, seed=0, begin_step=0).counts()
        (16, 12, 8, 5, 4)
        """
        shares = (1, 3 / 4, 1 / 2, 1 / 3, 1 / 4)
        counts = {max(self.least, round(share * self.num_experts)) for share in shares}
        return tuple(sorted(counts, reverse=True))

    @property
    def distillation_weight(self) -> float:
        """Weight of self-distillation; 0 without it."""
        return self.settings.distillation_weight if self.settings.self_distillation else 0.0

    @property
    def third(self) -> int:
        """A third of the experts, but at least `least`."""
        return max(self.least, round(self.num_experts / 3))


def chosen_experts(model: PreTrainedModel) -> int:
    """Return how many experts per token statistics count as chosen: K of the inference rule.

    A quarter of the experts where no rule fixes a number, as in a densely trained OLMoE, whose K is
    chosen at export.
    """
    if isinstance(model, DsMoeForCausalLM):
        k = Rule.parse(model.config.inference_rule).k
    else:
        k = _olmoe_choice(model)
    return k or max(1, int(model.config.num_experts) // 4)


def _olmoe_choice(model: PreTrainedModel) -> int | None:
    """Return the K of an OLMoE that is trained sparsely; None if it is trained densely."""
    k = int(model.config.num_experts_per_tok)
    return k if k < int(model.config.num_experts) else None


def _chosen_per_token(config: TrainConfig, model: PreTrainedModel) -> int | None:
    """Return the largest K of the rules that the model computes with; None if none has one."""
    if not isinstance(model, DsMoeForCausalLM):
        return _olmoe_choice(model)
    texts = (model.config.training_rule, model.config.inference_rule, config.sparse.rule)
    counts = [rule.k for rule in map(Rule.parse, filter(None, texts)) if rule.k is not None]
    return max(counts, default=None)


def _latest(steps: int) -> str:
    """Return a `begin` that leaves the last step.

    >>> _latest(8), _latest(3)
    ('0.875', '0.666666666667')
    """
    return f"{(steps - 1) / steps:.12g}"


def _least(given: int | None, chosen: int | None, num_experts: int) -> int:
    lowest, highest = chosen or 1, num_experts - 1
    if lowest > highest:
        raise ConfigError(
            f"expert_dropout leaves no expert to drop: the model's rules choose {lowest} of its "
            f"{num_experts} experts; the most that works is top_k:{highest}"
        )
    if given is None:
        return chosen or min(highest, -(-num_experts // 4))
    if not lowest <= given <= highest:
        reason = f"the model's rules choose {lowest}" if given < lowest else "some must be absent"
        raise ConfigError(
            f"expert_dropout.least={given}, but of {num_experts} experts {reason}; the nearest "
            f"that works is {min(highest, max(lowest, given))}"
        )
    return given


class AllowedExperts:
    """Limits which experts a model may choose.

    A DS-MoE receives the limit as an argument. For OLMoE, forward hooks on the routers apply it
    until `remove`.

    Args:
        model: A DS-MoE or an OLMoE.
    """

    def __init__(self, model: PreTrainedModel):
        self._takes_argument = isinstance(model, DsMoeForCausalLM)
        self._allowed_LBE: Tensor | None = None
        self._hooks = []
        if isinstance(model, OlmoeForCausalLM):
            self._hooks = [
                model.get_submodule(f"model.layers.{layer}.mlp.gate").register_forward_hook(
                    self._hook(layer)
                )
                for layer in range(model.config.num_hidden_layers)
            ]

    def arguments(self, allowed_LBE: Tensor | None) -> dict[str, Any]:
        """Return keyword arguments of a forward pass that is limited to these experts.

        The limit holds until the next call, because the backward pass may recompute activations.

        Args:
            allowed_LBE: True for experts that a sequence may use; None for no limit.
        """
        self._allowed_LBE = allowed_LBE
        if not self._takes_argument or allowed_LBE is None:
            return {}
        return {"allowed_LBE": allowed_LBE}

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, layer: int) -> Any:
        def limit(router: Any, _inputs: Any, output: Any) -> Any:
            if self._allowed_LBE is None:
                return None
            logits_TE, weights_TK, _ = output
            allowed_BE = self._allowed_LBE[layer].to(logits_TE.device)
            tokens = len(logits_TE) // len(allowed_BE)
            rule = Rule(kind="top_k", k=router.top_k, renormalize=router.norm_topk_prob)
            routing = route_allowed(
                logits_TE.float(), allowed_BE.repeat_interleave(tokens, dim=0), rule
            )
            return logits_TE, routing.weights_TK.to(weights_TK.dtype), routing.ids_TK

        return limit


def first_experts(resident_order: Sequence[Sequence[int]], count: int, num_experts: int) -> Tensor:
    """Return allowed_LE, True for the first `count` experts of each layer's order."""
    allowed_LE = torch.zeros(len(resident_order), num_experts, dtype=torch.bool)
    for allowed_E, order in zip(allowed_LE, resident_order, strict=True):
        allowed_E[list(order[:count])] = True
    return allowed_LE


@torch.no_grad()
def measured_order(
    model: PreTrainedModel, batches: Iterable[Tensor], document_end: int | None = None
) -> list[list[int]]:
    """Return each layer's experts in descending order of their total router weight.

    The model computes in eval mode, so that the random state does not change.

    Args:
        model: A DS-MoE or an OLMoE; its mode is restored.
        batches: Tokens ids_BT to measure on.
        document_end: Token that ends a document, whose tokens see no other; None for one stretch.
    """
    training = model.training
    model.eval()
    try:
        inputs = (model_inputs(ids_BT.to(model.device), document_end) for ids_BT in batches)
        total_LE = sum(_weight_by_expert(model, one) for one in inputs)
    finally:
        model.train(training)
    assert isinstance(total_LE, Tensor), "at least one batch"
    return total_LE.argsort(dim=-1, descending=True, stable=True).tolist()


def _weight_by_expert(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    output = model(**inputs, use_cache=False, output_router_logits=True)
    if isinstance(model, DsMoeForCausalLM):
        rule = Rule.parse(model.config.inference_rule)
    else:
        rule = Rule(kind="top_k", k=int(model.config.num_experts_per_tok))
    layers = []
    for logits in output.router_logits:
        scores_TE = logits.flatten(0, -2).float().softmax(-1)
        layers.append((scores_TE * active_experts(scores_TE, rule)).double().sum(0).cpu())
    return torch.stack(layers)


def set_record(model: PreTrainedModel, record: ExpertDropoutRecord) -> None:
    """Store the record in the model's configuration, and so in each checkpoint."""
    setattr(model.config, KEY, record.as_dict())


def set_held_out_loss(model: PreTrainedModel, losses: Mapping[int, float]) -> None:
    """Add held-out losses by number of experts to the model's record."""
    record = dropout_record(model.config)
    assert record is not None, "set_record() must be called first"
    set_record(model, replace(record, held_out_loss=losses))
