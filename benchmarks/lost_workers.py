"""Kill processes of a training run at random moments, under `torchrun --max-restarts`.

Two processes with gloo train a tiny model. Each time that they have been started, one of them is
killed (SIGKILL) at a random moment: a quarter of the times from its start on, while it imports,
joins the other and restores, else after it has begun to train, while it computes and saves.
torchrun then starts both again. Measured per kill: the last step in the log, the newest checkpoint,
the step that training goes on from, and how long the other process outlives the killed one. The
finished run must have the losses and weights, bit for bit, of a run that nobody killed.

    python benchmarks/lost_workers.py [--kills 20] [--steps 600] [--save]
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record
from safetensors.torch import load_file

from moefit.train.checkpoint import checkpoints, step_of
from moefit.train.run_folder import read_log

EVERY = 5
"""Steps between checkpoints."""
AT_START, IN_TRAINING = 9.0, 3.0
"""Seconds in which a process is killed, from its start and from the beginning of training."""
HUNG = 60.0
"""Seconds after which a process that outlives another one counts as hanging."""
_RESUMED = re.compile(r"resuming from \S*step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What was seen at a kill.

    Attributes:
        rank: Of the killed process.
        in_training: Whether the kill was after training had begun.
        after: Seconds from there, or from the start of the processes, to the kill.
        reached: Last step in the log.
        saved: Step of the newest checkpoint.
        resumed: Step that training went on from afterwards.
        others_ended: Seconds until all processes of this start had ended.
    """

    rank: int
    in_training: bool
    after: float
    reached: int
    saved: int
    resumed: int
    others_ended: float


def settings(folder: Path, out: Path, steps: int) -> Path:
    """Write the configuration of a run and return its path."""
    tree = {
        "out": str(out),
        "model": {
            "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_experts": 4,
        },
        "data": {"sources": [str(folder / "text")], "vocab_size": 300, "held_out_fraction": 0.2,
                 "cache_dir": str(folder / "cache")},
        "loss": {"mlp_mi": 0.02},
        "optimizer": {"warmup_steps": 2},
        "log": {"every": 1, "eval_every": 10 * steps, "eval_tokens": 64},
        "checkpoint": {"every": EVERY, "keep": 2},
        "steps": steps, "seq_len": 16, "batch_size": 4, "precision": "fp32",
    }  # fmt: skip
    path = folder / f"{out.name}.yaml"
    path.write_text(json.dumps(tree))  # YAML is a superset of JSON
    return path


def text(folder: Path) -> None:
    """Write a corpus of a few words."""
    chance = random.Random(0)
    (folder / "text").mkdir()
    for number in range(10):
        lines = [" ".join(chance.choices(["expert", "router", "token", "slot"], k=8))] * 60
        (folder / "text" / f"{number}.txt").write_text("\n".join(lines))


class Agent:
    """torchrun with two processes.

    Args:
        config: Of the run.
        restarts: Most restarts.
    """

    def __init__(self, config: Path, restarts: int):
        self.output = config.with_suffix(".out")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--max-restarts", str(restarts), "-m", "moefit", "train", str(config),
        ]  # fmt: skip
        environment = {
            **os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        return self.output.read_text()

    def workers(self) -> list[int]:
        """Return the ids of its processes that have not ended, by rank."""
        listed = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        return [int(one) for one in listed if not is_ended(int(one))]

    def started(self, before: list[int]) -> list[int]:
        """Wait until two new processes have been started; return their ids by rank."""
        while True:
            found = [one for one in self.workers() if one not in before]
            if len(found) == 2:
                return sorted(found)
            if self.process.poll() is not None:
                raise SystemExit(f"torchrun ended with {self.process.returncode}:\n{self.said()}")
            time.sleep(0.02)


def is_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def last_step(out: Path) -> int:
    return max((one["step"] for one in read_log(out) if one["kind"] == "train"), default=0)


def newest(out: Path) -> int:
    return max(map(step_of, checkpoints(out)), default=0)


def wait_until_ended(processes: list[int]) -> float:
    """Return the seconds until all have ended."""
    began = time.perf_counter()
    while not all(map(is_ended, processes)):
        if time.perf_counter() - began > HUNG:
            raise SystemExit(f"a process hangs {HUNG:g} s after another one was killed")
        time.sleep(0.02)
    return time.perf_counter() - began


def version_of_log(out: Path) -> tuple[int, int] | None:
    """Return what changes when a process begins to write the log."""
    try:
        status = (out / "log.jsonl").stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size


def kill_often(agent: Agent, out: Path, kills: int, seed: int) -> list[Kill]:
    """Kill a process after each start; return what was seen."""
    chance, found, workers, said = random.Random(seed), list[dict[str, Any]](), list[int](), 0
    began: list[int | None] = []
    for number in range(kills):
        workers, version = agent.started(workers), version_of_log(out)
        in_training, rank = chance.random() < 0.75, chance.randrange(2)
        after = chance.uniform(0.0, IN_TRAINING if in_training else AT_START)
        while in_training and version_of_log(out) == version:
            time.sleep(0.02)
        time.sleep(after)
        if all(map(is_ended, workers)):
            raise SystemExit(f"the run ended before kill {number + 1}; give more --steps")
        os.kill(workers[rank], 9)
        ended = wait_until_ended(workers)
        resumed = _RESUMED.search(agent.said(), said)
        said = len(agent.said())
        # Without a checkpoint training begins at 0 and nothing is said; None: not known.
        began.append(int(resumed[1]) if resumed else 0 if in_training else None)
        seen = {"rank": rank, "in_training": in_training, "after": round(after, 2)}
        seen |= {"reached": last_step(out), "saved": newest(out)}
        found.append({**seen, "others_ended": round(ended, 2)})
        print(found[-1], flush=True)
    agent.process.wait()
    if agent.process.returncode:
        raise SystemExit(f"torchrun ended with {agent.process.returncode}:\n{agent.said()}")
    resumed = _RESUMED.search(agent.said(), said)
    later = [*began[1:], int(resumed[1]) if resumed else 0]
    # Processes that are killed before they resume leave it to the next ones.
    for index, one in enumerate(found):
        one["resumed"] = next((step for step in later[index:] if step is not None), 0)
    return [Kill(**one) for one in found]


def differences(out: Path, whole: Path) -> dict[str, float]:
    """Return the largest difference of losses and of last weights of two runs."""
    of_one, of_other = (
        {one["step"]: one["loss"] for one in read_log(folder) if one["kind"] == "train"}
        for folder in (out, whole)
    )
    assert list(of_one) == list(of_other), "a step is missing in the log, or is there twice"
    mine, other = (
        load_file(checkpoints(folder)[-1] / "model.safetensors") for folder in (out, whole)
    )
    return {
        "losses": max(abs(of_one[step] - of_other[step]) for step in of_one),
        "weights": max(float((mine[name] - other[name]).abs().max()) for name in other),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that torchrun is ended too
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text(folder)
        whole, out = folder / "whole", folder / "killed"
        alone = Agent(settings(folder, whole, given.steps), 0)
        if alone.process.wait():
            raise SystemExit(alone.said())
        agent = Agent(settings(folder, out, given.steps), given.kills)
        try:
            kills = kill_often(agent, out, given.kills, given.seed)
        finally:
            agent.process.terminate()
        hidden = {one.name for one in out.iterdir() if one.name.startswith(".")}
        left = sorted(hidden - {".lock"})
        unlike = differences(out, whole)
    results = {
        "steps_between_checkpoints": EVERY,
        "kills": [asdict(one) for one in kills],
        "kills_in_training": sum(one.in_training for one in kills),
        "most_steps_lost": max(one.reached - one.resumed for one in kills),
        "resumed_before_the_newest_checkpoint": sum(one.resumed < one.saved for one in kills),
        "longest_until_others_ended": max(one.others_ended for one in kills),
        "differences_from_a_run_without_kills": unlike,
        "unfinished_files_left": left,
    }
    print({key: value for key, value in results.items() if key != "kills"})
    if given.save:
        notes = (
            "Seconds depend on the load of the machine. `reached` is the last step in the log at "
            "the kill; steps lost are `reached` - `resumed`."
        )
        print(record.write("lost-workers", results, notes=notes))


if __name__ == "__main__":
    main()
