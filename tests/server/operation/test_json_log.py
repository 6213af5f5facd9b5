"""Logs as JSON lines: one object a line, and nobody waits for them to be read."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from moefit.server.operation.json_log import MAX_CHARACTERS, JsonHandler

NAME = "moefit.test.json"


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord(NAME, logging.WARNING, "", 0, message, arguments, None)
    made.__dict__.update(extra)
    return made


def read_lines(descriptor: int) -> list[dict]:
    with open(descriptor, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_lines_are_objects_whatever_they_say() -> None:
    read, write = os.pipe()
    handler = JsonHandler(write)
    handler.emit(record("two\nlines and \x1b[31m, %s", "ü\ud800"))
    handler.emit(record("one", fields={"request_id": "r", "message": "other", "when": object}))
    handler.emit(record("x" * (2 * MAX_CHARACTERS)))
    handler.emit(record("%d", "no number"))  # such as a mistake in a library
    handler.emit(record("after it"))
    handler.flush()
    os.close(write)
    first, second, third, *rest = read_lines(read)
    assert first["message"] == "two\nlines and \x1b[31m, ü\ud800"
    assert first["level"] == "warning" and first["logger"] == NAME
    assert first["time"].endswith("Z") and "request_id" not in first
    assert second["message"] == "one" and second["request_id"] == "r" and "object" in second["when"]
    assert len(third["message"]) == MAX_CHARACTERS + 3
    assert [one["message"][:24] for one in rest] == ["1 lines were dropped: th", "after it"]


def test_unread_pipe_blocks_nobody() -> None:
    read, write = os.pipe()
    handler = JsonHandler(write, most=100)
    began = time.monotonic()
    for number in range(5000):
        handler.emit(record("line %d %s", number, "x" * 100))
    assert time.monotonic() - began < 3
    assert handler.dropped > 1000
    began = time.monotonic()
    handler.flush()
    assert time.monotonic() - began < 3, "an exit does not wait for the reader"
    lines, lost = 0, 0
    with open(read, encoding="utf-8") as file:
        for number in range(100):
            assert json.loads(file.readline())["message"].startswith("line "), number
        time.sleep(0.2)  # until there is room again
        handler.emit(record("last"))
        while (said := json.loads(file.readline())["message"]) != "last":
            lines += said.startswith("line ")
            lost += int(said.split()[0]) if "lines were dropped" in said else 0
        os.close(write)
    assert 100 + lines + lost == 5000, "every line is written or counted"


def test_non_blocking_pipe_loses_no_line() -> None:
    """Such as a standard error that another process of a shell has made so."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    handler = JsonHandler(write)
    for number in range(2000):  # more than a pipe holds
        handler.emit(record("line %d %s", number, "x" * 100))
    with open(read, encoding="utf-8") as file:
        for number in range(2000):
            assert json.loads(file.readline())["message"].startswith(f"line {number} ")
        handler.flush()
        os.close(write)


@pytest.mark.slow
def test_all_lines_of_a_server_are_json() -> None:
    command = [sys.executable, "-m", "moefit", "serve", "--port", "0", "--log-json"]
    said = []
    with subprocess.Popen(
        [*command, "--memory", "4GiB"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(json.loads(line)["message"])
            if said[-1].startswith("API at "):
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert said[0] == "loading reference" and said[-1].startswith("SIGTERM")


def test_errors_at_start_are_json() -> None:
    command = [sys.executable, "-m", "moefit", "serve", "/nowhere", "--log-json", "--port", "0"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert made.returncode == 2
    *_, last = [json.loads(line) for line in made.stderr.splitlines()]
    assert last["level"] == "error" and "/nowhere" in last["message"]
