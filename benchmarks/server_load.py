"""Measure servers under a recorded load: throughput, time to first token, time between tokens.

    python benchmarks/make_checkpoint.py olmoe-server FOLDER --tokenizer reference
    python benchmarks/server_load.py FOLDER TRACE.csv --text TEXT [--concurrency 1,4,16] [--save]

Lengths of prompts and responses are those of the Azure traces
(github.com/Azure/AzurePublicDataset), divided by --scale. N clients send the requests in the
trace's order, each as soon as the previous one is complete. moefit and `transformers serve`, with
and without its continuous batching, get the same requests, one server at a time in several rounds.
Decoding one sequence without a server is the ceiling of concurrency 1.
"""

import argparse
import asyncio
import csv
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import record
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PORT = 8731
BIN = Path(sys.executable).parent
TIMEOUT = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One request."""

    prompt: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Arrival times of a response's chunks, in seconds since its request."""

    times: tuple[float, ...]
    prompt_tokens: int
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="where prompts are cut from")
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--scale", type=float, default=8.0, help="divides the trace's lengths")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", help="moefit's budget")
    parser.add_argument("--systems", default="moefit,transformers,transformers-batching")
    parser.add_argument("--name", default="")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    works = read_works(given)
    results: dict[str, Any] = {"plain decoding, tokens/s": plain_decoding(given.model)}
    print(json.dumps(results), flush=True)
    for _ in range(given.rounds):
        for system in given.systems.split(","):
            for number in map(int, given.concurrency.split(",")):
                measured = asyncio.run(one_run(system, given, works, number))
                row = results.setdefault(f"{system}, {number} clients", [])
                row.append(measured)
                print(system, number, json.dumps(measured), flush=True)
    if given.save:
        notes = (
            f"{given.requests} requests per run, lengths of {given.trace.stem} divided by "
            f"{given.scale:g}; random weights; a run is one server process, warmed up with two "
            "requests."
        )
        print(record.write("server-load", results, notes=notes, suffix=given.name))


def read_works(given: argparse.Namespace) -> list[Work]:
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    text = given.text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    works, start = [], 0
    with given.trace.open() as file:
        for row in csv.DictReader(file):
            length = scaled(row["ContextTokens"], given.scale)
            start = start if start + length < len(ids) else 0
            prompt = tokenizer.decode(ids[start : start + length])
            works.append(Work(prompt=prompt, tokens=scaled(row["GeneratedTokens"], given.scale)))
            start += length
            if len(works) == given.requests:
                break
    return works


def scaled(length: str, scale: float) -> int:
    return max(2, round(int(length) / scale))


def plain_decoding(model: Path, tokens: int = 64) -> float:
    """Return tokens per second of transformers' generate for one sequence after a warm-up."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    ids = torch.arange(1, 33)[None]
    speeds = []
    for new in (8, tokens, tokens, tokens):
        began = time.perf_counter()
        loaded.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        speeds.append(new / (time.perf_counter() - began))
    return max(speeds[1:])


def command(system: str, given: argparse.Namespace, clients: int) -> list[str]:
    if system == "moefit":
        budget = ["--memory", given.memory] if given.memory else []
        tokens = 2048 * clients
        return [
            str(BIN / "moefit"), "serve", str(given.model), "--port", str(PORT),
            "--max-concurrency", str(clients), "--context", str(tokens), *budget,
        ]  # fmt: skip
    batching = ["--continuous-batching"] if system == "transformers-batching" else []
    return [
        str(BIN / "transformers"), "serve", str(given.model), "--port", str(PORT),
        "--host", "127.0.0.1", "--device", "cpu", *batching,
    ]  # fmt: skip


async def one_run(
    system: str, given: argparse.Namespace, works: list[Work], clients: int
) -> dict[str, float]:
    log = Path("/tmp") / f"server-load-{system}.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command(system, given, clients), stdout=out, stderr=subprocess.STDOUT
        )
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{PORT}", timeout=TIMEOUT
        ) as client:
            await until_ready(client, server, log)
            name = str(given.model)  # transformers lists models of the Hub only
            if system == "moefit":
                name = (await client.get("/v1/models")).json()["data"][0]["id"]
            for work in works[:2]:
                await ask(client, name, work)
            return await under_load(client, name, works, clients)
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


async def until_ready(client: httpx.AsyncClient, server: Any, log: Path) -> None:
    for _ in range(TIMEOUT):
        if server.poll() is not None:
            raise SystemExit(f"the server ended: {log.read_text()[-2000:]}")
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(1)
    raise SystemExit("the server did not become ready")


async def under_load(
    client: httpx.AsyncClient, name: str, works: list[Work], clients: int
) -> dict[str, float]:
    queue, answers = list(reversed(works)), []

    async def one_client() -> None:
        while queue:
            answers.append(await ask(client, name, queue.pop()))

    began = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    first = [one.times[0] for one in answers]
    gaps = [b - a for one in answers for a, b in zip(one.times, one.times[1:], strict=False)]
    return {
        "seconds": round(seconds, 2),
        "answer tokens/s": round(sum(one.tokens for one in answers) / seconds, 2),
        "all tokens/s": round(sum(one.tokens + one.prompt_tokens for one in answers) / seconds, 2),
        "first token p50": quantile(first, 0.5),
        "first token p99": quantile(first, 0.99),
        "between tokens p50": quantile(gaps, 0.5),
        "between tokens p99": quantile(gaps, 0.99),
    }


def quantile(values: list[float], share: float) -> float:
    if len(values) < 2:
        return round(values[0], 4) if values else float("nan")
    return round(statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1], 4)


async def ask(client: httpx.AsyncClient, name: str, work: Work) -> Answer:
    body = {
        "model": name,
        "prompt": work.prompt,
        "max_tokens": work.tokens,
        "temperature": 0,
        "stream": True,
    }
    if "/" not in name or not Path(name).is_dir():  # transformers always reports usage
        body["stream_options"] = {"include_usage": True}
    began, times, usage = time.perf_counter(), [], {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise SystemExit(str(chunk))
            usage = chunk.get("usage") or usage
            if any(choice.get("text") for choice in chunk["choices"]):
                times.append(time.perf_counter() - began)
    times = times or [time.perf_counter() - began]
    return Answer(
        times=tuple(times),
        prompt_tokens=usage["prompt_tokens"],
        tokens=usage["completion_tokens"],
    )


if __name__ == "__main__":
    main()
