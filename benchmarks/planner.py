"""Evaluate the planner: accuracy of its predictions, comparison with simple rules, and its time.

    python benchmarks/planner.py reference=reference [dsmoe=RUN smoe=RUN] [--text FILE]
        [--rule NAME=RULE] [--tokens 4096] [--held 20] [--steps 192] [--save NAME]

Each model's experts are packed and the model is profiled, unless there is a profile. Windows of the
text alternate between the profile and these measurements:

1. `held`: random configurations that were not used for fitting, predicted and measured: increase of
   perplexity, and tokens/s. A shared machine's speed changes within minutes, so the full model is
   timed before and after each, and the ratio of both speeds is compared with its prediction too.
2. `rules`: at 33, 25, 19 and 14% of the bf16 bytes of experts, the plan and simple rules: one
   format for all; formats at random, by frequency of use, or by output energy (`auto`); and some
   experts at native precision: uniform slots with swaps (SwapMoE), and fixed ones, the most
   frequent or random. Plans are made without fetching, as the rules are, and with it. With pymoo
   installed, also SwapMoE's planner (`swapmoe_planner.py`).
3. `times`: seconds of profiling and planning.

No other process should run.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import record
import swapmoe_planner
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from moefit.api import folder_of
from moefit.evaluate.baselines import fix_residents
from moefit.evaluate.passage import held_out_text, text_of_file
from moefit.plan.configuration import Configuration, uniform
from moefit.plan.experiments import FORMATS, Shapes, by_output_energy, policy_choices
from moefit.plan.fitting import rank_correlation
from moefit.plan.measure import MeasuredModel, fill_slots
from moefit.plan.plan_file import DEFAULT_LOSS
from moefit.plan.planner import Planner
from moefit.plan.profiler import Profiler
from moefit.plan.quality import quality_samples
from moefit.plan.reference import (
    Reference,
    Sample,
    Steps,
    make_reference,
    measure_steps,
    measure_windows,
    windows_of,
)
from moefit.plan.search import Models, placement_bytes
from moefit.quant.format import parse_format
from moefit.serve.config import BlockPlacement
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.model import ServedModel
from moefit.serve.packed.build import pack
from moefit.serve.windows import Windows

SHARES = (0.33, 0.25, 0.19, 0.14)
PACKED = ("int8", "int6", "int5", "int4", "int3", "int2")


def main() -> None:
    arguments = parse()
    rules = dict(one.split("=", 1) for one in arguments.rule)
    results: dict[str, Any] = {}
    for pair in arguments.models:
        name, _, model = pair.partition("=")
        study = Study(model, rules.get(name), arguments)
        results[name] = study.results()
        show(name, results[name])
    if arguments.save:
        notes = (
            "loss: relative increase of perplexity over the full model on the same tokens; "
            "divergence: KL from the full model's output, nats per token; bytes: of slots, as a "
            "share of all experts in bfloat16; measured on other windows of the text than the "
            "profile's"
        )
        path = record.write("planner", results, notes=notes, suffix=arguments.save)
        draw(results, path.with_suffix(".png"))
        print(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--rule", action="append", default=[], metavar="NAME=RULE")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="half of them for the profile")
    parser.add_argument("--steps", type=int, default=192, help="decoded where time or modes count")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--held", type=int, default=20)
    parser.add_argument("--save", metavar="NAME")
    return parser.parse_args()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A configuration, and how its resident experts are fixed, if they are."""

    name: str
    configuration: Configuration
    fixed: str | None = None


class Study:
    """A profiled model with its planner and the text for measurements."""

    def __init__(self, model: str, rule: str | None, arguments: argparse.Namespace):
        self.arguments = arguments
        self.subject = MeasuredModel(folder=folder_of(model), dtype=torch.bfloat16, rule=rule)
        tokenizer = AutoTokenizer.from_pretrained(self.subject.folder)
        cut = (tokenizer, arguments.context, arguments.tokens)
        text = held_out_text(*cut) if arguments.text is None else text_of_file(arguments.text, *cut)
        windows = windows_of(text)
        self.calibration, held = windows[::2], windows[1::2]
        skeleton = build_skeleton(self.subject.folder, torch.bfloat16)
        pack(skeleton, [parse_format(name) for name in PACKED])
        began = time.perf_counter()
        self.profile = Profiler(
            self.subject, self.calibration, text=arguments.text.name if arguments.text else ""
        ).run()
        profiled = time.perf_counter()
        self.planner = Planner(skeleton, self.profile, context=arguments.context)
        fitted = time.perf_counter()
        self.planner.plan(self.planner.slot_budgets.all_resident_bytes)
        self.times = {
            "profile_seconds": profiled - began,
            "fit_seconds": fitted - profiled,
            "plan_seconds": time.perf_counter() - fitted,
        }
        self.shapes: Shapes = self.profile.facts.shapes
        # Stays loaded to measure the machine's present speed.
        self.full = self.subject.load(self._native(), context=2 * arguments.context)
        fill_slots(self.full)
        self.reference: Reference = make_reference(self.full, held)

    def results(self) -> dict[str, Any]:
        held = [self._held_out(one) for one in track(list(self._drawn()), "held out")]
        rules = [
            {"share": share, **self._measured_rule(one)}
            for share in SHARES
            for one in track(list(self._rules(share)), f"rules at {share:.0%}")
        ]
        return {
            "summary": summary(held),
            "held": held,
            "rules": rules,
            "removed": removed(rules),
            "times": self.times,
            "quality_models": [
                asdict(one)
                for one in (
                    *self.planner.quality.comparison,
                    swapmoe_planner.network_error(self.profile, self.planner.features),
                )
            ],
            "latency_models": [asdict(one) for one in self.planner.latency.comparison],
            "warnings": self.planner.warnings(),
        }

    def _native(self) -> Configuration:
        return uniform(self.profile_experts, "native")

    @property
    def profile_experts(self) -> dict[str, int]:
        return self.profile.experts

    def _drawn(self) -> Iterator[Configuration]:
        """Yield random configurations: half fully resident, others exact, bounded and virtual."""
        for number in range(self.arguments.held):
            generator = random.Random(1000 + number)
            kind = ("seated", "mixed", "exact", "seated", "mixed", "exact", "bounded", "exact",
                    "bounded", "virtual")[number % 10]  # fmt: skip
            rest = generator.choice(("native", "native", "int8"))
            formats = {name: generator.choice(FORMATS) for name in self.shapes}
            if kind == "mixed":
                bits = generator.uniform(2.8, 7)
                uneven = {
                    name: [generator.random() ** 2 for _ in range(shape.num_experts)]
                    for name, shape in self.shapes.items()
                }
                yield replace(by_output_energy(self.shapes, uneven, bits), dense_precision=rest)
                continue
            slots = {
                name: shape.num_experts
                if kind == "seated"
                else max(1, round(shape.num_experts * generator.uniform(0.2, 0.9)))
                for name, shape in self.shapes.items()
            }
            mode = kind if kind in ("bounded", "virtual") else "exact"
            yield Configuration(
                placement={
                    name: BlockPlacement(slots=slots[name], formats=(formats[name],))
                    for name in self.shapes
                },
                dense_precision=rest,
                mode=mode,
                bound=generator.choice((0.1, 0.3, 0.5)) if mode == "bounded" else 0.0,
                every=generator.choice((1, 8)) if mode == "virtual" else 1,
            )

    def _held_out(self, configuration: Configuration) -> dict[str, Any]:
        before = self._full_seconds()
        measured = self._measured(Rule(name="held", configuration=configuration), timed=True)
        full_seconds = (before + self._full_seconds()) / 2
        predicted = self.planner.latency.seconds(configuration)
        return {
            "configuration": configuration.describe(),
            "predicted_loss": self.planner.quality.loss(configuration),
            "predicted_speed": 1 / predicted,
            **measured,
            "predicted_ratio": self.planner.latency.seconds(self._native()) / predicted,
            "ratio": measured["speed"] * full_seconds,
        }

    def _full_seconds(self) -> float:
        steps = Steps(windows=1, prompt=16, tokens=min(96, self.arguments.context - 16))
        seconds = measure_steps(self.full, self._native(), self.reference, steps).seconds
        assert seconds is not None
        return seconds

    def _rules(self, share: float) -> Iterator[Rule]:
        """Yield the rules for a share of the bytes, the planner's last."""
        room = self._bytes(share)
        experts = self.profile_experts
        fully_resident = [f for f in FORMATS if self._all_in(f) <= room]
        yield from self._few(room)
        if fully_resident:
            yield Rule(name="one format for all", configuration=uniform(experts, fully_resident[0]))
        if self._all_in(FORMATS[-1]) <= room:
            bits = 8 * room / sum(one.weights * one.num_experts for one in self.shapes.values())
            known = self.planner.features.blocks
            generator = random.Random(0)
            for name, shares in {
                "formats at random": {
                    block: [generator.random() ** 3 for _ in one.mass_E]
                    for block, one in known.items()
                },
                "formats by frequency": {block: one.mass_E for block, one in known.items()},
                "formats by output energy (auto)": {
                    block: one.output_energy_E for block, one in known.items()
                },
            }.items():
                yield Rule(name=name, configuration=by_output_energy(self.shapes, shares, bits))
        if still := swapmoe_planner.front_for_slots(self.planner, room, fetching=False):
            best = min(still, key=lambda one: one.loss)
            yield Rule(name="planned", configuration=best.configuration)
        yield from self._swapmoe(room)
        front = swapmoe_planner.front_for_slots(self.planner, room)
        good = [one for one in front if one.loss <= DEFAULT_LOSS]
        if good:
            free = min(good, key=lambda one: one.seconds)
            yield Rule(name="planned, fetching allowed", configuration=free.configuration)

    def _swapmoe(self, room: int) -> Iterator[Rule]:
        """Yield the plan of SwapMoE's planner: slots, formats and update interval."""
        known = all(one.rule_known for one in self.planner.features.blocks.values())
        policies = [one for one in policy_choices(known_rules=known) if one.mode == "virtual"]
        if not (policies and swapmoe_planner.available()):
            return
        samples = quality_samples(self.profile)
        network = swapmoe_planner.fit_network(samples, self.planner.features)
        models = Models(self.planner.quality, self.planner.latency, policies)
        if front := swapmoe_planner.search(models, {"native": room}, network.loss):
            best = min(front, key=lambda one: one.loss)
            yield Rule(name="SwapMoE's planner", configuration=best.configuration)

    def _few(self, room: int) -> Iterator[Rule]:
        """Yield uniform slots at native precision, and of int2 if int2 for all does not fit."""
        experts = self.profile_experts
        for format in ("native", "int4", "int2"):
            share = room / self._all_in(format)
            if share >= 1:
                continue
            slots = {name: max(1, int(share * count)) for name, count in experts.items()}
            configuration = uniform(experts, format, slots, mode="virtual")
            yield Rule(name=f"uniform slots of {format}", configuration=configuration)
            if format == "native":
                for fixed in ("frequency", "random"):
                    yield Rule(name=f"fixed by {fixed}", configuration=configuration, fixed=fixed)

    def _bytes(self, share: float) -> int:
        return round(share * self._all_in("native"))

    def _all_in(self, format: str) -> int:
        return sum(one.slot_bytes[format] * one.num_experts for one in self.shapes.values())

    def _measured_rule(self, rule: Rule) -> dict[str, Any]:
        return {
            "rule": rule.name,
            "configuration": rule.configuration.describe(),
            "predicted_loss": None if rule.fixed else self.planner.quality.loss(rule.configuration),
            **self._measured(rule, timed=rule.name.startswith("planned")),
        }

    def _measured(self, rule: Rule, *, timed: bool) -> dict[str, Any]:
        """Measure quality by window in exact mode; in other modes, and for speed, by step."""
        configuration = rule.configuration
        exact = configuration.mode == "exact"
        with self.subject.load(configuration, context=2 * self.arguments.context) as served:
            quality = measure_windows(served, configuration, self.reference) if exact else None
            steps = None
            if timed or not exact:
                self._settle(served, rule)
                steps = measure_steps(served, configuration, self.reference, self._steps())
        sample = quality or steps
        assert sample is not None
        return {
            "bytes": sum(
                placement_bytes(one, self.shapes[name])
                for name, one in configuration.placement.items()
            )
            / self._all_in("native"),
            "loss": math.expm1(sample.loss - sample.full_loss),
            "divergence": sample.divergence,
            "tokens": sample.tokens,
            **(_stepped(steps) if steps else {}),
        }

    def _settle(self, served: ServedModel, rule: Rule) -> None:
        if rule.fixed:
            ids_T = self.calibration.ids_BT[:4].flatten()
            fix_residents(served, rule.fixed, calibration=Windows(ids_T[None]))  # pyright: ignore
        else:
            fill_slots(served)

    def _steps(self) -> Steps:
        windows = max(1, self.arguments.steps // 96)
        return Steps(windows=windows, prompt=16, tokens=min(96, self.arguments.context - 16))


def _stepped(steps: Sample) -> dict[str, Any]:
    assert steps.seconds is not None
    return {"speed": 1 / steps.seconds, "misses": steps.misses, "moved": steps.moved}


def summary(held: list[dict[str, Any]]) -> dict[str, float]:
    """Return the errors of predictions for configurations that were not used for fitting."""
    loss = np.array([[one["predicted_loss"], one["loss"]] for one in held])
    speed = np.array([[one["predicted_speed"], one["speed"]] for one in held])
    ratio = np.array([[one["predicted_ratio"], one["ratio"]] for one in held])
    return {
        "median_loss_error_points": 100 * float(np.median(np.abs(loss[:, 0] - loss[:, 1]))),
        "loss_rank_correlation": rank_correlation(loss[:, 0].tolist(), loss[:, 1].tolist()),
        "median_speed_error": float(np.median(np.abs(speed[:, 0] / speed[:, 1] - 1))),
        "speed_rank_correlation": rank_correlation(speed[:, 0].tolist(), speed[:, 1].tolist()),
        "median_speed_ratio_error": float(np.median(np.abs(ratio[:, 0] / ratio[:, 1] - 1))),
        "speed_ratio_rank_correlation": rank_correlation(
            ratio[:, 0].tolist(), ratio[:, 1].tolist()
        ),
    }


def removed(rules: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by share the part of the best simple rule's loss and divergence that plans avoid."""
    found: dict[str, dict[str, Any]] = {}
    for share in SHARES:
        here = [one for one in rules if one["share"] == share]
        ours = next((one for one in here if one["rule"] == "planned"), None)
        if ours is None:
            continue
        simple = [
            one
            for one in here
            if not one["rule"].startswith(("planned", "SwapMoE")) and "auto" not in one["rule"]
        ]
        found[f"{share:.0%}"] = {
            what: _removed(ours, simple, what) for what in ("loss", "divergence")
        }
    return found


def _removed(
    ours: dict[str, Any], simple: list[dict[str, Any]], what: str
) -> dict[str, str | float | None]:
    """Return that part; None if the best rule has no loss."""
    best = min(simple, key=lambda one: one[what])
    share = 1 - ours[what] / best[what] if best[what] > 0 else None
    return {"best_rule": best["rule"], "its": best[what], "planned": ours[what], "removed": share}


def show(name: str, results: Mapping[str, Any]) -> None:
    out = Console(width=150)
    out.print(name, results["summary"], results["times"], results["removed"])
    for what, columns in {
        "held": ("configuration", "predicted_loss", "loss", "predicted_ratio", "ratio", "speed"),
        "rules": ("share", "rule", "bytes", "loss", "divergence", "speed", "configuration"),
    }.items():
        table = Table(title=f"{name}: {what}", title_justify="left")
        for column in columns:
            table.add_column(column)
        for one in results[what]:
            table.add_row(*(_cell(column, one.get(column)) for column in columns))
        out.print(table)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if "loss" in column:
        return f"{value:+.2%}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


MARKS = "os^DvPX<>*h"  # markers by rule; the ten colours are not enough


def draw(results: Mapping[str, Any], path: Path) -> None:
    figure = Figure(figsize=(13, 4.4 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 2, squeeze=False, width_ratios=(1.2, 1))
    for (left, right), (name, one) in zip(rows, results.items(), strict=True):
        rules = list(dict.fromkeys(point["rule"] for point in one["rules"]))
        for rule, mark in zip(rules, cycle(MARKS)):
            line = sorted(
                (100 * point["bytes"], 100 * point["loss"])
                for point in one["rules"]
                if point["rule"] == rule
            )
            look = {"color": "black", "lw": 2.2} if rule.startswith("planned") else {"lw": 1}
            fetching = "--" if rule.endswith("fetching allowed") else "-"
            left.plot(*zip(*line, strict=True), mark + fetching, ms=5, label=rule, **look)
        left.set_yscale("symlog", linthresh=1)
        left.set_xlabel("bytes of experts, % of bfloat16's")
        left.set_ylabel("perplexity above the full model's, %")
        left.set_title(name)
        left.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
        held = [(100 * point["predicted_loss"], 100 * point["loss"]) for point in one["held"]]
        right.plot(*zip(*held, strict=True), "o", ms=4)
        low, high = -0.5, max(max(pair) for pair in held)
        right.plot([low, high], [low, high], "-", lw=1, color="grey")
        right.set_xscale("symlog", linthresh=1)
        right.set_yscale("symlog", linthresh=1)
        right.set_xlabel("predicted loss, %")
        right.set_ylabel("measured loss, %")
        for axes in (left, right):
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
