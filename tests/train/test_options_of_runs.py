"""Options that a run is trained with together: Muon, WSD, skipping, document masks, a profile."""

import gzip
import json
import signal

import pytest
from transformers import AutoModelForCausalLM

from moefit.dsmoe.model import register
from moefit.errors import ConfigError
from moefit.train import spikes, step
from moefit.train.config import make_config
from moefit.train.data.batches import model_inputs
from moefit.train.loop import train
from moefit.train.memory import expert_dropout
from moefit.train.run_folder import read_log


def train_records(out):
    return [r for r in read_log(out) if r["kind"] == "train"]


def names_in(trace):
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [event.get("name", "") for event in events]


def test_a_run_with_all_options_resumes_bit_for_bit(tree, tmp_path, callback, monkeypatch):
    monkeypatch.setattr(spikes, "LEAST", 2)
    tree["optimizer"] = {
        "name": "muon", "schedule": "wsd", "decay_share": 0.5, "warmup_steps": 1,
        "skip_sigma": 0.3,
    }  # fmt: skip
    tree["sparse"] = {"rule": "top_k:1", "share": 0.5}
    tree["data"]["document_mask"] = True
    tree["log"]["profile"] = [5, 6]
    whole = train(make_config({**tree, "out": str(tmp_path / "whole")}), callback)
    config = make_config({**tree, "out": str(tmp_path / "parts")})
    callback.after_step = lambda step: step == 5 and signal.raise_signal(signal.SIGTERM)
    assert train(config, callback).stopped_by == "SIGTERM"
    callback.after_step = None
    profile = tmp_path / "parts" / "profile"
    assert "aten::mm" in names_in(profile / "trace-0.json.gz")
    parts = train(config, callback)
    assert "aten::mm" in names_in(profile / "trace-0-from-step-6.json.gz")
    register()
    first, second = (
        AutoModelForCausalLM.from_pretrained(one.checkpoint).state_dict() for one in (whole, parts)
    )
    assert all(first[name].equal(second[name]) for name in first)
    records = train_records(tmp_path / "whole")
    skipped = [r["skipped_steps"] for r in records]
    assert 0 < skipped[-1] < 6
    assert skipped == [r["skipped_steps"] for r in train_records(tmp_path / "parts")]
    rates = [r["lr"] for r in records]
    assert rates[0] == rates[4] > rates[5] > rates[7]
    assert any(str(tmp_path / "whole" / "profile") in message for message in callback.messages)


def test_documents_are_kept_apart_in_steps_evaluation_and_the_order_of_experts(
    tree, callback, monkeypatch
):
    tree["data"]["document_mask"] = True
    tree["model"] |= {"training_rule": "top_k:2", "inference_rule": "top_k:2"}
    tree["expert_dropout"] = {"order": "nested", "begin": 0.5}
    seen = {}

    def spy(name):
        def inputs(ids_BN, document_end):
            seen.setdefault(name, set()).add((ids_BN.shape[1], document_end))
            return model_inputs(ids_BN, document_end)

        return inputs

    for module in (step, expert_dropout):
        monkeypatch.setattr(module, "model_inputs", spy(module))
    train(make_config({**tree, "steps": 4}), callback)
    (end,) = {end for found in seen.values() for _, end in found}
    assert end is not None
    length = tree["seq_len"]
    assert seen[expert_dropout] == {(length, end)}
    assert {(length, end), (length + 1, end)} <= seen[step]


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tree, tmp_path, callback):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("a file")
    tree["log"]["profile"] = [1, 1]
    assert train(make_config({**tree, "steps": 4}), callback).step == 4
    assert any("profile cannot be written into" in message for message in callback.messages)


def test_optimizers_that_do_not_fit_the_run_are_refused(tree, tmp_path, callback):
    first = train(make_config({**tree, "steps": 4}), callback)
    changed = {**tree, "out": str(tmp_path / "other"), "continue_from": str(first.checkpoint)}
    with pytest.raises(ConfigError, match=r"optimizer\.name=adamw, whose state muon cannot"):
        train(make_config({**changed, "optimizer": {"name": "muon"}}), callback)
    routers = {"start_from": str(first.checkpoint), "trainable": "routers"}
    with pytest.raises(ConfigError, match=r"muon updates matrices that trainable=routers"):
        make_config({**tree, **routers, "optimizer": {"name": "muon"}})
