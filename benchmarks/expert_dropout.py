"""What does a model that was trained with experts absent lose when only some are in memory?

    python benchmarks/expert_dropout.py base=MODEL[,MODEL...] NAME=MODEL[,MODEL...]...
        [--text FILE] [--rules RULE,...] [--formats int4,int2] [--save NAME]

The first name is the base that the others are compared with; all must have the same tokenizer.
Several models of one name are seeds: the first is compared with the base's first, and so on, and
means over seeds come with their standard errors. `expert_dropout_runs.py` trains such models.
Measurements on the same text, which none of them has seen (by default the held-out standard
library):

- in one pass per window, over `--full-tokens`: perplexity with all experts and its difference to
  the base's, also by inference rule (`--rules`, of DS-MoE models), and with few experts per layer,
  chosen as for `fixed` below;
- with few experts: step by step over `--tokens`, as a server decodes, with a share of each layer's
  experts in memory, against the same model with all of them. `bounded-0.6` is bounded mode that may
  substitute 60% of a token's router weight. `fixed` is virtual mode without swaps:
  the residents are the first ones of the order that the model records, or, where it records none,
  the most important ones of other windows of the same text;
- with `--formats`: `fixed` with experts in these formats, all and a third of them, against the same
  model with all experts in its own dtype.

`--shares ""` leaves out the second. With `--points FILE` a run that was stopped goes on where it
was.
"""

import argparse
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import record
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from subject import Subject, as_text, summarised
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moefit.evaluate.baselines import fix_residents
from moefit.evaluate.loading import load_full_model
from moefit.evaluate.passage import read_text
from moefit.evaluate.stepwise import score_steps
from moefit.moe.expert_dropout import dropout_record
from moefit.serve.model import ServedModel
from moefit.serve.windows import Windows
from moefit.train.adapt import RUN
from moefit.train.config import read_config
from moefit.train.memory.expert_dropout import AllowedExperts, first_experts, measured_order
from moefit.train.run_folder import CONFIG

SHARES = (1.0, 0.5, 1 / 3, 0.25, 0.125)
SETTINGS = (
    "expert_dropout",
    "budget_aware",
    "rounding",
    "loss",
    "optimizer",
    "steps",
    "batch_size",
    "seq_len",
    "seed",
)
DEFAULT_MODES = "exact,bounded,virtual"  # `fixed` is in the passes over whole windows


def mode_settings(mode: str) -> dict[str, Any]:
    """Return the settings of a mode, such as `fixed` or `bounded-0.6`.

    >>> mode_settings("bounded-0.6")
    {'mode': 'bounded', 'bound': 0.6}
    """
    name, _, bound = mode.partition("-")
    settings: dict[str, Any] = {"mode": "virtual" if name == "fixed" else name}
    return {**settings, "bound": float(bound)} if bound else settings


def main() -> None:
    arguments = parse()
    pairs = (pair.split("=", 1) for pair in arguments.models)
    models = {name: folders.split(",") for name, folders in pairs}
    if len({len(folders) for folders in models.values()}) > 1:
        raise SystemExit("give as many models (seeds) of each name as of the base")
    seeds = range(len(next(iter(models.values()))))
    full = [
        full_memory({name: folders[seed] for name, folders in models.items()}, arguments)
        for seed in seeds
    ]
    known = Points(arguments.points)
    results: dict[str, Any] = {}
    for name, folders in models.items():
        of_seeds = [
            {
                "trained": trained(folders[seed]),
                "full_memory": full[seed][name],
                "points": points_of(name, seed, folders[seed], arguments, known),
            }
            for seed in seeds
        ]
        results[name] = {"mean": mean(of_seeds), "seeds": of_seeds}
        Console(width=120).print(table(name, results[name], results[next(iter(models))]))
    if arguments.save:
        path = record.write("expert-dropout", results, notes=NOTES, suffix=arguments.save)
        draw(results, path.with_suffix(".png"))
        print(path)


NOTES = (
    "mean: over seeds, with the standard error of the mean over seeds (null for one seed); "
    "full_memory: perplexity with all experts; to_base: the difference to the base of the same "
    "seed, with its standard error over windows; rules: the same by inference rule; few: with only "
    "so many experts per layer, chosen as for fixed, in one pass per window; loss: perplexity step "
    "by step over that of the same model with all experts in its own dtype, less one; error: the "
    "standard error of its logarithm over windows; bytes_per_token: read from storage; fixed: "
    "virtual mode without swaps"
)


class Points:
    """Measured points, kept in a file if there is one, so that a stopped run goes on."""

    def __init__(self, file: Path | None):
        lines = file.read_text().splitlines() if file and file.exists() else []
        self._file, self._known = file, {self._key(one): one for one in map(json.loads, lines)}

    @staticmethod
    def _key(labels: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(labels[name] for name in ("model", "seed", "format", "mode", "share"))

    def measured(self, labels: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> Any:
        """Return the point with these labels; measure it if it is not known."""
        key = self._key(labels)
        if key not in self._known:
            self._known[key] = {**labels, **measure()}
            if self._file:
                with self._file.open("a") as file:
                    file.write(json.dumps(self._known[key]) + "\n")
        return self._known[key]


def points_of(
    name: str, seed: int, model: str, arguments: argparse.Namespace, known: Points
) -> list[dict[str, Any]]:
    """Measure a model step by step."""
    modes, formats = arguments.modes.split(","), list(filter(None, arguments.formats.split(",")))
    shares = list(map(float, filter(None, arguments.shares.split(","))))
    wanted = [
        ("native", mode, share) for share in shares for mode in (modes if share < 1 else modes[:1])
    ]
    wanted += [(format_, "fixed", share) for format_ in formats for share in (1.0, 1 / 3)]
    if not wanted:
        return []
    subject = Subject(model, None, arguments)
    points = []
    for format_, mode, share in wanted:
        labels = {"model": name, "seed": seed, "format": format_, "mode": mode}
        labels["share"] = round(share, 4)
        measure = partial(measured, subject, format_, mode, share)
        points.append(known.measured(labels, measure))
    return points


def mean(of_seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over seeds of what a table shows."""
    full = [one["full_memory"] for one in of_seeds]
    few = {
        count: {key: _mean([one["few"][count][key] for one in full]) for key in ("loss", "to_base")}
        for count in full[0]["few"]
    }
    points = [
        {
            **{key: same[0][key] for key in ("format", "mode", "share")},
            **{key: _mean([one[key] for one in same]) for key in ("loss", "bytes_per_token")},
        }
        for same in zip(*(one["points"] for one in of_seeds), strict=True)
    ]
    return {
        "perplexity": _mean([one["perplexity"] for one in full]),
        "to_base": _mean([one["to_base"] for one in full]),
        "few": few,
        "points": points,
    }


def _mean(values: list[float]) -> dict[str, float | None]:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": fmean(values), "error": error}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL[,MODEL...]")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--full-tokens", type=int, default=32768)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--modes", default=DEFAULT_MODES)
    parser.add_argument("--shares", default=",".join(f"{share:.4f}" for share in SHARES))
    parser.add_argument("--rules", default="", help="inference rules, such as dense,top_k:4")
    parser.add_argument("--formats", default="", help="formats of experts, such as int4,int2")
    parser.add_argument("--points", type=Path, help="measured points, kept")
    parser.add_argument("--save", metavar="NAME")
    return parser.parse_args()


def trained(model: str) -> dict[str, Any]:
    """How the model was trained, as far as the folder of a run or an adaptation says."""
    folder = Path(model)
    runs = (one / CONFIG for one in (folder, folder.parent, folder / RUN))
    run = next((one for one in runs if one.is_file()), None)
    found = dropout_record(load_full_model(model)[0].config)
    settings: dict[str, Any] = {}
    if run is not None:
        config = read_config(run, []).model_dump(mode="json", exclude={"out", "data", "model"})
        settings = {name: config[name] for name in SETTINGS}
    losses = None if found is None else found.as_dict()["held_out_loss"]
    return {**settings, "held_out_loss_by_experts": losses}


@torch.inference_mode()
def full_memory(models: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexities with all experts and with few, and the differences to the first model's."""
    losses: dict[str, dict[int, list[float]]] = {}
    by_rule: dict[str, dict[str, list[float]]] = {}
    rules = list(filter(None, arguments.rules.split(",")))
    for name, model in models.items():
        loaded, tokenizer = load_full_model(model, dtype=torch.float32)
        text = read_text(arguments.text, tokenizer, arguments.context, 2 * arguments.full_tokens)
        windows = [window_L for ids_BL in text.batches() for window_L in ids_BL]
        windows = [window_L for window_L in windows if len(window_L) == arguments.context + 1]
        calibration = [window_L[None, :-1] for window_L in windows[1:17:2]]
        losses[name] = losses_by_count(loaded.eval(), windows[::2], calibration)
        by_rule[name] = {
            rule: [_loss(loaded, window_L, {"rule": rule}) for window_L in windows[::2]]
            for rule in rules
        }
    base = next(iter(models))
    return {
        name: {
            **_compared(losses[name], losses[base]),
            "rules": {
                rule: _against(own, by_rule[base][rule]) for rule, own in by_rule[name].items()
            },
        }
        for name in models
    }


def losses_by_count(
    model: PreTrainedModel, windows: list[Tensor], calibration: list[Tensor]
) -> dict[int, list[float]]:
    """By the number of experts per layer, the mean loss of each window."""
    found = dropout_record(model.config)
    order = found.resident_order if found is not None else ()
    order = order or measured_order(model, calibration)
    num_experts = int(model.config.num_experts)
    allowed = AllowedExperts(model)
    losses: dict[int, list[float]] = {}
    for count in (max(1, round(share * num_experts)) for share in SHARES):
        allowed_LE = first_experts(order, count, num_experts)
        limit = allowed.arguments(allowed_LE[:, None] if count < num_experts else None)
        losses[count] = [_loss(model, window_L, limit) for window_L in windows]
    allowed.remove()
    return losses


def _compared(own: dict[int, list[float]], base: dict[int, list[float]]) -> dict[str, Any]:
    everything = max(own)
    few = {count: _difference(some, own[everything]) for count, some in own.items()}
    return {
        **_against(own[everything], base[everything]),
        "windows": len(own[everything]),
        "experts": everything,
        "few": {
            count: {
                "loss": loss,
                "error": spread,
                "to_base": _difference(own[count], base[everything])[0],
            }
            for count, (loss, spread) in few.items()
            if count < everything
        },
    }


def _against(own: list[float], base: list[float]) -> dict[str, float]:
    """Perplexity of windows, and its difference to the base's on the same ones with its error."""
    to_base, error = _difference(own, base)
    return {"perplexity": math.exp(fmean(own)), "to_base": to_base, "error": error}


def _difference(some: list[float], others: list[float]) -> tuple[float, float]:
    """The relative difference of perplexities on the same windows, and its standard error."""
    differences = [a - b for a, b in zip(some, others, strict=True)]
    return math.expm1(fmean(differences)), stdev(differences) / math.sqrt(len(differences))


def _loss(model: Any, window_L: Tensor, limit: dict[str, Any]) -> float:
    logits_TV = model(input_ids=window_L[None, :-1], use_cache=False, **limit).logits[0]
    return F.cross_entropy(logits_TV.float(), window_L[1:]).item()


def measured(subject: Subject, format_: str, mode: str, share: float) -> dict[str, Any]:
    """One mode at one share of the experts of each layer, on a model loaded for it."""
    ids_T = torch.cat(subject.calibration)
    context = len(ids_T) if mode == "fixed" else subject.context
    own = nullcontext() if format_ == "native" else subject.load(mode="exact")
    settings = {"context": context, "precision": format_, **mode_settings(mode)}
    with own as reference, subject.load(**settings) as served:
        counts = [max(1, round(share * one.num_experts)) for one in served.blocks.values()]
        served.set_memory(served.budget.total_for_slots(counts))
        if mode == "fixed":
            _fix(served, ids_T)
        else:
            score_steps(served, as_text(subject.calibration[0]))  # warm
        scores = [
            score_steps(served, as_text(window_L), reference=reference)
            for window_L in subject.scored
        ]
    return summarised(scores)


def _fix(served: ServedModel, ids_T: Tensor) -> None:
    """Fix the residents: by the model's order, or by importance on other windows."""
    record_ = dropout_record(served.model.config)
    if record_ is None or not record_.resident_order:
        fix_residents(served, "importance", calibration=Windows(ids_T[None]))
    else:
        served.set_mode("virtual", residency="fixed")
        served.hold_first_experts()


def table(name: str, result: dict[str, Any], base: dict[str, Any]) -> Table:
    means = result["mean"]
    out = Table(
        title=f"{name}: perplexity {means['perplexity']['mean']:.2f} in full memory, "
        f"{_shown(means['to_base'])} to the base; with few experts "
        + ", ".join(f"{few} {_shown(one['loss'])}" for few, one in means["few"].items()),
        title_justify="left",
    )
    for heading in ("format", "experts", "mode", "loss", "base's", "read/token", "base's"):
        out.add_column(heading, justify="left" if heading == "mode" else "right", no_wrap=True)
    for one, other in zip(means["points"], base["mean"]["points"], strict=True):
        out.add_row(
            one["format"],
            f"{one['share']:.0%}",
            one["mode"],
            _shown(one["loss"]),
            _shown(other["loss"]),
            *(f"{x['bytes_per_token']['mean'] / 1024:.0f} KiB" for x in (one, other)),
        )
    return out


def _shown(value: dict[str, Any]) -> str:
    error = "" if value["error"] is None else f" +- {value['error']:.1%}"
    return f"{value['mean']:+.1%}{error}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the losses with few experts, a panel for each mode, and losses over bytes at a third."""
    measured = {point["mode"] for result in results.values() for point in result["mean"]["points"]}
    modes = [mode for mode in ("virtual", "bounded", "exact") if mode in measured]
    third = [1] if "exact" in modes else []
    panels = 1 + len(modes) + len(third)
    figure = Figure(figsize=(4.3 * panels, 4.2), layout="constrained")
    axes_of = figure.subplots(1, panels, squeeze=False)[0]
    for name, result in results.items():
        few = result["mean"]["few"].items()
        experts = int(result["seeds"][0]["full_memory"]["experts"])
        _line(axes_of[0], name, [(100 * int(n) / experts, one["loss"], 100) for n, one in few])
        for axes, mode in zip(axes_of[1:], modes, strict=False):
            key, scale = ("bytes_per_token", 1 / 1024) if mode == "exact" else ("loss", 100)
            points = [one for one in result["mean"]["points"] if one["format"] == "native"]
            line = [one for one in points if one["mode"] == mode]
            line = sorted(line, key=lambda one: one["share"])
            _line(axes, name, [(100 * one["share"], one[key], scale) for one in line])
        for _ in third:
            _draw_bytes(axes_of[-1], name, result["mean"])
    titles = ("fixed, one pass per window", *modes, *("a third: exact and bounded" for _ in third))
    for axes, title in zip(axes_of, titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("KiB per token" if title.startswith("a third") else "experts in memory, %")
        axes.set_ylabel("KiB per token" if title == "exact" else "perplexity above all experts, %")
        axes.grid(alpha=0.3)
        if title in ("fixed, one pass per window", "virtual"):
            axes.set_yscale("symlog", linthresh=5)
    if third:
        axes_of[-1].set_ylabel("perplexity above the base in full memory, %")
        axes_of[-1].set_xlim(left=0)
    axes_of[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_bytes(axes: Any, name: str, means: dict[str, Any]) -> None:
    """Draw what a third of the experts costs beside the base in full memory, over what it reads."""
    found = sorted(
        (
            one["bytes_per_token"]["mean"] / 1024,
            100 * ((1 + means["to_base"]["mean"]) * (1 + one["loss"]["mean"]) - 1),
        )
        for one in means["points"]
        if one["format"] == "native"
        and abs(one["share"] - 1 / 3) < 1e-3
        and one["mode"].startswith(("exact", "bounded"))
    )
    axes.plot(*zip(*found, strict=True), "o-", ms=4, label=name)


def _line(axes: Any, name: str, points: list[tuple[float, dict[str, Any], float]]) -> None:
    xs, values = [x for x, _, _ in points], [one["mean"] * scale for _, one, scale in points]
    errors = [(one["error"] or 0) * scale for _, one, scale in points]
    axes.errorbar(xs, values, errors, fmt="o-", ms=4, capsize=2, label=name)


if __name__ == "__main__":
    main()
