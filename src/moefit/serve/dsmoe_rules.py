"""What is particular about serving this project's own DS-MoE models.

Owns their inference rule: giving them another one (`use_rule`), and following it when it changes
while they are served. How many experts a token has is read from each choice, as for any family.
Whether the weights are renormalised cannot be, and what was identified at load doesn't tell: it
holds for the rule of that moment, and under `dense` the weights sum to one either way.

Served from slots are the MLP's experts. Attention experts (MoA) are heads of one attention over
keys and values that they share, and stay in memory with the other weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from moefit.dsmoe.block import DsMoeBlock
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import ConfigError
from moefit.moe.routing import Rule
from moefit.serve.virtual_experts import VirtualExperts


def follow_rules(
    model: nn.Module, served: Mapping[str, VirtualExperts]
) -> tuple[RemovableHandle, ...]:
    """Hook the DS-MoE blocks of a model, which may have none; returns the hooks."""
    return tuple(
        parent.register_forward_pre_hook(_follower(experts))
        for experts in served.values()
        if isinstance(parent := model.get_submodule(experts.block.parent), DsMoeBlock)
    )


def check_rule(model: nn.Module, rule: Rule) -> DsMoeForCausalLM:
    """The model, if it can be given that rule. Raises ConfigError for one that cannot."""
    if not isinstance(model, DsMoeForCausalLM):
        raise ConfigError(
            f"only DS-MoE models can be given an inference rule; {rule} was given for a "
            f"{type(model).__name__}, which works without"
        )
    rule.check(model.config.num_experts)
    return model


def use_rule(model: nn.Module, rule: Rule) -> None:
    """Infer by this rule from now on. Raises ConfigError for a model that has no choice of them."""
    check_rule(model, rule).set_inference_rule(rule)


def _follower(experts: VirtualExperts) -> Any:
    def follow(_block: nn.Module, inputs: tuple[Any, ...]) -> None:
        rule: Rule = inputs[1]
        chosen = "normalised" if rule.renormalize else "kept"
        if experts.scoring is not None and experts.scoring.chosen != chosen:
            experts.scoring = replace(experts.scoring, chosen=chosen)

    return follow
