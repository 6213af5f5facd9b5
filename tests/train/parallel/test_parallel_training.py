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
from processes import results
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moefit.dsmoe.model import register
from moefit.errors import ConfigError
from moefit.train import checkpoint
from moefit.train.config import make_config
from moefit.train.display import NoDisplay
from moefit.train.loop import train
from moefit.train.run_folder import read_log
from moefit.train.settings import ParallelConfig


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


@pytest.fixture(scope="module")
def pair(shared_folder):
    """What one pair of processes does, because starting one takes seconds."""
    stop = parallel_cases.Signals(2, signal.SIGTERM)
    tree = json.loads((shared_folder / "tree.json").read_text())
    train(make_config({**tree, "out": str(shared_folder / "chain")}), stop)
    return results(
        2, "parallel_cases", shared_folder, "equality", "spread:hash,biased", "long_way",
        "one_group:lopsided",
        "tensor:dsmoe,lopsided", "run:two", "run:again:5", "run:again", "tensor_run:chain:4",
        "run:chain:6", "locmoe:loc",
        "locmoe:loc_one:5", "muon_run:muon:3", "weighted_run:weighted", "mixed",
        "mixed_run:mixed", "mixed_run:mixed_parts:3", "mixed_run:mixed_parts",
        "equalised", "limits", "bf16", "failures", "killed",
        last_dies=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one(shared_folder):
    """The checkpoint of one process that has never stopped."""
    return alone(shared_folder, "one")


@pytest.mark.parametrize(
    "case",
    ["equality", "spread:hash,biased", "long_way", "one_group:lopsided", "tensor:dsmoe,lopsided"],
)
def test_two_processes_equal_one(pair, case):
    for name, (numbers, parameters) in pair[case].items():
        assert numbers < 1e-6, name
        assert parameters < 1e-9, name


def test_runs_resume_bit_for_bit_and_by_other_processes(pair, one, shared_folder):
    """The chain is of one process, two that divide experts, two that divide data, and one."""
    expected, whole = losses(shared_folder / "one"), weights(one)
    assert Path(pair["run:chain:6"]).name == "step-00000006"
    last = alone(shared_folder, "chain")
    for name in ("two", "again", "chain"):
        assert losses(shared_folder / name) == pytest.approx(expected, abs=1e-6), name
    assert_close(weights(pair["run:again"]), weights(pair["run:two"]), 0)
    for found in (pair["run:two"], last):
        assert_close(weights(found), whole, 1e-5)


def test_one_process_goes_on_with_muon(pair, shared_folder):
    tree = json.loads((shared_folder / "tree.json").read_text())
    two, whole = (
        train(
            make_config({**parallel_cases.muon(tree), "out": str(shared_folder / name)}),
            NoDisplay(),
        )
        for name in ("muon", "muon_one")
    )
    assert_close(weights(two.checkpoint), weights(whole.checkpoint), 1e-5)


def test_two_processes_draw_from_weighted_sources_as_one_does(pair, shared_folder):
    path = shared_folder / "weighted" / "config.yaml"
    tree = {**yaml.safe_load(path.read_text()), "out": str(shared_folder / "weighted_one")}
    train(make_config(tree), NoDisplay())
    two, one = (losses(shared_folder / name) for name in ("weighted", "weighted_one"))
    assert two == pytest.approx(one, abs=1e-6)
    assert len(one) == 4


def test_mixed_precision_of_two_processes_is_that_of_one_but_for_rounding(pair):
    """Rounding to 8 bits moves each number by up to 0.4%; what is summed is in float32."""
    for case, (numbers, expected, exact, dtypes, dtypes_of_one) in pair["mixed"].items():
        found, wanted = torch.tensor(numbers), torch.tensor(expected)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-4, msg=f"{case}: {found}")
        assert not torch.allclose(wanted, torch.tensor(exact), rtol=1e-6, atol=0), case
        assert dtypes == dtypes_of_one == [["torch.float32"], ["torch.float32"]], case


def test_runs_in_mixed_precision_save_float32_and_resume_bit_for_bit(pair, shared_folder):
    two = pair["mixed_run:mixed"]
    with safe_open(Path(two) / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {one.dtype for one in stored.values()} == {torch.float32}
    assert any(not one.equal(one.bfloat16().float()) for one in stored.values())
    assert_close(weights(pair["mixed_run:mixed_parts"]), weights(two), 0)
    tree = json.loads((shared_folder / "tree.json").read_text())
    config = make_config({**parallel_cases.mixed_run(tree), "out": str(shared_folder / "m")})
    one = train(config, NoDisplay())
    expected = losses(shared_folder / "m")
    assert losses(shared_folder / "mixed") == pytest.approx(expected, rel=1e-2)
    assert one.step == 6


def test_gradients_outside_the_experts_are_equal_within_a_group(pair):
    assert pair["equalised"] == [True, True]


def test_tokens_use_experts_of_few_machines(pair):
    own, one, free = (pair["limits"][limit] for limit in ("own", "1", "None"))
    assert own["cross_node_share"] == 0
    assert own["cross_node_bytes"] == 2 * 2 * 2 * 8  # two numbers to the other, in 2 layers
    # Without a limit the 4 experts of a token are on both machines, with it on either.
    for report in (one, free):
        assert report["cross_node_share"] == pytest.approx(0.5, abs=0.1)
    assert one["cross_node_bytes"] < 0.65 * free["cross_node_bytes"]


def test_tokens_travel_in_the_dtype_of_autocast(pair):
    loss, norm, sent, loss_of_one, norm_of_one = pair["bf16"]
    assert loss == pytest.approx(loss_of_one, abs=1e-5)
    assert norm == pytest.approx(norm_of_one, rel=1e-2)
    # 17 tokens of 4 sequences, 2 experts, 2 layers, 4 ways, 32 values of 2 bytes; and counts.
    assert sent == pytest.approx(4 * 17 * 2 * 2 * 4 * 32 * 2, rel=0.01)


def test_log_of_two_processes(pair, one, shared_folder):
    records = [r for r in read_log(shared_folder / "two") if r["kind"] == "train"]
    assert records[-1]["communication_seconds"] > 0
    of_two, of_one = (
        [r["loss"] for r in read_log(shared_folder / name) if r["kind"] == "eval"]
        for name in ("two", "one")
    )
    assert of_two == pytest.approx(of_one, abs=1e-5)


def test_errors_are_raised_by_all_and_described_by_process_0(pair):
    unequal, *said = pair["failures"]
    assert "different numbers of processes (1, 2); give torchrun --nproc-per-node 1" in unequal
    assert "process 1 of 2:" in said[0]
    assert "other settings than process 0 (seed)" in said[0]
    assert "batch_size=3" in said[1]
    assert "nearest that works is batch_size=4" in said[1]
    assert "parallel.replicate=3 does not divide the 2 processes" in said[2]
    assert "needs a sparse model" in said[3]
    assert "all processes are on one machine" in said[4]
    assert "parallel.all_to_all=hierarchical has no effect" in said[10]
    assert "diverged at step" in said[5]
    assert "nearest that works is parallel.expert_tensor=1" in said[6]
    assert "cannot write into /dev/null/run: Not a directory" in said[7]
    assert "process 1 of 2: the run's folder" in said[8]
    assert "process 1 of 2:" in said[9]
    assert "does not see the token files in not_shared" in said[9]


def test_tokens_stay_on_their_machine_and_one_process_goes_on(pair, shared_folder):
    folder = shared_folder
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


def test_a_killed_process_ends_the_other_and_loses_no_checkpoint(pair, one, shared_folder):
    survivor, victim = pair["ended"]
    assert victim[0] == -9
    assert survivor[0] > 0
    assert "process 0 of 2 lost contact with process 1 (" in survivor[1]
    kept = checkpoint.checkpoints(shared_folder / "killed")
    assert checkpoint.step_of(kept[-1]) >= 4  # that of step 6 may still have been written
    assert alone(shared_folder, "killed").name == "step-00000008"
    expected = losses(shared_folder / "one")
    assert losses(shared_folder / "killed") == pytest.approx(expected, abs=1e-6)
    assert not list((shared_folder / "killed").glob(".step-*"))


def assert_compiled_like_plain(numbers, dtypes, plain, dtypes_of_plain):
    """Compiled code keeps more bits between operations than bfloat16 has."""
    found, wanted = torch.tensor(numbers), torch.tensor(plain)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-4)
    assert dtypes == dtypes_of_plain == [["torch.float32"], ["torch.float32"]]


@pytest.mark.slow
def test_mixed_precision_is_compiled(folder):
    """In one process, which rounds by hooks, and in two, where FSDP does."""
    for size in (1, 2):
        done = results(size, "parallel_cases", folder, "compiled")
        assert_compiled_like_plain(*done["compiled"])


@pytest.mark.slow
def test_four_processes_and_replicas_equal_one(folder):
    names = "dsmoe,sparse,lopsided,olmoe"
    cases = ["equality", "equality:2", f"tensor:{names}"]
    tree = json.loads((folder / "tree.json").read_text())
    six = parallel_cases.six(tree)
    train(
        make_config({**six, "out": str(folder / "six")}),
        parallel_cases.Signals(2, signal.SIGTERM),
    )
    done = results(
        4, "parallel_cases", folder, *cases, "run:four:5", "tensor_run:four_two:5", "six:six:4"
    )
    for case in cases:
        for name, (numbers, parameters) in done[case].items():
            assert numbers < 1e-6, (case, name)
            assert parameters < 1e-9, (case, name)
    whole = weights(alone(folder, "one"))
    two = results(2, "parallel_cases", folder, "run:four", "run:four_two")
    for case in ("run:four", "run:four_two"):
        assert_close(weights(two[case]), whole, 1e-5)
    last, never_stopped = (
        train(make_config({**six, "out": str(folder / name)}), NoDisplay()).checkpoint
        for name in ("six", "six_one")
    )
    assert_close(weights(last), weights(never_stopped), 1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(folder):
    """4, 3, 1, 2, 3 and 4 processes in turn see the data, and get the weights, of one."""
    settings = parallel_cases.twelve(json.loads((folder / "tree.json").read_text()))

    def go_on(stop):
        signals = parallel_cases.Signals(stop, signal.SIGTERM)
        return train(make_config({**settings, "out": str(folder / "turns")}), signals)

    results(4, "parallel_cases", folder, "twelve:turns:2")
    results(3, "parallel_cases", folder, "twelve:turns:4")
    assert go_on(6).stopped_by == "SIGTERM"
    results(2, "parallel_cases", folder, "twelve:turns:8")
    results(3, "parallel_cases", folder, "twelve:turns:10")
    last = results(4, "parallel_cases", folder, "twelve:turns")["twelve:turns"]
    one = train(make_config({**settings, "out": str(folder / "one")}), NoDisplay())
    assert losses(folder / "turns") == pytest.approx(losses(folder / "one"), abs=1e-6)
    assert_close(weights(last), weights(one.checkpoint), 1e-5)


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
