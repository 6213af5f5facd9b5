"""Measure the quality of serving with less expert memory, by policy, and the bytes read.

    python benchmarks/quality_against_budget.py reference=reference --rule top_k:4 --save reference
        [--policies bounded,virtual] [--shares 0.5,0.33] [--tokens 1536] [--text FILE]
    python benchmarks/quality_against_budget.py dsmoe=RUN smoe=RUN --text FILE --save comparison

Decodes windows of a text token by token with each policy and share of expert bytes, and compares
with the same model in exact mode on the same tokens. Windows alternate between scoring and
calibration (for `frequency` and to warm up every policy). Each point is a newly loaded model. Bytes
read per token determine the speed where storage is slower than computing; tokens/s of a tiny model
in the page cache do not carry over to real models. `--policies` selects POLICIES by prefix;
`sweep` adds SWEEP. `--points FILE` resumes a stopped run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import record
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from subject import Subject, as_text, summarised

from moefit.evaluate.baselines import fix_residents
from moefit.evaluate.stepwise import score_steps
from moefit.serve.cache.scores import VirtualExpertManager
from moefit.serve.windows import Windows

Settings = dict[str, Any]

SHARES = (1.0, 0.67, 0.5, 0.33, 0.25)
POLICIES: dict[str, Settings] = {
    "exact": {"mode": "exact"},
    "on-demand": {"mode": "exact", "eviction": "lru"},
    "bounded": {"mode": "bounded"},
    "bounded 0.2, no ramp": {"mode": "bounded", "bound": 0.2, "ramp": 0.0},
    "bounded 0.5": {"mode": "bounded", "bound": 0.5},
    "virtual": {"mode": "virtual", "prefill": "exact"},
    "virtual, prefill too": {"mode": "virtual"},
    "fixed by norm": {"fixed": "norm"},
    "fixed by frequency": {"fixed": "frequency"},
    "fixed at random 0": {"fixed": "random", "seed": 0},
    "fixed at random 1": {"fixed": "random", "seed": 1},
}
SWEEP: dict[str, Settings] = {
    "bounded 0.1, no ramp": {"mode": "bounded", "bound": 0.1, "ramp": 0.0},
    "bounded 0.25, no ramp": {"mode": "bounded", "bound": 0.25, "ramp": 0.0},
    "bounded 0.3, no ramp": {"mode": "bounded", "bound": 0.3, "ramp": 0.0},
    "bounded 0.5, no ramp": {"mode": "bounded", "bound": 0.5, "ramp": 0.0},
    "bounded 0.3, no ramp, mass not kept": {
        "mode": "bounded", "bound": 0.3, "ramp": 0.0, "keep_mass": False,
    },
    "bounded 0.2": {"mode": "bounded", "bound": 0.2},
    "bounded 0.4": {"mode": "bounded", "bound": 0.4},
    "bounded 0.3, ramp 0.5": {"mode": "bounded", "bound": 0.3, "ramp": 0.5},
    "bounded, evicting by importance": {"mode": "bounded", "eviction": "importance"},
    "virtual, mass not kept": {"mode": "virtual", "prefill": "exact", "keep_mass": False},
    "virtual, 2 each step, no margin": {
        "mode": "virtual", "prefill": "exact",
        "manager": VirtualExpertManager(every=1, max_swaps=2, margin=0.0),
    },
    "virtual, 2 each 8 steps, half-life 256": {
        "mode": "virtual", "prefill": "exact", "half_life_tokens": 256.0,
        "manager": VirtualExpertManager(every=8, max_swaps=2, margin=0.25),
    },
}  # fmt: skip
TRIVIAL = ("on-demand", "bounded", "fixed")
"""Not measured with all experts resident, where they equal `exact` or `virtual`."""


def main() -> None:
    arguments = parse()
    rules = dict(one.rpartition("=")[::2] for one in arguments.rule)
    shares = [float(share) for share in arguments.shares.split(",")]
    known = known_points(arguments.points)
    results: dict[str, list[dict[str, Any]]] = {}
    for pair in arguments.models:
        name, _, model = pair.partition("=")
        subject = Subject(model, rules.get(name, rules.get("")), arguments)
        results[name] = []
        for policy, settings, share in track(points(arguments.policies, shares), name):
            key = (name, policy, share)
            if key not in known:
                labels = {"model": name, "policy": policy, "share": share}
                known[key] = {**labels, **measured(subject, share, settings)}
                if arguments.points:
                    with arguments.points.open("a") as file:
                        file.write(json.dumps(known[key]) + "\n")
            results[name].append(known[key])
        add_bytes_saved(results[name])
        Console(width=140).print(table(name, results[name]))
    if arguments.save:
        notes = (
            "loss: relative increase of stepwise perplexity over exact mode; error: standard error "
            "of its logarithm over windows; bytes_saved: bytes per token read in exact mode at the "
            "same share, divided by these; calibrated on other windows of the same text; tokens/s "
            "with other processes on the same cores"
        )
        path = record.write("quality-against-budget", results, notes=notes, suffix=arguments.save)
        draw(results, path.with_suffix(".png"))
        print(path)


def known_points(file: Path | None) -> dict[tuple[str, str, float], dict[str, Any]]:
    """Read the points of an earlier run."""
    lines = file.read_text().splitlines() if file and file.exists() else []
    found = [json.loads(line) for line in lines]
    return {(one["model"], one["policy"], one["share"]): one for one in found}


def points(names: str, shares: list[float]) -> list[tuple[str, Settings, float]]:
    """Return policy, settings and share of each point."""
    return [
        (policy, settings, share)
        for policy, settings in chosen(names).items()
        for share in shares
        if share < 1 or not policy.startswith(TRIVIAL)
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--rule", action="append", default=[], metavar="[NAME=]RULE")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=1152)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--policies", default="")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)))
    parser.add_argument("--points", type=Path, help="measured points, kept from run to run")
    parser.add_argument("--save", metavar="NAME")
    return parser.parse_args()


def chosen(names: str) -> dict[str, Settings]:
    """Return the policies with these prefixes; all of POLICIES by default."""
    wanted = tuple(names.split(","))
    some = {name: one for name, one in POLICIES.items() if name.startswith(wanted)}
    return some | (SWEEP if "sweep" in wanted else {})


def measured(subject: Subject, share: float, settings: Settings) -> dict[str, Any]:
    """Load a model and measure one policy at one share of expert bytes."""
    settings = dict(settings)
    fixed, seed = settings.pop("fixed", None), settings.pop("seed", 0)
    ids_T = torch.cat(subject.calibration)
    context = len(ids_T) if fixed else subject.context
    with subject.load(context=context, **settings) as served:
        budget = served.budget
        experts = budget.all_resident_bytes - budget.fixed
        served.set_memory(budget.fixed + round(share * experts))
        if fixed:
            fix_residents(served, fixed, calibration=Windows(ids_T[None]), seed=seed)
        else:
            score_steps(served, as_text(subject.calibration[0]))
        scores = [score_steps(served, as_text(window_L)) for window_L in subject.scored]
        policy = served.policy
    summary = summarised(scores)
    return {
        **summary,
        "settings": {name: str(value) for name, value in settings.items()},
        "policy_in_force": {name: getattr(policy, name) for name in policy.__slots__},
    }


def add_bytes_saved(points: list[dict[str, Any]]) -> None:
    exact = {one["share"]: one["bytes_per_token"] for one in points if one["policy"] == "exact"}
    for one in points:
        read, base = one["bytes_per_token"], exact.get(one["share"])
        one["bytes_saved"] = base / read if base and read else None


def table(name: str, points: list[dict[str, Any]]) -> Table:
    full, tokens = points[0]["full"], points[0]["tokens"]
    title = f"{name}: {tokens:,} tokens step by step; all experts: perplexity {full:.3f}"
    out = Table(title=title, title_justify="left")
    headings = (
        "policy",
        "share",
        "slots",
        "loss",
        "error",
        "KL",
        "agree",
        "moved",
        "read/token",
        "of exact's",
        "tok/s",
    )
    for heading in headings:
        out.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    for one in points:
        saved = one["bytes_saved"]
        out.add_row(
            one["policy"],
            f"{one['share']:.0%}",
            f"{one['slots']}/{one['experts']}",
            f"{one['loss']:+.2%}",
            f"{one['error']:.2%}",
            f"{one['divergence']:.4f}",
            f"{one['agreement']:.1%}",
            f"{one['substituted_mass']:.1%}",
            f"{one['bytes_per_token'] / 1024:.0f} KiB",
            f"1/{saved:.1f}" if saved else "",
            f"{one['tokens_per_second']:.0f}",
        )
    return out


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(6.5 * len(results), 7), layout="constrained")
    grid = figure.subplots(2, len(results), squeeze=False, sharex=True, sharey="row")
    for column, (name, points) in enumerate(results.items()):
        for row, key in enumerate(("loss", "bytes_per_token")):
            axes = grid[row][column]
            for policy in dict.fromkeys(one["policy"] for one in points):
                line = [one for one in points if one["policy"] == policy]
                ys = [100 * one[key] if key == "loss" else one[key] / 1024 for one in line]
                axes.plot([100 * one["share"] for one in line], ys, "o-", ms=4, label=policy)
            axes.grid(alpha=0.3)
        grid[0][column].set_title(name)
        grid[1][column].set_xlabel("share of expert bytes in memory, %")
    grid[0][0].set_yscale("symlog", linthresh=1)
    grid[0][0].set_ylabel("perplexity above all experts, %")
    grid[1][0].set_ylabel("KiB read per token")
    grid[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
