"""The modules of an expert that every token passes through, as kernels take them.

Such an expert is a gated MLP of three linear layers beside a block's router and routed experts, in
some families with a linear layer of one output, whose sigmoid is a factor. Which of both a block is
is not decided here: `layer_probe.py` compares what the block returns. The MLP of a layer without
experts may be computed as such an expert, added to nothing but the residual.
"""

from collections.abc import Sequence

import torch
from torch import nn

from moefit.quant.cpu_kernels import kernels
from moefit.quant.layers.shared_expert import SharedExpert, SharedExpertKernel
from moefit.serve.hf.activations import computes_silu
from moefit.serve.hf.native_linear import addresses_of, linear_of

_LINEARS = ("gate_proj", "up_proj", "down_proj")


class SharedModules:
    """A shared expert's modules.

    Args:
        mlp: The MLP.
        factor: The linear layer of its factor; None for none.

    Attributes:
        all: Every module of it.
    """

    def __init__(self, mlp: nn.Module, factor: nn.Module | None):
        self.mlp, factors = mlp, [] if factor is None else [factor]
        self.all = [*mlp.modules(), *factors]
        self._linears = [*(mlp.get_submodule(name) for name in _LINEARS), *factors]
        self._kernel: SharedExpertKernel | None = None
        self._weights: tuple[int, ...] = ()

    def kernel(self, dtype: torch.dtype) -> SharedExpertKernel | None:
        """Return the expert as one call for tokens of a dtype; None if kernels do not know it."""
        compiled, made = kernels(), self._kernel
        if compiled is None:
            return None
        weights = tuple([address for one in self._linears for address in addresses_of(one)])
        if made is None or self._weights != weights:
            shared = self._shared()
            if shared is None or not shared.supported(dtype):
                return None
            made = self._kernel = SharedExpertKernel(compiled, shared)
            self._weights = weights
        return made

    def _shared(self) -> SharedExpert | None:
        linears = [linear_of(one) for one in self._linears]
        known = [one for one in linears if one is not None]
        if len(known) != len(linears):
            return None
        gate, up, down, *factors = known
        return SharedExpert(gate=gate, up=up, down=down, factor=next(iter(factors), None))


def shared_modules(others: Sequence[nn.Module]) -> SharedModules | None:
    """Return the shared expert of a block, or None if its modules are others.

    Args:
        others: The block's children but its router and its routed experts.
    """
    mlps = [one for one in others if _is_mlp(one)]
    factors = [one for one in others if one not in mlps]
    if len(mlps) != 1 or len(factors) > 1 or any(linear_of(one) is None for one in factors):
        return None
    return SharedModules(mlps[0], next(iter(factors), None))


def dense_mlp(feed_forward: nn.Module) -> SharedModules | None:
    """Return a layer's feed-forward block as such an expert; None if its modules are others."""
    return SharedModules(feed_forward, None) if _is_mlp(feed_forward) else None


def _is_mlp(module: nn.Module) -> bool:
    children = dict(module.named_children())
    linears = [children.pop(name, None) for name in _LINEARS]
    return (
        all(one is not None and linear_of(one) is not None for one in linears)
        and all(map(computes_silu, children.values()))
        and len(children) == 1
    )
