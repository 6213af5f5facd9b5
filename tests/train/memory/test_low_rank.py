"""`trainable: low_rank`: changes of low rank are trained in place of the experts' weights."""

import os
import shutil
import signal
from dataclasses import dataclass

import pytest
import torch

from moefit.errors import CheckpointError, ConfigError
from moefit.evaluate.loading import load_full_model
from moefit.train.checkpoint import MANIFEST, STATE
from moefit.train.config import make_config
from moefit.train.loop import train
from moefit.train.memory.low_rank import add_low_rank, factors, merged
from moefit.train.model import build_model, select_trainable

WIDTH = 24
MODELS = {
    "olmoe": {
        "architecture": "olmoe",
        "hidden_size": 64,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "sparse": {
        "hidden_size": 64,
        "intermediate_size": WIDTH,
        "num_attention_experts": 1,
        "training_rule": "top_k:2:renormalize",
        "inference_rule": "top_k:2:renormalize",
    },
}
IDS = torch.arange(20).view(2, 10)


@dataclass(frozen=True)
class Adaptation:
    """Settings of a run that adapts a model, and the model."""

    tree: dict
    base: str


@pytest.fixture(params=list(MODELS))
def adaptation(tree, callback, tmp_path, request):
    if request.param == "olmoe":
        tree["model"] = MODELS["olmoe"]
        tree["loss"] = {}
    else:
        tree["model"] |= MODELS["sparse"]
        tree["loss"] = {"load_balancing": 0.01}
    base = tree | {"steps": 1, "out": str(tmp_path / "base"), "optimizer": {"warmup_steps": 0}}
    model = tmp_path / "model"
    checkpoint = train(make_config(base), callback).checkpoint
    shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns(MANIFEST, STATE))
    start = str(model)
    dropout = {"order": "nested", "begin": 0.0}
    more = {"start_from": start, "trainable": "low_rank", "rank": 3, "expert_dropout": dropout}
    return Adaptation(tree=tree | more, base=start)


def changed_model():
    """A model with changes of low rank that are not zero, and its weights before."""
    config = make_config({"model": MODELS["olmoe"]})
    model = build_model(config, vocab_size=30, eos_token_id=0).eval()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    add_low_rank(model, 3, seed=0)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name.endswith("left_EIK"):
                one.normal_()
    return model, before


def test_a_model_is_unchanged_at_first():
    config = make_config({"model": MODELS["olmoe"]})
    model = build_model(config, vocab_size=30, eos_token_id=0).eval()
    before = model(IDS).logits
    add_low_rank(model, 3, seed=0)
    assert torch.equal(model(IDS).logits, before)


def test_merged_weights_are_sums_expert_by_expert():
    model, before = changed_model()
    whole = merged(model).state_dict()
    assert whole.keys() == before.keys()
    changes = factors(model)
    for name, weights in before.items():
        path, _, own = name.rpartition(".")
        part = f"{path}.parametrizations.{own}.0"
        if f"{part}.left_EIK" not in changes:
            assert torch.equal(whole[name], weights), name
            continue
        left, right = changes[f"{part}.left_EIK"], changes[f"{part}.right_EKC"]
        for expert, matrix in enumerate(weights):
            torch.testing.assert_close(whole[name][expert], matrix + left[expert] @ right[expert])
    assert len(changes) == 2 * 2 * 2  # layers, matrices, factors
    torch.testing.assert_close(merged(model).eval()(IDS).logits, model(IDS).logits)


def test_few_numbers_are_trained():
    tree = {"model": MODELS["olmoe"], "start_from": "x", "trainable": "low_rank", "rank": 3}
    model = build_model(make_config(tree), vocab_size=30, eos_token_id=0)
    select_trainable(model, make_config(tree))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    experts = sum(count for name, count in trained.items() if ".experts." in name)
    # Two layers of four experts, of rank 3: [2 * 24, 64] and [64, 24].
    assert experts == 2 * 4 * 3 * ((2 * WIDTH + 64) + (64 + WIDTH))
    rest = [name for name in trained if ".experts." not in name]
    assert rest and all("gate" in name or "norm" in name for name in rest)


def test_a_run_changes_experts_by_no_more_than_the_rank(adaptation, callback):
    done = train(make_config(adaptation.tree), callback)
    before, after = (
        load_full_model(str(folder))[0].state_dict()
        for folder in (adaptation.base, done.checkpoint)
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if ".experts." in name} <= changed
    for name in changed:
        assert ".experts." in name or "gate" in name or "norm" in name
        if ".experts." in name:
            difference = (after[name] - before[name]).float()
            size = torch.linalg.svdvals(difference)
            assert (size[:, 3:] < 1e-4 * size[:, :1]).all()


def test_resume_equals_uninterrupted_run(adaptation, callback, tmp_path):
    tree = adaptation.tree
    whole = train(make_config(tree), callback)
    tree = tree | {"out": str(tmp_path / "broken")}
    callback.after_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    assert train(make_config(tree), callback).step == 3
    callback.after_step = None
    resumed = train(make_config(tree), callback)
    for name in ("model.safetensors", "config.json"):
        a, b = ((result.checkpoint / name).read_bytes() for result in (whole, resumed))
        assert a == b, name
    with pytest.raises(ConfigError, match=r"other settings \(rank\)"):
        train(make_config(tree | {"rank": 2}), callback)


def test_other_initial_weights_raise_on_resume(adaptation, callback):
    callback.after_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    train(make_config(adaptation.tree), callback)
    callback.after_step = None
    model = load_full_model(adaptation.base)[0]
    with torch.no_grad():
        for name, one in model.named_parameters():
            if ".experts." in name:
                one.mul_(2)
    model.save_pretrained(adaptation.base)
    with pytest.raises(CheckpointError, match="the weights in start_from have changed"):
        train(make_config(adaptation.tree), callback)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": WIDTH}, r"rank=24 saves nothing .* most that works is 23"),
        ({"rank": 0}, r"rank: .*greater than 0"),
        ({"trainable": "all"}, r"rank=3 has no effect with trainable=all"),
        ({"start_from": None}, r"trainable=low_rank would leave .* random; give start_from"),
        ({"optimizer": {"name": "muon"}}, r"muon updates matrices that trainable=low_rank does"),
        ({"rounding": {"formats": ["int4"]}}, r"rounding trains experts, which trainable=low_rank"),
    ],
)
def test_settings_without_effect_raise(tree, callback, change, message, tmp_path):
    tree["model"] = MODELS["olmoe"]
    few = {"steps": 1, "out": str(tmp_path / "base"), "optimizer": {"warmup_steps": 0}}
    tree = tree | {"loss": {}, "start_from": "unused"}
    if change.keys() & {"rank", "rounding"} and change.get("rank") != 0:  # refused by the trainer
        base = train(make_config(tree | few | {"start_from": None}), callback)
        tree["start_from"] = str(base.checkpoint)
    with pytest.raises(ConfigError, match=message):
        train(make_config(tree | {"trainable": "low_rank", "rank": 3} | change), callback)
