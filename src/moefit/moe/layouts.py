"""Find the MoE blocks of a Hugging Face model, and describe how each computes one expert.

One layout class per way of storing experts; families with the same storage share it. Activation
functions are recognised by their values, not by their class. The blocks of JetMoE, Llama 4 and
LongCat-Flash do more with experts than `experts(x_TD, ids_TK, weights_TK) -> y_TD`, so they get a
replacement that calls an experts module.

Shapes: B sequences, T tokens, D model width, E experts, K chosen per token, F expert width.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

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


_CLAMPED_MLP = MlpShape(
    w_in="gate_up_proj",
    w_out="down_proj",
    activation="clamped",
    gated=True,
    biases=("gate_up_proj_bias", "down_proj_bias"),
)


def _is_clamped(function: Callable[[Tensor], Tensor]) -> bool:
    """Return whether a gate function is gpt-oss's, with its slope and its limit.

    (up + 1) * gate * sigmoid(1.702 gate), of gate and up in turn; gate is at most 7, and up within
    7 of 0.
    """
    try:
        with torch.inference_mode(), torch.device("cpu"):
            found = function(_EXAMPLE)
    except Exception:  # noqa: BLE001 - the known function accepts the example
        return False
    gate, up = _EXAMPLE[:, ::2].clamp(max=7), _EXAMPLE[:, 1::2].clamp(-7, 7)
    value = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return found.shape == value.shape and bool(torch.allclose(found, value, rtol=1e-5, atol=1e-5))


class ServedJetMoe(nn.Module):
    """JetMoE's block with its experts replaced by `experts(x_TD, ids_TK, weights_TK) -> y_TD`."""

    def __init__(self, block: Any, experts: nn.Module):
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


class ServedLlama4(nn.Module):
    """Llama 4's block with served experts, whose inputs are scaled by the router's weights."""

    def __init__(self, block: Any, experts: nn.Module):
        super().__init__()
        self.router, self.shared_expert, self.top_k = block.router, block.shared_expert, block.top_k
        self.experts = experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [T, D] and the router's logits [T, E]."""
        x_TD = x.reshape(-1, x.shape[-1])
        scores_TE, logits_TE = self.router(x_TD)
        weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)  # 0 where not chosen
        return self.shared_expert(x_TD) + self.experts(x_TD, ids_TK, weights_TK), logits_TE


class ServedLongcat(nn.Module):
    """LongCat-Flash's block with served experts: further ones return their input (zero experts)."""

    def __init__(self, block: Any, experts: nn.Module):
        super().__init__()
        self.router, self.experts = block.router, experts
        self._num_experts = int(block.experts.num_routed_experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        _, weights_TK, ids_TK = self.router(x_BTD)
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        is_zero_TK = ids_TK >= self._num_experts
        y_TD = self.experts(x_TD, ids_TK.masked_fill(is_zero_TK, self._num_experts), weights_TK)
        kept_T1 = (weights_TK * is_zero_TK).sum(-1, keepdim=True)
        return (y_TD + (x_TD * kept_T1).type_as(x_TD)).view_as(x_BTD)


def find_blocks(model: nn.Module, *, needed: bool = True) -> tuple[MoeBlock, ...]:
    """Return all MoE blocks of a model in the order of its modules.

    Args:
        model: May be on the meta device.
        needed: Refuse a model without any.

    Raises:
        UnsupportedModelError: There is none.
    """
    found = tuple(_blocks(model))
    if needed and not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts that can be served one by one: none behind "
            f"transformers' experts interface, and none of {', '.join(sorted(_OF_FAMILIES))}; "
            "a model without experts is served by transformers itself"
        )
    return found


def _blocks(model: nn.Module) -> Iterator[MoeBlock]:
    for name, module in model.named_modules():
        kind = type(module)
        own = kind.__module__.startswith("transformers.models.")
        if own and (make := _OF_FAMILIES.get(kind.__name__)) is not None:
            yield make(name, module)
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
        # Step 3.7 has the interface's form without its flags.
        self._has_gate = bool(getattr(experts, "has_gate", True))
        self._is_transposed = bool(getattr(experts, "is_transposed", False))
        self._input = "gate_up_proj" if self._has_gate else "up_proj"
        self.specs: Mapping[str, TensorSpec] = {
            short: TensorSpec(tuple(parameter.shape[1:]), parameter.dtype, self._is_transposed)
            for short, parameter in parameters.items()
            if parameter.shape[0] == self.num_experts
        }
        self.mlp = self._mlp()

    def _mlp(self) -> MlpShape | None:
        biases = f"{self._input}_bias", "down_proj_bias"
        if self._has_norm:
            return None
        if set(self.specs) == {self._input, "down_proj", *biases} and self._has_gate:
            clamped = _is_clamped(self._experts._apply_gate)
            return _CLAMPED_MLP if clamped and self._input == _CLAMPED_MLP.w_in else None
        if self._is_transposed or len(self.specs) != 2:
            return None
        gated = self._has_gate
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
        activate = self._experts._apply_gate if self._has_gate else self._experts.act_fn
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
        if self._is_transposed:
            y_RO = x_RI @ weight
            return y_RO if bias is None else y_RO + bias
        return F.linear(x_RI, weight, bias)


class GatedLayout:
    """Stacked matrices of a block itself: one with gate above up, and one for the output.

    Args:
        block: The block.
        w_in: Name of the first parameter below the block, [E, 2F, D].
        w_out: Name of the second, [E, D, F].
        activation: Of the gate.
        inputs_first: Whether the matrices are transposed, [E, D, 2F] and [E, F, D].
    """

    def __init__(
        self,
        block: nn.Module,
        w_in: str,
        w_out: str,
        activation: Callable[[Tensor], Tensor],
        *,
        inputs_first: bool = False,
    ):
        self._in, self._out, self._activation = w_in, w_out, activation
        own = {short: block.get_parameter(short) for short in (w_in, w_out)}
        self.num_experts = own[w_out].shape[0]
        self.specs: Mapping[str, TensorSpec] = {
            short: TensorSpec(tuple(one.shape[1:]), one.dtype, inputs_first)
            for short, one in own.items()
        }
        known = None if inputs_first else activation_name(activation, gated=False)
        self.mlp: MlpShape | None = None
        if known is not None:
            self.mlp = MlpShape(w_in=w_in, w_out=w_out, activation=known, gated=True)

    def parameter(self, short: str, expert: int) -> tuple[str, int | None]:
        """Return the stacked parameter and the expert's row."""
        return short, expert

    def output(self, tensors: Tensors, x_RD: Tensor) -> Tensor:
        """Return output(act(gate) * up)."""
        return self.output_by(partial(_product, self.specs, tensors), tensors, x_RD)

    def output_by(self, product: Product, tensors: Tensors, x_RD: Tensor) -> Tensor:
        """Return the same with other products."""
        gate_RF, up_RF = product(self._in, x_RD, None).chunk(2, dim=-1)
        return product(self._out, self._activation(gate_RF) * up_RF, None)

    def routing(self, num_tokens: int, *arguments: Tensor) -> Routing:
        """Return the (ids_TK, weights_TK) of the block's replacement."""
        ids_TK, weights_TK = arguments
        return Routing(ids_TK.view(num_tokens, -1), weights_TK.view(num_tokens, -1))


class DbrxLayout:
    """DBRX: matrices of all experts above each other, [E * F, D]; the last one is transposed."""

    def __init__(self, experts: nn.Module):
        mlp = cast(Any, experts).mlp
        self.num_experts = int(mlp.moe_num_experts)
        self._activation = mlp.activation_fn
        shape = (int(mlp.ffn_hidden_size), int(mlp.hidden_size))
        self.specs: Mapping[str, TensorSpec] = {
            f"mlp.{short}": TensorSpec(shape, getattr(mlp, short).dtype, short == "w2")
            for short in ("w1", "v1", "w2")
        }
        self.mlp: MlpShape | None = None

    def parameter(self, short: str, expert: int) -> tuple[str, int | None]:
        """Return the parameter of all experts and the expert's row."""
        return short, expert

    def output(self, tensors: Tensors, x_RD: Tensor) -> Tensor:
        """Return (act(x W1^T) * x V1^T) W2."""
        return self.output_by(partial(_product, self.specs, tensors), tensors, x_RD)

    def output_by(self, product: Product, tensors: Tensors, x_RD: Tensor) -> Tensor:
        """Return the same with other products."""
        h_RF = self._activation(product("mlp.w1", x_RD, None)) * product("mlp.v1", x_RD, None)
        return product("mlp.w2", h_RF, None)

    def routing(self, num_tokens: int, *arguments: Tensor) -> Routing:
        """Return the block's (ids_TK, weights_TK)."""
        ids_TK, weights_TK = arguments
        return Routing(ids_TK.view(num_tokens, -1), weights_TK.view(num_tokens, -1))


def _product(
    specs: Mapping[str, TensorSpec],
    tensors: Tensors,
    short: str,
    x_RI: Tensor,
    _bias: Tensor | None,
) -> Tensor:
    """Return x W^T, or x W for matrices whose rows are inputs."""
    weight = tensors[short]
    return x_RI @ weight if specs[short].inputs_first else F.linear(x_RI, weight)


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


def _jetmoe(name: str, block: nn.Module) -> MoeBlock:
    """Return JetMoE's block.

    Its attention experts (MoA) are not served from slots: their matrices are used before and after
    attention, so they belong to the dense weights.
    """
    names = ("input_linear.weight", "output_linear.weight")
    layout = GatedLayout(block, *names, cast(Any, block).activation)
    return MoeBlock(name=name, layout=layout, shell=partial(ServedJetMoe, block))


def _llama4(name: str, block: nn.Module) -> MoeBlock:
    names = ("experts.gate_up_proj", "experts.down_proj")
    layout = GatedLayout(block, *names, cast(Any, block).experts.act_fn, inputs_first=True)
    shell = partial(ServedLlama4, block)
    return MoeBlock(name=name, layout=layout, shell=shell, weighs_inputs=True)


def _longcat(name: str, block: nn.Module) -> MoeBlock:
    names = ("experts.gate_up_proj", "experts.down_proj")
    layout = GatedLayout(block, *names, cast(Any, block).experts.act_fn)
    return MoeBlock(name=name, layout=layout, shell=partial(ServedLongcat, block))


_OF_FAMILIES: Mapping[str, Callable[[str, Any], MoeBlock]] = {
    "DbrxExperts": lambda name, experts: MoeBlock(name=name, layout=DbrxLayout(experts)),
    "JetMoeMoE": _jetmoe,
    "Llama4TextMoe": _llama4,
    "LongcatFlashMoE": _longcat,
    "NllbMoeExperts": lambda name, experts: MoeBlock(name=name, layout=NllbLayout(experts)),
    "Step3p7Experts": lambda name, experts: MoeBlock(name=name, layout=StackedLayout(experts)),
    "SwitchTransformersExperts": lambda name, experts: MoeBlock(
        name=name, layout=SwitchLayout(experts)
    ),
}
"""By the name of the class that is replaced; importing the classes would load all families."""
