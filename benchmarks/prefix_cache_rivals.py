"""Measure llama.cpp's server with the conversation and the agent's loop of prefix_cache.py.

    python benchmarks/prefix_cache_rivals.py TOKENIZER PROMPTS.jsonl --command "PYTHON -m
        llama_cpp.server --model FILE --n_threads 2" [--fixed 6000] [--rounds 1] [--save NAME]

The same texts, sent as text, since that server takes no tokens; so a border between tokens may move
where a turn begins. It keeps the text of the last request alone, and reuses what the next one has
in common with it. `--n_ctx` and `--port` are added to the command.
"""

import argparse
import json
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import prefix_cache
import record
from transformers import AutoTokenizer

from moefit.errors import MoefitError
from moefit.server.client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", help="folder of the model, to cut texts into tokens")
    parser.add_argument("prompts", type=Path, help="JSON lines with prompts")
    parser.add_argument("--command", required=True)
    parser.add_argument("--new", type=int, default=200, help="tokens of a turn")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--fixed", type=int, default=6000, help="tokens of an agent's instructions")
    parser.add_argument("--task", type=int, default=100, help="other tokens of an agent's request")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--save", metavar="NAME")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    size = given.fixed + prefix_cache.LOOPS * given.task
    text = prefix_cache.read_text(given.prompts)[: 12 * size * given.rounds]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    works = [ids[n * size : (n + 1) * size] for n in range(given.rounds)]
    if len(works[-1]) < size:
        raise SystemExit(
            f"the prompts have {len(ids):,} tokens; {size * given.rounds:,} are needed"
        )
    with server(given.command, size + 2 * given.answer) as client:
        talks = [conversation(client, tokenizer, work, given) for work in works]
        loops = [agent(client, tokenizer, work, given) for work in works]
    results = {"conversation": summary(talks), "agent": summary(loops)}
    print(json.dumps(results, indent=1))
    if given.save:
        notes = "Seconds from sending a request to its first streamed token, medians over rounds."
        print(record.write("prefix-cache-rival", results, notes=notes, suffix=given.save))


def conversation(
    client: Client, tokenizer: Any, ids: Sequence[int], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return TTFT of each turn; every request sends all earlier ones and their answers."""
    said, turns = "", []
    for turn in range(prefix_cache.TURNS):
        said += tokenizer.decode(ids[turn * given.new : (turn + 1) * given.new])
        turns.append(ask(client, said, given.answer))
        said += turns[-1]["text"]
    return turns


def agent(
    client: Client, tokenizer: Any, ids: Sequence[int], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return TTFT of requests that begin with the same instructions."""
    fixed = tokenizer.decode(ids[: given.fixed])
    return [
        ask(client, fixed + tokenizer.decode(ids[at : at + given.task]), given.answer)
        for at in range(given.fixed, len(ids), given.task)
    ]


def ask(client: Client, prompt: str, tokens: int) -> dict[str, Any]:
    """Return TTFT and text of a request."""
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    began, first, text = perf_counter(), None, ""
    for event in client.stream("/v1/completions", asked):
        first = first or perf_counter() - began
        text += "".join(choice["text"] for choice in event["choices"])
    assert first is not None
    return {"seconds": first, "text": text}


def summary(rounds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    found = prefix_cache.medians(rounds)
    first = found[0]["seconds"]
    return {
        "kept": found,
        "second / first": round(found[1]["seconds"] / first, 3),
        "last / first": round(found[-1]["seconds"] / first, 3),
    }


@contextmanager
def server(command: str, context: int) -> Iterator[Client]:
    """The rival's server, warmed up with two requests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*shlex.split(command), "--n_ctx", str(context), "--port", str(port)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        client = Client(f"http://127.0.0.1:{port}")
        end = time.monotonic() + 120
        while True:
            try:
                client.get("/v1/models")
                break
            except MoefitError as error:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server does not answer: {error}") from None
                time.sleep(0.2)
        for _ in range(2):
            ask(client, "import os\n" * 60, 4)
        yield client
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
