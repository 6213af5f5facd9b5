"""Layers whose block adds a shared expert: in one call, equal to the family's own modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from levels import compiled, normal
from quick import slow_but
from served_layers import (
    begun,
    counts,
    decoded,
    in_a_crowd,
    layers_of,
    nothing,
    own_modules,
    served,
)
from tiny_served import tokens
from torch import Tensor, nn
from torch.nn import functional as F

from moefit.serve.layer.decoder_layer import LayerForward
from moefit.serve.layer.layer_probe import use_layer_kernels
from moefit.serve.model import ServedModel

pytestmark = compiled
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3}
# Wide enough that their dense weights are encoded; routers with groups, and more than one shared
# expert.
SIZES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 96},
    "glm4_moe": {**GROUPS, "n_shared_experts": 6, "intermediate_size": 96},
    "dots1": {**GROUPS, "n_shared_experts": 6, "norm_topk_prob": True},
}
SETTINGS: list[dict[str, Any]] = [
    {"dtype": torch.float32},
    {},
    {"dtype": torch.float16, "precision": "int8", "dense_precision": "int8", "kv_cache": "int8"},
    {"precision": "int4", "dense_precision": "int4", "dtype": torch.float32},
]


def shared_layers(model: nn.Module) -> list[LayerForward]:
    return [one for one in layers_of(model) if one.parts.routed is not None]


@pytest.mark.parametrize("name", slow_but(["glm4_moe"], SIZES))
def test_answers_are_those_of_the_family(
    name: str, tmp_path: Path, calls: list[tuple[int, int]]
) -> None:
    """With all experts in memory and with few, alone and in batches; absent ones within a call."""
    for number, settings in enumerate(SETTINGS if name == "qwen2_moe" else SETTINGS[1:3]):
        with served(
            name, tmp_path / str(number), sizes=SIZES[name], memory=None, **settings
        ) as loaded:
            found = shared_layers(loaded.model)
            assert len(found) >= 3 and all(one.direct and one.together for one in found)
            encoded = type(found[0].parts.routed.shared.mlp.gate_proj) is not nn.Linear
            assert encoded == ("dense_precision" in settings)
            for slots in (None, 4):
                if slots:
                    total = loaded.budget.total_for_slots([slots] * len(loaded.blocks))
                    loaded.set_memory(total)
                calls.clear()
                mine, packed = decoded(loaded.model), in_a_crowd(loaded)
                assert (4, 4) in calls  # with layers without experts
                with own_modules(loaded.model):
                    assert torch.equal(mine, decoded(loaded.model))
                    assert torch.equal(packed, in_a_crowd(loaded))


def test_one_call_a_token_also_when_experts_are_absent(
    tmp_path: Path, calls: list[tuple[int, int]]
) -> None:
    """Counters and residents are as by the family's own modules."""
    results = []
    for own in (False, True):
        with served("qwen2_moe", tmp_path / str(own), memory=None) as loaded:
            loaded.set_memory(loaded.budget.total_for_slots([5] * 4))
            with own_modules(loaded.model) if own else nothing():
                logits = decoded(loaded.model)
            residents = [sorted(one.slot_table.residents) for one in loaded.blocks.values()]
            results.append((logits, counts(loaded), residents))
    (mine, *others), (wanted, *own_others) = results
    assert torch.equal(mine, wanted) and others == own_others
    assert others[0][1] > 10 and calls and all(made == (4, 4) for made in calls)


def test_bounded_and_virtual_modes_add_the_shared_expert(tmp_path: Path) -> None:
    with served("qwen2_moe", tmp_path, memory=None) as loaded:
        loaded.set_memory(loaded.budget.total_for_slots([4] * 4))
        for mode in ("bounded", "exact"):
            loaded.set_mode(mode)
            mine = decoded(loaded.model)
            with own_modules(loaded.model):
                assert torch.equal(mine, decoded(loaded.model))


def test_a_token_does_not_depend_on_other_rows(tmp_path: Path) -> None:
    """In float32, where torch's own silu and sigmoid round by an element's place."""
    with served("qwen2_moe", tmp_path, dtype=torch.float32) as loaded, torch.inference_mode():
        block, x_1TD = loaded.model.model.layers[0].mlp, normal(1, 40, 64)
        parts = [block(part) for part in x_1TD.split([1, 6, 33], dim=1)]
        assert torch.equal(block(x_1TD), torch.cat(parts, dim=1))


def shared_parts(loaded: ServedModel) -> list[nn.Module]:
    block = loaded.model.model.layers[1].mlp
    mlp = block.shared_expert
    return [mlp, mlp.gate_proj, mlp.act_fn, mlp.down_proj, block.shared_expert_gate, block.gate]


def test_hooks_are_called(tmp_path: Path) -> None:
    with served("qwen2_moe", tmp_path) as loaded:
        wanted, seen = decoded(loaded.model), []
        for module in shared_parts(loaded):
            hook = module.register_forward_hook(lambda module, *_: seen.append(module))
            assert torch.equal(decoded(loaded.model), wanted)
            assert len(seen) == 7 and set(seen) == {module}
            hook.remove()
            seen.clear()
        assert torch.equal(decoded(loaded.model), wanted)


class Doubled(nn.Module):
    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.own(x)


def test_replaced_modules_and_weights_are_used(tmp_path: Path) -> None:
    with served("qwen2_moe", tmp_path) as loaded:
        wanted, block = decoded(loaded.model), loaded.model.model.layers[0].mlp

        def check() -> None:
            changed = decoded(loaded.model)
            assert not torch.equal(changed, wanted)
            with own_modules(loaded.model):
                assert torch.equal(changed, decoded(loaded.model))

        names = "gate_proj", "act_fn"
        for owner, name in (*((block.shared_expert, one) for one in names), (block, "gate")):
            own = getattr(owner, name)
            setattr(owner, name, Doubled(own) if name != "gate" else own)
            weight = own._parameters.get("weight")
            if name == "gate":
                own.weight = nn.Parameter(-weight, requires_grad=False)
            check()
            setattr(owner, name, own)
            if name == "gate":
                own.weight = weight
        gate = block.shared_expert_gate
        weight = gate.weight
        gate.weight = nn.Parameter(-weight.detach().as_subclass(Tensor), requires_grad=False)
        check()  # a weight that kernels do not have
        gate.weight = weight
        assert torch.equal(decoded(loaded.model), wanted)


class Limited(nn.Module):
    """A shared expert with a limit that the recorded token does not reach."""

    def __init__(self, own: Any):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj
        self.act_fn = own.act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-1e4, 1e4))


class Swapped(Limited):
    """A shared expert whose two factors are exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Tripled(nn.Module):
    """A block that adds more than its shared expert."""

    def __init__(self, own: Any):
        super().__init__()
        self.gate, self.experts, self.shared_expert = own.gate, own.experts, own.shared_expert

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.view(-1, x.shape[-1])
        _, weights_TK, ids_TK = self.gate(x_TD)
        return (self.experts(x_TD, ids_TK, weights_TK) + 3 * self.shared_expert(x_TD)).view_as(x)


@pytest.mark.parametrize("changed", [Limited, Swapped, Tripled])
def test_blocks_that_do_more_are_left_alone(changed: type[Any], tmp_path: Path) -> None:
    with served("qwen2_moe", tmp_path) as loaded:
        for layer in loaded.model.model.layers:
            vars(layer).pop("forward")
            if changed is Tripled:
                layer.mlp = Tripled(layer.mlp)
            else:
                layer.mlp.shared_expert = changed(layer.mlp.shared_expert)
        with loaded.zero_experts():
            undo = use_layer_kernels(loaded.model, loaded.model.dtype, 128)
        found = layers_of(loaded.model)
        assert len(found) == 4 and not any(one.direct for one in found)
        undo()


def test_gradients_go_to_the_family(tmp_path: Path) -> None:
    with served("qwen2_moe", tmp_path, dtype=torch.float32) as loaded:
        block = loaded.model.model.layers[0].mlp
        x = torch.randn(1, 3, 64, requires_grad=True)
        block.shared_expert.act_fn(x).sum().backward()
        wanted = torch.autograd.grad(F.silu(x).sum(), x)[0]
        assert x.grad is not None and torch.equal(x.grad, wanted)


def test_closing_gives_back_the_familys_own(tmp_path: Path) -> None:
    with served("qwen2_moe", tmp_path) as loaded:
        model = loaded.model
        assert begun(model, tokens(1, 5)) is not None
    block = model.model.layers[0].mlp
    assert not any("forward" in vars(one) for one in (block, block.shared_expert.act_fn))
