"""Measure the bandwidth at which kernels read weights, by format, and the machine's bandwidth.

    python benchmarks/kernel_bandwidth.py [--formats native,int8,int4] [--threads 1,2] [--save NAME]
        [--gib 1] [--rounds 7]

Two operations of decoding: eight experts of OLMoE's shape with one token, and a quantised linear
layer with one token. Weights are read in turn from more memory than the caches hold; they are
random bytes, which does not affect speed. The ceiling is the faster of torch's sum of float32 and
product with a vector, interleaved with the kernels. Best and median of rounds.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moefit.quant.cpu_kernels import KernelMatrix, KernelMlp, Kernels, Weight, kernels, status
from moefit.quant.format import GroupedFormat, parse_format
from moefit.quant.grouped_int import GroupedMatrix

WIDTH, EXPERT = 2048, 1024  # OLMoE's
TOP_K = 8
ROWS = 8192  # of a linear layer
NATIVE = "native"  # bfloat16
CEILINGS = ("sum", "product")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default="native,int8,int6,int5,int4,int3,int2")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--gib", type=float, default=1.0, help="weights read in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    compiled = kernels()
    if compiled is None:
        parser.error(f"there are no kernels to measure ({status()})")
    threads = [int(one) for one in arguments.threads.split(",")]
    size = round(arguments.gib * (1 << 30))
    rates: dict[tuple[str, str, int], list[float]] = {}
    for name in arguments.formats.split(","):
        calls = dict(ways(compiled, name, size))
        for _ in range(arguments.rounds):
            for number in threads:
                torch.set_num_threads(number)
                for way, call in calls.items():
                    rates.setdefault((name, way, number), []).append(bytes_per_second(call))
    results = {
        "level": compiled.level,
        "points": [
            {
                "format": name,
                "call": way,
                "threads": number,
                "best": max(found),
                "median": median(found),
                "of_ceiling": median(found)
                / max(median(rates[name, one, number]) for one in CEILINGS),
            }
            for (name, way, number), found in rates.items()
        ],
    }
    Console(width=100).print(table(results))
    if arguments.save:
        notes = (
            "bytes a second of weights, scales and minima included; the ceiling is the faster of "
            "torch's sum of float32 and product with a vector, in turn with the others; medians"
        )
        print(record.write("kernel-bandwidth", results, notes=notes, suffix=arguments.save))


Call = Callable[[], int]
"""Reads weights and returns their bytes."""


def ways(compiled: Kernels, name: str, size: int) -> Iterator[tuple[str, Call]]:
    data_RC = torch.ones(size >> 15, 1 << 13)
    ones_C = torch.ones(1 << 13)
    yield "sum", lambda: data_RC.nbytes * bool(data_RC.sum() > 0)
    yield "product", lambda: data_RC.nbytes * bool(data_RC.mv(ones_C)[0] > 0)
    x_1D = torch.randn(1, WIDTH).bfloat16()
    mlps, held = [], 0
    while held < size or len(mlps) % TOP_K:
        w_in = random_matrix(name, 2 * EXPERT, WIDTH)
        w_out = random_matrix(name, WIDTH, EXPERT)
        mlps.append(KernelMlp(w_in=w_in, w_out=w_out, activation="silu", gated=True))
        held += nbytes(w_in) + nbytes(w_out)

    def experts() -> int:
        for first in range(0, len(mlps), TOP_K):
            compiled.experts(x_1D, mlps[first : first + TOP_K], [(0,)] * TOP_K)
        return held

    yield "experts", experts
    layers: list[KernelMatrix] = []
    while sum(nbytes(layer.weight) for layer in layers) < size:
        layers.append(KernelMatrix(random_matrix(name, ROWS, WIDTH)))

    def linear() -> int:
        for layer in layers:
            compiled.linear(x_1D, layer)
        return sum(nbytes(layer.weight) for layer in layers)

    yield "linear", linear


def nbytes(weight: Weight) -> int:
    if isinstance(weight, Tensor):
        return weight.nbytes
    return weight.codes_RB.nbytes + weight.meta_RMG.nbytes


def random_matrix(name: str, rows: int, cols: int) -> Weight:
    if name == NATIVE:
        return (torch.rand(rows, cols) - 0.5).bfloat16()
    format = parse_format(name)
    assert isinstance(format, GroupedFormat), name
    made = GroupedMatrix.empty(rows, cols, format.bits)
    made.codes_RB.random_(256)
    made.meta_RMG.fill_(1e-3)
    return made


def bytes_per_second(call: Call) -> float:
    began = time.perf_counter()
    read = call()
    return read / (time.perf_counter() - began)


def table(results: dict[str, Any]) -> Table:
    out = Table(title=f"weights read, {results['level']}", title_justify="left")
    for name in ("format", "call", "threads", "best GB/s", "median", "of the ceiling"):
        out.add_column(name, justify="left" if name in ("format", "call") else "right")
    for one in results["points"]:
        out.add_row(
            one["format"],
            one["call"],
            str(one["threads"]),
            f"{one['best'] / 1e9:.1f}",
            f"{one['median'] / 1e9:.1f}",
            f"{one['of_ceiling']:.0%}",
        )
    return out


if __name__ == "__main__":
    main()
