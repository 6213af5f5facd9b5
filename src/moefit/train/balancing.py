"""Loss-free balancing: biases of experts that move until all are chosen as often.

A router adds them to its scores where it chooses the k best, and not to the weights of those
(arXiv 2408.15664), so that balance costs no gradient. They are part of the model, also in serving.

Shapes: L layers, E experts.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.dsmoe.block import DsMoeBlock
from moefit.train.config import TrainConfig
from moefit.train.parallel.processes import Processes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BalancingBias:
    """Moves the biases of a model's routers after each step.

    Attributes:
        rate: By which each moves.
        biases: [E] of each layer; in place.
        loads: Choices of each expert in this process since the last update, counted by routers.
    """

    rate: float
    biases: tuple[Tensor, ...]
    loads: tuple[Tensor, ...]

    @classmethod
    def of(cls, config: TrainConfig, model: PreTrainedModel) -> Self | None:
        """Return the balancing of a run, on its model as it is trained; None if it asks for none.

        Without many processes and with them the routers' buffers are whole.
        """
        if not config.loss.balancing_bias:
            return None
        gates = [one.gate for one in model.modules() if isinstance(one, DsMoeBlock)]
        biases, loads = [], []
        for gate in gates:
            assert gate is not None, "checked by the model's configuration"
            assert gate.e_score_correction_bias is not None and gate.load_E is not None
            biases.append(gate.e_score_correction_bias)
            loads.append(gate.load_E)
        return cls(rate=config.loss.balancing_bias, biases=tuple(biases), loads=tuple(loads))

    def update(self, processes: Processes) -> None:
        """Move biases by the loads of all processes since the last update; all call it."""
        load_LE = torch.stack(self.loads).double()
        total = torch.tensor(processes.sums(load_LE.flatten().tolist()), dtype=torch.float64)
        total_LE = total.view_as(load_LE)
        move_LE = self.rate * (total_LE.mean(1, keepdim=True) - total_LE).sign()
        for bias_E, load_E, move_E in zip(self.biases, self.loads, move_LE, strict=True):
            bias_E.add_(move_E.to(bias_E))
            load_E.zero_()
