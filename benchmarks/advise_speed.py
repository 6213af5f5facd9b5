"""Compare what `moefit advise` predicts of serving a model with what serving it takes.

    python benchmarks/advise_speed.py FOLDER [--layers 10,14] [--experts 8]
        [--precisions native,int8,int4] [--new-tokens 24] [--save NAME]

Models of advise's family with random weights are written to FOLDER and served by moefit with all
experts resident. Measured: tokens per second of one sequence, and the resident set of the process
that serves. Predicted: both, from the rates of this machine, measured between the models.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table

import moefit
from moefit.advise.hardware import measure_this
from moefit.advise.serving import Limits, memory_cost, served_sizes
from moefit.advise.shapes import Shape
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.evaluate.bandwidth import Bandwidth
from moefit.evaluate.speed import measure_speed
from moefit.host import peak_process_bytes

VOCABULARY, CONTEXT, PROMPT = 16384, 256, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", default="10,14")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--precisions", default="native,int8,int4")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--serve", metavar="PRECISION", help="in a process of its own: one model")
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    if arguments.serve:
        print(json.dumps(served(arguments.folder, arguments.serve, arguments.new_tokens)))
        return
    points = []
    for layers in map(int, arguments.layers.split(",")):
        shape = Shape(
            width=64 * layers, layers=layers, experts=arguments.experts, vocabulary=VOCABULARY
        )
        folder = arguments.folder / f"layers-{layers}"
        write_model(shape, folder)
        points += [
            compared(shape, folder, one, arguments) for one in arguments.precisions.split(",")
        ]
    Console(width=110).print(table(points))
    if arguments.save:
        notes = (
            "predicted: bytes over the rates of kernels measured before and after each model "
            "(median); measured: median of decoded tokens, and the peak resident set"
        )
        print(record.write("advise-speed", points, notes=notes, suffix=arguments.save))


def write_model(shape: Shape, folder: Path) -> None:
    """Write random weights in bfloat16."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    config = DsMoeConfig(vocab_size=shape.vocabulary, **shape.model_fields(CONTEXT))
    with torch.device("meta"):
        model = DsMoeForCausalLM(config)
    model = model.bfloat16().to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.02)
    model.save_pretrained(folder)


def compared(shape: Shape, folder: Path, precision: str, arguments: Any) -> dict[str, Any]:
    """Serve a model in a process of its own, between two measurements of the machine."""
    sizes = served_sizes(shape, precision, context=CONTEXT, is_gpu=False)
    formats = tuple(dict.fromkeys(("native", sizes.dense_precision, precision)))
    before = measure_this(formats)
    command = [sys.executable, __file__, str(folder), "--serve", precision]
    command += ["--new-tokens", str(arguments.new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = measure_this(formats)
    rates = {name: median([before.rate(name), after.rate(name)]) for name in formats}
    per_layer = median([before.layer_seconds, after.layer_seconds])
    device = before.model_copy(update={"rates": rates, "layer_seconds": per_layer})
    position = PROMPT + arguments.new_tokens / 2
    cost = memory_cost(sizes, device, Limits(context=CONTEXT, position=position))
    assert cost is not None
    measured = json.loads(done.stdout.splitlines()[-1])
    return {
        "active": shape.active,
        "total": shape.total,
        "precision": precision,
        "read_bytes": cost.read,
        "rates": rates,
        "layer_seconds": per_layer,
        "predicted_tokens_per_second": 1 / cost.seconds,
        "predicted_resident": cost.resident,
        **measured,
    }


def served(folder: Path, precision: str, new_tokens: int) -> dict[str, Any]:
    """Serve a model; return its speed and the process's peak resident set."""
    dense = "native" if precision == "native" else "int8"
    model = moefit.load(
        str(folder),
        precision=precision,
        dense_precision=dense,
        context=CONTEXT,
        dtype=torch.bfloat16,
    )
    prompt_T = torch.arange(PROMPT) % VOCABULARY
    bandwidth = Bandwidth(storage=1e9, memory=1e10)  # only for bounds that are not used here
    speed = measure_speed(model, bandwidth, prompt_T=prompt_T, new_tokens=new_tokens, seed=0)
    return {
        "measured_tokens_per_second": 1 / speed.median_seconds,
        "measured_resident": peak_process_bytes(),
        "threads": torch.get_num_threads(),
    }


def table(points: list[dict[str, Any]]) -> Table:
    out = Table(title="predicted and measured", title_justify="left")
    names = (
        "active",
        "total",
        "precision",
        "tok/s predicted",
        "measured",
        "GiB predicted",
        "measured",
    )
    for name in names:
        out.add_column(name, justify="right")
    for one in points:
        out.add_row(
            f"{one['active'] / 1e6:.0f} M",
            f"{one['total'] / 1e6:.0f} M",
            one["precision"],
            f"{one['predicted_tokens_per_second']:.1f}",
            f"{one['measured_tokens_per_second']:.1f}",
            f"{one['predicted_resident'] / 2**30:.2f}",
            f"{one['measured_resident'] / 2**30:.2f}",
        )
    return out


if __name__ == "__main__":
    main()
