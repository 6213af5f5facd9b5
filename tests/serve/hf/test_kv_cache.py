"""Caches that grow in place equal transformers' caches after any operations."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import slow_but
from tiny_families import tiny_family
from tiny_served import VOCABULARY, saved, tiny
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

import moefit
from moefit.cache_argument import forward_with_cache
from moefit.serve.hf.attention import INT8_NAME, use_kernels
from moefit.serve.hf.kv_cache import Int8Layer, ReservedLayer, reserve_caches

H, D = 2, 4
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 40)),
        st.tuples(st.just("crop"), st.integers(1, 30)),
        st.tuples(st.just("select"), st.integers(0, 5)),
        st.tuples(st.just("reorder"), st.integers(0, 5)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=12,
)


def reserved(limit: int | None = None) -> ReservedLayer:
    return ReservedLayer(lambda: limit, DynamicLayer())


def states(batch: int, new: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    key_BHND, value_BHND = torch.randn(2, batch, H, new, D, generator=generator)
    return key_BHND, value_BHND


@settings(deadline=None, max_examples=150)
@given(OPERATIONS, st.sampled_from([None, 1, 50, 500]))
def test_fixed_cache_equals_growing_cache(operations, limit) -> None:
    plain, ours, batch = DynamicLayer(), reserved(limit), 2
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
                assert torch.equal(mine, wanted)
        elif plain.get_seq_length():
            if operation == "repeat" and batch > 4:
                continue
            batch = apply(operation, number, plain, batch)
            apply(operation, number, ours, batch)
        assert ours.get_seq_length() == plain.get_seq_length()
        if plain.get_seq_length():
            assert torch.equal(ours.keys, plain.keys)
            assert torch.equal(ours.values, plain.values)


def apply(operation: str, number: int, layer: DynamicLayer, batch: int) -> int:
    if operation == "crop":
        layer.crop(-min(number, layer.get_seq_length() - 1))
    elif operation == "repeat":
        layer.batch_repeat_interleave(number)
        return 2 * batch
    elif operation == "select":
        layer.batch_select_indices(torch.tensor([number % len(layer.keys)]))
        return 1
    else:
        layer.reorder_cache(torch.arange(len(layer.keys)).roll(number))
    return batch


def test_token_writes_only_its_keys() -> None:
    layer, generator = reserved(), torch.Generator().manual_seed(0)
    layer.update(*states(1, 100, generator))
    where = layer.keys.data_ptr()
    for _ in range(25):
        layer.update(*states(1, 1, generator))
        assert layer.keys.data_ptr() == where
    assert layer.get_seq_length() == 125


@pytest.mark.parametrize(("limit", "most"), [(None, 132), (128, 128), (90, 100), (101, 101)])
def test_buffers_match_estimated_tokens(limit: int | None, most: int) -> None:
    layer, generator = reserved(limit), torch.Generator().manual_seed(0)
    layer.update(*states(1, 100, generator))
    assert layer.keys.untyped_storage().nbytes() == 4 * H * D * most


def test_sequences_share_context_limit() -> None:
    layer = reserved(240)
    layer.update(*states(2, 100, torch.Generator().manual_seed(0)))
    assert layer.keys.untyped_storage().nbytes() == 4 * 2 * H * D * 120


def test_only_full_attention_layers_are_converted() -> None:
    class Other(DynamicLayer):
        pass

    class Model(torch.nn.Module):
        def forward(self, past_key_values=None):
            return past_key_values

    model = Model()
    reserve_caches(model, lambda: None)
    cache = DynamicCache()
    cache.layers[:] = [DynamicLayer(), Other()]
    both = EncoderDecoderCache(cache, DynamicCache())
    with torch.no_grad():
        model(past_key_values=both)
        model(past_key_values="no cache")
        model()
    assert [type(one) for one in cache.layers] == [ReservedLayer, Other]
    kept = cache.layers[0]
    with torch.no_grad():
        model(past_key_values=cache)
    assert cache.layers[0] is kept


@pytest.mark.parametrize("limit", [None, 64])
def test_windows_keep_all_keys_where_memory_is_reserved(limit: int | None) -> None:
    """Also in a cache that the model would make itself; without a limit memory may be short."""
    model = tiny_family("gpt_oss").eval()
    ids_1T = torch.randint(3, 90, (1, 20))  # more than the window
    with torch.no_grad():
        wanted = model(input_ids=ids_1T).logits
        undo = use_kernels(model)
        reserve_caches(model, lambda: limit)
        output, cache = forward_with_cache(model, None, input_ids=ids_1T[:, :15])
        rows = [output.logits]
        for place in range(15, 20):
            ids_11 = ids_1T[:, place : place + 1]
            output, cache = forward_with_cache(model, cache, input_ids=ids_11)
            rows.append(output.logits)
        given = model(ids_1T, None, None, DynamicCache(config=model.config))  # by position
    torch.testing.assert_close(torch.cat(rows, dim=1), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(given.logits, wanted, atol=1e-4, rtol=1e-4)
    kinds = {type(layer) for layer in cache.layers}
    all_kept = limit is not None and model.config._attn_implementation == INT8_NAME
    assert kinds == ({ReservedLayer} if all_kept else {ReservedLayer, DynamicSlidingWindowLayer})
    undo()


@pytest.mark.parametrize("int8", [False, True])
def test_windows_stay_where_others_of_a_cache_cannot_be_replaced(int8: bool) -> None:
    """One mask may serve all layers with windows, as DeepSeek-V4's do."""

    class Compressed(DynamicSlidingWindowLayer):
        pass

    class Model(torch.nn.Module):
        config = SimpleNamespace(_attn_implementation=INT8_NAME)

        def forward(self, past_key_values=None):
            return past_key_values

    model = Model()
    reserve_caches(model, lambda: 64, int8=int8)
    for others, kept in ((Compressed, True), (DynamicSlidingWindowLayer, False)):
        cache = DynamicCache()
        cache.layers[:] = [DynamicSlidingWindowLayer(8), DynamicLayer(), others(8)]
        with torch.no_grad():
            model(past_key_values=cache)
        own = Int8Layer if int8 else ReservedLayer
        first = DynamicSlidingWindowLayer if kept else own
        assert [type(one) for one in cache.layers] == [first, own, others if kept else own]


def test_static_caches_of_models_with_sinks() -> None:
    """They have room behind the last key, which a window does not describe."""
    model, ids_1T = tiny_family("gpt_oss").eval(), torch.randint(3, 90, (1, 21))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids_1T, **options)
    undo = use_kernels(model)
    for kind in (None, "static"):
        assert torch.equal(model.generate(ids_1T, cache_implementation=kind, **options), wanted)
    undo()


def test_no_in_place_writes_with_gradients() -> None:
    model = torch.nn.Identity()
    model.forward = lambda past_key_values=None: past_key_values  # type: ignore[method-assign]
    reserve_caches(model, lambda: None)
    cache = DynamicCache()
    cache.layers[:] = [DynamicLayer()]
    model(past_key_values=cache)
    assert type(cache.layers[0]) is DynamicLayer


@pytest.mark.parametrize(
    "family", slow_but(["GptOss", "DeepseekV3"], ["Mixtral", "Olmoe", "GptOss", "DeepseekV3"])
)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generation_equals_model(family: str, how: dict[str, int], tmp_path) -> None:
    model = tiny(family)
    folder = saved(model, tmp_path)
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted = model.generate(ids, max_new_tokens=40, do_sample=False, **how)
    with moefit.load(folder) as served:
        assert torch.equal(served.generate(ids, max_new_tokens=40, do_sample=False, **how), wanted)
