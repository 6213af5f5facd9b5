"""A server with a small KV cache answers a long prompt in its budget; its experts return."""

import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep

import pytest

from moefit.engine.context import reservation
from moefit.server.client import Client

PROMPT = [17 + at * at * 7 % 3000 for at in range(600)]
ASKED = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}


@contextmanager
def server(context: int, memory: str) -> Iterator[Client]:
    command = [sys.executable, __file__, "serve", "reference", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--context", str(context), "--memory", memory, "--exact"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("API at "):
                yield Client(line.split()[2])
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
                return
        raise AssertionError("the server did not start")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def answer(client: Client) -> str:
    return client.post("/v1/completions", ASKED)["choices"][0]["text"]


@pytest.mark.slow
def test_long_prompt_within_the_budget() -> None:
    with server(2048, "4GiB") as client:
        expected = answer(client)
    with server(128, "4GiB") as client:
        everything = client.get("/v1/memory")["everything"]
    with server(128, str(everything - (4 << 20))) as client:
        before = client.get("/v1/memory")
        assert before["kv_tokens"] == before["kv_tokens_reserved"] == 128
        assert before["kv_tokens_most"] >= 608
        assert answer(client) == expected
        during = client.get("/v1/memory")
        assert during["kv_tokens"] >= 608 and during["slot_bytes"] < before["slot_bytes"]
        deadline = monotonic() + 60
        while client.get("/v1/memory")["slot_bytes"] < before["slot_bytes"]:
            assert monotonic() < deadline, "slots did not return"
            sleep(0.1)
        after = client.get("/v1/memory")
        assert after["kv_tokens"] == 128 and after["budget"] == before["budget"]
        assert after["peak_process_bytes"] <= after["budget"]["total"]
        assert answer(client) == expected


if __name__ == "__main__":  # a server that gives back sooner
    reservation.GIVE_BACK_AFTER = 1.0
    runpy.run_module("moefit", run_name="__main__")
