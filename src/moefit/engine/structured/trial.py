"""Try a client's grammars in a process of their own before this one compiles them.

Some schemas take memory and time without end while they are compiled, whatever the limits that the
library is given (`multipleOf` with a large prime is one). In another process that costs a client
one error, and requests that are running nothing.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from moefit.engine.structured.library import llguidance

TRIAL_BYTES = 256 << 20
"""Address space of the process, which uses about 30 MiB."""
TRIAL_SECONDS = 2
"""Processor time."""
_WAIT = 60.0  # seconds on the clock, on a machine that is busy
# An isolated interpreter has no site-packages, so pass the path of the library.
_START = (
    "import runpy, sys; sys.path.append(sys.argv[1]); runpy.run_path(sys.argv[2], "
    "run_name='__main__')"
)
_WORKER = Path(__file__).with_name("trial_worker.py")
_ENVIRONMENT = ("LANG", "LC_ALL", "PATH", "LD_LIBRARY_PATH")


def tried(
    grammars: Sequence[str],
    limits: Mapping[str, int],
    *,
    memory: int = TRIAL_BYTES,
    seconds: int = TRIAL_SECONDS,
) -> list[str]:
    """Return what is wrong with each grammar; empty if nothing is.

    The list is shorter if the process reached a limit. Only a grammar that did so as the first is
    known to take too much by itself, and has an error; the others may be tried again.

    Args:
        grammars: Their texts, as `sources.whole` returns them.
        limits: Of llguidance.
        memory: Address space of the process, in bytes.
        seconds: Processor time of all together.

    Raises:
        ConfigError: If the library is not installed.
    """
    folder = str(Path(llguidance().__file__).parent.parent)
    command = [sys.executable, "-I", "-S", "-c", _START, folder, str(_WORKER)]
    try:
        done = subprocess.run(
            [*command, str(memory), str(seconds)],
            input=json.dumps({"grammars": list(grammars), "limits": dict(limits)}).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            timeout=_WAIT,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:  # says nothing about the grammars
        return _whole_lines(error.stdout or b"")
    found = _whole_lines(done.stdout)
    if done.returncode and not found:
        return [
            f"compiling it takes more than {seconds} seconds or {memory >> 20} MiB; simplify it: "
            "smaller counts, fewer alternatives, no large multipleOf"
        ]
    return found


def _whole_lines(output: bytes) -> list[str]:
    return [json.loads(line) for line in output.split(b"\n")[:-1]]
