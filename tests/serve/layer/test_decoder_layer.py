"""Decoder layers in one call: recognised by results, and equal to the family's own bit by bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from levels import compiled
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
from tiny_served import saved, settled, tiny, tokens
from torch import Tensor, nn
from transformers import DynamicCache

from moefit.cache_argument import forward_with_cache
from moefit.serve.config import LoadSettings
from moefit.serve.layer.decoder_layer import MOST_TOKENS
from moefit.serve.layer.layer_probe import use_layer_kernels
from moefit.serve.load import load_model

pytestmark = compiled
# Whether the router is part of the call.
FAMILIES = {
    "olmoe": True,
    "mixtral": True,
    "qwen3_moe": True,
    "qwen2_moe": True,
    "glm4_moe": True,
    "dots1": True,
    "minimax_m2": True,
    "gpt_oss": True,
}
OTHERS = ("granitemoe", "phimoe", "qwen3_next", "hunyuan_v1_moe")


@pytest.mark.parametrize("name", slow_but(["qwen2_moe", "minimax_m2", "gpt_oss"], FAMILIES))
def test_answers_are_those_of_the_family(name: str, tmp_path: Path) -> None:
    """In each dtype and int8; with a cache of its own, and among other requests."""
    int8 = {"precision": "int8", "dense_precision": "int8", "dtype": torch.float16}
    for number, settings in enumerate(({"dtype": torch.float32}, {}, int8)):
        with served(name, tmp_path / str(number), **settings) as loaded:
            found = layers_of(loaded.model)
            assert len(found) == loaded.model.config.num_hidden_layers
            assert {one.direct for one in found if one.parts.routed} <= {FAMILIES[name]}
            mine, packed = decoded(loaded.model), in_a_crowd(loaded)
            with own_modules(loaded.model):
                assert torch.equal(mine, decoded(loaded.model))
                assert torch.equal(packed, in_a_crowd(loaded))
            assert torch.equal(mine, decoded(loaded.model))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_int8_cache(name: str, tmp_path: Path) -> None:
    """gpt-oss has sinks, whose effect on the recorded token may vanish."""
    with served(name, tmp_path, kv_cache="int8") as loaded:
        found = layers_of(loaded.model)
        assert found and all(
            (one._options.sinks_H is not None) == (name == "gpt_oss") for one in found
        )
        mine, packed = decoded(loaded.model), in_a_crowd(loaded)
        with own_modules(loaded.model):
            assert torch.equal(mine, decoded(loaded.model))
            assert torch.equal(packed, in_a_crowd(loaded))


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_another_form_are_left_alone(name: str, tmp_path: Path) -> None:
    with served(name, tmp_path) as loaded:
        assert not layers_of(loaded.model)


def test_operation_without_effect_on_one_token_is_seen(tmp_path: Path) -> None:
    """OLMoE may limit queries, keys and values; the recorded token's are within the limit."""
    model = tiny("Olmoe", hidden_size=64)
    with load_model(saved(model, tmp_path / "unlimited"), LoadSettings(context=32)) as loaded:
        assert layers_of(loaded.model)
    model.config.clip_qkv = 1e6
    with load_model(saved(model, tmp_path / "limited"), LoadSettings(context=32)) as loaded:
        assert not layers_of(loaded.model)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[bool]]:
    """Count calls of layers by themselves: whether each made something."""
    calls: list[bool] = []

    def counting(own: Any) -> Any:
        def compute(x: Tensor, named: Any, **more: Any) -> Any:
            made = own(x, named, **more)
            calls.append(made is not None)
            return made

        return compute

    found = layers_of(model)
    together = [one.together for one in found]
    for one in found:
        vars(one)["compute"], one.together = counting(one.compute), None
    yield calls
    for one, chain in zip(found, together, strict=True):
        del vars(one)["compute"]
        one.together = chain


def test_hooks_are_called(tmp_path: Path) -> None:
    with served("olmoe", tmp_path) as loaded:
        layer, wanted, seen = loaded.model.model.layers[1], decoded(loaded.model), []
        for module in (layer, layer.self_attn, layer.post_attention_layernorm, layer.mlp.gate):
            with_hook = module.register_forward_hook(lambda module, *_: seen.append(module))
            assert torch.equal(decoded(loaded.model), wanted)
            assert len(seen) == 7 and set(seen) == {module}
            with_hook.remove()
            seen.clear()
        own = next(iter(layer.mlp.gate._forward_hooks))  # as many hooks, but others
        kept = layer.mlp.gate._forward_hooks.pop(own)
        layer.mlp.gate.register_forward_hook(lambda module, *_: seen.append(module))
        decoded(loaded.model)
        assert len(seen) == 7
        layer.mlp.gate._forward_hooks.clear()
        layer.mlp.gate._forward_hooks[own] = kept
        cache = begun(loaded.model, tokens(1, 5))
        states = {"output_hidden_states": True, "output_router_logits": True}
        with torch.inference_mode():
            output, _ = forward_with_cache(
                loaded.model, cache, input_ids=tokens(1, 1, seed=2), **states
            )
        assert len(output.hidden_states) == 5 and len(output.router_logits) == 4


def test_what_the_call_does_not_know_is_the_familys_own(tmp_path: Path) -> None:
    with served("olmoe", tmp_path, dtype=torch.float32) as loaded:
        model, next_11 = loaded.model, tokens(1, 1, seed=2)
        with counted(model) as calls, torch.inference_mode():
            forward_with_cache(model, begun(model, tokens(1, 5)), input_ids=next_11)
            assert calls[-4:] == [True] * 4  # one token of one sequence
            calls.clear()
            model(input_ids=tokens(1, MOST_TOKENS + 1))
            assert not calls
            other = torch.zeros(1)  # an argument that the call does not know
            forward_with_cache(model, begun(model, tokens(1, 5)), input_ids=next_11, other=other)
            forward_with_cache(model, begun(model, tokens(2, 5)), input_ids=tokens(2, 1))
            forward_with_cache(model, Rounding(config=model.config), input_ids=tokens(1, 5))
            assert calls and not any(calls[-8:])
        with counted(model) as calls:
            forward_with_cache(model, begun(model, tokens(1, 5)), input_ids=next_11)
            model.train()
            with torch.no_grad():
                forward_with_cache(model, begun(model, tokens(1, 5)), input_ids=next_11)
            model.eval()
            assert not any(calls[-8:])


class Rounding(DynamicCache):
    """A user's own cache."""

    def update(self, *given: Any, **named: Any) -> Any:
        keys, values = super().update(*given, **named)
        return keys.round(), values.round()


@torch.inference_mode()
def test_own_caches_are_updated_and_others_do_not_fit(tmp_path: Path) -> None:
    with served("olmoe", tmp_path, dtype=torch.float32) as loaded:
        model, ids_16 = loaded.model, tokens(1, 6)

        def rounded() -> Tensor:
            cache = Rounding(config=model.config)
            for part in ids_16.split([4, 1, 1], dim=1):
                output, cache = forward_with_cache(model, cache, input_ids=part)
            return output.logits

        mine = rounded()
        with own_modules(model):
            assert torch.equal(mine, rounded())
        cache = begun(model, tokens(1, 5))
        for layer in cache.layers:  # of a model with fewer heads
            layer.keys, layer.values = layer.keys[:, :1], layer.values[:, :1]
        with counted(model) as calls:
            forward_with_cache(model, cache, input_ids=tokens(1, 1))
        assert calls and not any(calls)


def test_columns_as_hidden_states(tmp_path: Path) -> None:
    with served("olmoe", tmp_path) as loaded, torch.inference_mode():
        columns = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
        x_1TD = columns.T[None, 3:4]
        assert not x_1TD[0].is_contiguous() or x_1TD.stride(-1) != 1
        results = []
        for given in (x_1TD, x_1TD.contiguous()):
            cache = begun(loaded.model, tokens(1, 5))
            output, _ = forward_with_cache(loaded.model, cache, inputs_embeds=given)
            results.append(output.logits)
        assert torch.equal(*results)


def test_swaps_and_budgets_follow_the_choice(tmp_path: Path) -> None:
    """The router's choice reaches eviction, misses and substitution as by the hooks."""
    results = []
    for own in (False, True):
        with served("olmoe", tmp_path / str(own), memory=None) as loaded:
            loaded.set_memory(loaded.budget.total_for_slots([4] * 4))
            for mode in ("exact", "bounded", "virtual"):
                loaded.set_mode(mode)
                settle = partial(settled, loaded)  # swaps end at the same step both times
                settle()
                with own_modules(loaded.model) if own else nothing():
                    results.append((decoded(loaded.model, after=settle), counts(loaded)))
    half = len(results) // 2
    for (logits, counters), (own_logits, own_counters) in zip(
        results[:half], results[half:], strict=True
    ):
        assert torch.equal(logits, own_logits)
        assert counters == own_counters


class Adapted(nn.Module):
    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.own(x)


def test_replaced_modules_and_weights_are_used(tmp_path: Path) -> None:
    with served("mixtral", tmp_path) as loaded:
        model, wanted = loaded.model, decoded(loaded.model)
        layer = model.model.layers[0]

        def check() -> None:
            changed = decoded(model)
            assert not torch.equal(changed, wanted)
            with own_modules(model):
                assert torch.equal(changed, decoded(model))

        weight = layer.input_layernorm.weight
        layer.input_layernorm.weight = nn.Parameter(weight * 2, requires_grad=False)
        check()
        layer.input_layernorm.weight = weight
        for owner, name in ((layer.self_attn, "q_proj"), (layer, "post_attention_layernorm")):
            own = getattr(owner, name)
            setattr(owner, name, Adapted(own))
            check()
            setattr(owner, name, own)
        assert torch.equal(decoded(model), wanted)
    assert not layers_of(model)


class Limited(nn.Module):
    """A feed-forward block with a step after its experts."""

    def __init__(self, own: Any):
        super().__init__()
        self.gate, self.experts, self.own = own.gate, own.experts, type(own).forward

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x).clamp(-1e4, 1e4)


def test_steps_around_experts_are_kept(tmp_path: Path) -> None:
    """A limit that the recorded token does not reach."""
    with served("olmoe", tmp_path) as loaded:
        model = loaded.model
        for layer in model.model.layers:
            vars(layer).pop("forward")
            layer.mlp = Limited(layer.mlp)
        with loaded.zero_experts():
            undo = use_layer_kernels(model, model.dtype, 128)
        found = layers_of(model)
        assert len(found) == 4 and not any(one.direct for one in found)
        undo()
