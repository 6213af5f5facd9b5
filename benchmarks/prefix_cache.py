"""Measure time to first token (TTFT) with and without kept prefixes, and after a restart.

    python benchmarks/prefix_cache.py MODEL PROMPTS.jsonl [--fixed 6000] [--rounds 3] [--save]

A conversation: ten turns of --new tokens each; every request sends all earlier turns and answers
again. An agent's loop: requests of --fixed tokens that are the same and --task others. Both are
measured with prefixes kept and without (`--prefix-cache off`), and the agent's first request once
more after a restart of the server, from its files (`--prefix-cache-dir`). Texts are cut from the
prompts, so that no two rounds share any. Each figure is the median over --rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import record

from moefit.server.client import Client

TURNS, LOOPS = 10, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path, help="JSON lines with prompts")
    parser.add_argument("--new", type=int, default=200, help="tokens of a turn")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--fixed", type=int, default=6000, help="tokens of an agent's instructions")
    parser.add_argument("--task", type=int, default=100, help="other tokens of an agent's request")
    parser.add_argument("--few", action="store_true", help="compute only the last turn again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="conversation,agent")
    parser.add_argument("--serve", default="", help="further options of moefit serve")
    parser.add_argument("--name", default="")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    text = read_text(given.prompts)
    results: dict[str, Any] = {}
    if "conversation" in given.parts:
        results["conversation"] = conversations(given, text)
    if "agent" in given.parts:
        results["agent"] = agents(given, text)
    print(json.dumps(results, indent=1))
    if given.save:
        notes = (
            "Seconds from sending a request to its first streamed token, medians over "
            f"{given.rounds} rounds; the least and the largest beside them. No other requests run. "
            "Without kept prefixes everything is computed again."
        )
        print(record.write("prefix-cache", results, notes=notes, suffix=given.name))


def read_text(path: Path) -> str:
    """Return all prompts and responses of a file of JSON lines, one after another."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return "\n\n".join(str(value) for line in lines for value in line.values())


def conversations(given: argparse.Namespace, text: str) -> dict[str, Any]:
    """Return the TTFT of each turn, with and without kept prefixes."""
    context = TURNS * (given.new + given.answer) + given.answer
    with server(given, context, "on") as client:
        works = texts(client, text, TURNS * given.new, given.rounds)
        kept = [conversation(client, ids, given) for ids in works]
    turns = [TURNS - 1] if given.few else range(TURNS)
    with server(given, context, "off") as client:
        alone = [
            [ask(client, turns_of_one[turn]["prompt"], given.answer) for turn in turns]
            for turns_of_one in kept
        ]
    found: dict[str, Any] = {
        "prompt tokens by turn": [len(one["prompt"]) for one in kept[-1]],
        "cached tokens by turn": [one["cached"] for one in kept[-1]],
        "kept": medians(kept),
        ("not kept, last turn" if given.few else "not kept"): medians(alone),
    }
    first, last = (found["kept"][at]["seconds"] for at in (0, -1))
    found["kept, last turn / first turn"] = round(last / first, 3)
    found["last turn, kept / not kept"] = round(last / medians(alone)[-1]["seconds"], 3)
    return found


def conversation(
    client: Client, ids: Sequence[int], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return what `ask` does for each turn, with the prompt."""
    said: list[int] = []
    turns: list[dict[str, Any]] = []
    for turn in range(TURNS):
        said += ids[turn * given.new : (turn + 1) * given.new]
        turns.append({**ask(client, said, given.answer), "prompt": list(said)})
        answer = {"prompt": turns[-1]["text"], "add_special_tokens": False}
        said += client.post("/tokenize", answer)["tokens"][: given.answer]
    return turns


def agents(given: argparse.Namespace, text: str) -> dict[str, Any]:
    """Return the TTFT of requests with fixed instructions, also after a restart."""
    context = given.fixed + given.task + 2 * given.answer
    size = given.fixed + (LOOPS + 1) * given.task
    with tempfile.TemporaryDirectory() as folder:
        stored = f"--prefix-cache-dir {folder}"
        with server(given, context, "on", stored) as client:
            works = texts(client, text, size, given.rounds)
            kept = [loop(client, ids, given, range(LOOPS)) for ids in works]
        again = []
        for ids in works:
            with server(given, context, "on", stored) as client:
                again += [loop(client, ids, given, [LOOPS])]
    found: dict[str, Any] = {"kept": medians(kept), "restarted": medians(again)}
    found["cached tokens"] = [one["cached"] for one in (*kept[-1], *again[-1])]
    if not given.few:
        with server(given, context, "off") as client:
            found["not kept"] = medians([loop(client, one, given, range(LOOPS)) for one in works])
    first = found["kept"][0]["seconds"]
    found["kept, second request / first"] = round(found["kept"][1]["seconds"] / first, 3)
    found["restarted / first request"] = round(found["restarted"][0]["seconds"] / first, 3)
    return found


def loop(
    client: Client, ids: Sequence[int], given: argparse.Namespace, turns: Sequence[int]
) -> list[dict[str, Any]]:
    """Return what `ask` does for some of an agent's requests."""
    fixed, rest = list(ids[: given.fixed]), ids[given.fixed :]
    parts = [list(rest[turn * given.task : (turn + 1) * given.task]) for turn in turns]
    return [ask(client, fixed + part, given.answer) for part in parts]


def ask(client: Client, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """Return TTFT, cached tokens and text of a request."""
    asked = {
        "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "logprobs": 0, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, text, cached = perf_counter(), None, "", 0
    for event in client.stream("/v1/completions", asked):
        first = first or perf_counter() - began
        text += "".join(choice["text"] for choice in event["choices"])
        if event.get("usage"):
            cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first is not None
    return {"seconds": first, "text": text, "cached": cached}


def texts(client: Client, text: str, tokens: int, count: int) -> list[list[int]]:
    """Return `count` different texts of `tokens` tokens."""
    ids: list[int] = []
    for start in range(0, len(text), 40_000):
        piece = client.post("/tokenize", {"prompt": text[start : start + 40_000]})
        ids += piece["tokens"]
        if len(ids) >= tokens * count:
            return [ids[n * tokens : (n + 1) * tokens] for n in range(count)]
    raise SystemExit(f"the prompts have {len(ids):,} tokens; {tokens * count:,} are needed")


@contextmanager
def server(given: argparse.Namespace, context: int, cache: str, more: str = "") -> Iterator[Client]:
    """A server process, warmed up with two requests."""
    command = [
        sys.executable, "-m", "moefit", "serve", given.model, "--port", "0",
        "--context", str(context), "--prefix-cache", cache, *given.serve.split(), *more.split(),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("API at "):
                break
        else:
            raise SystemExit("".join(lines))
        client = Client(line.split()[2])
        for _ in range(2):
            ask(client, list(range(5, 5 + min(300, context - 8))), 4)
        yield client
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def medians(rounds: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, float]]:
    """Return median, least and largest TTFT of each turn over the rounds, in seconds."""
    found = []
    for turn in zip(*rounds, strict=True):
        seconds = [one["seconds"] for one in turn]
        median, least, largest = statistics.median(seconds), min(seconds), max(seconds)
        found.append(
            {"seconds": round(median, 4), "least": round(least, 4), "largest": round(largest, 4)}
        )
    return found


if __name__ == "__main__":
    main()
