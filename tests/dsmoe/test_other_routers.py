"""Routers that hash token ids, and routers with a bias for their choice."""

import pytest
import torch
from tiny_models import set_biases, tiny_config, tiny_model, tokens

from moefit.errors import ConfigError
from moefit.evaluate.evaluated_model import evaluated_model
from moefit.moe.routing import Rule, hashed_logits, route, route_allowed

ONE = {"training_rule": "top_k:1", "inference_rule": "top_k:1"}
HASH = {"router_type": "hash", **ONE}
BIASED = {
    "score_correction_bias": True, "training_rule": "top_k:2", "inference_rule": "top_k:2",
}  # fmt: skip


def choices(model, ids_BT):
    """Return ids_TK and weights_TK that the experts of each layer are given."""
    seen = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, given: seen.append(given[1:]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_token_has_the_same_expert_wherever_it_is():
    model, ids_BT = tiny_model(**HASH), tokens(3, 12)
    expected_T = hashed_logits(ids_BT, 5).argmax(-1).flatten()
    assert len(expected_T.unique()) > 1
    for ids_TK, weights_TK in choices(model, ids_BT):
        assert ids_TK[:, 0].equal(expected_T)
        assert (weights_TK == 1).all()


def test_hashing_spreads_consecutive_ids_evenly():
    counts_E = torch.bincount(hashed_logits(torch.arange(4096), 16).argmax(-1), minlength=16)
    assert counts_E.min() > 0.95 * 256 and counts_E.max() < 1.05 * 256


def test_hashed_tokens_are_generated_with_a_cache_as_without():
    model, ids_BT = tiny_model(**HASH), tokens(2, 5)
    made_BT = model.generate(ids_BT, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        next_BT = model(made_BT).logits.argmax(-1)
    assert next_BT[:, 4:-1].equal(made_BT[:, 5:])


def test_hashed_experts_are_trained_also_with_activation_checkpointing():
    ids_BT, found = tokens(2, 9), []
    for again in (False, True):
        model = tiny_model(**HASH).train()
        if again:
            model.activation_checkpointing_enable()
        model(ids_BT, labels=ids_BT).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(one.equal(other) for one, other in zip(*found, strict=True))
    assert all(grad.any() for grad in found[0])


def test_hashed_tokens_beside_padding_are_computed_as_alone():
    model, ids_BT = tiny_model(**HASH), tokens(2, 9)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0
    with torch.no_grad():
        padded = model(ids_BT.masked_fill(mask_BT == 0, 0), attention_mask=mask_BT).logits
        alone = model(ids_BT[:1, 4:]).logits
    torch.testing.assert_close(padded[:1, 4:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("outside", [-1, 10**6])
def test_hashed_ids_outside_the_table_raise(outside):
    with pytest.raises(IndexError):
        tiny_model(**HASH)(torch.tensor([[3, outside]]))


def test_hashing_needs_token_ids():
    model = tiny_model(**HASH)
    with pytest.raises(ConfigError, match="inputs_embeds were given; give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 16))


def test_a_bias_decides_the_choice_and_not_the_weights():
    scores_TE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    bias_E, rule = torch.tensor([0.0, 0.0, 0.25]), Rule.parse("top_k:2")
    routing = route(scores_TE, rule, None, bias_E)
    assert routing.ids_TK.tolist() == [[0, 2], [1, 2]]
    assert routing.weights_TK.equal(torch.tensor([[0.5, 0.2], [0.6, 0.3]]))
    some_TE = torch.tensor([[True, True, False]] * 2)
    allowed = route_allowed(scores_TE.log(), some_TE, rule, None, torch.tensor([0.0, 0.9, 0.0]))
    assert allowed.ids_TK.tolist() == [[1, 0], [1, 0]]
    # Their scores among the two, times what the rule's own choice has of the scores of all.
    wanted = [[0.375 * 0.8, 0.625 * 0.8], [6 / 7 * 0.9, 1 / 7 * 0.9]]
    torch.testing.assert_close(allowed.weights_TK, torch.tensor(wanted))


def test_no_bias_brings_back_an_expert_that_is_excluded():
    """As `parallel.node_limit` excludes those of other machines, by their logits."""
    logits_TE = torch.tensor([[0.0, 1.0, -1e4, -1e4]])
    bias_E, rule = torch.tensor([-0.9, -0.9, 0.5, 0.5]), Rule.parse("top_k:2")
    routing = route(logits_TE.softmax(-1), rule, None, bias_E)
    assert sorted(routing.ids_TK[0].tolist()) == [0, 1]
    torch.testing.assert_close(routing.weights_TK.sum(), torch.tensor(1.0))
    some_TE = torch.tensor([[True, False, True, False]])
    allowed = route_allowed(logits_TE, some_TE, Rule.parse("top_k:1"), None, bias_E)
    assert allowed.ids_TK.tolist() == [[0]] and allowed.weights_TK.isfinite().all()


def test_choices_are_counted_in_training_only():
    model, ids_BT = tiny_model(**BIASED), tokens(2, 9)
    loads = [layer.mlp.gate.load_E for layer in model.model.layers]
    plain = choices(model, ids_BT)
    assert not any(load_E.any() for load_E in loads)
    set_biases(model)
    seen = choices(model.train(), ids_BT)
    for load_E, (ids_TK, _), (before_TK, _) in zip(loads, seen, plain, strict=True):
        assert not ids_TK.equal(before_TK)
        assert load_E.tolist() == torch.bincount(ids_TK.flatten(), minlength=5).tolist()


def test_a_bias_is_saved_and_stays_in_float32(tmp_path):
    model = tiny_model(**BIASED)
    set_biases(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for one, other in zip(model.model.layers, loaded.model.layers, strict=True):
        found_E = other.mlp.gate.e_score_correction_bias
        assert found_E.dtype == torch.float32
        assert found_E.equal(one.mlp.gate.e_score_correction_bias.float())
        assert not other.mlp.gate.load_E.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_type": "hash"}, "gives each token one expert, but training_rule='dense'"),
        ({**HASH, "inference_rule": "top_k:2"}, "inference_rule='top_k:2'; give inference_rule"),
        ({**HASH, "pregated": True}, "pregated=True has no effect; give pregated=false"),
        (
            {**HASH, "pregated": "previous_token_and_embedding"},
            "pregated='previous_token_and_embedding' has no effect; give pregated=false",
        ),
        ({**HASH, "num_experts": 1}, "router_type='hash' has no hidden layer and needs several"),
        ({**HASH, "score_correction_bias": True}, "needs routers that choose by scores"),
        ({"score_correction_bias": True}, "training_rule='dense' does not choose the best"),
        ({"score_correction_bias": 1}, "score_correction_bias=1, but it must be true or false"),
    ],
)
def test_what_contradicts_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("settings", "rule", "message"),
    [
        (HASH, "dense", "gives each token one expert, but inference_rule='dense'"),
        (BIASED, "threshold:0.5", "inference_rule='threshold:0.5' does not choose the best"),
    ],
)
def test_rules_that_routers_cannot_choose_by_are_refused(settings, rule, message, tmp_path):
    """A model that was saved with one could not be loaded."""
    model = tiny_model(**settings)
    with pytest.raises(ConfigError, match=message):
        model.set_inference_rule(rule)
    evaluated = evaluated_model(model)
    with pytest.raises(ConfigError, match=message):
        evaluated.check(Rule.parse(rule))
    assert evaluated.default_rules()
    for one in evaluated.default_rules():
        with evaluated.use(one):
            model.save_pretrained(tmp_path)
        type(model).from_pretrained(tmp_path)
