"""Layers without experts among those with: in one call with them, equal to the family's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from levels import compiled
from quick import slow_but
from served_layers import (
    counts,
    decoded,
    in_a_crowd,
    layers_of,
    nothing,
    own_modules,
    served,
)
from torch import Tensor, nn

from moefit.serve.layer import layer_chain
from moefit.serve.layer.layer_probe import use_layer_kernels
from moefit.serve.model import ServedModel

pytestmark = compiled
FIRST_TWO = {"first_k_dense_replace": 2, "intermediate_size": 96}
# The first layers; one between others, and the last.
SIZES: dict[str, dict[str, Any]] = {
    "glm4_moe": FIRST_TWO,
    "dots1": FIRST_TWO,
    "qwen2_moe": {"mlp_only_layers": [1, 3], "intermediate_size": 80},
    "qwen3_moe": {"decoder_sparse_step": 2, "intermediate_size": 96},
}
SETTINGS: list[dict[str, Any]] = [
    {"dtype": torch.float32},
    {},
    {"dtype": torch.float16, "precision": "int4", "dense_precision": "int8", "kv_cache": "int8"},
]


def dense_mlps(loaded: ServedModel) -> list[Any]:
    layers = loaded.model.model.layers
    return [one.mlp for one in layers if hasattr(one.mlp, "gate_proj")]


@pytest.mark.parametrize("name", slow_but(["qwen2_moe", "dots1"], SIZES))
def test_answers_are_those_of_the_family(
    name: str, tmp_path: Path, calls: list[tuple[int, int]]
) -> None:
    """With all experts in memory and with few, alone and in batches; all layers in one call."""
    for number, settings in enumerate(SETTINGS):
        with served(
            name, tmp_path / str(number), sizes=SIZES[name], memory=None, **settings
        ) as loaded:
            found = layers_of(loaded.model)
            assert len(dense_mlps(loaded)) == 2 and len(found) == 4
            assert all(one.direct and one.together for one in found)
            for slots in (None, 4):
                if slots:
                    total = loaded.budget.total_for_slots([slots] * len(loaded.blocks))
                    loaded.set_memory(total)
                calls.clear()
                mine, packed = decoded(loaded.model), in_a_crowd(loaded)
                assert (4, 4) in calls
                with own_modules(loaded.model):
                    assert torch.equal(mine, decoded(loaded.model))
                    assert torch.equal(packed, in_a_crowd(loaded))


def test_a_layer_by_itself_is_the_familys(tmp_path: Path) -> None:
    """Where layers are not computed together, as behind a layer of another form."""
    with served("glm4_moe", tmp_path, sizes=FIRST_TWO) as loaded:
        wanted = decoded(loaded.model)
        for one in layers_of(loaded.model):
            one.together = None
        assert torch.equal(decoded(loaded.model), wanted)


def test_residents_and_counters_are_as_by_the_familys_modules(
    tmp_path: Path, calls: list[tuple[int, int]]
) -> None:
    """A step begins once, although its first layer has no experts."""
    results = []
    for own in (False, True):
        with served("dots1", tmp_path / str(own), sizes=SIZES["dots1"], memory=None) as loaded:
            loaded.set_memory(loaded.budget.total_for_slots([5] * 2))
            begun: list[int] = []
            loaded._shared.on_step = lambda begun=begun: begun.append(1)
            with own_modules(loaded.model) if own else nothing():
                logits = decoded(loaded.model)
            residents = [sorted(one.slot_table.residents) for one in loaded.blocks.values()]
            used = [one.counts() for one in loaded.blocks.values()]
            results.append((logits, counts(loaded), residents, used, len(begun)))
    (mine, *others), (wanted, *own_others) = results
    assert torch.equal(mine, wanted) and others == own_others
    assert others[0][1] > 5 and others[-1] == 7 and all(made == (4, 4) for made in calls)


def test_experts_that_are_not_loaded_end_a_call_behind_dense_layers(
    tmp_path: Path, calls: list[tuple[int, int]]
) -> None:
    with served("glm4_moe", tmp_path, sizes=FIRST_TWO, memory=None) as loaded:
        loaded.set_memory(loaded.budget.total_for_slots([3] * 2))
        loaded.set_residents({name: range(3) for name in loaded.blocks})
        loaded.set_mode("exact", residency="fixed")
        calls.clear()
        mine = decoded(loaded.model)
        assert any(complete == 2 < number for number, complete in calls)
        assert all(set(one.slot_table.residents) == set(range(3)) for one in loaded.blocks.values())
        with own_modules(loaded.model):
            assert torch.equal(mine, decoded(loaded.model))


def test_hooks_of_a_dense_mlp_are_called(tmp_path: Path) -> None:
    with served("glm4_moe", tmp_path, sizes=FIRST_TWO) as loaded:
        wanted, seen = decoded(loaded.model), []
        mlp = dense_mlps(loaded)[0]
        for module in (mlp, mlp.gate_proj, mlp.act_fn, mlp.down_proj):
            hook = module.register_forward_hook(lambda module, *_: seen.append(module))
            assert torch.equal(decoded(loaded.model), wanted)
            assert len(seen) == 7 and set(seen) == {module}
            hook.remove()
            seen.clear()
        assert torch.equal(decoded(loaded.model), wanted)


class Negated(nn.Module):
    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return -self.own(x)


def test_replaced_modules_and_weights_are_used(tmp_path: Path) -> None:
    with served("glm4_moe", tmp_path, sizes=FIRST_TWO) as loaded:
        wanted, layer = decoded(loaded.model), loaded.model.model.layers[1]

        def check() -> None:
            changed = decoded(loaded.model)
            assert not torch.equal(changed, wanted)
            with own_modules(loaded.model):
                assert torch.equal(changed, decoded(loaded.model))

        for owner, name in ((layer, "mlp"), (layer.mlp, "up_proj"), (layer.mlp, "act_fn")):
            own = getattr(owner, name)
            setattr(owner, name, Negated(own))
            check()
            setattr(owner, name, own)
        down = layer.mlp.down_proj
        weight = down.weight
        down.weight = nn.Parameter(-weight, requires_grad=False)
        check()
        down.weight = weight
        assert torch.equal(decoded(loaded.model), wanted)


class Limited(nn.Module):
    """An MLP with a limit that the recorded token does not reach."""

    def __init__(self, own: Any):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj
        self.act_fn = own.act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-1e4, 1e4))


class Swapped(Limited):
    """An MLP whose two factors are exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


@pytest.mark.parametrize("changed", [Limited, Swapped])
def test_mlps_that_do_more_are_left_alone(changed: type[Any], tmp_path: Path) -> None:
    """The layers behind them are computed together still."""
    with served("glm4_moe", tmp_path, sizes=FIRST_TWO) as loaded:
        for layer in loaded.model.model.layers:
            vars(layer).pop("forward")
            if hasattr(layer.mlp, "gate_proj"):
                layer.mlp = changed(layer.mlp)
        with loaded.zero_experts():
            undo = use_layer_kernels(loaded.model, loaded.model.dtype, 128)
        found = layers_of(loaded.model)
        assert [one.direct for one in found] == [False, False, True, True]
        assert [isinstance(one.together, layer_chain.LayerChain) for one in found] == [
            one.direct for one in found
        ]
        mine = decoded(loaded.model)
        with own_modules(loaded.model):
            assert torch.equal(mine, decoded(loaded.model))
        undo()
