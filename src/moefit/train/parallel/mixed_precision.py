"""Compute with weights rounded to bfloat16; weights, gradients and optimizer stay in float32.

Many processes use FSDP2's policy: weights travel and compute in bfloat16, and gradients are added
up in float32. One process does the same by hooks, which hold rounded weights in a module during its
forward pass. Routers compute in float32: in bfloat16 the choice between experts with similar logits
would depend on the kernel.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional
from transformers import PreTrainedModel

ROUNDED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
"""Of all modules but routers."""
WHOLE = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
"""Of routers, whose inputs FSDP2 then casts too."""


def routers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield the routers of MLPs and attention."""
    for name, module in model.get_submodule("model.layers").named_modules():
        if name.rpartition(".")[2] == "gate":
            yield module


def routers_with_weights(model: PreTrainedModel) -> list[nn.Module]:
    """Return the routers that have weights of their own: not those of LocMoE."""
    return [one for one in routers(model) if next(one.parameters(), None) is not None]


def round_weights(model: PreTrainedModel) -> None:
    """Make a model of one process compute with rounded weights; in place.

    Each module rounds its own weights in its own forward pass, also when activation checkpointing
    repeats it. Weights, their gradients and what is saved are not rounded.

    Args:
        model: In float32.
    """
    whole: set[nn.Module] = set()
    for router in routers(model):
        whole |= set(router.modules())
        router.register_forward_pre_hook(_cast_inputs)
    for module in model.modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if names and module not in whole:
            sum_rows_in_float32(module)
            rounded = _RoundedWeights(names=names)
            module.register_forward_pre_hook(rounded.enter)
            # Always: activation checkpointing ends a repeated pass early, by an exception.
            module.register_forward_hook(rounded.leave, always_call=True)


def sum_rows_in_float32(module: nn.Module) -> None:
    """Sum an embedding's gradient in float32, and round it once; in place.

    On CPUs torch adds the rows of a token one by one in the dtype of the weights: a frequent
    token's sum in bfloat16 stops growing after some hundred. Does nothing to other modules.
    """
    if type(module) is not nn.Embedding or module.max_norm is not None or module.sparse:
        return
    module.forward = MethodType(_embedded, module)  # a method, so that copies have their own


def _embedded(module: nn.Embedding, ids: Tensor) -> Tensor:
    return cast(Tensor, _Rows.apply(ids, module._parameters["weight"], module.padding_idx))


class _Rows(torch.autograd.Function):
    """Rows of a matrix, whose gradients are summed in float32."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VD: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.padding = weight_VD.shape, weight_VD.dtype, padding
        return functional.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (ids,), (gradient,) = ctx.saved_tensors, gradients
        sums_VD = gradient.new_zeros(ctx.shape, dtype=torch.float32)
        sums_VD.index_add_(0, ids.flatten(), gradient.reshape(-1, ctx.shape[1]).float())
        if ctx.padding is not None:
            sums_VD[ctx.padding] = 0
        return None, sums_VD.to(ctx.dtype), None


def _cast_inputs(router: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(one.float() for one in inputs)


@dataclass(slots=True, kw_only=True)
class _RoundedWeights:
    """Rounded weights of a module during its forward pass.

    Attributes:
        names: Of its own parameters.
        whole: The parameters, while rounded ones are in their places.
    """

    names: Sequence[str]
    whole: dict[str, Any] = field(default_factory=dict)

    def enter(self, module: nn.Module, inputs: Any) -> None:
        assert not self.whole
        for name in self.names:
            self.whole[name] = module._parameters[name]
            # Not by setattr, which wants a Parameter; gradients must reach the whole weights.
            module._parameters[name] = self.whole[name].to(torch.bfloat16)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        module._parameters.update(self.whole)
        self.whole.clear()
