"""How long decoding attention takes over a KV cache in bfloat16 and in int8, by number of keys.

    python benchmarks/attention_speed.py [--keys 96,512,2048,8192] [--rounds 7] [--save NAME]

One new token over one layer's cache, in seconds of the thread that computes (one thread), so that
other processes change little. Layers are read in turn, more of them than the processor's caches
hold, as decoding does. Beside the kernels, torch's `scaled_dot_product_attention` in bfloat16, and
what rounding and writing the token's keys and values to an int8 cache takes.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from moefit.quant.attention import AttentionOptions, KeySegment, attend
from moefit.quant.cpu_kernels import kernels, status
from moefit.quant.kv_int8 import Int8Rows, quantize_rows, write_rows

SHAPES = {  # query heads, KV heads, head width
    "OLMoE": (16, 16, 128),
    "Qwen3-30B-A3B": (32, 4, 128),
    "reference": (4, 2, 64),
}
TOTAL = 256 << 20  # bytes of all layers in bfloat16
Layer = tuple[Tensor, Tensor]


def layers_of(groups: int, keys: int, width: int) -> list[Layer]:
    number = max(2, min(64, TOTAL // (4 * groups * keys * width)))
    return [
        (
            torch.randn(groups, keys, width).bfloat16(),
            torch.randn(groups, keys, width).bfloat16(),
        )
        for _ in range(number)
    ]


def by_kernel(query_1HC: Tensor, layers: Sequence[Layer]) -> None:
    compiled = kernels()
    assert compiled is not None
    for keys_GLC, values_GLC in layers:
        past = keys_GLC.shape[1] - 1
        segment = KeySegment(keys_GLC=keys_GLC, values_GLZ=values_GLC, past=past, new=1)
        attend(compiled, query_1HC, [segment], AttentionOptions())


def by_torch(query_1HC: Tensor, layers: Sequence[Layer]) -> None:
    for keys_GLC, values_GLC in layers:
        query_1GSC = query_1HC.view(1, keys_GLC.shape[0], -1, keys_GLC.shape[2])
        F.scaled_dot_product_attention(query_1GSC, keys_GLC[None], values_GLC[None])


def writes(caches: Sequence[Int8Rows], rows_G1C: Tensor) -> None:
    place_1 = torch.tensor([caches[0].shape[1] - 1])
    for cache in caches:
        write_rows(cache, place_1, rows_G1C)


def seconds(call: Callable[[], None]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


@torch.inference_mode()
def measure(shape: tuple[int, int, int], keys: int, rounds: int) -> dict[str, Any]:
    heads, groups, width = shape
    own = layers_of(groups, keys, width)
    rounded = [(quantize_rows(k), quantize_rows(v)) for k, v in own]
    caches = [one for pair in rounded for one in pair]
    query_1HC, new_G1C = torch.randn(1, heads, width).bfloat16(), own[0][0][:, :1]
    ways = {
        "bfloat16": lambda: by_kernel(query_1HC, own),
        "int8": lambda: by_kernel(query_1HC, rounded),
        "torch": lambda: by_torch(query_1HC, own),
        "int8_write": lambda: writes(caches, new_G1C),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):  # interleaved
        for name, call in ways.items():
            found[name].append(seconds(call) / len(own))
    return {"keys": keys, "layers": len(own), **{name: median(f) for name, f in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", default="96,512,2048,8192")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    if kernels() is None:
        parser.error(f"there are no kernels to measure ({status()})")
    torch.set_num_threads(1)
    rows = [
        {"shape": name, **measure(shape, int(keys), arguments.rounds)}
        for name, shape in SHAPES.items()
        for keys in arguments.keys.split(",")
    ]
    ways = ("bfloat16", "int8", "torch", "int8_write")
    out = Table(title=f"microseconds a layer, {status()}", title_justify="left")
    for column in ("heads of", "keys", *ways):
        out.add_column(column, justify="left" if column == "heads of" else "right")
    for row in rows:
        figures = (f"{row[way] * 1e6:.0f}" for way in ways)
        out.add_row(row["shape"], f"{row['keys']:,}", *figures)
    Console(width=100).print(out)
    if arguments.save:
        results = {"level": status(), "shapes": SHAPES, "rows": rows}
        notes = (
            "seconds of the computing thread (time.thread_time) for one token and one layer, "
            "medians of interleaved rounds; int8_write: rounding and writing its keys and values"
        )
        print(record.write("attention-speed", results, notes=notes, suffix=arguments.save))


if __name__ == "__main__":
    main()
