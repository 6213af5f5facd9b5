"""Start the processes of a run without torchrun, whose own start takes seconds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def start(size: int, script: Path, *arguments: str) -> list[subprocess.Popen]:
    """Start a Python script in processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    helpers = str(Path(__file__).parent)
    path = os.pathsep.join([helpers, *filter(None, [os.environ.get("PYTHONPATH")])])
    common = {
        **os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Return exit code, standard output and standard error of each process."""
    try:
        outputs = [one.communicate(timeout=timeout) for one in processes]
    finally:
        for one in processes:
            one.kill()
    return [(one.returncode, *texts) for one, texts in zip(processes, outputs, strict=True)]


def results(size: int, script: Path, *arguments: str) -> dict:
    """Run a script in `size` processes; return what process 0 prints last, as JSON."""
    ended = finish(start(size, script, *arguments))
    assert all(code == 0 for code, _, _ in ended), "\n".join(text for _, _, text in ended)
    return json.loads(ended[0][1].splitlines()[-1])
