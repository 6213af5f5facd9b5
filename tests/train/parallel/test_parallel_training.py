"""Training by several processes equals training by one; they resume each other's checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import parallel_cases
import pytest
import torch
import yaml
from processes import finish, results, start
from transformers import AutoModelForCausalLM

from moefit.dsmoe.model import register
from moefit.errors import ConfigError
from moefit.train import checkpoint
from moefit.train.config import ParallelConfig, make_config
from moefit.train.display import NoDisplay
from moefit.train.loop import train
from moefit.train.run_folder import read_log

CASES = Path(parallel_cases.__file__)


def losses(out):
    return {r["step"]: r["loss"] for r in read_log(out) if r["kind"] == "train"}


def weights(folder):
    register()
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_close(found, expected, tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


def alone(folder, name):
    tree = json.loads((folder / "tree.json").read_text())
    return train(make_config({**tree, "out": str(folder / name)}), NoDisplay()).checkpoint


def test_two_processes_train_resume_and_refuse_together(folder, tree):
    """One pair of processes does everything, because starting one takes seconds."""
    stop = parallel_cases.Signals(5, signal.SIGTERM)
    train(make_config({**tree, "out": str(folder / "one_two")}), stop)
    done = results(
        2, CASES, str(folder), "equality", "run:two", "stop:again", "run:again", "stop:two_one",
        "run:one_two", "spread", "locmoe:loc", "stop_locmoe:loc_one", "failures",
    )  # fmt: skip
    for name, (numbers, parameters) in (done["equality"] | done["spread"]).items():
        assert numbers < 1e-6, name
        assert parameters < 1e-9, name
    whole = alone(folder, "one")
    expected, one = losses(folder / "one"), weights(whole)
    for name in ("two", "again"):
        assert losses(folder / name) == pytest.approx(expected, abs=1e-6), name
    assert_close(weights(done["run:again"]), weights(done["run:two"]), 0)
    assert Path(done["stop:two_one"]).name == "step-00000005"
    two_one = alone(folder, "two_one")
    for found in (done["run:two"], two_one, done["run:one_two"]):
        assert_close(weights(found), one, 1e-5)
    records = [r for r in read_log(folder / "two") if r["kind"] == "train"]
    assert records[-1]["communication_seconds"] > 0
    held_out = [r["loss"] for r in read_log(folder / "two") if r["kind"] == "eval"]
    assert held_out == pytest.approx(
        [r["loss"] for r in read_log(folder / "one") if r["kind"] == "eval"], abs=1e-5
    )
    check_locmoe(folder)
    said = done["failures"]
    assert "process 1 of 2:" in said[0]
    assert "other settings than process 0 (seed)" in said[0]
    assert "batch_size=3" in said[1]
    assert "nearest that works is batch_size=4" in said[1]
    assert "parallel.replicate=3 does not divide the 2 processes" in said[2]
    assert "needs a sparse model" in said[3]
    assert "all processes are on one machine" in said[4]
    assert "diverged at step" in said[5]


def check_locmoe(folder):
    """Tokens stay on their machine more and more; one process can go on with such a run."""
    records = [r for r in read_log(folder / "loc") if r["kind"] == "train"]
    assert records[0]["cross_node_share"] == pytest.approx(0.5, abs=0.2)
    assert records[-1]["cross_node_share"] < 0.7 * records[0]["cross_node_share"]
    for name in ("all_to_all_seconds", "all_to_all_bytes", "load_cv"):
        assert records[-1][name] > 0
    # Each row of 32 floats that leaves comes back, and so does its gradient.
    rows = records[0]["cross_node_share"] * 2 * 4 * 16
    assert records[0]["cross_node_bytes"] == pytest.approx(rows * 32 * 4 * 4, rel=0.1)
    config = make_config(yaml.safe_load((folder / "loc_one" / "config.yaml").read_text()))
    with pytest.raises(ConfigError, match=r"divided among 2 machines.*give parallel\.nodes=2"):
        train(
            config.model_copy(update={"parallel": ParallelConfig(experts="all_to_all")}),
            NoDisplay(),
        )
    train(config, NoDisplay())
    one = [r["step"] for r in read_log(folder / "loc_one") if r["kind"] == "train"]
    assert one == list(range(1, 17))


def test_a_killed_process_ends_the_others_and_loses_no_checkpoint(folder):
    survivor, victim = finish(start(2, CASES, str(folder), "killed"))
    assert victim[0] == -9
    assert survivor[0] > 0
    assert "process 0 of 2 lost contact with another process" in survivor[2]
    kept = checkpoint.checkpoints(folder / "killed")
    assert checkpoint.step_of(kept[-1]) >= 4  # that of step 6 may still have been written
    assert alone(folder, "killed").name == "step-00000008"
    assert losses(folder / "killed") == pytest.approx(losses(alone(folder, "one").parent), abs=1e-6)
    assert not list((folder / "killed").glob(".step-*"))


@pytest.mark.slow
def test_four_processes_and_replicas_equal_one(folder):
    done = results(4, CASES, str(folder), "equality", "equality:2", "stop:four_two")
    for case in ("equality", "equality:2"):
        for name, (numbers, parameters) in done[case].items():
            assert numbers < 1e-6, (case, name)
            assert parameters < 1e-9, (case, name)
    two = results(2, CASES, str(folder), "run:four_two")["run:four_two"]
    assert_close(weights(two), weights(alone(folder, "one")), 1e-5)


@pytest.mark.slow
def test_torchrun_restarts_after_a_lost_worker(folder, tree):
    """A worker is killed while it trains; torchrun starts all again, and they resume."""
    tree["steps"], tree["out"] = 100, str(folder / "run")
    path = folder / "config.json"  # YAML is a superset of JSON
    path.write_text(json.dumps(tree))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--max-restarts", "2", "-m", "moefit", "train", str(path),
    ]  # fmt: skip
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agent = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while len(checkpoint.checkpoints(folder / "run")) < 2 and agent.poll() is None:
        time.sleep(0.1)
    children = subprocess.run(
        ["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), 9)
    text = agent.communicate(timeout=300)[0]
    assert agent.returncode == 0, text
    assert "resuming from" in text
    assert checkpoint.checkpoints(folder / "run")[-1].name == "step-00000100"
    assert list(losses(folder / "run")) == list(range(1, 101))
