"""Keep tokens on their machine: LocMoE's locality loss, a bias on the router, and a limit.

On text that every machine gets alike the loss cannot work, because machines pull the same router
in opposite directions. It needs text divided by source (`data.shard_by`).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import ConfigError
from moefit.moe.locmoe import locality_loss, of_best_machines
from moefit.moe.routing import Rule
from moefit.train.config import TrainConfig
from moefit.train.parallel.parallelism import Parallelism

_EXCLUDED = -1e4
"""The logit of an expert that a token may not use: its score is 0, and losses stay finite."""


class NodeLocality:
    """The locality loss of a run, and what keeps its routers to experts of some machines.

    Args:
        model: With routers; hooks change their logits, in training only, until `remove`.
        own_E: True for experts of this machine.
        bias: Added to the logits of those experts.
        limit: Most machines whose experts a token uses, or `own`; None for all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        own_E: Tensor,
        bias: float,
        limit: Literal["own"] | int | None = None,
    ):
        device = model.device
        self._own_E = own_E.to(device)
        self.weight = torch.zeros((), device=device)
        """mu of the paper, for each layer; set by the trainer."""
        self._bias_E = bias * self._own_E.float()
        self._limit = limit
        self._hooks = []
        if bias or limit is not None:
            self._k = Rule.parse(model.config.training_rule).k or 1
            for layer in model.get_submodule("model.layers").children():
                gate = layer.get_submodule("mlp.gate")
                self._hooks.append(gate.register_forward_hook(self._change))

    @classmethod
    def of(cls, config: TrainConfig, model: PreTrainedModel, parallel: Parallelism) -> Self | None:
        """Return the locality of a run; None if it asks for none, or has one process only.

        Raises:
            ConfigError: Its settings have no effect, or the model does not support them.
        """
        wanted = {
            "loss.locality": config.loss.locality,
            "parallel.node_bias": config.parallel.node_bias,
            "parallel.node_limit": config.parallel.node_limit,
        }
        given = ", ".join(
            f"{name}={value if isinstance(value, str) else format(value, 'g')}"
            for name, value in wanted.items()
            if value
        )
        if not given or parallel.dispatch is None:  # or one process goes on with the run of many
            return None
        own_E = parallel.dispatch.own_E
        if bool(own_E.all()):
            raise ConfigError(
                f"{given} has no effect, because all processes are on one machine; leave it out, "
                "or give parallel.nodes=2 to treat them as two"
            )
        bias, limit = config.parallel.node_bias, config.parallel.node_limit
        if (bias or limit is not None) and not isinstance(model, DsMoeForCausalLM):
            one = f"node_bias={bias:g}" if bias else f"node_limit={limit}"
            raise ConfigError(
                f"parallel.{one} works for architecture: dsmoe only; leave it out, or use "
                "loss.locality"
            )
        if limit is not None:
            rule = Rule.parse(model.config.training_rule)
            _check_limit(limit, rule.k or 1, len(own_E), int(own_E.sum()), bias)
        return cls(model, own_E, bias, limit)

    def loss(self, logits: Sequence[Tensor]) -> Tensor:
        """Return mu times the locality loss, summed over layers; logits [.., E] by layer."""
        layers = [locality_loss(one.flatten(0, -2), self._own_E) for one in logits]
        return self.weight * torch.stack(layers).sum()

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _change(self, router: Any, inputs: Any, logits_TE: Tensor) -> Tensor:
        if not router.training:
            return logits_TE
        logits_TE = logits_TE + self._bias_E
        if self._limit is None:
            return logits_TE
        kept_TE = self._own_E
        if isinstance(self._limit, int):
            machines = len(self._own_E) // int(self._own_E.sum())
            kept_TE = of_best_machines(logits_TE.detach(), machines, self._limit, self._k)
        return logits_TE.masked_fill(~kept_TE, _EXCLUDED)


def _check_limit(
    limit: Literal["own"] | int, chosen: int, experts: int, own: int, bias: float
) -> None:
    """Raise ConfigError for a limit that has no effect, or leaves too few experts.

    Args:
        limit: Most machines, or `own`.
        chosen: Experts that a token chooses.
        experts: E.
        own: Experts of one machine.
        bias: Towards them.
    """
    machines = experts // own
    most = 1 if limit == "own" else limit
    if most >= machines:
        raise ConfigError(
            f"parallel.node_limit={limit} has no effect, because there are {machines} machines; "
            f"leave it out, or give at most {machines - 1}"
        )
    if most * own < chosen:
        least = math.ceil(chosen / own)
        works = f"the least that works is {least}" if least < machines else "leave it out"
        raise ConfigError(
            f"parallel.node_limit={limit} leaves {most * own} experts, but a token chooses "
            f"{chosen}; {works}"
        )
    if limit == "own" and bias:
        raise ConfigError(
            f"parallel.node_bias={bias:g} has no effect with node_limit=own, where a token uses no "
            "other experts; leave one of them out"
        )
