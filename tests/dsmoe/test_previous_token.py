"""Models that route each token by the router's logits for the token before."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, StaticCache

from moefit.cache_argument import forward_with_cache, with_cache
from moefit.dsmoe.block import DsMoeBlock
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.dsmoe.previous_token import RouterLogits
from moefit.errors import ConfigError, UnsupportedModelError

SHAPE: dict[str, Any] = {
    "pregated": "previous_token", "num_hidden_layers": 3, "qk_norm": True,
    "inference_rule": "top_k:2",
}  # fmt: skip


FORMS = ["previous_token", "previous_token_and_embedding"]


def model_of(**changes: Any) -> DsMoeForCausalLM:
    return tiny_model(**(SHAPE | changes))


@torch.no_grad()
def in_chunks(model: Any, ids_BT: Tensor, sizes: list[int], cache: Any = None) -> Tensor:
    logits = []
    for part_BT in ids_BT.split(sizes, dim=1):
        output, cache = forward_with_cache(model, cache, input_ids=part_BT)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def whole(model: Any, ids_BT: Tensor, **inputs: Any) -> Tensor:
    return model(ids_BT, use_cache=False, **inputs).logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("router", "hidden"), [("linear", None), ("linear", 6), ("grap", None)])
def test_a_token_is_routed_by_the_logits_of_the_one_before(
    router: str, hidden: int | None, form: str
) -> None:
    if router == "grap" and form != FORMS[0]:
        pytest.skip("it has no weights for an embedding")
    model = model_of(router_type=router, router_hidden_size=hidden, num_experts=4, pregated=form)
    ids_BT, given, used = tokens(2, 9), [], []
    blocks = [one for one in model.modules() if isinstance(one, DsMoeBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        block.experts.register_forward_pre_hook(lambda _, inputs: used.append(inputs[1:]))
    with torch.no_grad():
        found = model(ids_BT, output_router_logits=True, use_cache=False).router_logits
        for block, x_BTD, logits, (ids_TK, weights_TK) in zip(
            blocks, given, found, used, strict=True
        ):
            own_BTE = block.gate.logits(x_BTD)
            expected = torch.cat([own_BTE[:, :1], own_BTE[:, :-1]], dim=1)
            if form == FORMS[1]:
                e_BTD = model.model.embed_tokens(ids_BT)
                e_BTD = e_BTD / (e_BTD.square().mean(-1, keepdim=True) + 1e-5).sqrt()
                hidden = F.gelu(e_BTD @ block.gate.embedding_up.T + block.gate.embedding_bias)
                expected = expected + hidden @ block.gate.embedding_weight.T
            expected = expected.flatten(0, 1)
            torch.testing.assert_close(logits, expected)
            best = expected.softmax(-1).topk(2)
            assert torch.equal(ids_TK.sort().values, best.indices.sort().values)
            torch.testing.assert_close(weights_TK.sum(-1), best.values.sum(-1))
    if form == FORMS[1]:
        return
    plain = model_of(router_type=router, router_hidden_size=hidden, num_experts=4, pregated=False)
    plain.load_state_dict(model.state_dict())  # the same names and shapes
    difference = (whole(plain, ids_BT) - whole(model, ids_BT)).abs().amax(-1)
    if len(blocks) == 3 and router == "linear":
        assert difference[:, 0].max() < 1e-5 and difference[:, 1:].max() > 0.01


@pytest.mark.parametrize("rule", ["top_k:2", "top_k:2:renormalize", "threshold:0.9", "dense"])
@pytest.mark.parametrize("sizes", [[11], [1] * 11, [4, 1, 3, 1, 1, 1]])
@pytest.mark.parametrize("form", FORMS)
def test_a_text_in_parts_equals_the_whole(form: str, rule: str, sizes: list[int]) -> None:
    model, ids_BT = model_of(inference_rule=rule, pregated=form), tokens(2, 11)
    expected = whole(model, ids_BT)
    for cache in (None, DynamicCache(), DynamicCache(config=model.config)):
        torch.testing.assert_close(
            in_chunks(model, ids_BT, sizes, cache), expected, atol=1e-5, rtol=1e-4
        )


def test_what_changes_a_cache_changes_the_logits_in_it() -> None:
    model, ids_BT, other_BT = model_of(), tokens(2, 8), tokens(2, 5, seed=9)
    cache = DynamicCache(config=model.config)
    in_chunks(model, ids_BT, [8], cache)
    assert sum(isinstance(one, RouterLogits) for one in cache.layers) == 3
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    text_BT = torch.cat([ids_BT.flip(0)[:, :6], other_BT], dim=1)
    torch.testing.assert_close(
        in_chunks(model, other_BT, [2, 3], cache), whole(model, text_BT)[:, 6:],
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("named", [False, True])
def test_the_first_token_after_padding_has_none_before_it(named: bool) -> None:
    """Whether positions are given, as `generate` does, or not."""
    model, ids_BT = model_of(), tokens(2, 9)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0
    inputs: dict[str, Any] = {"attention_mask": mask_BT}
    expected = whole(model, ids_BT[:1, 4:])
    if named:
        inputs["position_ids"] = (mask_BT.cumsum(1) - 1).masked_fill(mask_BT == 0, 1)
    padded = whole(model, ids_BT, **inputs)
    torch.testing.assert_close(padded[:1, 4:], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded[1:], whole(model, ids_BT[1:]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_generated_beside_padding_as_alone(form: str) -> None:
    model, ids_BT = model_of(pregated=form), tokens(2, 6)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    made = model.generate(ids_BT, attention_mask=mask_BT, **options)
    for row, start in ((0, 3), (1, 0)):
        alone = model.generate(ids_BT[row : row + 1, start:], **options)
        assert torch.equal(made[row, start:], alone[0])
        text = alone[:, :-1]
        choice = whole(model, text).argmax(-1)
        assert torch.equal(choice[0, 5 - start :], alone[0, 6 - start :])


def test_documents_that_share_a_sequence_begin_anew() -> None:
    model, ids_BT = model_of(), tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    both = whole(model, ids_BT, position_ids=positions)
    torch.testing.assert_close(both[:, 4:], whole(model, ids_BT[:, 4:]), atol=1e-5, rtol=1e-4)


def test_caches_without_room_for_logits_are_refused() -> None:
    model, ids_BT = model_of(), tokens(1, 5)
    static = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(UnsupportedModelError, match="a StaticCache has no place"):
        in_chunks(model, ids_BT, [5], static)
    plain, cache = model_of(pregated=False), DynamicCache(config=model.config)
    in_chunks(plain, ids_BT, [5], cache)
    with pytest.raises(ConfigError, match="of 5 tokens and router logits of 0"):
        in_chunks(model, ids_BT, [5], cache)


@pytest.mark.parametrize("form", FORMS)
def test_activation_checkpointing_gives_the_same_gradients(form: str) -> None:
    ids_BT, found = tokens(2, 9), []
    for checkpointing in (False, True):
        model = model_of(pregated=form).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**with_cache({"input_ids": ids_BT, "labels": ids_BT}, None, model)).loss.backward()
        found.append({name: one.grad for name, one in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
