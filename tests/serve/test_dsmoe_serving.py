"""Serving DS-MoE models: changing rules, and numbers of experts that differ by token."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import (
    assert_same_but_for_rounding,
    differs_by,
    give_slots,
    greedy,
    hold,
    logits,
    saved,
    serving,
)
from tiny_models import set_biases, tiny_config, tiny_model, tokens

import moefit
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.moe.routing import Rule
from moefit.serve.memory.activations import workspace_bytes

EXPERTS = 5
RULES = ["dense", "top_k:1", "top_k:2", "threshold:0.9", "threshold_top_k:0.9"]
RENORMALIZED = ["dense:renormalize", "top_k:2:renormalize", "threshold:0.9:renormalize"]
REFERENCE = Path(moefit.__file__).parent / "reference_model"


@pytest.fixture
def inputs():
    ids = tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(large(), tmp_path_factory.mktemp("dsmoe"))


def large(**changes) -> DsMoeForCausalLM:
    """A DS-MoE with all optional parts."""
    return tiny_model(
        num_attention_experts=2,
        router_hidden_size=6,
        routed_scaling_factor=3.0,
        inference_rule="top_k:2",
        **changes,
    )


@pytest.mark.parametrize("rule", RULES + RENORMALIZED)
def test_one_slot_per_block_equals_model(rule, folder, inputs):
    model = large()
    model.set_inference_rule(rule)
    with serving(folder) as served:
        served.model.set_inference_rule(rule)
        assert set(served.report()["slots"].values()) == {1}
        assert differs_by(logits(served.model, inputs), logits(model, inputs)) < 1e-5
        assert differs_by(greedy(served.model, inputs), greedy(model, inputs)) < 1e-5
        assert served.report()["fetches"] > len(served.blocks)


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_type": "gelu", "inference_rule": "threshold:0.9"},
        {"tie_word_embeddings": True, "qk_norm": True},
        {"num_experts": 1},
        {"router_type": "hash", "training_rule": "top_k:1", "inference_rule": "top_k:1"},
        {
            "score_correction_bias": True,
            "training_rule": "top_k:2",
            "inference_rule": "top_k:2:renormalize",
        },
    ],
)
def test_every_kind_of_model(changes, tmp_path, inputs):
    model = tiny_model(**changes)
    set_biases(model)
    with serving(saved(model, tmp_path)) as served:
        assert differs_by(logits(served.model, inputs), logits(model, inputs)) < 1e-5
        assert differs_by(greedy(served.model, inputs), greedy(model, inputs)) < 1e-5


def test_virtual_mode_knows_a_bias_that_showed_no_choice_when_it_was_loaded(tmp_path, inputs):
    """Biases of 0 here, which change no choice; small ones may change none of a few tokens."""
    model = tiny_model(
        score_correction_bias=True, training_rule="top_k:2", inference_rule="top_k:2"
    )
    with serving(saved(model, tmp_path), slots=EXPERTS) as served:
        for one in (model, served.model):
            set_biases(one)
        hold(served, list(range(EXPERTS)), "virtual", keep_mass=False)
        served.reset()
        assert differs_by(logits(served.model, inputs), logits(model, inputs)) < 1e-5


def test_bfloat16(tmp_path, inputs):
    folder = saved(large(num_hidden_layers=4).to(torch.bfloat16), tmp_path)
    model = DsMoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with serving(folder) as served:
        assert_same_but_for_rounding(served, model, inputs)


@pytest.mark.parametrize("rule", ["threshold:0.48", "top_k:4", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_model(rule, dtype):
    model = DsMoeForCausalLM.from_pretrained(REFERENCE, dtype=dtype).eval()
    ids = torch.randint(3, 4096, (1, 48), generator=torch.Generator().manual_seed(0))
    with serving(REFERENCE, dtype=dtype) as served:
        for one in (model, served.model):
            one.set_inference_rule(rule)
        inputs = {"input_ids": ids}
        if dtype == torch.float32:
            assert differs_by(logits(served.model, inputs), logits(model, inputs)) < 1e-4
        else:
            assert_same_but_for_rounding(served, model, inputs)
        assert served.report()["experts"] == dict.fromkeys(served.blocks, 16)


def by_hand(model: DsMoeForCausalLM, residents: list[int]):
    """Make the plain model choose among residents, token by token."""

    def restrict(block):
        def reroute(_experts, inputs):
            x_TD, ids_TK, weights_TK = inputs
            rule = Rule.parse(model.config.inference_rule)
            ids_TK, weights_TK = ids_TK.clone(), torch.zeros_like(weights_TK)
            for token, scores_E in enumerate(block.gate.scores(x_TD)):
                count = int((ids_TK[token] < EXPERTS).sum())
                best = sorted(residents, key=lambda e: -scores_E[e])[:count]
                total = sum(scores_E[e] for e in best) if rule.renormalize else 1.0
                ids_TK[token] = EXPERTS
                for k, expert in enumerate(best):
                    ids_TK[token, k] = expert
                    weights_TK[token, k] = scores_E[expert] / total * block.scale
            return x_TD, ids_TK, weights_TK

        return reroute

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(restrict(layer.mlp))
    return model


@pytest.mark.parametrize("residents", [[2], [0, 1, 4], list(range(EXPERTS))])
@pytest.mark.parametrize("at_load", ["top_k:2", "threshold:0.9", "dense:renormalize"])
def test_virtual_mode_is_masked_gating_for_every_rule(at_load, residents, tmp_path, inputs):
    model = large()
    model.set_inference_rule(at_load)
    with serving(saved(model, tmp_path), slots=len(residents)) as served:
        hold(served, residents, "virtual", keep_mass=False)
        served.reset()
        by_hand(model, residents)
        for rule in [at_load, *RULES, *RENORMALIZED]:
            for one in (model, served.model):
                one.set_inference_rule(rule)
            ours, theirs = logits(served.model, inputs), logits(model, inputs)
            assert differs_by(ours, theirs) < 1e-5, rule
        assert served.report()["fetches"] == 0


def test_virtual_mode_with_all_resident_equals_model(folder, inputs):
    model = large()
    with serving(folder, slots=EXPERTS) as served:
        hold(served, range(EXPERTS), "virtual")
        for rule in RULES + RENORMALIZED:
            for one in (model, served.model):
                one.set_inference_rule(rule)
            assert differs_by(greedy(served.model, inputs), greedy(model, inputs)) < 1e-5, rule


@pytest.mark.parametrize("rule", ["top_k:2", "threshold:0.9", "top_k:2:renormalize"])
def test_bounded_mode_with_zero_bound_is_exact(rule, folder, inputs):
    model = large()
    with serving(folder, slots=2) as served:
        for one in (model, served.model):
            one.set_inference_rule(rule)
        hold(served, [0, 3], "bounded", bound=0.0)
        assert differs_by(logits(served.model, inputs), logits(model, inputs)) < 1e-5


@pytest.mark.parametrize("bound", [0.3, 1.0])
@pytest.mark.parametrize("rule", ["top_k:2", "threshold:0.9", "top_k:2:renormalize"])
def test_bounded_mode_respects_bound(rule, bound, folder, inputs):
    with serving(folder, slots=2) as served:
        served.model.set_inference_rule(rule)
        hold(served, [0, 3], "bounded", bound=bound, ramp=0.0, protected=0)
        served.reset()
        logits(served.model, inputs)
        assert 0 < served.report()["substituted_mass"] <= bound


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("rule"), st.sampled_from(RULES + RENORMALIZED)),
            st.tuples(st.just("slots"), st.integers(1, EXPERTS)),
            st.tuples(st.just("virtual"), st.integers(1, 6)),
            st.tuples(st.just("forward"), st.integers(1, 9)),
        ),
        max_size=10,
    )
)
@settings(max_examples=15, deadline=None)
def test_exact_after_other_modes(folder, steps):
    """After changes of rules, budgets and modes, exact mode equals the model."""
    model = large()
    with serving(folder) as served:
        for what, value in steps:
            match what:
                case "rule":
                    model.set_inference_rule(value)
                    served.model.set_inference_rule(value)
                case "slots":
                    give_slots(served, value)
                case "virtual":
                    served.set_mode("virtual", residency="manager")
                    logits(served.model, {"input_ids": tokens(1, value)})
                    served.set_mode("exact")
                case "forward":
                    ids = {"input_ids": tokens(2, value)}
                    # Dense, the model's own experts are one wide product, summed in its order.
                    assert differs_by(logits(served.model, ids), logits(model, ids)) < 1e-5
            served.check()


def test_workspace_covers_every_rule():
    few, many = (tiny_config(num_experts=number) for number in (4, 8))
    sizes = [workspace_bytes(one, 100, torch.float32) for one in (few, many)]
    assert sizes[1] - sizes[0] >= 100 * 4 * 2 * few.hidden_size * 4  # outputs, and weighted ones
