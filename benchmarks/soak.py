"""Soak test of the server: everything that it can do at once, and everything that goes wrong.

    python benchmarks/soak.py MODEL [--minutes 30] [--clients 6] [--dtype float32] [--save]
        [--capped COMMAND]

Clients send completions, conversations that grow, structured output, tools, sampled requests and
the Responses API, plain or streamed; a third of them disconnect mid-stream, and others are
cancelled. Prefixes are kept, in a folder on a small file system that is full for half of the time;
tokens are drafted by prompt lookup, by a draft model (the served one) or not. The KV cache is
small: it grows for several requests at once and for long ones, and gives back what it grew by.
Every few seconds the budget changes or begins to follow free memory; occasionally a shard (of a
copy of the checkpoint) cannot be read for a few seconds; once a minute the server is killed while
it writes a file of prefixes, files are damaged, and it is started again on the same folder; schemas
that are too large to compile arrive.

Every complete answer is compared: see `soak_requests`. In bfloat16, where transformers rounds
differently, the model's own answers are those of a served model that computes nothing else. Counted
too: requests that do not end, samples above the current budget, growth of the process. Ctrl-C ends
the test early.

The small file system is a tmpfs in a namespace of this process's own (Linux, `unshare`). --capped
names a command that runs the server in a memory control group: COMMAND MIB SERVER...
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2 as httpx
import record
import torch
from soak_faults import Faults
from soak_requests import (
    TEMPLATE,
    Ask,
    Assembled,
    Script,
    answer_of,
    greedy_scripts,
    is_valid,
    other_scripts,
    salted,
)
from soak_server import Clock, Server, Tally

import moefit
from moefit.api import folder_of
from moefit.evaluate.loading import load_full_model

APART = "MOEFIT_SOAK_APART"  # set in the process that has a namespace of its own
TIMEOUT = 3600  # long, since all of the test may be stopped for a while
CONTEXT = 768  # tokens of KV cache from the start, in which each request fits but the long ones
AFTER_OUTAGE = 90.0  # seconds in which errors of an outage may still be answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--every", type=float, default=5, help="seconds between budgets")
    parser.add_argument("--kill", type=float, default=60, help="seconds between kills, on average")
    parser.add_argument("--disk", type=int, default=16, help="MiB of the small file system")
    parser.add_argument("--capped", help="runs the server in a control group")
    parser.add_argument("--cap", type=int, default=800, help="MiB of the control group")
    parser.add_argument("--log", type=Path, help="where to leave the server's log")
    parser.add_argument("--port", type=int, default=8733)
    parser.add_argument("--answers", type=Path, help="keeps what answers must be, for later runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    if APART not in os.environ:
        os.environ[APART] = "1"
        os.execvp("unshare", ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv])
    with TemporaryDirectory() as folder:
        tally = soak_in(Path(folder), given)
    results = asdict(tally)
    print(json.dumps(results, indent=1))
    if given.save:
        notes = (
            f"{tally.minutes:g} minutes, {given.dtype}, {given.clients} clients, another budget "
            f"every {given.every:g} s, killed every {given.kill:g} s on average, prefixes on "
            f"{given.disk} MiB. Features are totals over all starts, up to the last look before "
            "each kill, in tokens but for experts and damaged files."
        )
        print(record.write("soak", results, notes=notes, suffix=given.dtype))


def soak_in(folder: Path, given: argparse.Namespace) -> Tally:
    """Run the test with all files in a folder."""
    copy, disk, tally = folder / "model", folder / "disk", Tally()
    shutil.copytree(folder_of(given.model), copy)
    config = copy / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATE}))
    disk.mkdir()
    serve = [str(copy), "--dtype", given.dtype, "--max-concurrency", "8"]
    scripts = expected(folder, copy, serve, given)
    limited = [
        "--context", str(CONTEXT), "--memory", "700MiB", "--memory-headroom", "256MiB",
        "--prefix-cache-dir", str(disk / "prefixes"), "--prefix-cache-disk",
        f"{given.disk * 3 // 4}MiB",
    ]  # fmt: skip
    before = [given.capped, str(given.cap)] if given.capped else []
    drafts = ["ngram", f"draft:{copy}", "off"]
    server = Server([*serve, *limited], given.port, drafts, folder, before, tally)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={given.disk}m", "soak", str(disk)]
    subprocess.run(mount, check=True)
    try:
        asyncio.run(soak(given, server, (copy, disk), scripts, tally))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return tally


def expected(
    folder: Path, model: Path, serve: Sequence[str], given: argparse.Namespace
) -> list[Script]:
    """Return all requests with what the answers must be, computed or from the file."""
    if given.answers is not None and given.answers.exists():
        kept = json.loads(given.answers.read_text())
        return [[Ask(**ask) for ask in script] for script in kept]
    scripts = own_answers(model, given.dtype)
    roomy = [*serve, "--prefix-cache", "off", "--context", "4096"]
    alone = Server(roomy, given.port, ["off"], folder, [], Tally())
    scripts += asyncio.run(answers_alone(alone, other_scripts()))
    shutil.rmtree(folder / "cache", ignore_errors=True)
    if given.answers is not None:
        given.answers.write_text(json.dumps([[asdict(ask) for ask in one] for one in scripts]))
    return scripts


def own_answers(model: Path, dtype: str) -> list[Script]:
    """Return greedy requests with the model's own answers, computed alone."""
    if dtype == "float32":
        loaded, tokenizer = load_full_model(str(model), dtype=torch.float32)
        return greedy_scripts(continuations(loaded, tokenizer))
    with moefit.load(str(model), dtype=getattr(torch, dtype)) as served:
        return greedy_scripts(continuations(served, served.tokenizer))


def continuations(loaded: Any, tokenizer: Any) -> Callable[[str, int], str]:
    """Return what computes how `loaded.generate` continues a prompt."""

    def own(prompt: str, tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = loaded.generate(ids, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return own


async def answers_alone(server: Server, scripts: Sequence[Script]) -> list[Script]:
    """Return scripts with the answers of a server that computes one request at a time."""
    found = []
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT) as http:
        await server.start(http)
        try:
            for script in scripts:
                asks = []
                for ask in script:
                    answer = await plain(http, ask)
                    assert is_valid(ask, answer), (ask, answer)
                    asks.append(replace(ask, expected=answer))
                found.append(asks)
        finally:
            server.end()
    return found


async def soak(
    given: argparse.Namespace,
    server: Server,
    paths: tuple[Path, Path],
    scripts: Sequence[Script],
    tally: Tally,
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT) as http:
        try:
            await server.start(http)
            clock = Clock(60 * given.minutes)
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, clock.stop)
            clients = [
                Client(http, server, random.Random(given.seed + n), tally).run(scripts, clock)
                for n in range(given.clients)
            ]
            await asyncio.gather(
                clock.run(), *clients, Faults(http, server, paths, given, tally, clock).run()
            )
            tally.minutes = round(clock.ran / 60, 1)
            assert server.alive(), "the server ended"
        finally:
            server.end()
            server.read_log()
            if given.log:
                shutil.copy(server.log, given.log)


class Failed(Exception):
    """The server reported that a request failed.

    Args:
        body: Of the error.
        status: Of HTTP; None in a stream.
    """

    def __init__(self, body: dict[str, Any], status: int | None):
        error = body["error"]
        super().__init__(f"{status or 'stream'} {error['code']}: {str(error['message'])[:80]}")
        self.code = error["code"]


class NoEnd(Exception):
    """A stream ended without its final event."""


class Client:
    """Sends requests one after the other and compares the answers.

    Args:
        http: A client.
        server: The server.
        chance: Chooses.
        tally: What is counted.
    """

    def __init__(
        self, http: httpx.AsyncClient, server: Server, chance: random.Random, tally: Tally
    ):
        self._http, self._server, self._chance, self._tally = http, server, chance, tally

    async def run(self, scripts: Sequence[Script], clock: Clock) -> None:
        """Send scripts, each kind as often as the others, until the clock's end."""
        kinds = sorted({script[0].kind for script in scripts})
        by_kind = [[one for one in scripts if one[0].kind == kind] for kind in kinds]
        while clock.goes_on():
            script = self._chance.choice(self._chance.choice(by_kind))
            new = f"{self._chance.random()}"
            for ask in salted(script, self._chance.choice([None, None, "shared", new])):
                await self._server.up.wait()
                if clock.goes_on():
                    await self._one(ask)

    async def _one(self, ask: Ask) -> None:
        tally, start = self._tally, self._server.starts
        hang_up = self._chance.random() < 1 / 3
        try:
            if hang_up or self._chance.random() < 0.5:
                answer = await streamed(self._http, ask, hang_up)
            else:
                answer = await plain(self._http, ask)
        except Failed as error:
            self._failed(ask, error)
            await asyncio.sleep(0.5)
        except (httpx.HTTPError, NoEnd) as error:
            if start != self._server.starts or not self._server.up.is_set():
                tally.cut_by_kill += 1
            else:
                tally.without_an_end += 1
                tally.count("failed", repr(error)[:120])
        else:
            self._compare(ask, answer)

    def _compare(self, ask: Ask, answer: str | None) -> None:
        tally = self._tally
        if answer is None:
            tally.hung_up += 1
            return
        tally.count("finished", ask.kind)
        tally.invalid += not is_valid(ask, answer)
        if answer != ask.expected:
            tally.wrong += 1
            print(f"wrong: {ask}: {answer}", flush=True)

    def _failed(self, ask: Ask, error: Failed) -> None:
        if error.code == "cancelled_by_operator":
            self._tally.cancelled += 1
            return
        if ask.kind == "long" and error.code == "context_length_exceeded":
            self._tally.without_room += 1  # beside experts, in the budget of that moment
            return
        self._tally.count("failed", str(error))
        if time.monotonic() > self._server.outage_ended + AFTER_OUTAGE:
            self._tally.failed_without_cause += 1


async def plain(http: httpx.AsyncClient, ask: Ask) -> str:
    response = await http.post(ask.url, json=ask.body)
    if response.status_code != 200:
        raise Failed(response.json(), response.status_code)
    return answer_of(ask.url, response.json())


async def streamed(http: httpx.AsyncClient, ask: Ask, hang_up: bool) -> str | None:
    """Return the answer; None if the client disconnected after the first chunk."""
    whole = Assembled(ask.url)
    async with http.stream("POST", ask.url, json={**ask.body, "stream": True}) as response:
        if response.status_code != 200:
            raise Failed(json.loads(await response.aread()), response.status_code)
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return whole.answer()
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Failed(event, None)
            whole.add(event)
            if hang_up:
                return None
    raise NoEnd("a stream ended without its last event")


if __name__ == "__main__":
    main()
