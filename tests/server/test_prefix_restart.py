"""A server that is killed while it writes prefixes answers the same after a restart."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest

from moefit.server.client import Client

PROMPT = "def add(a, b):\n    return a + b\n\n" * 40
ASKED = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}


@contextmanager
def server(folder: Path) -> Iterator[tuple[Client, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "moefit", "serve", "--port", "0", "--memory", "4GiB"]
    process = subprocess.Popen(
        [*command, "--prefix-cache-dir", str(folder)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("API at "):
                yield Client(line.split()[2]), process
                return
        raise AssertionError("the server did not start")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def answer(client: Client) -> tuple[str, int]:
    given = client.post("/v1/completions", ASKED)
    return given["choices"][0]["text"], given["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.slow
def test_killed_while_writing(tmp_path: Path) -> None:
    with server(tmp_path) as (client, process):
        text, cached = answer(client)
        assert cached == 0
        deadline = monotonic() + 20
        while not list(tmp_path.glob("*/*.kv")) and monotonic() < deadline:
            sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with server(tmp_path) as (client, process):
        again, read = answer(client)
        assert again == text and read >= 64
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with server(tmp_path) as (client, _):
        assert answer(client)[0] == text
        disk = client.get("/v1/memory")["prefix_cache"]["disk"]
        assert disk["damaged"] == 0 and disk["read"] >= read
    assert not list(tmp_path.glob("*/*.partial"))
