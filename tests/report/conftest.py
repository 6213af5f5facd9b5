import json

import pytest
from tiny_models import tiny_model

from moefit.checkpoint.tokenizer import read_tokenizer
from moefit.evaluate.loading import reference_path
from moefit.report.facts import PLAN, SCORES


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A model folder with the log, scores and plan that a training run would have."""
    folder = tmp_path_factory.mktemp("runs") / "mine|1"
    tokenizer = read_tokenizer(reference_path())
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    routers = {"mlp_h_e": 0.9, "mlp_h_e_given_x": 0.5, "mlp_mi": 0.4, "mlp_active": 0.3}
    records = [{"kind": "run", "step": 0, "tokens_per_step": 100}]
    for step in (10, 20):
        values = {"loss": 5.0 - step / 20, **routers, "mlp_dead": 0.125}
        records.append({"kind": "train", "step": step, **values})
        records.append({"kind": "eval", "step": step, "loss": 5.5 - step / 20})
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (folder / SCORES).mkdir()
    result = {
        "results": {
            "piqa": {"acc,none": 0.52, "acc_stderr,none": 0.05, "acc_norm,none": 0.5},
            "sciq": {"acc,none": 0.75, "acc_stderr,none": 0.04},
        },
        "n-samples": {"piqa": {"effective": 100}, "sciq": {"effective": 90}},
        "moefit": {"name": "top_k:2", "active_parameters": 1.5e6, "seconds": 3.0},
    }
    (folder / SCORES / "top_k-2.tasks.json").write_text(json.dumps(result))
    point = {"loss": 0.01, "tokens_per_second": 5.0, "expert_bytes": 1000}
    (folder / PLAN).write_text(json.dumps({"front": [], "budgets": [{"front": [point]}]}))
    return folder
