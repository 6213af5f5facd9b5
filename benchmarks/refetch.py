"""What reading heavy experts again in a better format buys, and what it reads.

    python benchmarks/refetch.py reference=reference [--rule NAME=RULE] [--bits 3]
        [--thresholds 0.5,0.3,0.15] [--tokens 2048] [--text FILE] [--calibration FILE] [--save NAME]

Decodes windows of held-out text token by token in precision auto, against the same model with all
experts in bfloat16. Each threshold is measured twice: at the same bytes in all, its scratch slots
taken from what experts have (`same total`), and with scratch slots on top (`same slots`), as it
would be with a thousand of experts, where these are next to nothing. Beside them the other way to
spend the same bytes: all experts in int8, a third of them in memory, the others fetched. Windows
are by turns scored and given to what `auto` observes; formats then stay as they are. Packed is in a
cache folder of its own, with --calibration by that text.
"""

import argparse
from pathlib import Path
from typing import Any

import record
import torch
from quality_against_bytes import UNIFORM, alone, pack_by
from rich.console import Console
from rich.progress import track
from rich.table import Table
from subject import Subject, as_text, summarised

from moefit.evaluate.stepwise import score_steps
from moefit.quant.format import parse_format, weights_in
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.model import ServedModel
from moefit.serve.packed.build import pack

PLENTY = "64GiB"
Point = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--rule", action="append", default=[], metavar="NAME=RULE")
    parser.add_argument("--bits", type=float, default=3)
    parser.add_argument("--thresholds", default="0.5,0.3,0.15")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    rules = dict(one.split("=", 1) for one in arguments.rule)
    thresholds = [float(one) for one in arguments.thresholds.split(",")]
    results = {}
    for pair in arguments.models:
        name, _, model = pair.partition("=")
        how = {"context": 2 * arguments.context, "dtype": torch.bfloat16}
        subject = Subject(model, rules.get(name), arguments, **how)
        wanted: list[tuple[float | None, str]] = [(None, "same total"), (None, "int8, fetched")]
        wanted += [(one, room) for room in ("same total", "same slots") for one in thresholds]
        with alone(), subject.load() as full:
            if arguments.calibration:
                pack_by(subject, arguments.calibration)
            else:
                formats = [parse_format(one) for one in UNIFORM]
                pack(build_skeleton(subject.folder, torch.bfloat16), formats)
            results[name] = [
                measured(subject, full, arguments.bits, *one) for one in track(wanted, name)
            ]
        Console(width=110).print(table(name, results[name]))
    if arguments.save:
        notes = (
            "loss: stepwise perplexity over that of the same model with all experts in bfloat16, "
            "less one, on the same tokens, with its standard error over windows; bits: bytes of "
            "slots times eight over weights in experts; read: bytes from the packed store per "
            "decoded token; again: better copies read per token"
        )
        print(record.write("refetch", results, notes=notes, suffix=arguments.save))


def measured(
    subject: Subject, full: ServedModel, bits: float, threshold: float | None, room: str
) -> Point:
    fetched = room == "int8, fetched"
    precision = "int8" if fetched else "auto"
    how: dict[str, Any] = {"precision": precision, "memory": PLENTY, "refetch": threshold}
    with subject.load(**how) as served:
        scratch = served.report()["scratch_bytes"]
        weights = sum(
            one.num_experts * weights_in(one.block.layout.specs) for one in served.blocks.values()
        )
        paid = scratch if room == "same total" else 0
        served.set_memory(served.budget.fixed - paid + round(bits / 8 * weights))
        with torch.inference_mode():
            for window_L in subject.calibration[:64]:
                served.model(window_L[None, :-1], use_cache=False)
        served.settle_precision()
        served.set_mode("exact", residency="manager" if fetched else "fixed")
        again, scores = 0, []
        for window_L in subject.scored:
            scores.append(score_steps(served, as_text(window_L), against=full))
            again += served.report()["refetches"]
            served.check()
        report = served.report()
    assert report["experts_from"] == "packed"
    summed = summarised(scores)
    return {
        "refetch": threshold,
        "room": room,
        "bits": 8 * report["slot_bytes"] / weights,
        "scratch_bits": 8 * scratch / weights,
        "again": again / summed["tokens"],
        **{one: summed[one] for one in ("loss", "error", "full", "stepwise", "divergence")},
        "read": summed["bytes_per_token"],
        "tokens": summed["tokens"],
    }


def table(name: str, points: list[Point]) -> Table:
    title = (
        f"{name}: perplexity {points[0]['full']:.3f} in bfloat16, {points[0]['tokens']:,} tokens"
    )
    out = Table(title=title, title_justify="left")
    out.add_column("refetch")
    out.add_column("room")
    for heading in ("bits", "scratch", "loss", "+-", "KL", "again a token", "kB a token"):
        out.add_column(heading, justify="right")
    for one in points:
        out.add_row(
            "off" if one["refetch"] is None else f"{one['refetch']:g}",
            one["room"],
            f"{one['bits']:.2f}",
            f"{one['scratch_bits']:.2f}",
            f"{one['loss']:+.2%}",
            f"{one['error']:.2%}",
            f"{one['divergence']:.4f}",
            f"{one['again']:.2f}",
            f"{one['read'] / 1e3:.0f}",
        )
    return out


if __name__ == "__main__":
    main()
