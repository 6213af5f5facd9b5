"""Find the MoE blocks of a Hugging Face model, and describe how each computes one expert.

One layout class per way of storing experts; families with the same storage share it. Activation
functions are recognised by their values, not by their class. The experts of JetMoE are part of its
block, so its block gets a replacement that calls an experts module.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

from moefit.errors import UnsupportedModelError
from moefit.moe.families import MlpShape, MoeBlock, Product, Tensors, TensorSpec
from moefit.moe.routing import Routing

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}
_EXAMPLE = torch.stack(  # gates and ups of both signs and all sizes, beyond any clamp
    [torch.linspace(-12, 12, 192), torch.linspace(-12, 12, 192) ** 3]
)[:, torch.arange(192) * 37 % 192]


def activation_name(function: Callable[[Tensor], Tensor], *, gated: bool) -> str | None:
    """Return the name of an activation function, or None if it is not a known one.

    Args:
        function: Function of [R, F], or of [R, 2F] as act(gate) * up if `gated`.
        gated: Whether the input has gates and ups.

    >>> activation_name(F.silu, gated=False)
    'silu'
    """
    try:
        with torch.inference_mode(), torch.device("cpu"):
            found = function(_EXAMPLE)
    except Exception:  # noqa: BLE001 - known functions accept the example
        return None
    gate, up = _EXAMPLE.chunk(2, dim=-1) if gated else (_EXAMPLE, torch.ones_like(_EXAMPLE))
    for name, known in ACTIVATIONS.items():
        value = known(gate)
        slack = (
            1e-5 * value.abs() + 1e-6
        ) * up.abs()  # for other implementations of the same function
        if found.shape == value.shape and bool(((found - value * up).abs() <= slack).all()):
            return name
    return None


class ServedJetMoe(nn.Module):
    """JetMoE's block with its experts replaced by `experts(x_TD, ids_TK, weights_TK) -> y_TD`."""

    def __init__(self, block: JetMoeMoE, experts: nn.Module):
        super().__init__()
        self.router, self.bias, self.experts = block.router, block.bias, experts

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        x_TD = x_BTD.flatten(0, 1)
        *_, logits_TE = self.router(
            x_TD
        )  # the other outputs are the same selection, sorted by expert
        logits_TK, ids_TK = logits_TE.topk(self.router.top_k, dim=-1)
        y_TD = self.experts(x_TD, ids_TK, logits_TK.softmax(-1).type_as(x_TD))
        return y_TD.view_as(x_BTD) + self.bias


def find_blocks(model: nn.Module) -> tuple[MoeBlock, ...]:
    """Return all MoE blocks of a model in the order of its modules.

    Args:
        model: May be on the meta device.

    Raises:
        UnsupportedModelError: There is none.
    """
    found = tuple(_blocks(model))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts that can be served one by one: none behind "
            "transformers' experts interface, no Switch Transformers, NLLB-MoE or JetMoE layout; "
            "a model without experts is served by transformers itself"
        )
    return found


def _blocks(model: nn.Module) -> Iterator[MoeBlock]:
    for name, module in model.named_modules():
        if isinstance(module, SwitchTransformersExperts):
            yield MoeBlock(name=name, layout=SwitchLayout(module))
        elif isinstance(module, NllbMoeExperts):
            yield MoeBlock(name=name, layout=NllbLayout(module))
        elif isinstance(module, JetMoeMoE):
            shell = partial(ServedJetMoe, module)
            yield MoeBlock(name=name, layout=JetMoeLayout(module), shell=shell)
        elif _uses_experts_interface(module):
            yield MoeBlock(name=name, layout=StackedLayout(module))


def _uses_experts_interface(module: nn.Module) -> bool:
    attributes = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
    return all(hasattr(module, name) for name in attributes) and hasattr(module, "down_proj")


class StackedLayout:
    """Stacked parameters [E, ...] of transformers' experts interface.

    The computation follows the interface's flags (transformers `integrations/moe.py`): gate and up
    in one matrix or up alone, biases, transposed matrices, the class's own gate function, and a
    norm of each expert's output.
    """

    def __init__(self, experts: nn.Module):
        self._experts = cast(Any, experts)
        parameters = dict(experts.named_parameters(recurse=False))
        self.num_experts = self._experts.down_proj.shape[0]
        self._input = "gate_up_proj" if self._experts.has_gate else "up_proj"
        self.specs: Mapping[str, TensorSpec] = {
            short: TensorSpec(
                tuple(parameter.shape[1:]), parameter.dtype, bool(self._experts.is_transposed)
            )
            for short, parameter in parameters.items()
            if parameter.shape[0] == self.num_experts
        }
        self.mlp = self._mlp()

    def _mlp(self) -> MlpShape | None:
        if self._has_norm or self._experts.is_transposed or len(self.specs) != 2:
            return None
        gated = bool(self._experts.has_gate)
        activate = self._experts._apply_gate if gated else self._experts.act_fn
        activation = activation_name(activate, gated=gated)
        if activation is None:
            return None
        return MlpShape(w_in=self._input, w_out="down_proj", activation=activation, gated=gated)

    def parameter(self, short: str, expert: int) -> tuple[str, int | None]:
        """Return the stacked parameter and the expert's row."""
        return short, expert

    def output(self, tensors: Tensors, x_RD: Tensor) -> Tensor:
        """Return down(gate(in(x))), normalised if the family does so."""
        return self.output_by(partial(self._linear, tensors), tensors, x_RD)

    def output_by(self, product: Product, tensors: Tensors, x_RD: Tensor) -> Tensor:
        """Return the same with other products."""
        h_RI = product(self._input, x_RD, tensors.get(f"{self._input}_bias"))
        activate = self._experts._apply_gate if self._experts.has_gate else self._experts.act_fn
        h_RF = activate(h_RI)
        y_RD = product("down_proj", h_RF, tensors.get("down_proj_bias"))
        return self._experts.post_expert_norm(y_RD) if self._has_norm else y_RD

    def routing(self, num_tokens: int, *arguments: Tensor) -> Routing:
        """Return the block's (ids_TK, weights_TK)."""
        ids_TK, weights_TK = arguments
        return Routing(ids_TK.reshape(num_tokens, -1), weights_TK.reshape(num_tokens, -1))

    @property
    def _has_norm(self) -> bool:
        return getattr(self._experts, "has_post_expert_norm", False)

    def _linear(self, tensors: Tensors, short: str, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        weight = tensors[short]
        if self._experts.is_transposed:
            y_RO = x_RI @ weight
            return y_RO if bias is None else y_RO + bias
        return F.linear(x_RI, weight, bias)


class JetMoeLayout:
    """JetMoE's MLP: stacked `input_linear` (gate and up) and `output_linear` of the block itself.

    Its attention experts (MoA) are not served from slots: their matrices are used before and after
    attention, so they belong to the dense weights.
    """

    def __init__(self, block: nn.Module):
        self._activation = cast(Any, block).activation
        self.specs: Mapping[str, TensorSpec] = {
            short: TensorSpec(tuple(parameter.shape[1:]), parameter.dtype)
            for short, parameter in block.named_parameters()
            if short in ("input_linear.weight", "output_linear.weight")
        }
        self.num_experts = int(cast(Any, block).input_linear.num_experts)
        activation = activation_name(self._activation, gated=False)
        self.mlp: MlpShape | None = None
        if activation is not None:
            self.mlp = MlpShape(
                w_in="input_linear.weight",
                w_out="output_linear.weight",
                activation=activation,
                gated=True,
            )

    def parameter(self, short: str, expert: int) -> tuple[str, int | None]:
        """Return the stacked parameter and the expert's row."""
        return short, expert

    def output(self, tensors: Tensors, x_RD: Tensor) -> Tensor:
        """Return output(act(gate) * up)."""
        gate_RF, up_RF = F.linear(x_RD, tensors["input_linear.weight"]).chunk(2, dim=-1)
        return F.linear(self._activation(gate_RF) * up_RF, tensors["output_linear.weight"])

    def output_by(self, product: Product, tensors: Tensors, x_RD: Tensor) -> Tensor:
        """Return the same with other products."""
        gate_RF, up_RF = product("input_linear.weight", x_RD, None).chunk(2, dim=-1)
        return product("output_linear.weight", self._activation(gate_RF) * up_RF, None)

    def routing(self, num_tokens: int, *arguments: Tensor) -> Routing:
        """Return the (ids_TK, weights_TK) of `ServedJetMoe`."""
        ids_TK, weights_TK = arguments
        return Routing(ids_TK.view(num_tokens, -1), weights_TK.view(num_tokens, -1))


class SwitchLayout:
    """One module per expert, `expert_3`; the block passes a one-hot mask [T, 1, E] and weights."""

    def __init__(self, experts: nn.ModuleDict):
        self.num_experts = int(
            cast(Any, experts).num_experts
        )  # NLLB's dictionary has dropout in it
        self._template = experts["expert_0"]
        self.specs: Mapping[str, TensorSpec] = {
            short: TensorSpec(tuple(parameter.shape), parameter.dtype)
            for short, parameter in self._template.named_parameters()
        }
        self.mlp = self._mlp()

    def _mlp(self) -> MlpShape | None:
        activate = getattr(self._template, "act", None)
        if set(self.specs) != {"wi.weight", "wo.weight"} or activate is None:
            return None
        activation = activation_name(activate, gated=False)
        if activation is None:
            return None
        return MlpShape(w_in="wi.weight", w_out="wo.weight", activation=activation, gated=False)

    def parameter(self, short: str, expert: int) -> tuple[str, int | None]:
        """Return a parameter of the expert's own module."""
        return f"expert_{expert}.{short}", None

    def output(self, tensors: Tensors, x_RD: Tensor) -> Tensor:
        """Call the family's own expert module with these tensors."""
        return functional_call(self._template, dict(tensors), (x_RD,))

    def output_by(self, product: Product, tensors: Tensors, x_RD: Tensor) -> None:
        """Return None: the products are the module's own."""

    def routing(self, num_tokens: int, *arguments: Tensor) -> Routing:
        """Convert the mask; a token beyond an expert's capacity gets the padding id E."""
        mask_T1E, weights_T1 = arguments
        mask_TE = mask_T1E.reshape(num_tokens, self.num_experts)
        ids_T = mask_TE.argmax(-1).masked_fill(~mask_TE.any(-1), self.num_experts)
        return Routing(ids_T[:, None], weights_T1.reshape(num_tokens, 1))


class NllbLayout(SwitchLayout):
    """NLLB-MoE: the block passes the first choice's mask [T, E] and both choices' weights [T, E].

    transformers 5 interprets the mask's zeros and ones as expert ids (`one_hot(router_mask)`), so
    that expert 1 computes every first choice, expert 0 every second, and no other expert is used.
    This is reproduced here, because results must equal those of transformers;
    tests/serve/test_encoder_decoder_serving.py compares them and fails if transformers changes it.
    """

    def __init__(self, experts: nn.ModuleDict):
        super().__init__(experts)
        dropout = float(cast(Any, experts).moe_token_dropout)
        self._kept = 1 - dropout if dropout > 0 else 1.0

    def routing(self, num_tokens: int, *arguments: Tensor) -> Routing:
        """Return the two columns with weight; a dropped choice is padding."""
        mask_TE, weights_TE = (one.reshape(num_tokens, self.num_experts) for one in arguments)
        weights_TK, column_TK = weights_TE.topk(min(2, self.num_experts), dim=-1)
        ids_TK = mask_TE.long().gather(-1, column_TK)
        return Routing(
            ids_TK.masked_fill(weights_TK == 0, self.num_experts), weights_TK * self._kept
        )
