"""What the tests of lost processes do: pairs of processes, of which one stops or waits in vain.

Arguments: a folder, and per pair its case and a free port. The processes of all pairs are started
together, so that their waits overlap.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from moefit.errors import LostProcessError
from moefit.train.parallel.processes import ManyProcesses, joined_processes

WAIT, LONG_WAIT = 2.0, 6.0
"""Seconds: until a process counts as lost, and where it must not, also on a busy machine."""


def stopped_in_a_step(processes: ManyProcesses) -> None:
    """Process 1 stops where both would communicate."""
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    processes.most(1)


def stopped_in_a_task(processes: ManyProcesses) -> None:
    """Process 0 stops in a task for which the other waits."""
    processes.on_main(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def hanging_in_a_task(processes: ManyProcesses) -> None:
    """Process 0 waits in a task for something that never comes."""
    processes.on_main(lambda: time.sleep(60))


def hanging_in_a_step(processes: ManyProcesses) -> None:
    """Process 1 waits for something else."""
    if processes.rank == 1:
        time.sleep(60)
    processes.most(1)


def computing(processes: ManyProcesses) -> None:
    """Process 0 computes for longer than others wait for a process that does not."""

    def compute() -> None:
        end = time.monotonic() + LONG_WAIT + 2
        while time.monotonic() < end:
            torch.rand(1 << 16).sort()

    processes.on_main(compute)
    assert processes.every(processes.rank) == [0, 1]


def failing(processes: ManyProcesses) -> None:
    """Process 1 has an error that is not the user's, while the other is in a task."""
    if processes.rank == 1:
        raise ValueError("a fault of the program")
    processes.every(1)


CASES: tuple[Callable[[ManyProcesses], None], ...] = (
    stopped_in_a_step, stopped_in_a_task, hanging_in_a_task, hanging_in_a_step, computing, failing,
)  # fmt: skip


def main() -> None:
    """Take part in the case of this process's pair, and write what it says at the end."""
    folder, pair = Path(sys.argv[1]), int(os.environ["RANK"]) // 2
    rank = int(os.environ["RANK"]) % 2
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ["MASTER_PORT"] = sys.argv[2 + pair]
    case, said = CASES[pair], ""
    (folder / f"{case.__name__}.{rank}.pid").write_text(str(os.getpid()))
    try:
        with joined_processes() as processes:
            assert isinstance(processes, ManyProcesses)
            wait = LONG_WAIT if case is computing else WAIT
            _set_pg_timeout(timedelta(seconds=wait), processes.control)
            processes.heartbeats.timeout = wait
            case(processes)
    except LostProcessError as error:
        said = str(error)
    except ValueError as error:
        said = f"ValueError: {error}"
    (folder / f"{case.__name__}.{rank}.json").write_text(json.dumps(said))
    # The other one may be stopped, or wait for a minute.
    other = folder / f"{case.__name__}.{1 - rank}.pid"
    if "lost contact" in said:
        os.kill(int(other.read_text()), signal.SIGKILL)
