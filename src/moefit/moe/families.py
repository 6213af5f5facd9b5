"""Describe a MoE block independently of its model family.

A `Layout` defines the names, shapes and parameters of an expert's tensors, what an expert computes,
and what a block passes to its experts. `layouts.py` implements it for each family.

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
Product = Callable[[str, Tensor, Tensor | None], Tensor]
"""x W^T + bias, [R, O], from the short name of the matrix W, x_RI and a bias or None."""


@dataclass(frozen=True, slots=True)
class ScaledCodes:
    """A quantised matrix as memory can hold it: codes, and scales of groups of a row's inputs.

    Attributes:
        name: As reports call it, such as `mxfp4`.
        codes: `e2m1` (floats of 4 bits), `int4`, `int8`, `e4m3` (floats of 8 bits), or a k-quant of
            llama.cpp, `q2_k` to `q6_k`, whose scales are codes too.
        scales: `e8m0` (exponents of two), `float16` or `bfloat16`; `float32` of `e4m3`.
        group: 32 if any 32 inputs may have a scale of their own, else 64; 128 for `e4m3`, 256 for
            k-quants. Larger groups repeat it.
        zeros: Whether groups have zero points.
        transposed: Whether the model's tensor has input units in rows; rows of codes are output
            units in any case.
    """

    name: str
    codes: str
    scales: str
    group: int
    zeros: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one expert's part of a parameter.

    Attributes:
        shape: Shape of the part.
        dtype: Dtype of the model's parameter.
        inputs_first: Whether rows of a matrix are input units, so that it computes x @ W.
        stored: How the checkpoint stores it, if slots can hold that.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs_first: bool = False
    stored: ScaledCodes | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpShape:
    """An MLP of two matrices: down(act(gate) * up) with gate above up, or down(act(in)).

    Attributes:
        w_in: Short name of the first matrix.
        w_out: Short name of the second.
        activation: Its name. `clamped` has gate and up in turn and clamps both (gpt-oss).
        gated: Whether the first matrix has gates and ups.
        biases: Short names of the biases of both, if they have any.
    """

    w_in: str
    w_out: str
    activation: str
    gated: bool
    biases: tuple[str, str] | None = None


class Layout(Protocol):
    """How a family stores, addresses and computes its experts. One instance per block."""

    num_experts: int
    specs: Mapping[str, TensorSpec]
    mlp: MlpShape | None
    """The expert as an MLP, if it consists of two matrices and a known activation; else None."""

    def parameter(self, short: str, expert: int) -> tuple[str, int | None]:
        """Return the parameter's name in the experts module, and the row (None: all of it)."""
        ...

    def output(self, tensors: Tensors, x_RD: Tensor) -> Tensor:
        """Return one expert's unweighted output [R, D]."""
        ...

    def output_by(self, product: Product, tensors: Tensors, x_RD: Tensor) -> Tensor | None:
        """Return the same with matrix products computed by `product`, whose rounding may differ.

        `tensors` has biases and other tensors that are no matrices. None if the family's code does
        not show its products.
        """
        ...

    def routing(self, num_tokens: int, *arguments: Tensor) -> Routing:
        """Return what the block passes to its experts after the tokens, as a `Routing`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeBlock:
    """One router with its experts in one layer.

    Attributes:
        name: Dotted name of the module that is replaced and holds the experts' parameters: the
            experts module, or the whole block if a family has no experts module.
        layout: How the experts are stored and computed.
        shell: For a family without experts module, builds the replacement of the block, including
            its router, around an experts module.
    """

    name: str
    layout: Layout
    shell: Callable[[nn.Module], nn.Module] | None = None
    weighs_inputs: bool = False

    @property
    def parent(self) -> str:
        """Name of the module that contains router and experts."""
        return self.name if self.shell else self.name.rpartition(".")[0]

    def around(self, experts: nn.Module) -> nn.Module:
        """Return the module to put at `name` so that the block uses these experts."""
        return self.shell(experts) if self.shell else experts

    @property
    def num_experts(self) -> int:
        """E."""
        return self.layout.num_experts

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the model's own dtypes."""
        return sum(spec.nbytes for spec in self.layout.specs.values())
