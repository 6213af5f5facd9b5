"""Soak test of the server: disconnecting clients, changing budgets and read errors.

    python benchmarks/soak.py MODEL --least 706MiB --most 726MiB [--minutes 30] [--clients 6]
        [--dtype float32] [--save]

In exact mode every complete greedy response must equal the model's own output; in bfloat16, where
transformers rounds differently, the output of a served model that computes nothing else. A third
of the clients disconnect mid-stream; every 5 s the budget changes between --least and --most;
occasionally a shard (of a copy of the checkpoint) cannot be read for a few seconds. Counted: wrong
responses, requests that do not end, samples above the current budget, growth of the process.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2 as httpx
import record
import torch

import moefit
from moefit.api import folder_of
from moefit.evaluate.loading import load_full_model
from moefit.serve.memory.budget import format_bytes, parse_bytes

PORT = 8733
PROMPTS = (
    "def main():", "class Reader(", "import os\n", "    return self.", "for name in", "# The",
    'raise ValueError("', "    def __init__(self", "if __name__ ==", "try:\n    import",
    "@property\n", "from collections import",
)  # fmt: skip
TOKENS = (4, 16, 48)


@dataclass(slots=True)
class Tally:
    """Counts for the record."""

    finished: int = 0
    wrong: int = 0
    hung_up: int = 0
    refused_or_failed: int = 0
    without_an_end: int = 0
    budget_changes: int = 0
    budget_changes_failed: int = 0
    outages: int = 0
    samples: int = 0
    samples_above_budget: int = 0
    worst_excess_bytes: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    process_bytes_by_minute: list[int] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--least", required=True)
    parser.add_argument("--most", required=True)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    expected = own_answers(given.model, given.dtype)
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        shutil.copytree(folder_of(given.model), copy)
        tally = asyncio.run(soak(given, copy, expected))
    results = asdict(tally)
    print(json.dumps(results, indent=1))
    if given.save:
        notes = (
            f"{given.minutes:g} minutes, {given.dtype}, {given.clients} clients, "
            f"budget changing every 5 s between {given.least} and {given.most}; "
            "a third of the clients disconnect."
        )
        suffix = "" if given.dtype == "float32" else given.dtype
        print(record.write("soak", results, notes=notes, suffix=suffix))


def own_answers(model: str, dtype: str) -> dict[tuple[str, int], str]:
    """Return the greedy continuation of each prompt, computed alone."""
    if dtype == "float32":
        loaded, tokenizer = load_full_model(model, dtype=torch.float32)
        return continuations(loaded, tokenizer)
    with moefit.load(model, dtype=getattr(torch, dtype)) as served:
        return continuations(served, served.tokenizer)


def continuations(loaded: Any, tokenizer: Any) -> dict[tuple[str, int], str]:
    """Return what `loaded.generate` makes of each prompt, at each length."""
    answers = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = loaded.generate(ids, max_new_tokens=max(TOKENS), do_sample=False)
        for tokens in TOKENS:
            new = out[0, ids.shape[1] :][:tokens]
            answers[prompt, tokens] = tokenizer.decode(new, skip_special_tokens=True)
    return answers


async def soak(
    given: argparse.Namespace, copy: Path, expected: dict[tuple[str, int], str]
) -> Tally:
    moefit = str(Path(sys.executable).parent / "moefit")
    command = [
        moefit, "serve", str(copy), "--port", str(PORT), "--memory", given.most,
        "--dtype", given.dtype, "--context", "1024",
    ]  # fmt: skip
    tally, end = Tally(), time.monotonic() + 60 * given.minutes
    server = subprocess.Popen(command)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=300) as http:
            await until_ready(http, server)
            name = (await http.get("/v1/models")).json()["data"][0]["id"]
            clients = [
                one_client(http, name, random.Random(given.seed + n), expected, tally, end)
                for n in range(given.clients)
            ]
            await asyncio.gather(
                *clients,
                turn_the_dial(http, given, tally, end),
                lose_a_file(copy, tally, end),
                watch(http, server, tally, end),
            )
            assert server.poll() is None, "the server ended"
    finally:
        server.terminate()
        server.wait(60)
    return tally


async def until_ready(http: httpx.AsyncClient, server: Any) -> None:
    for _ in range(300):
        assert server.poll() is None, "the server ended"
        try:
            if (await http.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(1)
    raise SystemExit("the server did not become ready")


async def one_client(
    http: httpx.AsyncClient,
    name: str,
    chance: random.Random,
    expected: dict[tuple[str, int], str],
    tally: Tally,
    end: float,
) -> None:
    while time.monotonic() < end:
        prompt, tokens = chance.choice(list(expected))
        hang_up = chance.random() < 1 / 3
        body = {
            "model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "stream": hang_up or chance.random() < 0.5,
        }  # fmt: skip
        try:
            text = await (streamed if body["stream"] else plain)(http, body, hang_up)
        except Failed as error:
            tally.refused_or_failed += 1
            tally.errors[str(error)] = tally.errors.get(str(error), 0) + 1
            await asyncio.sleep(0.5)
            continue
        except (httpx.HTTPError, NoEnd) as error:
            tally.without_an_end += 1
            tally.errors[repr(error)] = tally.errors.get(repr(error), 0) + 1
            continue
        if text is None:
            tally.hung_up += 1
            continue
        tally.finished += 1
        if text != expected[prompt, tokens]:
            tally.wrong += 1
            print(f"wrong: {prompt!r}: {text!r}, not {expected[prompt, tokens]!r}", flush=True)


class Failed(Exception):
    """The server reported that a request failed."""


class NoEnd(Exception):
    """A stream ended without its final event."""


async def plain(http: httpx.AsyncClient, body: dict[str, Any], _hang_up: bool) -> str | None:
    response = await http.post("/v1/completions", json=body)
    if response.status_code != 200:
        raise Failed(kind(response.json()))
    return response.json()["choices"][0]["text"]


async def streamed(http: httpx.AsyncClient, body: dict[str, Any], hang_up: bool) -> str | None:
    """Return the whole text; None if the client disconnected after the first chunk."""
    pieces: list[str] = []
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise Failed(kind(json.loads(await response.aread())))
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return "".join(pieces)
            if not line.startswith("data: "):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise Failed(kind(chunk))
            pieces += [choice["text"] for choice in chunk["choices"]]
            if hang_up:
                return None
    raise NoEnd(f"after {len(pieces)} pieces")


def kind(body: dict[str, Any]) -> str:
    return f"{body['error'].get('type')}: {str(body['error'].get('message'))[:60]}"


async def turn_the_dial(
    http: httpx.AsyncClient, given: argparse.Namespace, tally: Tally, end: float
) -> None:
    chance = random.Random(given.seed)
    least, most = parse_bytes(given.least), parse_bytes(given.most)
    while time.monotonic() < end:
        await asyncio.sleep(5)
        response = await http.post("/v1/memory", json={"bytes": chance.randint(least, most)})
        tally.budget_changes += 1
        if response.status_code != 200:
            tally.budget_changes_failed += 1
            tally.errors[kind(response.json())] = tally.errors.get(kind(response.json()), 0) + 1


async def lose_a_file(copy: Path, tally: Tally, end: float) -> None:
    """Empty a shard for a while, so that reads are too short; its inode stays."""
    shard = sorted(copy.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    while time.monotonic() + 40 < end:
        await asyncio.sleep(30)
        with shard.open("r+b") as file:
            file.truncate(len(whole) // 4)
        tally.outages += 1
        await asyncio.sleep(6)
        with shard.open("r+b") as file:
            file.write(whole)
        os.sync()


async def watch(http: httpx.AsyncClient, server: Any, tally: Tally, end: float) -> None:
    """Compare the process's resident set with the current budget ten times per second."""
    page, minute = os.sysconf("SC_PAGE_SIZE"), time.monotonic()
    while time.monotonic() < end:
        before = (await http.get("/v1/memory")).json()["budget"]["total"]
        resident = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * page
        after = (await http.get("/v1/memory")).json()["budget"]["total"]
        tally.samples += 1
        if (excess := resident - max(before, after)) > 0:
            tally.samples_above_budget += 1
            tally.worst_excess_bytes = max(tally.worst_excess_bytes, excess)
        if time.monotonic() >= minute:
            tally.process_bytes_by_minute.append(resident)
            minute += 60
            print(f"{format_bytes(resident)}: {tally.finished} finished, {tally.wrong} wrong")
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    main()
