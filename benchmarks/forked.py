"""Run a function in several processes that train together, without torchrun."""

import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moefit.train.parallel.processes import Processes, joined_processes


def results(size: int, work: Callable[[Processes], Any]) -> list[Any]:
    """Return what a function returns in each of `size` processes; values as JSON has them.

    Processes are forked, because imports take seconds, so the caller must not have computed with
    torch. Each has one thread and, where there are several cores, one core: process r has core r
    modulo their number.

    Args:
        size: Number of processes.
        work: The function.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    os.environ.update(shared, LOCAL_WORLD_SIZE=str(size))
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        pids = [_fork(rank, Path(folder), work) for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(codes):
            raise SystemExit(f"processes ended with {codes}")
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(size)]


def _fork(rank: int, folder: Path, work: Callable[[Processes], Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        torch.set_num_threads(1)
        with joined_processes() as processes:
            found = work(processes)
        (folder / str(rank)).write_text(json.dumps(found))
        code = 0
    except BaseException:  # noqa: BLE001 - it ends here
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
