"""KV caches of int8 in transformers' own generation: values, what is done to them, refusals."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import compiled
from tiny_families import families, tiny_family
from tiny_served import VOCABULARY, saved, tiny
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import moefit
from moefit.cache_argument import forward_with_cache
from moefit.errors import ConfigError, UnsupportedModelError
from moefit.quant.kv_int8 import Int8Rows, quantize_rows
from moefit.serve.config import LoadSettings
from moefit.serve.hf import attention as attention_module
from moefit.serve.hf.kv_cache import Int8Layer, reserve_caches
from tests.serve.hf.test_kv_cache import OPERATIONS, apply, states
from tests.serve.test_encoder_decoder_serving import switch

WIDE = {"head_dim": 16}  # which the kernels know; 8 is left to torch


def dequantized(rows: Tensor) -> Tensor:
    assert isinstance(rows, Int8Rows)
    return rows.dequantized(torch.float32)


@settings(deadline=None, max_examples=100)
@given(OPERATIONS, st.sampled_from([None, 1, 50, 500]))
def test_it_is_the_growing_layer_with_rounded_rows(operations, limit) -> None:
    plain, ours, batch = DynamicLayer(), Int8Layer(lambda: limit, DynamicLayer()), 2
    generator = torch.Generator().manual_seed(0)
    for operation, number in operations:
        if operation == "copy":
            ours = copy.deepcopy(ours)
        elif operation == "reset":
            plain.reset()
            ours.reset()
            batch = 2
        elif operation == "update":
            new = states(batch, number, generator)
            for mine, wanted in zip(ours.update(*new), plain.update(*new), strict=True):
                assert torch.equal(dequantized(mine), dequantized(quantize_rows(wanted)))
        elif plain.get_seq_length():
            if operation == "repeat" and batch > 4:
                continue
            batch = apply(operation, number, plain, batch)
            apply(operation, number, ours, batch)
        assert ours.get_seq_length() == plain.get_seq_length()
        if plain.get_seq_length():
            assert torch.equal(dequantized(ours.keys), dequantized(quantize_rows(plain.keys)))
            assert torch.equal(dequantized(ours.values), dequantized(quantize_rows(plain.values)))


def test_a_token_writes_its_own_rows_only() -> None:
    layer, generator = Int8Layer(lambda: None, DynamicLayer()), torch.Generator().manual_seed(0)
    layer.update(*states(1, 100, generator))
    where = layer.keys.data_ptr()
    for _ in range(25):
        layer.update(*states(1, 1, generator))
        assert layer.keys.data_ptr() == where
    assert layer.get_seq_length() == 125


class Model(torch.nn.Module):
    """Returns the cache that its forward pass was given."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny("Mixtral").config

    def forward(self, input_ids=None, past_key_values=None, use_cache=True):
        return past_key_values


def test_caches_of_every_beginning_are_converted() -> None:
    model = Model()
    reserve_caches(model, lambda: None, int8=True)
    filled, generator = DynamicLayer(), torch.Generator().manual_seed(0)
    filled.update(*states(1, 3, generator))
    window = DynamicSlidingWindowLayer(4)
    window.update(*states(1, 9, generator))
    given_ = DynamicCache()
    given_.layers[:] = [DynamicLayer(), filled, DynamicSlidingWindowLayer(4), window]
    with torch.no_grad():
        own = model(input_ids=torch.ones(1, 1))
        assert [type(layer) for layer in own.layers] == [Int8Layer] * 2
        assert model(past_key_values=given_) is given_
        assert model(use_cache=False) is None
        lazy = model(past_key_values=DynamicCache())
        lazy.update(*states(1, 2, generator), 0)
    kinds = [type(layer) for layer in given_.layers]
    assert kinds == [Int8Layer] * 3 + [DynamicSlidingWindowLayer], "its first keys are gone"
    assert torch.equal(dequantized(given_.layers[1].keys), dequantized(quantize_rows(filled.keys)))
    assert type(lazy.layers[0]) is Int8Layer
    assert model(input_ids=torch.ones(1, 1)) is None, "with gradients, the model makes its own"


def ids(batch: int = 2, length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


MODELS = {
    "Mixtral": lambda: tiny("Mixtral", **WIDE),
    "narrow heads": lambda: tiny("Mixtral"),
    "window": lambda: tiny("Mixtral", sliding_window=5, **WIDE),
    "sinks and windows": lambda: tiny("GptOss", **WIDE),
    "Olmoe": lambda: tiny("Olmoe"),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_rounded_keys_and_values(name, tmp_path) -> None:
    """The same attention in torch over a cache that rounds and dequantises."""
    folder = saved(MODELS[name](), tmp_path)
    ids_BT = ids(2, 24)

    class Rounded(DynamicCache):
        def update(self, key_states, value_states, *rest, **named):
            both = (dequantized(quantize_rows(one)) for one in (key_states, value_states))
            return super().update(*both, *rest, **named)

    with moefit.load(folder) as plain:
        cache = Rounded(config=plain.model.config)
        wanted = forward_with_cache(plain.model, cache, input_ids=ids_BT)[0].logits
        exact = plain.model(input_ids=ids_BT, use_cache=False).logits
    with moefit.load(folder, kv_cache="int8") as served:
        assert served.budget.kv_dtype == "int8"
        cache, rows = None, []
        for part in ids_BT.split([7, 5, 1, 1, 1, 1, 1, 7], 1):
            output, cache = forward_with_cache(served.model, cache, input_ids=part)
            rows.append(output.logits)
        found = torch.cat(rows, dim=1)
        alone = served.model(input_ids=ids_BT, use_cache=False).logits
    torch.testing.assert_close(alone, exact, rtol=1e-4, atol=1e-4)
    # Quantiles, since a key on the border between two codes may change a router's choice.
    size = float(exact.abs().max())
    assert float((found - wanted).abs().quantile(0.9)) < 1e-3 * size
    assert 1e-5 * size < float((found - exact).abs().median()) < 0.02 * size, "they are rounded"


@compiled
@pytest.mark.parametrize("name", ["Mixtral", "window", "sinks and windows"])
def test_kernels_compute_what_they_know(name, tmp_path, monkeypatch) -> None:
    folder = saved(MODELS[name](), tmp_path)
    monkeypatch.setattr(attention_module, "_by_torch", None)
    with moefit.load(folder, kv_cache="int8") as served:
        served.generate(ids(2), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        pytest.param({"num_return_sequences": 2, "num_beams": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_generation(name, how, tmp_path) -> None:
    """Beams and batches give each sequence what it gets alone; padding changes nothing."""
    folder = saved(MODELS[name](), tmp_path)
    with moefit.load(folder, kv_cache="int8") as served:
        settings_ = {"max_new_tokens": 12, "do_sample": False, **how}
        both = served.generate(ids(2), **settings_)
        each = [served.generate(row[None], **settings_) for row in ids(2)]
        assert torch.equal(both, torch.cat(each))
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids(2)], dim=1)
        mask = (padded > 0).long()
        found = served.generate(padded, attention_mask=mask, **settings_)
        assert torch.equal(found[:, 3:], both)


REFUSED = {
    "deepseek_v3": "latent vectors",
    "minimax": "cache of its own",
    "zaya": "other states",
    "inkling": "position_bias",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_has_another_kind_of_cache_is_refused(family, tmp_path) -> None:
    assert family in families()
    folder = saved(tiny_family(family), tmp_path)
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]) as caught:
        moefit.load(folder, kv_cache="int8")
    assert "kv_cache model (the model's own dtype) works" in str(caught.value)
    moefit.load(folder).close()


@pytest.mark.parametrize("family", ["qwen3_next", "gemma4_multimodal", "jamba"])
def test_what_attends_in_some_layers_or_parts_is_served(family, tmp_path) -> None:
    folder = saved(tiny_family(family), tmp_path)
    with moefit.load(folder, kv_cache="int8") as served:
        assert served.int8_cache


def test_an_encoder_is_refused(tmp_path) -> None:
    with pytest.raises(UnsupportedModelError, match="encoder"):
        moefit.load(saved(switch(), tmp_path), kv_cache="int8")


def test_invalid_settings() -> None:
    with pytest.raises(ConfigError, match="not one of model, int8"):
        LoadSettings(kv_cache="int4").check()
    with pytest.raises(ConfigError, match=r"CPUs only.*give kv_cache model, or device cpu"):
        LoadSettings(kv_cache="int8", device="cuda").check()


def test_closing_restores_the_models_attention(tmp_path) -> None:
    served = moefit.load(saved(tiny("Mixtral"), tmp_path), kv_cache="int8")
    assert served.model.config._attn_implementation == "moefit_int8"
    served.close()
    assert served.model.config._attn_implementation == "sdpa"
