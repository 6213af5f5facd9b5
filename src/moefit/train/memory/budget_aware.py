"""Train routers to keep to the experts that a server with few slots holds.

While a model is trained, the slot table of a server is simulated along each sequence, with the
experts that the router chooses and the server's eviction. A loss moves the choice from experts that
would evict others towards residents, so that exact mode reads less.

Shapes: B sequences, T tokens of a sequence, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import ConfigError
from moefit.moe.residents import eviction_loss
from moefit.moe.routing import Rule
from moefit.train.config import TrainConfig
from moefit.train.memory.expert_dropout import chosen_experts
from moefit.train.schedule import mi_scale
from moefit.train.settings import BudgetAwareConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BudgetAware:
    """The budget-aware routing of one run.

    Attributes:
        settings: As configured.
        rule: By which a server chooses experts.
        slots: Experts of a layer that the simulated server holds.
        steps: Of the run.
        weight: Of the loss at the present step; a tensor, because torch.compile would recompile for
            each value of a float.
    """

    settings: BudgetAwareConfig
    rule: Rule
    slots: int
    steps: int
    weight: Tensor

    @classmethod
    def of(cls, config: TrainConfig, model: PreTrainedModel) -> Self | None:
        """Return the budget-aware routing of a run; None if it has none.

        Raises:
            ConfigError: The model has no router or uses all experts for every token, or the budget
                is not between what a token needs and all experts.
        """
        settings = config.budget_aware
        if settings is None:
            return None
        num_experts = int(model.config.num_experts)
        if num_experts < 2:
            raise ConfigError(
                "budget_aware has no effect, because a model with model.num_experts=1 has no "
                "router; leave it out, or give model.num_experts=2 or more"
            )
        rule, least = _served_rule(model, num_experts)
        slots = round(settings.share * num_experts)
        if not least <= slots < num_experts:
            nearest = min(num_experts - 1, max(least, slots))
            raise ConfigError(
                f"budget_aware.share={settings.share:g} is {slots} of {num_experts} experts, but "
                f"a token uses {least} and at least one must be absent; the nearest that works is "
                f"{nearest / num_experts:g}"
            )
        weight = torch.zeros((), device=model.device)
        return cls(settings=settings, rule=rule, slots=slots, steps=config.steps, weight=weight)

    def set_step(self, step: int) -> None:
        """Set the weight of a step, counted from 1."""
        self.weight.fill_(self.settings.weight * mi_scale(step, self.steps, self.settings.ramp))

    def loss(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum of the layers' losses; 0 before the ramp.

        Args:
            logits: Router logits [B, T, E] by layer.
        """
        if not self.weight.item():
            return self.weight
        layers = [eviction_loss(one, self.rule, self.slots) for one in logits]
        return self.weight * torch.stack(layers).sum()


def _served_rule(model: PreTrainedModel, num_experts: int) -> tuple[Rule, int]:
    """Return the rule that a server routes by, and the most experts that a token surely uses."""
    if isinstance(model, DsMoeForCausalLM):
        rule = Rule.parse(model.config.inference_rule)
    else:
        rule = Rule(kind="top_k", k=chosen_experts(model))
    if rule.kind == "dense" or rule.k == num_experts:
        raise ConfigError(
            f"budget_aware has no effect on a model whose rule {rule} uses all experts for every "
            "token; give a model.inference_rule such as top_k:4, or leave out budget_aware"
        )
    if rule.kind == "threshold_top_k":
        raise ConfigError(
            f"budget_aware needs a rule that decides token by token, and {rule} depends on the "
            "batch; the nearest that works is "
            f"model.inference_rule=threshold:{rule.epsilon:g}"
        )
    return rule, rule.k or 1
