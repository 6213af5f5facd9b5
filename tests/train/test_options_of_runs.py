"""Options that a run is trained with together: Muon, WSD, skipping, document masks, a profile."""

import gzip
import json
import signal

from transformers import AutoModelForCausalLM

from moefit.dsmoe.model import register
from moefit.train.config import make_config
from moefit.train.loop import train
from moefit.train.run_folder import read_log


def test_a_run_with_all_options_resumes_bit_for_bit(tree, tmp_path, callback):
    tree["optimizer"] = {
        "name": "muon", "schedule": "wsd", "decay_share": 0.5, "warmup_steps": 1, "skip_sigma": 3,
    }  # fmt: skip
    tree["data"]["document_mask"] = True
    tree["log"]["profile"] = [2, 2]
    whole = train(make_config({**tree, "out": str(tmp_path / "whole")}), callback)
    config = make_config({**tree, "out": str(tmp_path / "parts")})
    callback.after_step = lambda step: step == 5 and signal.raise_signal(signal.SIGTERM)
    assert train(config, callback).stopped_by == "SIGTERM"
    callback.after_step = None
    parts = train(config, callback)
    register()
    first, second = (
        AutoModelForCausalLM.from_pretrained(one.checkpoint).state_dict() for one in (whole, parts)
    )
    assert all(first[name].equal(second[name]) for name in first)
    records = [r for r in read_log(tmp_path / "whole") if r["kind"] == "train"]
    assert [r["skipped_steps"] for r in records] == [0] * 8
    rates = [r["lr"] for r in records]
    assert rates[0] == rates[4] > rates[5] > rates[7]
    trace = tmp_path / "whole" / "profile" / "trace-0.json.gz"
    assert any(str(trace) in message for message in callback.messages)
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("aten::mm" in event.get("name", "") for event in events)
