"""What does a model that was trained with experts absent lose when only some are in memory?

    python benchmarks/expert_dropout.py base=MODEL[,MODEL...] NAME=MODEL[,MODEL...]...
        [--text FILE] [--rules RULE,...] [--formats int4,int2] [--mode-tokens exact=1024,...]
        [--save NAME]

The first name is the base that the others are compared with; all must have the same tokenizer.
Several models of one name are seeds: the first is compared with the base's first, and so on, and
means over seeds come with their standard errors and 95% intervals (Student's t).
`expert_dropout_runs.py` trains such models. Measurements on the same text, which none of them has
seen (by default the held-out standard library):

- in one pass per window, over `--full-tokens`: perplexity with all experts and its difference to
  the base's, also by inference rule (`--rules`, of DS-MoE models), and with few experts per layer,
  chosen as for `fixed` below;
- with few experts: step by step over `--tokens` (or `--mode-tokens`), as a server decodes, with a
  share of each layer's experts in memory, against the same model with all of them, and against the
  base with all of them. `bounded-0.6` is bounded mode that may substitute 60% of a token's router
  weight. `fixed` is virtual mode without swaps: the residents are the first ones of the order that
  the model records, or, where it records none, the most important ones of other windows of the
  same text;
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
from expert_dropout_picture import draw
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t
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
    mode_tokens(arguments)  # refused before anything is measured
    full = [
        full_memory({name: folders[seed] for name, folders in models.items()}, arguments)
        for seed in seeds
    ]
    known = Points(arguments.points)
    results: dict[str, Any] = {}
    base = next(iter(models))
    for name, folders in models.items():
        of_seeds = [
            {
                "trained": trained(folders[seed]),
                "full_memory": full[seed][name],
                "points": points_of(name, seed, folders[seed], arguments, known),
            }
            for seed in seeds
        ]
        of_base = results[base]["seeds"] if results else of_seeds
        results[name] = {"mean": mean(of_seeds, of_base), "seeds": of_seeds}
        Console(width=120).print(table(name, results[name], results[base]))
    if arguments.save:
        path = record.write("expert-dropout", results, notes=NOTES, suffix=arguments.save)
        draw(results, path.with_suffix(".png"))
        print(path)


NOTES = (
    "mean: over seeds, with the standard error of the mean over seeds and half of its 95% interval "
    "by Student's t (null for one seed); "
    "full_memory: perplexity with all experts; to_base: the difference to the base of the same "
    "seed, with its standard error over windows; rules: the same by inference rule; few: with only "
    "so many experts per layer, chosen as for fixed, in one pass per window; loss: perplexity step "
    "by step over that of the same model with all experts in its own dtype, less one; error: the "
    "standard error of its logarithm over windows; nats: per window, the mean loss with all "
    "experts and step by step; to_base of points: perplexity over the base's with all experts on "
    "the same windows, less one; bytes_per_token: read from storage; bytes_to_base: over the "
    "base's at the same point; fixed: virtual mode without swaps"
)


class Points:
    """Measured points, kept in a file if there is one, so that a stopped run goes on."""

    def __init__(self, file: Path | None):
        lines = file.read_text().splitlines() if file and file.exists() else []
        self._file, self._known = file, {self._key(one): one for one in map(json.loads, lines)}

    @staticmethod
    def _key(labels: dict[str, Any]) -> tuple[Any, ...]:
        names = ("model", "seed", "format", "mode", "share", "windows")
        return tuple(labels[name] for name in names)

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
    tokens = mode_tokens(arguments)
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
        labels["windows"] = tokens.get(mode, arguments.tokens) // arguments.context
        measure = partial(measured, subject, labels, share)
        points.append(known.measured(labels, measure))
    return points


def mode_tokens(arguments: argparse.Namespace) -> dict[str, int]:
    """Return the tokens of the modes that have a number of their own, as `--mode-tokens` says."""
    pairs = (one.split("=", 1) for one in filter(None, arguments.mode_tokens.split(",")))
    found = {mode: int(tokens) for mode, tokens in pairs}
    if unknown := found.keys() - {*arguments.modes.split(","), "fixed"}:
        raise SystemExit(f"--mode-tokens: not measured: {', '.join(sorted(unknown))}")
    if any(not arguments.context <= tokens <= arguments.tokens for tokens in found.values()):
        raise SystemExit("--mode-tokens: from --context to --tokens")
    return found


def mean(of_seeds: list[dict[str, Any]], of_base: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over seeds of what a table shows."""
    full = [one["full_memory"] for one in of_seeds]
    few = {
        count: {key: _mean([one["few"][count][key] for one in full]) for key in ("loss", "to_base")}
        for count in full[0]["few"]
    }
    pairs = zip(of_seeds, of_base, strict=True)
    by_seed = [list(zip(own["points"], base["points"], strict=True)) for own, base in pairs]
    points = [
        {
            **{key: same[0][0][key] for key in ("format", "mode", "share", "windows")},
            **{key: _mean([own[key] for own, _ in same]) for key in ("loss", "bytes_per_token")},
            "to_base": _mean([_point_to_base(own, base) for own, base in same]),
            "bytes_to_base": _mean([_bytes_to_base(own, base) for own, base in same]),
        }
        for same in zip(*by_seed, strict=True)
    ]
    return {
        "perplexity": _mean([one["perplexity"] for one in full]),
        "to_base": _mean([one["to_base"] for one in full]),
        "few": few,
        "points": points,
    }


def _point_to_base(own: dict[str, Any], base: dict[str, Any]) -> float:
    pairs = zip(own["nats"], base["nats"], strict=True)
    return math.expm1(fmean(stepwise - full for (_, stepwise), (full, _) in pairs))


def _bytes_to_base(own: dict[str, Any], base: dict[str, Any]) -> float | None:
    read = base["bytes_per_token"]
    return own["bytes_per_token"] / read if read else None


def _mean(values: list[Any]) -> dict[str, float | None]:
    """Mean, standard error and half of the 95% interval; without values, nothing."""
    if None in values:
        return {"mean": None, "error": None, "interval": None}
    if len(values) < 2:
        return {"mean": fmean(values), "error": None, "interval": None}
    error = stdev(values) / math.sqrt(len(values))
    half = float(student_t.ppf(0.975, len(values) - 1)) * error
    return {"mean": fmean(values), "error": error, "interval": half}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL[,MODEL...]")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--mode-tokens", default="", help="fewer tokens for some modes, such as exact=1024"
    )
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
    everything, all_of_base = max(own), base[max(base)]  # the base may have more experts
    few = {count: _difference(some, own[everything]) for count, some in own.items()}
    return {
        **_against(own[everything], all_of_base),
        "windows": len(own[everything]),
        "experts": everything,
        "few": {
            count: {
                "loss": loss,
                "error": spread,
                "to_base": _difference(own[count], all_of_base)[0],
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


def measured(subject: Subject, labels: dict[str, Any], share: float) -> dict[str, Any]:
    """One mode at one share of the experts of each layer, on a model loaded for it."""
    format_, mode = labels["format"], labels["mode"]
    own = nullcontext() if format_ == "native" else subject.load(mode="exact")
    settings = {"precision": format_, **mode_settings(mode)}
    with own as reference, subject.load(**settings) as served:
        counts = [max(1, round(share * one.num_experts)) for one in served.blocks.values()]
        served.set_memory(served.budget.total_for_slots(counts))
        if mode == "fixed":
            _fix(served, subject)
        else:
            score_steps(served, as_text(subject.calibration[0]))  # warm
        scores = [
            score_steps(served, as_text(window_L), reference=reference)
            for window_L in subject.scored[: labels["windows"]]
        ]
    nats = [[math.log(one.full), math.log(one.stepwise)] for one in scores]
    return {**summarised(scores), "nats": nats}


def _fix(served: ServedModel, subject: Subject) -> None:
    """Fix the residents: by the model's order, or by importance on other windows."""
    record_ = dropout_record(served.model.config)
    if record_ is None or not record_.resident_order:
        # In rows: one of all tokens would be longer than those that the model was trained on.
        rows = [row_T for row_T in subject.calibration if len(row_T) == subject.context + 1]
        fix_residents(served, "importance", calibration=Windows(torch.stack(rows)))
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
    headings = ("format", "experts", "mode", "loss", "base's", "to base", "read/token", "of base's")
    for heading in headings:
        out.add_column(heading, justify="left" if heading == "mode" else "right", no_wrap=True)
    for one, other in zip(means["points"], base["mean"]["points"], strict=True):
        ratio = one["bytes_to_base"]["mean"]
        out.add_row(
            one["format"],
            f"{one['share']:.1%}",
            one["mode"],
            _shown(one["loss"]),
            _shown(other["loss"]),
            _shown(one["to_base"]),
            f"{one['bytes_per_token']['mean'] / 1024:.0f} KiB",
            "" if ratio is None else f"{ratio:.2f}",
        )
    return out


def _shown(value: dict[str, Any]) -> str:
    error = "" if value["error"] is None else f" ± {value['error']:.1%}"
    return f"{value['mean']:+.1%}{error}"


if __name__ == "__main__":
    main()
