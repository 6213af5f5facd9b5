"""Measure kernels against what the processor can read and multiply: a roofline in numbers.

    python benchmarks/kernel_bandwidth.py [--formats bf16,f32,int8,int4,int3,int2,mxfp4,fp8,q4_k]
        [--threads 1,2] [--tokens 1,64,512] [--gib 0.5] [--rounds 7] [--save NAME]
        [--model FOLDER]

Three operations: eight experts of OLMoE's shape with one token, a linear layer with any number,
and 64 such experts with a prompt, eight of them per token. With `--model`, a checkpoint of OLMoE's
shape with few layers (make_checkpoint.py), also whole prompts: all layers of the model as served.
Weights of one token's products are read in turn from more memory than the caches hold, in huge
pages as in a server. The ceilings, in turn with the kernels, are plain reading, and products in
registers (ceilings.cpp): float32 multiply-adds for matrices of floats, and for integers int16
products added to int32 sums. These are instructions of AVX2. "of_processor" is of the fastest
instructions for the format that the processor has: float32, bfloat16 and bytes with AVX-512, tiles
of bfloat16 and bytes with AMX. A product counts as two operations, whatever it is computed by: with
activations of 15 bits (int8) a kernel computes each twice. Medians of rounds.
"""

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moefit
from moefit.checkpoint.gguf.blocks import K_QUANTS
from moefit.moe.families import ScaledCodes
from moefit.quant.cpu_kernels import KernelMatrix, KernelMlp, Kernels, Weight, kernels, status
from moefit.quant.format import GroupedFormat, parse_format
from moefit.quant.grouped_int import GroupedMatrix
from moefit.quant.scaled.fp8 import Fp8Matrix, fp8_bytes
from moefit.quant.scaled.held import held_bytes, held_matrix
from moefit.serve.cache.slot import host_bytes
from moefit.serve.model import ServedModel

WIDTH, EXPERT = 2048, 1024  # OLMoE's
TOP_K = 8
ROWS = 8192  # of a linear layer that one token is multiplied by,
FEW_ROWS = 2048  # and many
CODES = {
    "mxfp4": ScaledCodes("mxfp4", "e2m1", "e8m0", 32),
    "int4-32": ScaledCodes("int4 in groups of 32", "int4", "float16", 32),
    "int8-32": ScaledCodes("int8 in groups of 32", "int8", "float16", 32),
    **{type: ScaledCodes(type, type, "float16", 256) for type in K_QUANTS},
}
FLOATS = {"bf16": torch.bfloat16, "f32": torch.float32}
MOST_TOKENS = 4096
PAUSE = 0.01  # seconds, until no thread of the kernels' pool spins
BURST = 4_000_000  # of 12 vectors of products
CEILING_VECTORS = {"float rate": 12 * 8, "integer rate": 12 * 16}
# Function of ceilings.cpp, products of a step and steps, in the order of wide_products_here.
WIDE = {
    "float rate, AVX-512": ("wide_float_products", 12 * 16, BURST),
    "bfloat16 rate, AVX-512": ("wide_bfloat16_products", 12 * 32, BURST),
    "byte rate, AVX-512": ("wide_byte_products", 12 * 64, BURST),
    "bfloat16 rate, AMX": ("tile_bfloat16_products", 4 * 16 * 16 * 32, BURST // 20),
    "byte rate, AMX": ("tile_byte_products", 4 * 16 * 16 * 64, BURST // 20),
}
EXPERTS = 64  # of a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A call, the bytes that it reads and its operations, of one thread if they add up."""

    call: Callable[[int], object]
    """Takes the number of threads."""
    nbytes: int = 0
    operations: int = 0
    each_thread: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default="bf16,f32,int8,int4,int3,int2")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", default="1,64,512")
    parser.add_argument("--gib", type=float, default=0.5, help="weights read by one token")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path, help="a checkpoint of OLMoE's shape")
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    compiled = kernels()
    if compiled is None:
        parser.error(f"there are no kernels to measure ({status()})")
    threads = [int(one) for one in arguments.threads.split(",")]
    tokens = [int(one) for one in arguments.tokens.split(",")]
    size = round(arguments.gib * (1 << 30))
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        limits = ceilings(Path(folder), size)
        for name in arguments.formats.split(","):
            with ExitStack() as opened:
                work = limits | dict(ways(compiled, name, tokens, size))
                if arguments.model is not None:
                    served = opened.enter_context(loaded(arguments.model, name))
                    work |= {f"whole prompt, {n} tokens": prompt(served, n) for n in tokens[1:]}
                points += measured(name, work, threads, arguments.rounds)
    results = {"level": compiled.level, "points": points}
    Console(width=110).print(table(results))
    if arguments.save:
        notes = (
            "bytes of weights, scales and minima; two operations a product; medians; shares are "
            "of plain reading, of AVX2's products in registers and of the fastest products in "
            "registers that suit the format, measured in turn"
        )
        print(record.write("kernel-roofline", results, notes=notes, suffix=arguments.save))


def ceilings(folder: Path, size: int) -> dict[str, Work]:
    """Compile and return plain reading and products in registers."""
    source, made = Path(__file__).with_name("ceilings.cpp"), folder / "ceilings.so"
    flags = ["-O3", "-mavx2", "-mfma", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *flags, str(source), "-o", str(made)], check=True)
    library = ctypes.CDLL(str(made))
    library.read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    for function in (library.float_products, library.integer_products):
        function.argtypes = [ctypes.c_int64, ctypes.c_int64]
    memory = host_bytes(size).fill_(1)
    vectors, here = CEILING_VECTORS, library.wide_products_here()
    wide = {name: one for bit, (name, one) in enumerate(WIDE.items()) if here >> bit & 1}
    return {
        **{name: wide_rate(library, *one) for name, one in wide.items()},
        "reading": Work(
            call=lambda threads: library.read_memory(memory.data_ptr(), size, threads), nbytes=size
        ),
        "float rate": Work(
            call=lambda threads: library.float_products(BURST, threads),
            operations=2 * BURST * vectors["float rate"],
            each_thread=True,
        ),
        "integer rate": Work(
            call=lambda threads: library.integer_products(BURST, threads),
            operations=2 * BURST * vectors["integer rate"],
            each_thread=True,
        ),
    }


def wide_rate(library: ctypes.CDLL, function: str, products: int, steps: int) -> Work:
    compute = getattr(library, function)
    compute.argtypes = [ctypes.c_int64, ctypes.c_int64]
    return Work(
        call=lambda threads: compute(steps, threads),
        operations=2 * products * steps,
        each_thread=True,
    )


def loaded(folder: Path, name: str) -> ServedModel:
    """Return the model with all weights in a format."""
    if name == "bf16":
        return moefit.load(str(folder), context=MOST_TOKENS)
    format = f"{name}-nearest"
    return moefit.load(str(folder), context=MOST_TOKENS, precision=format, dense_precision=format)


def prompt(served: ServedModel, tokens: int) -> Work:
    """Return all layers with a prompt; only the last token's logits are computed."""
    config: Any = served.model.config
    ids_1T = torch.randint(config.vocab_size, (1, tokens))
    width, heads = config.hidden_size, config.num_attention_heads
    keys = width // heads * config.num_key_value_heads
    layer = 2 * width * (width + keys) + width * config.num_experts
    layer += config.num_experts_per_tok * 3 * width * config.intermediate_size
    scores = width * (tokens + 1)  # of a token with those before it, and the sum of their values
    products = config.num_hidden_layers * tokens * (layer + scores) + width * config.vocab_size

    def call(_threads: int) -> None:
        with torch.inference_mode():
            served.model(ids_1T, logits_to_keep=1)

    return Work(call=call, operations=2 * products)


def ways(compiled: Kernels, name: str, tokens: list[int], size: int) -> Iterator[tuple[str, Work]]:
    dtype = torch.float32 if name == "f32" else torch.bfloat16
    if 1 in tokens:
        yield "experts, 1 token", experts(compiled, name, dtype, size)
    for number in tokens:
        layers = [random_matrix(name, ROWS if number == 1 else FEW_ROWS, WIDTH)]
        while number == 1 and len(layers) * nbytes(layers[0]) < size:
            layers.append(random_matrix(name, ROWS, WIDTH))
        yield f"linear, {number} token{'s' * (number > 1)}", linear(compiled, layers, number, dtype)
        if number > 1:
            yield f"experts, {number} tokens", routed(compiled, name, number, dtype)


def experts(compiled: Kernels, name: str, dtype: torch.dtype, size: int) -> Work:
    x_1D = torch.randn(1, WIDTH).to(dtype)
    mlps, held, weights = [], 0, 0
    while held < size or len(mlps) % TOP_K:
        w_in = random_matrix(name, 2 * EXPERT, WIDTH)
        w_out = random_matrix(name, WIDTH, EXPERT)
        mlps.append(KernelMlp(w_in=w_in, w_out=w_out, activation="silu", gated=True))
        held += nbytes(w_in) + nbytes(w_out)
        weights += 3 * WIDTH * EXPERT

    def call(_threads: int) -> None:
        for first in range(0, len(mlps), TOP_K):
            compiled.experts(x_1D, mlps[first : first + TOP_K], [(0,)] * TOP_K)

    return Work(call=call, nbytes=held, operations=2 * weights)


def routed(compiled: Kernels, name: str, tokens: int, dtype: torch.dtype) -> Work:
    """Return a layer's experts with a prompt that uses all of them alike."""
    x_TD = torch.randn(tokens, WIDTH).to(dtype)
    mlps = [
        KernelMlp(
            w_in=random_matrix(name, 2 * EXPERT, WIDTH),
            w_out=random_matrix(name, WIDTH, EXPERT),
            activation="silu",
            gated=True,
        )
        for _ in range(EXPERTS)
    ]
    chosen_TK = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
    tokens_of = [(chosen_TK == expert).any(-1).nonzero()[:, 0] for expert in range(EXPERTS)]
    size = sum(nbytes(one.w_in) + nbytes(one.w_out) for one in mlps)

    def call(_threads: int) -> None:
        compiled.experts(x_TD, mlps, tokens_of)

    return Work(call=call, nbytes=size, operations=2 * tokens * TOP_K * 3 * WIDTH * EXPERT)


def linear(compiled: Kernels, weights: list[Weight], tokens: int, dtype: torch.dtype) -> Work:
    layers = [KernelMatrix(weight) for weight in weights]
    x_TI = torch.randn(tokens, WIDTH).to(dtype)

    def call(_threads: int) -> None:
        for layer in layers:
            compiled.linear(x_TI, layer, dtype)

    products = tokens * sum(layer.rows * layer.cols for layer in layers)
    return Work(call=call, nbytes=sum(map(nbytes, weights)), operations=2 * products)


def nbytes(weight: Weight) -> int:
    if isinstance(weight, Tensor):
        return weight.nbytes
    return weight.codes_RB.nbytes + weight.meta_RMG.nbytes


def random_matrix(name: str, rows: int, cols: int) -> Weight:
    """Return random weights in memory as slots have it; their values do not affect speed."""
    if name in FLOATS:
        weight = (torch.rand(rows, cols) - 0.5).to(FLOATS[name])
        return host_bytes(weight.nbytes).view(weight.dtype).view(rows, cols).copy_(weight)
    if name == "fp8":
        size, more = fp8_bytes(rows, cols)
        memory = host_bytes(size + more)
        memory[:size].random_(126)
        memory[size:].view(torch.float32).fill_(1.0)
        return Fp8Matrix.of(cols, memory[:size], memory[size:])
    if name in CODES:
        size, more = held_bytes(rows, cols, CODES[name])
        memory = host_bytes(size + more).random_(256)
        # Exponents of 2^-7 and halves of 0.0067: no product is beyond float32 or subnormal. In
        # k-quants, words other than halves are small integers, and any will do.
        memory[size:].view(torch.int16).fill_(0x7878 if name == "mxfp4" else 0x1EDC)
        return held_matrix(CODES[name], cols, memory[:size], memory[size:])
    format = parse_format(name)
    assert isinstance(format, GroupedFormat), name
    made = GroupedMatrix.empty(rows, cols, format.bits)
    memory = host_bytes(nbytes(made)).random_(256)
    codes = memory[: made.codes_RB.nbytes].view(made.codes_RB.shape)
    meta = memory[made.codes_RB.nbytes :].view(torch.float16).view(made.meta_RMG.shape)
    return GroupedMatrix(format.bits, cols, codes, meta.fill_(1e-3))


def measured(
    name: str, work: dict[str, Work], threads: list[int], rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield each call's medians and their shares of the ceilings."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds + 1):
        for number in threads:
            torch.set_num_threads(number)
            for way, one in work.items():
                time.sleep(PAUSE)
                began = time.perf_counter()
                one.call(number)
                seconds.setdefault((way, number), []).append(time.perf_counter() - began)
    rates = {key: median(found[1:]) for key, found in seconds.items()}  # the first only warms up
    floats = name in (*FLOATS, "fp8")
    rate = "float rate" if floats else "integer rate"
    kinds = (
        ("float",) if name == "f32" else ("float", "bfloat16") if floats else ("integer", "byte")
    )
    suited = [one for one in work if "rate" in one and one.startswith(kinds[: 1 + (name != "f32")])]
    for (way, number), median_seconds in rates.items():
        one = work[way]
        times = number if one.each_thread else 1
        reading = work["reading"].nbytes / rates["reading", number]
        products = work[rate].operations * number / rates[rate, number]
        most = max(work[one].operations * number / rates[one, number] for one in suited)
        yield {
            "format": name,
            "call": way,
            "threads": number,
            "seconds": median_seconds,
            "bytes": one.nbytes,
            "operations": one.operations * times,
            "bytes_per_second": one.nbytes / median_seconds,
            "operations_per_second": one.operations * times / median_seconds,
            "of_reading": one.nbytes / median_seconds / reading,
            "of_rate": one.operations * times / median_seconds / products,
            "of_processor": one.operations * times / median_seconds / most,
        }


def table(results: dict[str, Any]) -> Table:
    out = Table(title=f"kernels, {results['level']}", title_justify="left")
    names = (
        "format",
        "call",
        "threads",
        "GB/s",
        "of reading",
        "Gop/s",
        "of AVX2",
        "of the processor",
    )
    for name in names:
        out.add_column(name, justify="left" if name in ("format", "call") else "right")
    for one in results["points"]:
        out.add_row(
            one["format"],
            one["call"],
            str(one["threads"]),
            f"{one['bytes_per_second'] / 1e9:.1f}" if one["bytes"] else "",
            f"{one['of_reading']:.0%}" if one["bytes"] else "",
            f"{one['operations_per_second'] / 1e9:.0f}" if one["operations"] else "",
            f"{one['of_rate']:.0%}" if one["operations"] else "",
            f"{one['of_processor']:.0%}" if one["operations"] else "",
        )
    return out


if __name__ == "__main__":
    main()
