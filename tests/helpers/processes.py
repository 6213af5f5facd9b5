"""Start the processes of a run without torchrun, whose own start takes seconds.

One process imports everything and forks the others, because imports take seconds too.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def results(size: int, module: str, folder: Path, *arguments: str, last_dies: bool = False) -> dict:
    """Run `main` of a module of this folder in `size` processes.

    Args:
        size: Number of processes.
        module: Its name.
        folder: First argument; process 0 writes its results into `results.json` there.
        arguments: Further ones.
        last_dies: Whether a process may fail at the end.

    Returns:
        The results, and under `ended` exit code and standard error of each process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, __file__, str(size), module, str(folder), *arguments]
    parent = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        codes = json.loads(parent.communicate(timeout=600)[0].splitlines()[-1])
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
    errors = [(folder / f"{rank}.err").read_text() for rank in range(size)]
    assert last_dies or not any(codes), "\n".join(errors)
    found = folder / "results.json"
    assert found.is_file(), "\n".join(errors)
    return {**json.loads(found.read_text()), "ended": list(zip(codes, errors, strict=True))}


def _fork(rank: int, folder: Path, main: Callable[[], None]) -> int:
    """Return the process id of a copy of this process that runs `main` and ends."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        with (folder / f"{rank}.err").open("w") as file:
            os.dup2(file.fileno(), 2)
        main()
        code = 0
    except BaseException:  # noqa: BLE001 - it ends here
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    count, name, *sys.argv[1:] = sys.argv[1:]
    run = importlib.import_module(name).main
    pids = [_fork(rank, Path(sys.argv[1]), run) for rank in range(int(count))]
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    sys.stdout.write(json.dumps(ends) + "\n")
