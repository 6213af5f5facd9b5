"""Measure calibrated packing of one expert: moments of its inputs, encoding, error of its outputs.

    python benchmarks/calibrated_pack_speed.py [--width 2048] [--units 1024] [--tokens 2560]
        [--formats int4,int3,int2] [--threads 1,2] [--rounds 3] [--ways torch,avx512,...]
        [--before SRC] [--save NAME]

An expert of OLMoE's shape with random weights, and random tokens with most variance in few
directions. Moments: the expert runs over its rows, and each matrix's second moments are factored,
once for all formats. Encoding and measuring the error (decode, run again, compare outputs) are by
format. Times are in seconds, the best of rounds, by torch and each level of the kernels. --before:
the same with another version of moefit, given by its `src` folder, in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import record
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, OlmoeConfig

from moefit.moe.families import Layout
from moefit.moe.layouts import find_blocks
from moefit.quant import gptq
from moefit.quant.cpu_kernels import kernels
from moefit.quant.format import Weights, parse_format
from moefit.quant.gptq import CalibratedExpert
from moefit.quant.library import LEVELS
from moefit.serve.cache.slot import allocate_slot

BEFORE = "before"


def main() -> None:
    arguments = parse()
    results: dict[str, Any] = {}
    if arguments.before:
        results[BEFORE] = elsewhere(arguments)
    wanted = arguments.ways.split(",") if arguments.ways else ways()
    for way in [BEFORE] if arguments.one else wanted:
        with by(way):
            results[way] = Expert(arguments).measured()
    if arguments.one:
        print(json.dumps(results[BEFORE]))
        return
    Console(width=110).print(table(results))
    if arguments.save:
        notes = (
            "seconds of one expert, the best of rounds: moments once for all formats, encode and "
            "judge by format; loss: squared error of its outputs over their squares"
        )
        print(record.write("calibrated-pack-speed", results, notes=notes, suffix=arguments.save))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--units", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2560)
    parser.add_argument("--formats", default="int4,int3,int2")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", help="torch and levels of the kernels; all that are here")
    parser.add_argument("--before", type=Path, metavar="SRC")
    parser.add_argument("--save", metavar="NAME")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def ways() -> list[str]:
    compiled = kernels(LEVELS[-1])
    return ["torch", *(LEVELS[: LEVELS.index(compiled.level) + 1] if compiled else ())]


@contextmanager
def by(way: str) -> Iterator[None]:
    """Encode with torch or one level of the kernels for the duration of the context."""
    if way == BEFORE:
        yield
        return
    with mock.patch.object(gptq, "kernels", lambda: kernels(way)):
        yield


def elsewhere(arguments: argparse.Namespace) -> Any:
    """Run this file with another version of moefit and return its results."""
    drop = sys.argv.index("--before")
    rest = [*sys.argv[1:drop], *sys.argv[drop + 2 :]]
    environment = {**os.environ, "PYTHONPATH": str(arguments.before)}
    command = [sys.executable, __file__, "--one", *rest]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Expert:
    """One expert and its weighted tokens."""

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        torch.manual_seed(0)
        self._layout = olmoe(arguments.width, arguments.units)
        self._native = {
            short: (torch.randn(spec.shape) * spec.shape[1] ** -0.5).bfloat16()
            for short, spec in self._layout.specs.items()
        }
        few_KD = torch.randn(arguments.width // 8, arguments.width) * arguments.width**-0.5
        self._x_ND = torch.randn(arguments.tokens, len(few_KD)) @ few_KD
        self._x_ND += 0.1 * torch.randn_like(self._x_ND)
        self._count_N = torch.rand(arguments.tokens)

    def measured(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for threads in self._arguments.threads.split(","):
            torch.set_num_threads(int(threads))
            seconds, expert = self._timed(self._calibrated)
            found[f"{threads} threads"] = {"moments": seconds} | {
                name: self._format(expert, name) for name in self._arguments.formats.split(",")
            }
        return found

    def _calibrated(self) -> CalibratedExpert:
        return CalibratedExpert(self._layout, self._native, self._x_ND, self._count_N)

    def _format(self, expert: CalibratedExpert, name: str) -> dict[str, float]:
        slot = allocate_slot(parse_format(name), self._layout.specs, torch.device("cpu"))
        weights: Weights = slot.tensors
        encode, _ = self._timed(lambda: expert.encode(weights))
        judge, loss = self._timed(lambda: expert.relative_error(slot.format, weights))
        return {"encode": encode, "judge": judge, "loss": loss}

    def _timed(self, act: Callable[[], Any]) -> tuple[float, Any]:
        best, made = float("inf"), None
        for _ in range(self._arguments.rounds):
            began = time.perf_counter()
            made = act()
            best = min(best, time.perf_counter() - began)
        return best, made


def olmoe(width: int, units: int) -> Layout:
    config = OlmoeConfig(
        hidden_size=width,
        intermediate_size=units,
        num_hidden_layers=1,
        num_experts=2,
        num_experts_per_tok=1,
        vocab_size=64,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return find_blocks(model)[0].layout


def table(results: dict[str, Any]) -> Table:
    made = Table(title="one expert, seconds", title_justify="left")
    for name in ("way", "threads", "moments", "format", "encode", "judge", "loss"):
        made.add_column(name, justify="left" if name in ("way", "format") else "right")
    for way, by_threads in results.items():
        for threads, found in by_threads.items():
            for name, one in found.items():
                if name != "moments":
                    numbers = f"{one['encode']:.3f}", f"{one['judge']:.3f}", f"{one['loss']:.5f}"
                    moments = f"{found['moments']:.3f}"
                    made.add_row(way, threads.split()[0], moments, name, *numbers)
    return made


if __name__ == "__main__":
    main()
