import json
import math
import os
import signal

import pytest
import torch
from tiny_models import OLMOE

from moefit.dsmoe.export import export_olmoe
from moefit.dsmoe.losses import RouterLossWeights
from moefit.errors import ConfigError
from moefit.evaluate.loading import load_full_model
from moefit.moe.expert_dropout import dropout_record
from moefit.train import checkpoint
from moefit.train.config import make_config
from moefit.train.loop import train
from moefit.train.memory.expert_dropout import (
    AllowedExperts,
    ExpertDropout,
    first_experts,
    measured_order,
)
from moefit.train.model import build_model
from moefit.train.run_folder import read_log
from moefit.train.step import make_losses

SPARSE = {"training_rule": "top_k:2:renormalize", "inference_rule": "top_k:2:renormalize"}


def built(tree):
    config = make_config(tree)
    return config, build_model(config, vocab_size=300, eos_token_id=0)


@pytest.fixture
def sparse(tree):
    """A sparse MoE that OLMoE can represent: 2 of 8 experts."""
    tree["model"] |= {**SPARSE, "num_experts": 8, "num_attention_experts": 1, "qk_norm": True}
    tree["loss"] = {"load_balancing": 0.01}
    tree["expert_dropout"] = {"order": "mixed", "begin": 0.5}
    return tree


def dropout_of(tree):
    config, model = built(tree)
    found = ExpertDropout.of(config, model)
    assert found is not None
    return found


def test_draws_follow_from_seed_and_number_alone(sparse):
    order = [list(range(8))] * 2
    state = torch.get_rng_state()
    first = dropout_of(sparse).draw(3, 16, order)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(dropout_of(sparse).draw(3, 16, order), first)
    assert not torch.equal(dropout_of(sparse).draw(4, 16, order), first)
    assert not torch.equal(dropout_of(sparse | {"seed": 1}).draw(3, 16, order), first)


@pytest.mark.parametrize(("order", "nested"), [("random", 0.0), ("nested", 1.0), ("mixed", 0.5)])
def test_shares_are_those_asked_for(sparse, order, nested):
    sparse["expert_dropout"] = {"order": order, "share": 0.75, "least": 3, "sizes": "uniform"}
    resident_order = [[7, 6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 1, 3, 5, 7]]
    allowed_LBE = dropout_of(sparse).draw(0, 4000, resident_order)
    count_LB = allowed_LBE.sum(-1)
    assert torch.equal(count_LB[0], count_LB[1])  # S is the same in all layers
    few_B = count_LB[0] < 8
    assert few_B.float().mean() == pytest.approx(0.75, abs=0.03)
    for count in range(3, 8):  # uniform
        share = (count_LB[0][few_B] == count).float().mean()
        assert share == pytest.approx(0.2, abs=0.03)
    prefix_B = torch.tensor(
        [
            all(
                set(allowed_LBE[layer, b].nonzero().flatten().tolist())
                == set(resident_order[layer][: int(count_LB[layer, b])])
                for layer in (0, 1)
            )
            for b in few_B.nonzero().flatten().tolist()
        ]
    )
    assert prefix_B.float().mean() == pytest.approx(nested, abs=0.04)  # few by chance alone


def test_few_experts_may_be_frequent(sparse):
    sparse["expert_dropout"] = {"order": "random", "share": 1.0, "least": 2, "sizes": "few"}
    count_B = dropout_of(sparse).draw(0, 6000, []).sum(-1)[0]
    total = sum(1 / s**2 for s in range(2, 8))
    for count in range(2, 8):
        share = (count_B == count).float().mean()
        assert share == pytest.approx(1 / count**2 / total, abs=0.02)


def test_when_it_begins(sparse):
    sparse["expert_dropout"]["begin"] = 0.25  # of 8 steps
    dropout = dropout_of(sparse)
    assert [step for step in range(1, 9) if dropout.active_at(step)] == [3, 4, 5, 6, 7, 8]
    assert [step for step in range(1, 9) if dropout.begins_at(step)] == [3]


def test_the_least_follows_the_rules(sparse):
    assert dropout_of(sparse).least == 2
    sparse["sparse"] = {"rule": "top_k:3"}
    assert dropout_of(sparse).least == 3
    del sparse["sparse"]
    sparse["model"] |= {"training_rule": "dense", "inference_rule": "threshold:0.5"}
    assert dropout_of(sparse).least == 2  # a quarter
    sparse["expert_dropout"]["least"] = 1  # a threshold rule needs no more
    assert dropout_of(sparse).least == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0}, "expert_dropout.share: .*greater than 0"),
        (
            {"share": 1, "self_distillation": False},
            "expert_dropout: share=1 with self_distillation=false would .* give a share below 1",
        ),
        (
            {"distillation_weight": 0.5, "self_distillation": False},
            "expert_dropout: distillation_weight=0.5 has no effect with self_distillation=false",
        ),
        ({"distillation_weight": 0}, "expert_dropout.distillation_weight: .*greater than 0"),
        ({"distillation_weight": math.inf}, "expert_dropout.distillation_weight: .*finite"),
        ({"share": 1.1}, "expert_dropout.share: .*less than or equal to 1"),
        ({"begin": 1}, "expert_dropout.begin: .*less than 1"),
        ({"begin": -0.1}, "expert_dropout.begin: .*greater than or equal to 0"),
        ({"least": 0}, "expert_dropout.least: .*greater than or equal to 1"),
        ({"order": "best"}, "expert_dropout.order: .*'random', 'nested' or 'mixed'"),
        ({"sizes": "many"}, "expert_dropout.sizes: .*'uniform' or 'few'"),
        ({"shares": 0.5}, "expert_dropout.shares: unknown key; did you mean share?"),
        ({"least": 1}, r"least=1, but of 8 experts the model's rules choose 2; .* works is 2"),
        ({"begin": 0.95}, r"begin=0.95 of steps=8 leaves no step .* works is begin=0.875"),
        ({"least": 8}, r"least=8, but of 8 experts some must be absent; .* works is 7"),
    ],
)
def test_settings_that_cannot_be(sparse, settings, message):
    sparse["expert_dropout"] |= settings
    with pytest.raises(ConfigError, match=message):
        dropout_of(sparse)


def test_order_must_be_given(sparse):
    sparse["expert_dropout"] = {"share": 0.5}
    with pytest.raises(ConfigError, match=r"expert_dropout.order: Field required"):
        make_config(sparse)


def test_models_with_nothing_to_drop(sparse):
    sparse["model"] |= {"training_rule": "top_k:8", "inference_rule": "dense"}
    with pytest.raises(ConfigError, match=r"choose 8 of its 8 experts; .* top_k:7"):
        dropout_of(sparse)
    sparse["model"] = {"hidden_size": 32, "num_attention_heads": 4, "num_experts": 1}
    sparse["loss"] = {}
    with pytest.raises(ConfigError, match=r"num_experts=1 has no router; leave out"):
        dropout_of(sparse)


def test_locality_needs_a_router(tree, callback):
    tree["model"] = {"hidden_size": 32, "num_attention_heads": 4, "num_experts": 1}
    tree["loss"] = {"routing_locality": 0.5}
    with pytest.raises(ConfigError, match=r"routing_locality=0.5 has no effect.*leave it out"):
        train(make_config(tree), callback)


@pytest.mark.parametrize("architecture", ["dsmoe", "olmoe"])
def test_absent_experts_have_no_part_in_the_answer(tree, architecture):
    """Changing the weights of absent experts changes only the sequences that may use them."""
    if architecture == "olmoe":
        tree["model"], tree["loss"] = OLMOE, {}
    model = built(tree)[1].eval()
    allowed, ids = AllowedExperts(model), torch.randint(300, (2, 6))
    allowed_LBE = torch.ones(2, 2, 4, dtype=torch.bool)
    allowed_LBE[:, 0, 2:] = False  # the first sequence has two experts

    def logits(limit):
        with torch.no_grad():
            return model(input_ids=ids, **allowed.arguments(limit)).logits

    everything, before = logits(None), logits(allowed_LBE)
    assert torch.allclose(before[1], everything[1], atol=1e-5)
    assert not torch.allclose(before[0], everything[0], atol=1e-5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[2:] += 1.0
    assert torch.allclose(logits(allowed_LBE)[0], before[0], atol=1e-5)
    assert not torch.allclose(logits(allowed_LBE)[1], before[1], atol=1e-5)
    allowed.arguments(None)
    allowed.remove()


def test_weights_of_those_that_remain_sum_to_one_in_olmoe(tree):
    tree["model"], tree["loss"] = OLMOE, {}
    model = built(tree)[1]
    allowed, seen = AllowedExperts(model), []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *hook: seen.append(hook[2]))
    allowed_LBE = first_experts([[3, 1, 0, 2]] * 2, 2, 4)[:, None].expand(-1, 3, -1)
    model(input_ids=torch.randint(300, (3, 5)), **allowed.arguments(allowed_LBE))
    _, weights_TK, ids_TK = seen[0]
    used = set(ids_TK[weights_TK > 0].tolist())
    assert used == {1, 3}
    assert torch.allclose(weights_TK.sum(-1), torch.ones(15))


def test_the_order_is_that_of_router_weight(sparse):
    model = built(sparse)[1]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[5] = 1e-3  # chosen where its logit is above zero
    order = measured_order(model, [torch.randint(300, (4, 16))])
    assert [sorted(one) for one in order] == [list(range(8))] * 2
    assert model.training


@pytest.mark.parametrize(
    ("model", "stop_after"),
    [
        ("sparse", 2),
        ("dense", 4),
        ("olmoe", 6),
        *(
            pytest.param(model, step, marks=pytest.mark.slow)
            for model, step in (("sparse", 4), ("dense", 2), ("olmoe", 4))
        ),
    ],
)
def test_resume_equals_uninterrupted_run(sparse, callback, tmp_path, stop_after, model):
    """Bitwise equality after stops before, at and after the start of dropout."""
    if model == "dense":
        sparse["model"] |= {"training_rule": "dense", "inference_rule": "threshold:0.5"}
    if model == "olmoe":
        sparse["model"] = OLMOE
    whole = train(make_config(sparse), callback)
    sparse["out"] = str(tmp_path / "broken")
    callback.after_step = lambda step: (
        os.kill(os.getpid(), signal.SIGTERM) if step == stop_after else None
    )
    assert train(make_config(sparse), callback).step == stop_after
    callback.after_step = None
    torch.manual_seed(12345)  # whatever state the new process happens to have
    resumed = train(make_config(sparse), callback)
    for name in ("model.safetensors", "config.json"):
        a, b = ((result.checkpoint / name).read_bytes() for result in (whole, resumed))
        assert a == b, name
    logs = [
        [
            (r["step"], r["loss"], r.get("loss_third"))
            for r in read_log(tmp_path / out)
            if "loss" in r
        ]
        for out in ("run", "broken")
    ]
    assert logs[0] == logs[1]
    states = [checkpoint.load_state(result.checkpoint) for result in (whole, resumed)]
    assert torch.equal(states[0]["rng"], states[1]["rng"])


def test_steps_before_dropout_are_unchanged(sparse, callback, tmp_path):
    """Runs with different settings may start from one checkpoint."""
    sparse["steps"] = 8
    train(make_config(sparse | {"checkpoint": {"every": 4, "keep": 9}}), callback)
    plain = {k: v for k, v in sparse.items() if k != "expert_dropout"}
    plain |= {"out": str(tmp_path / "plain"), "checkpoint": {"every": 4, "keep": 9}}
    train(make_config(plain), callback)
    middle = [tmp_path / out / "step-00000004" for out in ("run", "plain")]
    last = [tmp_path / out / "step-00000008" for out in ("run", "plain")]
    weights = [[(one / "model.safetensors").read_bytes() for one in two] for two in (middle, last)]
    assert weights[0][0] == weights[0][1]
    assert weights[1][0] != weights[1][1]
    assert "expert_dropout" not in json.loads((middle[0] / "config.json").read_text())
    assert "expert_dropout" not in json.loads((last[1] / "config.json").read_text())


def test_another_recipe_continues_from_a_checkpoint(sparse, callback, tmp_path):
    """The steps that two runs share are computed once; the others are as if computed alone."""
    sparse |= {"steps": 8, "checkpoint": {"every": 4, "keep": 9}}
    plain = {k: v for k, v in sparse.items() if k != "expert_dropout"}
    train(make_config(plain | {"out": str(tmp_path / "plain")}), callback)
    middle = tmp_path / "plain" / "step-00000004"
    branch = sparse | {"out": str(tmp_path / "branch"), "continue_from": str(middle)}
    continued = train(make_config(branch), callback)
    assert f"continuing from {middle}" in callback.messages
    whole = train(make_config(sparse), callback)
    weights = [(one.checkpoint / "model.safetensors").read_bytes() for one in (continued, whole)]
    assert weights[0] == weights[1]
    assert json.loads((continued.checkpoint / "config.json").read_text())["expert_dropout"]
    assert train(make_config(branch), callback) == continued  # nothing is left to do


def test_the_same_dropout_goes_on_with_another_recipe(sparse, callback, tmp_path):
    sparse["expert_dropout"] |= {"order": "nested"}
    sparse |= {"steps": 8, "checkpoint": {"every": 6, "keep": 9}}
    whole = train(make_config(sparse), callback).checkpoint
    branch = {"out": str(tmp_path / "branch"), "continue_from": str(tmp_path / "run/step-00000006")}
    same = train(make_config(sparse | branch), callback).checkpoint
    assert (same / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    sparse |= branch | {"out": str(tmp_path / "other"), "rounding": {"formats": ["int2"]}}
    other = train(make_config(sparse), callback).checkpoint
    assert (other / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()
    a, b = (
        json.loads((one / "config.json").read_text())["expert_dropout"] for one in (whole, other)
    )
    assert a["resident_order"] == b["resident_order"]
    sparse["expert_dropout"] = sparse["expert_dropout"] | {"share": 0.25}
    with pytest.raises(ConfigError, match=r"continue_from=.* is at step 6; the least that works"):
        train(make_config(sparse | {"out": str(tmp_path / "third")}), callback)


def test_checkpoints_that_cannot_be_continued(sparse, callback, tmp_path):
    plain = {k: v for k, v in sparse.items() if k != "expert_dropout"}
    last = train(make_config(plain | {"out": str(tmp_path / "plain")}), callback).checkpoint
    assert last.name == "step-00000008"
    sparse["continue_from"] = str(last)
    with pytest.raises(ConfigError, match=r"at step 8, but steps=8; the fewest that work are 9"):
        train(make_config(sparse), callback)
    with pytest.raises(ConfigError, match=r"begin=0.5 is step 5, but .*step 8; .*works is 0.8"):
        train(make_config(sparse | {"steps": 10}), callback)
    sparse["continue_from"] = str(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"plain' is not a checkpoint; .* step-NUMBER"):
        train(make_config(sparse), callback)
    with pytest.raises(ConfigError, match="start_from and continue_from both give the weights"):
        make_config(sparse | {"start_from": "elsewhere"})


def test_changed_dropout_raises_on_resume(sparse, callback):
    train(make_config(sparse), callback)
    sparse["expert_dropout"]["order"] = "nested"
    with pytest.raises(ConfigError, match=r"other settings \(expert_dropout.order\)"):
        train(make_config(sparse), callback)
    del sparse["expert_dropout"]
    with pytest.raises(ConfigError, match=r"other settings \(expert_dropout\)"):
        train(make_config(sparse), callback)


@pytest.mark.parametrize("model", ["sparse", "olmoe"])
def test_dropout_is_logged_and_recorded(sparse, callback, tmp_path, model):
    if model == "olmoe":
        sparse["model"] = OLMOE | {"num_experts": 8}
    result = train(make_config(sparse), callback)
    log = read_log(tmp_path / "run")
    step = [r for r in log if r["kind"] == "train"][-1]
    assert 0 < step["mlp_window_entropy"] <= 1
    assert 0 < step["mlp_window_coverage"] <= 1
    assert step["mlp_reuse_distance"] >= 1
    evaluated = [r for r in log if r["kind"] == "eval"]
    assert all(r["loss_third"] > 0 for r in evaluated)
    record = dropout_record(load_full_model(str(tmp_path / "run"))[0].config)
    assert record is not None
    assert (record.order, record.share, record.least, record.begin) == ("mixed", 0.5, 2, 0.5)
    assert [sorted(one) for one in record.resident_order] == [list(range(8))] * 2
    assert record.held_out_loss is not None
    assert sorted(record.held_out_loss) == [2, 3, 4, 6, 8]
    assert record.held_out_loss[8] == pytest.approx(result.held_out_loss, rel=1e-5)
    assert record.held_out_loss[3] == pytest.approx(evaluated[-1]["loss_third"], rel=1e-5)


def test_export_keeps_dropout_record(sparse, callback, tmp_path):
    train(make_config(sparse), callback)
    model, tokenizer = load_full_model(str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="norm_topk_prob"):
        export_olmoe(model, tmp_path / "olmoe", experts_per_token=2, tokenizer=tokenizer)
    exported = load_full_model(str(tmp_path / "olmoe"))[0]
    assert dropout_record(exported.config) == dropout_record(model.config) != None  # noqa: E711
    assert "| 8 of 8 | +0.0% |" in (tmp_path / "olmoe" / "README.md").read_text()


def test_locality_loss_is_added(sparse, callback, tmp_path):
    del sparse["expert_dropout"]
    train(make_config(sparse | {"out": str(tmp_path / "plain")}), callback)
    sparse["loss"]["routing_locality"] = 100.0
    train(make_config(sparse), callback)
    first = [
        next(r for r in read_log(tmp_path / out) if r["kind"] == "train")
        for out in ("plain", "run")
    ]
    assert first[0]["loss"] == first[1]["loss"]
    assert first[1]["router_loss"] > first[0]["router_loss"]
    with pytest.raises(ConfigError, match=r"loss.routing_locality: .*greater than or equal to 0"):
        make_config(sparse | {"loss": {"routing_locality": -1}})


@pytest.mark.parametrize(("architecture", "weight"), [("dsmoe", 1.0), ("olmoe", 0.3)])
def test_distillation_is_the_slow_one(tree, architecture, weight):
    """Each sequence by itself: cross-entropy with all experts, and weighted KL with few."""
    if architecture == "olmoe":
        tree["model"], tree["loss"] = OLMOE, {}
    tree["model"] |= {"attention_dropout": 0.0}
    model = built(tree)[1].train()
    allowed, ids = AllowedExperts(model), torch.randint(300, (3, 7))
    allowed_LBE = torch.ones(2, 3, 4, dtype=torch.bool)
    allowed_LBE[:, 0, 1:] = False
    allowed_LBE[0, 2, :2] = allowed_LBE[1, 2, 2:] = False
    losses = make_losses(model, RouterLossWeights(), compile=False, allowed=allowed, distill=weight)
    found, _, mlp_logits, _ = losses(ids, torch.tensor(1.0), None, allowed_LBE)
    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = torch.zeros(())
    for b in range(3):
        one = ids[b : b + 1]
        full = model(input_ids=one, **allowed.arguments(None)).logits[0, :-1].log_softmax(-1)
        expected = expected - full.gather(1, one[0, 1:, None]).mean() / 3
        if b != 1:
            limit = allowed.arguments(allowed_LBE[:, b : b + 1])
            few = model(input_ids=one, **limit).logits[0, :-1].log_softmax(-1)
            teacher = full.detach()
            divergence = (teacher.exp() * (teacher - few)).sum(-1).mean()
            expected = expected + weight * divergence / 3
            expected.backward()  # while the limit holds
            expected = expected.detach()
        else:
            expected.backward()
            expected = expected.detach()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert [len(logits) for logits in mlp_logits] == [3 * 7] * 2
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-5), name


def test_without_distillation_the_text_is_always_the_target(sparse, callback, tmp_path):
    train(make_config(sparse | {"out": str(tmp_path / "plain")}), callback)
    sparse["expert_dropout"]["self_distillation"] = False
    train(make_config(sparse), callback)
    logs = [
        [r for r in read_log(tmp_path / out) if r["kind"] == "train"] for out in ("plain", "run")
    ]
    assert [one["loss"] for one in logs[0][:4]] == [one["loss"] for one in logs[1][:4]]
    assert logs[0][-1]["loss"] != logs[1][-1]["loss"]
