"""Layers with latent attention in one call: equal to the family's own with kernels, bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from levels import compiled
from served_layers import counts, decoded, in_a_crowd, layers_of, nothing, own_modules, served
from torch import Tensor, nn

from moefit.serve.layer.layer_probe import use_layer_kernels

pytestmark = compiled
SIZES: dict[str, Any] = {
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}  # fmt: skip
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("deepseek_v2", {"q_lora_rank": None}),
    ("deepseek_v2", {}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}),
    ("glm4_moe_lite", {}),
]
SETTINGS: list[dict[str, Any]] = [
    {"dtype": torch.float32},
    {},
    {"precision": "int4", "dense_precision": "int8", "dtype": torch.float16},
]


@pytest.mark.parametrize(
    ("name", "changes"),
    [pytest.param(*one, marks=() if one in FORMS[:4:3] else pytest.mark.slow) for one in FORMS],
)
def test_answers_are_those_of_the_family(
    name: str, changes: dict[str, Any], tmp_path: Path, calls: list[tuple[int, int]]
) -> None:
    """With all experts in memory and with few, alone and in batches; all layers in one call."""
    for number, settings in enumerate(SETTINGS):
        folder, sizes = tmp_path / str(number), {**SIZES, **changes}
        with served(name, folder, sizes=sizes, memory=None, **settings) as loaded:
            found = layers_of(loaded.model)
            assert len(found) == loaded.model.config.num_hidden_layers
            assert all(one.direct and one.together and one.parts.latent for one in found)
            for slots in (None, 4):
                if slots:
                    total = loaded.budget.total_for_slots([slots] * len(loaded.blocks))
                    loaded.set_memory(total)
                calls.clear()
                mine, packed = decoded(loaded.model), in_a_crowd(loaded)
                assert (len(found), len(found)) in calls
                with own_modules(loaded.model):
                    assert torch.equal(mine, decoded(loaded.model))
                    assert torch.equal(packed, in_a_crowd(loaded))


def test_residents_and_counters_are_as_by_the_familys_modules(tmp_path: Path) -> None:
    results = []
    for own in (False, True):
        with served("deepseek_v3", tmp_path / str(own), sizes=SIZES, memory=None) as loaded:
            loaded.set_memory(loaded.budget.total_for_slots([5] * len(loaded.blocks)))
            with own_modules(loaded.model) if own else nothing():
                logits = decoded(loaded.model)
            residents = [sorted(one.slot_table.residents) for one in loaded.blocks.values()]
            results.append((logits, counts(loaded), residents))
    (mine, *others), (wanted, *own_others) = results
    assert torch.equal(mine, wanted) and others == own_others and others[0][1] > 5


def test_hooks_are_called(tmp_path: Path) -> None:
    with served("deepseek_v3", tmp_path, sizes=SIZES, dtype=torch.float32) as loaded:
        wanted, seen = decoded(loaded.model), []
        attention = loaded.model.model.layers[1].self_attn
        names = "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"
        for module in (attention, *(getattr(attention, name) for name in names)):
            hook = module.register_forward_hook(lambda module, *_: seen.append(module))
            torch.testing.assert_close(decoded(loaded.model), wanted, rtol=1e-4, atol=1e-4)
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
    with served("deepseek_v2", tmp_path, sizes=SIZES) as loaded:
        wanted, attention = decoded(loaded.model), loaded.model.model.layers[1].self_attn

        def check() -> None:
            changed = decoded(loaded.model)
            assert not torch.equal(changed, wanted)
            with own_modules(loaded.model):
                assert torch.equal(changed, decoded(loaded.model))

        for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "q_b_proj"):
            own = getattr(attention, name)
            setattr(attention, name, Negated(own))
            check()
            setattr(attention, name, own)
            weight = own.weight
            own.weight = nn.Parameter(-weight.detach().as_subclass(Tensor), requires_grad=False)
            check()
            own.weight = weight
        assert torch.equal(decoded(loaded.model), wanted)


def test_layers_that_do_more_are_left_alone(tmp_path: Path) -> None:
    """A factor of latents, and one of a layer's input, that change nothing here."""
    with served("deepseek_v3", tmp_path, sizes=SIZES) as loaded:
        for layer in loaded.model.model.layers:
            vars(layer).pop("forward")
        layers = loaded.model.model.layers
        for module in (layers[1].self_attn.kv_a_layernorm, layers[2].input_layernorm):
            module.register_forward_hook(lambda *given: given[2] * 1.0)
        with loaded.zero_experts():
            undo = use_layer_kernels(loaded.model, loaded.model.dtype, 128)
        assert ["forward" in vars(one) for one in layers] == [True, False, False, True]
        undo()


def test_layers_with_an_indexer_are_left_alone(tmp_path: Path) -> None:
    with served("deepseek_v32", tmp_path, sizes=SIZES) as loaded:
        assert not layers_of(loaded.model)
