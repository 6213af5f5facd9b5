"""Measure tokens/s of 16 requests at once: moefit's engine, llama.cpp and transformers.

    python benchmarks/batch_speed.py FOLDER --formats int4-nearest [--sequences 16] [--own FILE]
        [--rivals llama.cpp,llama.cpp-repacked,transformers] [--gguf FILE] [--rival-python PYTHON]
        [--prompt-tokens 128] [--new-tokens 48] [--threads 2] [--rounds 1] [--under COMMAND]
        [--save NAME]

All start together with random prompts of the same length. moefit's engine samples each request's
tokens, as its server does; for rivals see batch_rivals.py. With `--own` moefit serves a GGUF file
(`--formats native`), and FOLDER needs a configuration only. Decoding is timed from the moment when
every request has its first token, until one has its last. Each system runs in a process of its own
(after COMMAND), and all take turns in rounds; medians.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from threading import Event as Flag
from typing import Any

import batch_rivals
import record
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

import moefit
from moefit.engine.api import Event, FinishedEvent, SamplingParams, TokenEvent
from moefit.engine.engine import Engine, EngineSettings

SPEEDS = ("tokens_per_second", "decode_tokens_per_second", "prompt_tokens_per_second")


def main() -> None:
    arguments = parse()
    batch = make_batch(arguments)
    if arguments.one:
        print(json.dumps(one(batch, arguments.one, arguments.own or batch.folder)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for name in filter(None, arguments.formats.split(",")):
            command = [sys.executable, *sys.argv, "--one", name]
            rounds.setdefault(f"moefit {name}", []).append(run(command, arguments, batch))
        for name in filter(None, arguments.rivals.split(",")):
            python = sys.executable if name == "transformers" else arguments.rival_python
            command = [python, batch_rivals.__file__, name]
            rounds.setdefault(name, []).append(run(command, arguments, batch))
    results = {
        name: {
            **found[-1],
            **{speed: median(one[speed] for one in found) for speed in SPEEDS},
            "rounds": {speed: [one[speed] for one in found] for speed in SPEEDS},
        }
        for name, found in rounds.items()
    }
    Console().print(table(results))
    if arguments.save:
        notes = "random weights and prompts; moefit samples, llama.cpp decodes given tokens"
        print(record.write("batch-speed", results, notes=notes, suffix=arguments.save))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--formats", default="int4-nearest")
    parser.add_argument("--rivals", default="")
    parser.add_argument("--rival-python", default=sys.executable)
    parser.add_argument("--gguf", default="")
    parser.add_argument("--own", type=Path)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--under", default="", metavar="COMMAND")
    parser.add_argument("--save", metavar="NAME")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_batch(arguments: argparse.Namespace) -> batch_rivals.Batch:
    config = AutoConfig.from_pretrained(arguments.folder)
    words = config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = arguments.sequences, arguments.prompt_tokens + arguments.new_tokens
    ids_BT = torch.randint(0, words, shape, generator=generator)
    return batch_rivals.Batch(
        folder=str(arguments.folder),
        gguf=arguments.gguf,
        threads=arguments.threads,
        prompts=ids_BT[:, : arguments.prompt_tokens].tolist(),
        decode=ids_BT[:, arguments.prompt_tokens :].tolist(),
    )


def run(
    command: list[str], arguments: argparse.Namespace, batch: batch_rivals.Batch
) -> dict[str, Any]:
    command = [*shlex.split(arguments.under), *command]
    given = json.dumps(asdict(batch))
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed: {done.stderr[-2000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    print(command[-1], line, file=sys.stderr, flush=True)
    return json.loads(line)


def one(batch: batch_rivals.Batch, format: str, model: str | Path) -> dict[str, Any]:
    """Measure moefit's engine with all experts of a model in memory."""
    torch.set_num_threads(batch.threads)
    new = len(batch.decode[0])
    context = len(batch.prompts) * (len(batch.prompts[0]) + new + 2)
    with moefit.load(model, context=context, precision=format, dense_precision=format) as served:
        served.set_residents(
            {block: range(one.num_experts) for block, one in served.blocks.items()}
        )
        engine = Engine(served, EngineSettings(max_concurrency=len(batch.prompts)))
        engine.start()
        heard = [Times() for _ in batch.prompts]
        sampling = SamplingParams(max_tokens=new + 1, ignore_eos=True, seed=0)
        began = time.perf_counter()
        for prompt, times in zip(batch.prompts, heard, strict=True):
            engine.submit(prompt, sampling, times)
        for times in heard:
            times.finished.wait()
        engine.close()
    started = max(times.all[0] for times in heard)
    until = min(times.all[-1] for times in heard)
    ended = max(times.all[-1] for times in heard)
    decoded = sum(sum(started < at <= until for at in times.all) for times in heard)
    return {
        **batch_rivals.speeds(batch, started - began, ended - started),
        "decode_tokens_per_second": decoded / (until - started),
    }


class Times:
    """A listener that notes when each token arrives."""

    def __init__(self) -> None:
        self.all: list[float] = []
        self.finished = Flag()

    def __call__(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self.all.append(time.perf_counter())
        if isinstance(event, FinishedEvent):
            self.finished.set()


def table(results: dict[str, Any]) -> Table:
    sequences = next(iter(results.values()))["sequences"]
    out = Table(title=f"{sequences} requests at once, tokens/s", title_justify="left")
    for name in ("system", "all", "decoding", "prompts"):
        out.add_column(name, justify="left" if name == "system" else "right")
    for name, one in results.items():
        out.add_row(name, *(f"{one[speed]:.1f}" for speed in SPEEDS))
    return out


if __name__ == "__main__":
    main()
