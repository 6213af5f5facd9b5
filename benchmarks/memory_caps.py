"""Measure tokens/s of moefit's policies and of llama.cpp under decreasing memory limits.

    python benchmarks/memory_caps.py FOLDER --gguf FILE --under 'COMMAND {mib}'
        [--shares 1,0.67,0.5,0.36,0.25] [--policies exact@int8,exact@auto+int8] [--rivals llama.cpp]
        [--rival-python PYTHON] [--new-tokens 24] [--warm-up 8] [--threads 2] [--save NAME]

Limits are shares of the bytes of the GGUF file (moefit export --format gguf --type q8_0). Each run
is a process of its own in a cgroup with this limit, created by COMMAND, for example `systemd-run
--scope -p MemoryMax={mib}M`. moefit's budget is 3% below the limit; page cache counts in a cgroup
and is dropped before each run. Policies are those of serving_speed.py; their formats must be
packed. All decode the same random tokens, whose nearly uniform routing is the worst case for
caches.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import record
import rivals
import serving_speed
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from moefit.serve.memory.budget import format_bytes

SPARE = 1.03  # cap over budget


def main() -> None:
    arguments = parse()
    whole = arguments.gguf.stat().st_size
    results: dict[str, Any] = {}
    for share in map(float, arguments.shares.split(",")):
        results[f"{share:.0%}"] = under_cap(arguments, round(share * whole))
        Console(width=120).print(table(results))
    if arguments.save:
        notes = "caps as shares of the 8-bit GGUF file; random tokens, near-uniform routing"
        path = record.write("memory-caps", results, notes=notes, suffix=arguments.save)
        draw(results, path.with_suffix(".png"))
        print(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--under", required=True)
    parser.add_argument("--shares", default="1,0.67,0.5,0.36,0.25")
    parser.add_argument("--policies", default="exact@int8,exact@auto+int8")
    parser.add_argument("--rivals", default="llama.cpp")
    parser.add_argument("--rival-python", default=sys.executable)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", metavar="NAME")
    return parser.parse_args()


def under_cap(arguments: argparse.Namespace, cap: int) -> dict[str, Any]:
    """Run all policies and rivals with one limit."""
    budget = int(cap / SPARE)
    under = [f"*={arguments.under.format(mib=cap >> 20)}"]
    options = [
        *("--memory", str(budget), "--prompt-tokens", str(arguments.prompt_tokens)),
        *("--new-tokens", str(arguments.new_tokens), "--warm-up", str(arguments.warm_up)),
        *("--context", str(arguments.context), "--threads", str(arguments.threads)),
    ]
    runs: dict[str, Any] = {}
    for name in filter(None, arguments.policies.split(",")):
        command = [sys.executable, serving_speed.__file__, str(arguments.folder), *options]
        runs[name] = serving_speed.in_own_process(name, [*command, "--one", name], under)
    given = argparse.Namespace(**vars(arguments), memory=str(budget), own=None)
    for name in filter(None, arguments.rivals.split(",")):
        command = [arguments.rival_python, rivals.__file__, name]
        work = serving_speed.work(given)
        runs[name] = serving_speed.in_own_process(name, command, under, work)
    return {"cap": cap, "budget": budget, "runs": runs}


def table(results: dict[str, Any]) -> Table:
    """Return a table of tokens/s by limit, with ratios to the first rival."""
    names = list(dict.fromkeys(name for one in results.values() for name in one["runs"]))
    made = Table(title="tokens/s, decoding", title_justify="left")
    for column in ("cap", "", *names):
        made.add_column(column, justify="right")
    for share, one in results.items():
        runs = one["runs"]
        made.add_row(share, format_bytes(one["cap"]), *(_cell(runs.get(name)) for name in names))
    return made


def _cell(run: dict[str, Any] | None) -> str:
    if run is None or "failed" in run:
        return "-" if run is None else "failed"
    return f"{run['tokens_per_second']:.2f}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot tokens/s over the limit on logarithmic axes."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(name for one in results.values() for name in one["runs"])
    for name in names:
        points = [
            (one["cap"] / 2**30, one["runs"][name]["tokens_per_second"])
            for one in results.values()
            if "failed" not in one["runs"][name]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([one["cap"] / 2**30 for one in results.values()])
    axes.set_xticklabels([f"{one['cap'] / 2**30:.1f}" for one in results.values()])
    axes.minorticks_off()
    axes.set_xlabel("memory, GiB")
    axes.set_ylabel("tokens/s, decoding")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
