"""What a family's MoE block is to all others: a name, and a layout of experts.

Owns that contract: how an expert's tensors are called, shaped and addressed, what it computes, and
what a block passes to its experts. Knows nothing of which families there are (`layouts.py`), nor of
where experts' bytes are kept.

Shapes: T tokens, D model width, E experts, K chosen per token, R rows of one expert.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moefit.moe.routing import Routing

Tensors = Mapping[str, Tensor]
"""One expert's tensors by short name, such as `gate_up_proj`."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one expert's part of a parameter.

    `inputs_first`: a matrix whose rows are input units, so that it computes x @ W.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs_first: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpShape:
    """down(act(gate) * up), gate and up in one matrix, gate first; or, not gated, down(act(in))."""

    w_in: str
    w_out: str
    activation: str
    gated: bool


class Layout(Protocol):
    """How a family keeps, addresses and computes its experts. One instance per block."""

    num_experts: int
    specs: Mapping[str, TensorSpec]
    mlp: MlpShape | None
    """What an expert is, if two matrices and a known activation are all of it."""

    def parameter(self, short: str, expert: int) -> tuple[str, int | None]:
        """The parameter's name below the experts module, and the row in it, None for all of it."""
        ...

    def output(self, tensors: Tensors, x_RD: Tensor) -> Tensor:
        """One expert's unweighted output y_RD."""
        ...

    def routing(self, num_tokens: int, *arguments: Tensor) -> Routing:
        """What the block passed behind the tokens, as a `Routing`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeBlock:
    """One router with its experts in one layer.

    `name` is the dotted name of the module that is replaced and whose parameters the experts are.
    That is the experts' own module; where a family has none, it is the whole block, and `shell`
    makes of served experts what takes its place, router included.
    """

    name: str
    layout: Layout
    shell: Callable[[nn.Module], nn.Module] | None = None

    @property
    def parent(self) -> str:
        """The module that holds router and experts."""
        return self.name if self.shell else self.name.rpartition(".")[0]

    def around(self, experts: nn.Module) -> nn.Module:
        """What stands at `name` when these experts serve the block."""
        return self.shell(experts) if self.shell else experts

    @property
    def num_experts(self) -> int:
        """E."""
        return self.layout.num_experts

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the model's own dtypes."""
        return sum(spec.nbytes for spec in self.layout.specs.values())
