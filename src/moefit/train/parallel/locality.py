"""Keep tokens on their machine: LocMoE's locality loss, and a bias on the router.

On text that every machine gets alike the loss cannot work, because machines pull the same router
in opposite directions. It needs text divided by source (`data.shard_by`).
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import ConfigError
from moefit.moe.locmoe import locality_loss
from moefit.train.config import TrainConfig
from moefit.train.parallel.parallelism import Parallelism


class NodeLocality:
    """The locality loss of a run, and the bias of its routers towards experts of their machine.

    Args:
        model: With routers; the bias is added by hooks, in training only, until `remove`.
        own_E: True for experts of this machine.
        bias: Added to the logits of those experts.
    """

    def __init__(self, model: PreTrainedModel, own_E: Tensor, bias: float):
        device = model.device
        self._own_E = own_E.to(device)
        self.weight = torch.zeros((), device=device)
        """mu of the paper, for each layer; set by the trainer."""
        self._bias_E = bias * self._own_E.float()
        self._hooks = []
        if bias:
            for layer in model.get_submodule("model.layers").children():
                gate = layer.get_submodule("mlp.gate")
                self._hooks.append(gate.register_forward_hook(self._add_bias))

    @classmethod
    def of(cls, config: TrainConfig, model: PreTrainedModel, parallel: Parallelism) -> Self | None:
        """Return the locality of a run; None if it asks for none, or has one process only.

        Raises:
            ConfigError: Its settings have no effect, or the model does not support them.
        """
        wanted = {
            "loss.locality": config.loss.locality,
            "parallel.node_bias": config.parallel.node_bias,
        }
        given = ", ".join(f"{name}={value:g}" for name, value in wanted.items() if value)
        if not given or parallel.dispatch is None:  # or one process goes on with the run of many
            return None
        own_E = parallel.dispatch.own_E
        if bool(own_E.all()):
            raise ConfigError(
                f"{given} has no effect, because all processes are on one machine; leave it out, "
                "or give parallel.nodes=2 to treat them as two"
            )
        if config.parallel.node_bias and not isinstance(model, DsMoeForCausalLM):
            raise ConfigError(
                f"parallel.node_bias={config.parallel.node_bias:g} works for architecture: dsmoe "
                "only; leave it out, or use loss.locality"
            )
        return cls(model, own_E, config.parallel.node_bias)

    def loss(self, logits: Sequence[Tensor]) -> Tensor:
        """Return mu times the locality loss, summed over layers; logits [.., E] by layer."""
        layers = [locality_loss(one.flatten(0, -2), self._own_E) for one in logits]
        return self.weight * torch.stack(layers).sum()

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _add_bias(self, router: Any, inputs: Any, logits_TE: Tensor) -> Tensor:
        return logits_TE + self._bias_E if router.training else logits_TE
