"""More connections than file descriptors."""

import subprocess
import sys
from pathlib import Path

import pytest

FLOOD = """
import resource, socket
from serving_http import fake_service
import moefit
from moefit.server.run import HttpServer as Running
from moefit.server.run import bind
hard = 480
resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
with moefit.load("reference") as served, fake_service(served, connections=2) as (service, _):
    bound = bind("127.0.0.1", 0)
    running = Running(service, bound)
    running.start()
    address = bound.getsockname()
    from moefit.server.run import available_connections
    print(available_connections(1024), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    held = [socket.create_connection(address, timeout=9) for _ in range(150)]
    print("closed" if held[-1].recv(1) == b"" else "kept")
    for one in held:
        one.close()
    running.stop()
"""


@pytest.mark.slow
def test_connections_are_limited_by_open_files() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FLOOD],
        check=True, capture_output=True, text=True, timeout=100,
        cwd=Path(__file__).parents[1] / "helpers",
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0] == "224 480"
    assert lines[1] == "closed"
    assert "Too many open files" not in done.stderr
