"""The minimum budgets that `describe` prints work in the commands that they are for."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_served import saved, tiny

from tests.serve.memory.test_tokenizer_size import byte_pairs, write

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of a MiB, so that a too low minimum is detected."""
    model = tiny("Olmoe", vocab_size=4200, max_position_embeddings=128)
    return write(byte_pairs(4096, 8), saved(model, tmp_path_factory.mktemp("least")))


def moefit(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moefit", *map(str, arguments)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def least(folder: Path) -> dict[str, int]:
    done = moefit("describe", folder, "--memory", "100GiB", "--exact", "--context", 64, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["minimum"]["generate"] == said["floor"]
    return said["minimum"]


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("generate", ["hello", "--max-new-tokens", 4]),
        pytest.param("bench", ["--prompt-tokens", 8, "--new-tokens", 4], marks=pytest.mark.slow),
        pytest.param("eval", ["--text", __file__, "--max-tokens", 64], marks=pytest.mark.slow),
    ],
)
def test_described_minimum_is_accepted_and_kept(
    folder: Path, least: dict[str, int], command: str, more: list[object]
) -> None:
    size = least[command]
    done = moefit(command, folder, *more, "--exact", "--memory", size, "--context", 64)
    assert done.returncode == 0, done.stderr
    below = moefit(command, folder, *more, "--exact", "--memory", size - 40 * MIB, "--context", 64)
    assert below.returncode == 2
    assert "BudgetTooSmallError" in below.stderr


@pytest.mark.slow
def test_described_server_minimum_starts_server(folder: Path, least: dict[str, int]) -> None:
    arguments = ["--exact", "--memory", str(least["serve"]), "--context", "64", "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "moefit", "serve", str(folder), *arguments],
        stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        said = ""
        for line in server.stderr:
            said += line
            if "API at" in line:
                break
        assert "API at" in said, said
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
