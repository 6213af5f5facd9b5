"""What it costs that kernels round activations: perplexity with kernels and without.

    python benchmarks/activation_bits.py [NAME=]MODEL... [--text FILE] [--tokens 16384]
        [--context 512] [--formats int2,int3,int4,int8] [--dense int8] [--save NAME]

Experts (and dense weights, in --dense or, with `same`, in the format of the experts) are rounded to
nearest. Without kernels torch decodes the same weights and multiplies them by activations in
float32, so that the difference is that of the activations' rounding: 8 bits in groups of 64 for
weights up to 4 bits, 15 bits for others. The format's own cost is that of the decoded weights over
the model's own. Losses are paired by window.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from statistics import fmean, stdev
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table
from subject import Subject
from torch.nn import functional as F


@torch.inference_mode()
def losses(subject: Subject, **settings: Any) -> list[float]:
    """Return nats per token of each scored window."""
    found = []
    with subject.load(dtype=torch.float32, **settings) as served:
        for window_L in subject.scored:
            logits_TV = served.model(input_ids=window_L[None, :-1]).logits[0]
            found.append(float(F.cross_entropy(logits_TV, window_L[1:])))
    return found


def formats_of(arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Return the settings of each row."""
    rows: dict[str, dict[str, str]] = {"native": {}}
    for name in arguments.formats.split(","):
        dense = name if arguments.dense == "same" else arguments.dense
        rows[name] = {"precision": f"{name}-nearest", "dense_precision": dense}
    return rows


def measure(model: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the losses of each row in this process, with or without kernels."""
    subject = Subject(model, None, arguments)
    return {name: losses(subject, **how) for name, how in formats_of(arguments).items()}


def in_process(model: str, most: str) -> dict[str, list[float]]:
    """Return what `measure` returns in a process with kernels up to a level, or `torch`."""
    environment = {**os.environ, "MOEFIT_KERNELS": most}
    command = [sys.executable, *sys.argv, "--only", model]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def relative(losses: list[float], base: list[float]) -> dict[str, float]:
    """Return the relative increase of perplexity, with its standard error over windows."""
    costs = [one - other for one, other in zip(losses, base, strict=True)]
    error = stdev(costs) / math.sqrt(len(costs)) if len(costs) > 1 else math.nan
    return {"loss": math.expm1(fmean(costs)), "error": error}


def compared(model: str) -> dict[str, Any]:
    """Return, per format, its own cost and that of rounding activations."""
    kernels, torch_alone = in_process(model, "amx"), in_process(model, "torch")
    native = torch_alone.pop("native")
    return {
        name: {
            "format": relative(exact, native),
            "activations": relative(kernels[name], exact),
            "windows": len(exact),
        }
        for name, exact in torch_alone.items()
    }


def table(name: str, results: dict[str, Any]) -> Table:
    out = Table(title=name, title_justify="left")
    for column in ("format", "its own loss", "error", "rounded activations", "error"):
        out.add_column(column, justify="right")
    for row, one in results.items():
        pairs = (one["format"], one["activations"])
        out.add_row(row, *(f"{pair[key]:+.3%}" for pair in pairs for key in ("loss", "error")))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="[NAME=]MODEL")
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--formats", default="int2,int3,int4,int8")
    parser.add_argument("--dense", default="int8")
    parser.add_argument("--save", metavar="NAME")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a process of its own
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
        return
    results = {}
    for argument in arguments.models:
        name, _, model = argument.rpartition("=")
        results[name or model] = compared(model)
        Console(width=100).print(table(name or model, results[name or model]))
    if arguments.save:
        notes = (
            "float32; format.loss: perplexity with decoded weights over the model's own, less one; "
            "activations.loss: with kernels over with decoded weights; errors are standard errors "
            "of paired differences over windows"
        )
        print(record.write("activation-bits", results, notes=notes, suffix=arguments.save))


if __name__ == "__main__":
    main()
