"""Measure perplexity over bits per expert weight, for formats, `auto`, and fewer experts.

    python benchmarks/quality_against_bytes.py reference=reference dsmoe=RUN smoe=RUN
        [--rule NAME=RULE] [--tokens 16384] [--steps 768] [--text FILE] [--calibration FILE]
        [--ways fitted,auto,...] [--formats int3,...] [--bits 4,3,...] [--save NAME]

Ways: each grouped format for all experts, rounded to nearest or fitted; `auto`, with formats by
sensitivity on calibration text; and some experts at native precision: virtual, and pruned to the
most frequent. With --calibration, both again with experts packed with that text, which must differ
from the scored text: calibrated, and calibrated-auto. virtual and pruned are scored token by token
on fewer tokens and compared with the same model on these; all others are scored by window. Windows
alternate between scoring and what `auto` observes. Bits include scales, minima and the padding of
slots.
"""

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import record
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from subject import Subject, as_text, summarised
from torch import Tensor

from moefit.checkpoint.tokenizer import read_tokenizer
from moefit.evaluate.baselines import fix_residents
from moefit.evaluate.passage import text_of_file
from moefit.evaluate.stepwise import score_steps
from moefit.plan.reference import windows_of
from moefit.quant.format import parse_format, weights_in
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.model import ServedModel
from moefit.serve.packed.build import pack
from moefit.serve.packed.calibrate import CalibrationText
from moefit.serve.windows import Windows

BITS = (8, 6, 5.33, 5, 4, 3.5, 3, 2.75)
WAYS = ("fitted", "nearest", "auto", "virtual", "pruned", "calibrated", "calibrated-auto")
SHARES = (8, 5.33, 4)  # of 16 bits: the share of experts that stay, for virtual and pruned
UNIFORM = ("int8", "int6", "int5", "int4", "int3", "int2")
PLENTY = "64GiB"
CALIBRATION_TOKENS = 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--rule", action="append", default=[], metavar="NAME=RULE")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--formats", default=",".join(UNIFORM))
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=768)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    rules = dict(one.split("=", 1) for one in arguments.rule)
    results = {}
    for pair in arguments.models:
        name, _, model = pair.partition("=")
        how = {"context": 2 * arguments.context, "dtype": torch.bfloat16}
        measured = Bytes(Subject(model, rules.get(name), arguments, **how), arguments.steps)
        wanted = measured.points(arguments.formats.split(","), arguments.bits.split(","))
        wanted = [one for one in wanted if one[0] in arguments.ways.split(",")]
        with alone():
            plain = [one for one in wanted if not one[0].startswith("calibrated")]
            results[name] = [measured.point(*one) for one in track(plain, name)]
            if arguments.calibration:
                pack_by(measured.subject, arguments.calibration)
                rest = [one for one in wanted if one not in plain]
                results[name] += [measured.point(*one) for one in track(rest, name)]
        Console(width=110).print(table(name, results[name]))
    if arguments.save:
        notes = (
            "loss: relative increase of perplexity over the same model with all experts in "
            "bfloat16 on the same tokens; bits: bits of slots divided by weights of experts"
        )
        path = record.write("quality-against-bytes", results, notes=notes, suffix=arguments.save)
        draw(results, path.with_suffix(".png"))
        print(path)


@contextmanager
def alone() -> Iterator[None]:
    """Use a temporary cache folder for the duration of the context."""
    with TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": cache}):
        yield


def pack_by(
    subject: Subject,
    text: Path,
    dtype: torch.dtype = torch.bfloat16,
    formats: Sequence[str] = UNIFORM,
    dense_formats: Sequence[str] = (),
) -> None:
    """Pack formats of experts and of dense weights, calibrated as `moefit pack --text` does."""
    windows = windows_of(
        text_of_file(text, read_tokenizer(subject.folder), subject.context, CALIBRATION_TOKENS)
    )
    what = CalibrationText(text=text.name, digest=windows.digest, windows=windows)
    skeleton = build_skeleton(subject.folder, dtype)
    made = pack(
        skeleton,
        [parse_format(name) for name in formats],
        calibration=what,
        dense_formats=[parse_format(name) for name in dense_formats],
    )
    print(f"packed with {text.name} in {made.seconds:.0f} s")


class Bytes:
    """A subject and its perplexity at native precision."""

    def __init__(self, subject: Subject, steps: int):
        self.subject = subject
        self.few = subject.scored[: max(1, steps // subject.context)]
        with subject.load() as served:
            self.weights = sum(
                one.num_experts * weights_in(one.block.layout.specs)
                for one in served.blocks.values()
            )
            self.full = self._perplexity(served)

    def points(self, formats: list[str], bits: list[str]) -> list[tuple[str, str, float]]:
        """Return way, setting and requested bits of each point."""
        return [
            *(("fitted", name, 0.0) for name in formats),
            *(("nearest", f"{name}-nearest", 0.0) for name in formats),
            *(("auto", "auto", float(one)) for one in bits),
            *(("calibrated", name, 0.0) for name in formats),
            *(("calibrated-auto", "auto", float(one)) for one in bits),
            *(("virtual", "native", float(bits)) for bits in SHARES),
            *(("pruned", "native", float(bits)) for bits in SHARES),
        ]

    def point(self, way: str, precision: str, bits: float) -> dict[str, Any]:
        memory = PLENTY if precision == "auto" else None
        with self.subject.load(precision=precision, memory=memory) as served:
            if bits:
                served.set_memory(served.budget.fixed + round(bits / 8 * self.weights))
            if way in ("virtual", "pruned"):
                loss = self._stepwise(served, way)
            else:
                if precision == "auto":
                    self._calibrate(served)
                loss = self._perplexity(served) / self.full - 1
            report = served.report()
            packed = report["experts_from"] == "packed"
            assert packed == way.startswith("calibrated") or way in ("virtual", "pruned")
        return {
            "way": way,
            "precision": precision,
            "bits": 8 * report["slot_bytes"] / self.weights,
            "loss": loss,
            "perplexity": self.full * (1 + loss),
            "formats": _sum(report["formats"]),
        }

    def _calibrate(self, served: ServedModel) -> None:
        for window_L in self.subject.calibration[:64]:
            _loss(served, window_L)
        served.settle_precision()
        served.set_mode("exact", residency="fixed")

    def _perplexity(self, served: ServedModel) -> float:
        return math.exp(fmean(_loss(served, window_L) for window_L in self.subject.scored))

    def _stepwise(self, served: ServedModel, way: str) -> float:
        if way == "pruned":
            ids_T = self.subject.calibration[0]
            fix_residents(served, "frequency", calibration=Windows(ids_T[None]))
        else:
            served.set_mode("virtual", prefill="exact")
            score_steps(served, as_text(self.subject.calibration[0]))
        return summarised([score_steps(served, as_text(one)) for one in self.few])["loss"]


def _loss(served: ServedModel, window_L: Tensor) -> float:
    with torch.inference_mode():
        logits_LV = served.model(window_L[None, :-1], use_cache=False).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits_LV, window_L[1:]))


def _sum(formats: dict[str, dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in formats.values():
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total


def table(name: str, points: list[dict[str, Any]]) -> Table:
    full = points[0]["perplexity"] / (1 + points[0]["loss"])
    out = Table(title=f"{name}: perplexity {full:.3f} in bfloat16", title_justify="left")
    for heading in ("way", "bits a weight", "loss", "formats"):
        out.add_column(heading, justify="left" if heading in ("way", "formats") else "right")
    for one in points:
        formats = ", ".join(f"{count} {name}" for name, count in sorted(one["formats"].items()))
        out.add_row(one["way"], f"{one['bits']:.2f}", f"{one['loss']:+.2%}", formats)
    return out


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(5.5 * len(results), 4.5), layout="constrained")
    for axes, (name, points) in zip(
        figure.subplots(1, len(results), squeeze=False, sharey=True)[0],
        results.items(),
        strict=True,
    ):
        for way in dict.fromkeys(one["way"] for one in points):
            line = sorted((one["bits"], 100 * one["loss"]) for one in points if one["way"] == way)
            axes.plot(*zip(*line, strict=True), "o-", ms=4, label=way)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_xlabel("bits a weight of the experts, scales included")
        axes.set_title(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("perplexity above bfloat16, %")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
