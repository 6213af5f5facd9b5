"""Compare dense, sparse and DS-MoE runs of scaling_runs.py, and fit laws to them.

    python benchmarks/scaling_law.py RUNS [--bootstrap 200] [--save NAME]

Runs of equal total size and tokens are compared pair by pair, without a law. Forms are fitted as
`moefit law fit` does, to those groups of runs that are enough for them; errors of extrapolation are
of fits without the two runs of most compute of each kind. The DS-MoE models are scored under
sparse rules too, since a DS-MoE reads few bytes only under one. Runs that are not there yet are
named.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scaling_runs import SEQUENCE, Planned, card_of, grid

from moefit.advise.fitting import FitSettings, fit_law
from moefit.advise.forms import CHINCHILLA, JOINT, YUN, Form
from moefit.advise.runs import Run, Runs, read_runs
from moefit.advise.shapes import Count
from moefit.errors import DataError
from moefit.evaluate.loading import load_full_model
from moefit.evaluate.perplexity import Text, score
from moefit.moe.routing import Rule
from moefit.train.config import read_config
from moefit.train.data.tokens import prepare
from moefit.train.run_folder import read_log

RULES = ("top_k:2", "top_k:2:renormalize", "threshold:0.48")
BYTES = 2  # of a weight in bf16
HELD_OUT = 2  # runs of each kind
FEWEST = 3  # pairs for an interval
COUNTS = {"total": Count.total, "active": Count.active}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A finished run.

    Attributes:
        run: Which.
        total: Parameters without embeddings.
        embeddings: Of the tied input and output matrix.
        active: Parameters without embeddings that a token reads under the model's own rule.
        loss: On held-out text under that rule, in nats per token.
        rules: Loss above that of all experts, on the same tokens, and mean active parameters
            under sparse rules; of DS-MoE only.
    """

    run: Planned
    total: int
    embeddings: int
    active: int
    loss: float
    rules: dict[str, tuple[float, int]]


def measured(run: Planned, folder: Path, tokens: int) -> Measured:
    """Return the sizes and losses of a finished run.

    Args:
        run: Which.
        folder: Of the run.
        tokens: Most held-out tokens to score under other rules.
    """
    card = card_of(run)
    loss = [one["loss"] for one in read_log(folder) if one["kind"] == "eval"][-1]
    rules: dict[str, tuple[float, int]] = {}
    if run.kind == "dsmoe":
        config = read_config(folder / "config.yaml", [])
        data = prepare(config.data, seq_len=SEQUENCE)
        ids_T = torch.from_numpy(data.held_out.open().astype("int64"))
        text = Text(
            ids_T=ids_T,
            text_bytes=data.held_out.text_bytes,
            context=SEQUENCE,
            max_tokens=tokens,
            batch_size=16,
        )
        model, _ = load_full_model(str(folder))
        dense, *sparse = score(model, text, [Rule.parse(rule) for rule in ("dense", *RULES)])
        rules = {one.rule: (one.loss - dense.loss, one.active_parameters) for one in sparse}
    return Measured(
        run=run,
        total=card.total_without_embeddings,
        embeddings=card.head_matrix,
        active=card.active(card.inference_rule),
        loss=loss,
        rules=rules,
    )


def pairs(runs: list[Measured], first: str, second: str) -> list[tuple[str, float]]:
    """Return loss of `second` less that of `first` at equal size, tokens, and experts if both have.

    Args:
        runs: Finished runs.
        first: A kind.
        second: Another kind.
    """
    found = []
    for one in runs:
        for other in runs:
            alike = (one.run.size, one.run.tokens) == (other.run.size, other.run.tokens)
            experts = first == "dense" or one.run.experts == other.run.experts
            if (one.run.kind, other.run.kind) == (first, second) and alike and experts:
                found.append((other.run.name, other.loss - one.loss))
    return found


def interval(values: list[float], seed: int = 0) -> list[float] | None:
    """Return the 95% bootstrap interval of a mean; None of fewer than three values."""
    if len(values) < FEWEST:
        return None
    generator = np.random.default_rng(seed)
    means = [np.mean(generator.choice(values, len(values))) for _ in range(10_000)]
    return [float(end) for end in np.percentile(means, (2.5, 97.5))]


def expansion(run: Planned) -> float:
    """Return all over active experts in training."""
    return run.experts / 2 if run.kind == "sparse" else 1.0


def law_runs(runs: list[Measured], kinds: tuple[str, ...], count: str, form: Form) -> Runs:
    """Return runs for a fit, with N as `count` says, and E, if the form has it, as `expansion`."""
    used = tuple(
        Run(
            name=one.run.name,
            parameters=float(one.total if count == "total" else one.active),
            tokens=float(one.run.steps * 1024),
            experts=expansion(one.run) if form is not CHINCHILLA else 1.0,
            loss=one.loss,
        )
        for one in runs
        if one.run.kind in kinds
    )
    return Runs(used=used, left_out={}, counts=COUNTS[count])


def largest(runs: list[Measured]) -> set[str]:
    """Return the names of the two runs of most compute of each kind."""
    names: set[str] = set()
    for kind in {one.run.kind for one in runs}:
        own = [one for one in runs if one.run.kind == kind]
        own.sort(key=lambda one: one.total * one.run.tokens)
        names |= {one.run.name for one in own[-HELD_OUT:]}
    return names


def fitted(
    runs: list[Measured], kinds: tuple[str, ...], count: str, form: Form, bootstrap: int
) -> dict[str, Any]:
    """Fit a form to some kinds, and to those that are not held out; return coefficients and errors.

    Args:
        runs: Finished runs.
        kinds: Which to fit to.
        count: `total` or `active`: which parameters N counts.
        form: The formula.
        bootstrap: Resamplings for intervals.
    """
    away = largest(runs)
    used = law_runs(runs, kinds, count, form)
    kept = [one for one in runs if one.run.name not in away]
    try:
        fit = fit_law(used, form, FitSettings(bootstrap=bootstrap))
    except DataError as error:
        return {"refused": str(error)}
    found: dict[str, Any] = {
        "coefficients": dict(fit.coefficients),
        "intervals": {name: list(ends) for name, ends in fit.intervals.items()},
        "rms_log10": fit.rms_log10,
        "leave_out_rms_log10": fit.left_out and fit.left_out.rms_log10,
        "others": {
            kind: residuals(fit.coefficients, form, law_runs(runs, (kind,), count, form))
            for kind in ("dense", "sparse", "dsmoe")
        },
    }
    try:
        smaller = fit_law(law_runs(kept, kinds, count, form), form, FitSettings(bootstrap=0))
        held_out = [one for one in runs if one.run.name in away]
        found["extrapolation"] = residuals(
            smaller.coefficients, form, law_runs(held_out, kinds, count, form)
        )
    except DataError as error:
        found["extrapolation_refused"] = str(error)
    return found


def residuals(coefficients: Any, form: Form, runs: Runs) -> dict[str, float]:
    """Return measured less predicted loss in nats of each run."""
    if not runs.used:
        return {}
    predicted_R = form.loss(coefficients, runs.points)
    return {
        one.name: one.loss - float(predicted)
        for one, predicted in zip(runs.used, predicted_R, strict=True)
    }


def compare(runs: list[Measured], bootstrap: int) -> dict[str, Any]:
    """Return all comparisons and fits."""
    results: dict[str, Any] = {"pairs": {}, "laws": {}}
    for first, second in (("dense", "dsmoe"), ("dense", "sparse"), ("sparse", "dsmoe")):
        found = pairs(runs, first, second)
        if found:
            values = [value for _, value in found]
            results["pairs"][f"{second} less {first}"] = {
                "nats": dict(found),
                "mean": float(np.mean(values)),
                "interval": interval(values),
            }
    every = ("dense", "sparse", "dsmoe")
    for kinds in (every, ("dense", "dsmoe"), ("dense", "sparse"), ("dense",), ("dsmoe",)):
        for count in COUNTS:
            if kinds != every and kinds != ("dense", "sparse") and count == "active":
                continue  # all parameters of these are active in training
            for form in (CHINCHILLA, YUN, JOINT):
                if form is not CHINCHILLA and "sparse" not in kinds:
                    continue  # they have one E
                name = f"{form.name}, {' + '.join(kinds)}, N {count}"
                results["laws"][name] = fitted(runs, kinds, count, form, bootstrap)
    return results


def show(runs: list[Measured], results: dict[str, Any]) -> None:
    """Print the runs and what follows from them."""
    table = Table("run", "total", "active", "loss", *RULES)
    for one in runs:
        rules = [
            f"{one.rules[rule][0]:+.3f} ({one.rules[rule][1]:,})" if one.rules else ""
            for rule in RULES
        ]
        table.add_row(one.run.name, f"{one.total:,}", f"{one.active:,}", f"{one.loss:.4f}", *rules)
    Console(width=150).print(table)
    for name, found in results["pairs"].items():
        print(f"{name}: {found['mean']:+.4f} nats, interval {found['interval']}: {found['nats']}")
    for name, found in results["laws"].items():
        if "refused" in found:
            print(f"{name}: {found['refused']}")
            continue
        means = {kind: float(np.mean(list(by.values()))) for kind, by in found["others"].items()}
        print(
            f"{name}: rms {found['rms_log10']:.4f}, measured less predicted {means}, "
            f"extrapolation {found.get('extrapolation', found.get('extrapolation_refused'))}"
        )


_COLOURS = {"dense": "tab:blue", "sparse": "tab:orange", "dsmoe": "tab:green"}


def draw(runs: list[Measured], path: Path) -> None:
    """Draw loss over bytes of the model and over bytes that a token reads, by tokens and kind."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = ("memory: bytes of all weights", "bytes read per token")
    for one in runs:
        colour, alpha = _COLOURS[one.run.kind], 0.35 + 0.3 * (math.log2(one.run.tokens) + 2)
        sizes = (one.total, one.active)
        for axis, size in zip(axes, sizes, strict=True):
            x = BYTES * (size + one.embeddings)
            axis.plot(x, one.loss, "o", color=colour, alpha=min(1.0, alpha), ms=5)
            label = f"{one.run.experts}" if one.run.experts > 1 else ""
            axis.annotate(f"{label} {one.run.tokens:g}M", (x, one.loss), fontsize=5)
        for rule, marker in zip(RULES[1:], ("^", "x"), strict=True):
            if one.rules:
                above, active = one.rules[rule]
                x = BYTES * (active + one.embeddings)
                axes[1].plot(x, one.loss + above, marker, color=colour, ms=5)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xscale("log")
        axis.set_xlabel(f"{title}, bf16, embeddings included")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss, nats")
    for kind, colour in _COLOURS.items():
        axes[0].plot([], [], "o", color=colour, label=kind)
    axes[1].plot([], [], "^", color="tab:green", label="dsmoe, top_k:2:renormalize")
    axes[1].plot([], [], "x", color="tab:green", label="dsmoe, threshold:0.48")
    for axis in axes:
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--bootstrap", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=65536, help="scored under sparse rules")
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    folders = {run.name: arguments.runs / run.name for run in grid()}
    there = [path for path in folders.values() if (path / "log.jsonl").is_file()]
    checked = read_runs(there, counts=Count.total)
    done = {Path(one.name).name for one in checked.used}
    runs = [
        measured(run, folders[run.name], arguments.tokens) for run in grid() if run.name in done
    ]
    missing = sorted(folders.keys() - done)
    results = compare(runs, arguments.bootstrap)
    show(runs, results)
    print(f"not finished: {', '.join(missing) or 'none'}")
    if arguments.save:
        notes = (
            "N without embeddings; experts of sparse runs are all over active ones; losses on "
            "65,536 held-out tokens; losses under sparse rules above that of all experts, on "
            f"{arguments.tokens:,} tokens; one seed, learning rates not tuned by size"
        )
        rows = {"runs": [asdict(one) for one in runs], "not finished": missing, **results}
        path = record.write("scaling-law", rows, notes=notes, suffix=arguments.save)
        draw(runs, path.with_suffix(".png"))
        print(path)


if __name__ == "__main__":
    main()
