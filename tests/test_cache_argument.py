"""The name under which a model takes its KV cache, and what it returns, in any version."""

import pytest
import torch
from tiny_served import VOCABULARY, tiny
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import moefit
from moefit.cache_argument import (
    CACHE_NAME,
    cache_name,
    forward_with_cache,
    given_cache,
    one_cache,
    returned_cache,
    with_cache,
)
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM, register
from moefit.errors import ConfigError, UnsupportedModelError


class Old(nn.Module):
    def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
        return {"past_key_values": past_key_values, "unknown": kwargs}


class New(nn.Module):
    def forward(self, input_ids=None, cache=None, use_cache=None, **kwargs):
        return {"cache": cache, "unknown": kwargs}


class StateSpace(nn.Module):
    def forward(self, input_ids=None, cache_params=None, use_cache=None, **kwargs):
        return {"cache_params": cache_params, "unknown": kwargs}


class PassesOn(nn.Module):
    def __init__(self, base_model):
        super().__init__()
        self.base_model = base_model

    def forward(self, input_ids=None, **kwargs):
        return self.base_model(input_ids=input_ids, **kwargs)


class Swallows(nn.Module):
    def forward(self, input_ids=None, **kwargs):
        return BaseModelOutputWithPast(last_hidden_state=input_ids)


class TakesNone(nn.Module):
    def forward(self, input_ids=None):
        return BaseModelOutputWithPast(last_hidden_state=input_ids)


@pytest.mark.parametrize("model", [Old(), New(), StateSpace(), PassesOn(Old()), PassesOn(New())])
def test_a_model_gets_its_cache_under_the_name_that_it_knows(model) -> None:
    cache = DynamicCache()
    output, after = forward_with_cache(model, cache, input_ids=torch.ones(1, 1))
    assert after is cache and not output["unknown"]


@pytest.mark.parametrize("given", ["past_key_values", "cache", "cache_params"])
def test_a_cache_is_found_under_any_name_and_passed_on_under_the_right_one(given) -> None:
    cache = DynamicCache()
    named = {"attention_mask": None, given: cache}
    assert given_cache(named) is cache
    assert with_cache(named, cache, New()) == {"attention_mask": None, "cache": cache}
    assert with_cache(named, cache, Old()) == {"attention_mask": None, "past_key_values": cache}


@pytest.mark.parametrize("model", [Swallows(), TakesNone(), PassesOn(Swallows())])
def test_a_model_without_a_cache_is_refused(model) -> None:
    with pytest.raises(UnsupportedModelError, match=r"takes no KV cache .*past_key_values"):
        cache_name(model)


def test_an_output_without_a_cache_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has no KV cache"):
        returned_cache(BaseModelOutputWithPast(last_hidden_state=torch.ones(1)))


def test_loading_refuses_a_model_that_takes_no_cache(folder, monkeypatch) -> None:
    kind = type(tiny("Mixtral"))
    monkeypatch.setattr(kind, "forward", lambda self, input_ids=None, labels=None: None)
    with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM takes no KV cache"):
        moefit.load(folder)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "DeepseekV3"])
def test_families_of_transformers_continue_from_their_cache(family) -> None:
    model = tiny(family)
    assert cache_name(model) == CACHE_NAME
    _decodes_as_at_once(model)


def _decodes_as_at_once(model) -> None:
    ids_BT = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids_BT, use_cache=False).logits
        cache, rows = None, []
        for part in ids_BT.split([4, 3, 1, 1], 1):
            output, cache = forward_with_cache(model, cache, input_ids=part)
            rows.append(output.logits)
    torch.testing.assert_close(torch.cat(rows, dim=1), wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def dsmoe() -> DsMoeForCausalLM:
    register()
    torch.manual_seed(0)
    config = DsMoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=4,
    )
    return DsMoeForCausalLM(config).eval()


def test_dsmoe_takes_either_name(dsmoe) -> None:
    _decodes_as_at_once(dsmoe)
    ids_BT = torch.randint(1, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = dsmoe(ids_BT, use_cache=False).logits[:, -1]
        for name in ("past_key_values", "cache"):
            given = DynamicCache(config=dsmoe.config)
            dsmoe(ids_BT[:, :5], use_cache=True, **{name: given})
            last = dsmoe(ids_BT[:, 5:], use_cache=True, **{name: given})
            torch.testing.assert_close(last.logits[:, -1], wanted, rtol=1e-4, atol=1e-5)
            assert returned_cache(last) is given and given.get_seq_length() == 6


def test_dsmoe_refuses_two_caches(dsmoe) -> None:
    with pytest.raises(ValueError, match="give the KV cache once"):
        dsmoe(
            torch.ones(1, 1, dtype=torch.long), cache=DynamicCache(), past_key_values=DynamicCache()
        )
    assert one_cache(None, None) is None


def test_generate_of_transformers_uses_the_cache(dsmoe) -> None:
    """Each step after the first computes one token."""
    lengths = []
    layer = dsmoe.model.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    ids = torch.randint(1, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(2))
    dsmoe.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert lengths == [7, 1, 1, 1, 1]


@pytest.mark.parametrize("int8", [False, True])
def test_limits_see_a_cache_under_either_name(folder, int8) -> None:
    """A cache that is not seen counts as empty."""
    ids = torch.ones(1, 8, dtype=torch.long)
    given = {"kv_cache": "int8"} if int8 else {}
    with moefit.load(folder, context=12, **given) as served:
        served.set_memory(served.budget.min_bytes)
        with torch.inference_mode():
            _, cache = forward_with_cache(served.model, None, input_ids=ids)
            with pytest.raises(ConfigError, match="would hold 16 tokens"):
                forward_with_cache(served.model, cache, input_ids=ids)
