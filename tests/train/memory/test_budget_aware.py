import pytest
import torch
from tiny_models import OLMOE

from moefit.errors import ConfigError
from moefit.moe.residents import eviction_loss
from moefit.moe.routing import Rule
from moefit.train.config import make_config
from moefit.train.loop import train
from moefit.train.memory.budget_aware import BudgetAware
from moefit.train.model import build_model
from moefit.train.run_folder import read_log


@pytest.fixture
def sparse(tree):
    rules = {"training_rule": "top_k:2:renormalize", "inference_rule": "top_k:2:renormalize"}
    tree["model"] |= {**rules, "num_experts": 8, "num_attention_experts": 1}
    tree["loss"] = {"load_balancing": 0.01}
    tree["budget_aware"] = {"weight": 2.0, "share": 0.375, "ramp": [0.25, 0.75]}
    return tree


def budget_of(tree):
    config = make_config(tree)
    found = BudgetAware.of(config, build_model(config, vocab_size=300, eos_token_id=0))
    assert found is not None
    return found


def test_loss_is_the_weighted_sum_of_the_layers(sparse):
    budget, logits = budget_of(sparse), [torch.randn(2, 9, 8) for _ in range(3)]
    assert (budget.slots, budget.rule.k) == (3, 2)
    losses = []
    for step in (2, 4, 6, 8):  # of 8 steps; the ramp is from 2 to 6
        budget.set_step(step)
        losses.append(budget.loss(logits).item())
    whole = 2.0 * sum(eviction_loss(one, Rule(kind="top_k", k=2), 3).item() for one in logits)
    assert losses == pytest.approx([0, whole / 2, whole, whole])


def test_only_steps_of_the_ramp_change(sparse, callback, tmp_path):
    plain = {name: value for name, value in sparse.items() if name != "budget_aware"}
    train(make_config(plain | {"out": str(tmp_path / "plain")}), callback)
    train(make_config(sparse), callback)
    logs = [
        [r for r in read_log(tmp_path / out) if r["kind"] == "train"] for out in ("plain", "run")
    ]
    assert [r["loss"] for r in logs[0][:3]] == [r["loss"] for r in logs[1][:3]]
    assert [r["router_loss"] for r in logs[0][:2]] == [r["router_loss"] for r in logs[1][:2]]
    assert logs[1][2]["router_loss"] > logs[0][2]["router_loss"]
    assert logs[1][3]["loss"] != logs[0][3]["loss"]


def test_more_of_a_tokens_experts_are_resident(sparse, callback, tmp_path):
    """The statistic that the log shows is what the loss raises."""
    sparse |= {"steps": 40, "log": {"every": 1, "eval_every": 40, "eval_tokens": 64}}
    sparse["checkpoint"] = {"every": 40, "keep": 1}
    sparse["budget_aware"] |= {"ramp": [0.0, 0.1], "weight": 10.0}
    plain = {name: value for name, value in sparse.items() if name != "budget_aware"}
    train(make_config(plain | {"out": str(tmp_path / "plain")}), callback)
    train(make_config(sparse), callback)
    hits = [
        [r["mlp_slot_hits"] for r in read_log(tmp_path / out) if r["kind"] == "train"][-1]
        for out in ("plain", "run")
    ]
    assert hits[1] > hits[0] + 0.1


def test_other_models(sparse):
    sparse["model"] |= {"training_rule": "dense", "inference_rule": "threshold:0.5"}
    found = budget_of(sparse)
    assert (found.rule.kind, found.slots) == ("threshold", 3)
    sparse["model"], sparse["loss"] = OLMOE, {}
    sparse["budget_aware"]["share"] = 0.5
    assert budget_of(sparse).rule == Rule(kind="top_k", k=1)  # a quarter, as at export
    sparse["model"] = OLMOE | {"num_experts_per_tok": 2}
    assert budget_of(sparse).rule == Rule(kind="top_k", k=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "budget_aware.weight: .*greater than 0"),
        ({"share": 0}, "budget_aware.share: .*greater than 0"),
        ({"share": 1}, "budget_aware.share: .*less than 1"),
        ({"share": 0.125}, "share=0.125 is 1 of 8 experts, but a token uses 2 .* works is 0.25"),
        ({"share": 0.99}, "share=0.99 is 8 of 8 experts, .* works is 0.875"),
        ({"ramp": [0.6, 0.5]}, r"budget_aware: ramp=\[0.6, 0.5\] ends before it starts"),
        ({"ramp": [1, 1]}, r"ramp=\[1, 1\] begins when training ends; .* below 1"),
        ({"slots": 3}, "budget_aware.slots: unknown key"),
    ],
)
def test_settings_that_cannot_be(sparse, settings, message):
    sparse["budget_aware"] |= settings
    with pytest.raises(ConfigError, match=message):
        budget_of(sparse)


def test_models_with_nothing_to_keep(sparse):
    sparse["model"]["inference_rule"] = "dense"
    with pytest.raises(ConfigError, match=r"rule dense uses all experts .* such as top_k:4"):
        budget_of(sparse)
    sparse["model"]["inference_rule"] = "top_k:8"
    with pytest.raises(ConfigError, match="rule top_k:8 uses all experts"):
        budget_of(sparse)
    sparse["model"]["inference_rule"] = "threshold_top_k:0.5"
    with pytest.raises(ConfigError, match=r"depends on the batch; .*inference_rule=threshold:0.5"):
        budget_of(sparse)
    sparse["model"] = {"hidden_size": 32, "num_attention_heads": 4, "num_experts": 1}
    sparse["loss"] = {}
    with pytest.raises(ConfigError, match="num_experts=1 has no router; leave it out"):
        budget_of(sparse)


def test_another_recipe_raises_on_resume(sparse, callback):
    train(make_config(sparse), callback)
    sparse["budget_aware"]["weight"] = 1.0
    with pytest.raises(ConfigError, match=r"other settings \(budget_aware.weight\)"):
        train(make_config(sparse), callback)
