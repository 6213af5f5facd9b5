"""Measure the Triton kernels on a GPU, compared with memory bandwidth and torch.

Ceilings, in the same run: bandwidth of a copy, and FLOP/s of a large bfloat16 product. Then a
linear layer and a MoE block (OLMoE's by default) in each format, for the token counts of decoding
and prompts: by the kernels, by torch from decoded weights (the fallback without Triton), and by
torch from bfloat16 weights. Matrices are used in turn, more of them than caches hold.

    python triton_kernels.py --save

With TRITON_INTERPRET=1, `--device cpu --width 64 --inner 64 --experts 4 --top-k 2` tests the
script.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import Any

import torch
from record import write
from torch import Tensor
from torch.nn import functional as F

from moefit.quant.cpu_kernels import KernelMlp
from moefit.quant.gpu.gpu_kernels import TritonKernels
from moefit.quant.grouped_int import PLANES, GroupedMatrix, bits_per_weight

RUN = TritonKernels()
TOKENS = 1, 4, 16, 128, 512
BEYOND_CACHES = 1 << 29  # bytes of weights read in one round
Act = Callable[[], Any]


def seconds(acts: Sequence[Act], device: torch.device, rounds: int = 6) -> float:
    """Return seconds per call: the median over rounds, without the first, which compiles."""
    taken = []
    for _ in range(rounds if device.type == "cuda" else 1):
        _wait(device)
        began = perf_counter()
        for act in acts:
            act()
        _wait(device)
        taken.append((perf_counter() - began) / len(acts))
    return median(taken[1:] or taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_matrix(rows: int, cols: int, bits: int, device: torch.device) -> GroupedMatrix:
    """Return a matrix of random codes, scaled to keep the magnitude of activations."""
    empty = GroupedMatrix.empty(rows, cols, bits)
    codes_RB = torch.randint(0, 256, empty.codes_RB.shape, dtype=torch.uint8, device=device)
    scale = 2.0 / 2**bits / cols**0.5
    meta_RMG = torch.full(empty.meta_RMG.shape, scale, dtype=torch.float16, device=device)
    if bits < 8:
        meta_RMG[:, 1] = -(2 ** (bits - 1)) * scale
    return GroupedMatrix(bits, cols, codes_RB, meta_RMG)


def ceilings(device: torch.device, size: int) -> dict[str, float]:
    """Return GB/s of a copy, counting both directions, and TFLOP/s of a bfloat16 product."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = seconds([lambda: target.copy_(source)] * 4, device)
    side = 8192 if device.type == "cuda" else 128
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    multiplying = seconds([lambda: a @ a] * 4, device)
    return {
        "copy_gb_per_s": 2 * size / copying / 1e9,
        "bf16_tflops": 2 * side**3 / multiplying / 1e12,
    }


def linear(width: int, bits: int, tokens: int, device: torch.device) -> dict[str, float]:
    """Measure y = x W^T with W [4 * width, width]."""
    rows = 4 * width
    nbytes = rows * width * bits_per_weight(bits) / 8
    matrices = [random_matrix(rows, width, bits, device) for _ in range(_number(nbytes, device))]
    plain_RC = matrices[0].dense(torch.bfloat16)
    x_TI = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
    fused = seconds([lambda one=one: RUN.linear(x_TI, one) for one in matrices], device)
    decoded = [lambda one=one: F.linear(x_TI, one.dense(x_TI.dtype)) for one in matrices[:2]]
    return {
        "kernels_us": fused * 1e6,
        "kernels_gb_per_s": nbytes / fused / 1e9,
        "kernels_tflops": 2 * tokens * rows * width / fused / 1e12,
        "torch_decoding_us": seconds(decoded, device) * 1e6,
        "torch_bf16_in_cache_us": seconds([lambda: F.linear(x_TI, plain_RC)] * 8, device) * 1e6,
    }


def _number(nbytes: float, device: torch.device) -> int:
    return max(2, int(BEYOND_CACHES / nbytes)) if device.type == "cuda" else 2


class Block:
    """Experts of one format, or of several in turn, with random top-k choices."""

    def __init__(self, formats: Sequence[int], settings: argparse.Namespace, device: torch.device):
        self._k, self._device, self._width = settings.top_k, device, settings.width
        choice = cycle(formats)
        self.mlps = [self._mlp(next(choice), settings) for _ in range(settings.experts)]

    def _mlp(self, bits: int, settings: argparse.Namespace) -> KernelMlp:
        w_in = random_matrix(2 * settings.inner, settings.width, bits, self._device)
        w_out = random_matrix(settings.width, settings.inner, bits, self._device)
        return KernelMlp(w_in=w_in, w_out=w_out, activation="silu", gated=True)

    def steps(self, tokens: int, number: int) -> Iterator[tuple[list[KernelMlp], list[Tensor]]]:
        """Yield the chosen experts with the tokens of each."""
        for _ in range(number):
            ids_TK = torch.rand(tokens, len(self.mlps)).argsort(-1)[:, : self._k]
            chosen = ids_TK.unique().tolist()
            rows = [(ids_TK == e).any(-1).nonzero()[:, 0].to(self._device) for e in chosen]
            yield [self.mlps[e] for e in chosen], rows

    def measure(self, tokens: int) -> dict[str, float]:
        """Measure one step of all chosen experts."""
        x_TD = torch.randn(tokens, self._width, dtype=torch.bfloat16, device=self._device)
        steps = list(self.steps(tokens, 16 if self._device.type == "cuda" else 2))
        fused = [lambda one=one: RUN.experts(x_TD, *one) for one in steps]
        decoded = [lambda one=one: _by_torch(x_TD, *one) for one in steps[:2]]
        taken = seconds(fused, self._device)
        read = sum(sum(map(_bytes, mlps)) for mlps, _ in steps) / len(steps)
        products = sum(sum(_flops(*pair) for pair in zip(*one, strict=True)) for one in steps)
        return {
            "kernels_us": taken * 1e6,
            "kernels_gb_per_s": read / taken / 1e9,
            "kernels_tflops": products / len(steps) / taken / 1e12,
            "torch_decoding_us": seconds(decoded, self._device) * 1e6,
        }


def _by_torch(x_TD: Tensor, mlps: Sequence[KernelMlp], rows: Sequence[Tensor]) -> None:
    for mlp, rows_R in zip(mlps, rows, strict=True):
        assert isinstance(mlp.w_in, GroupedMatrix) and isinstance(mlp.w_out, GroupedMatrix)
        gate_RF, up_RF = F.linear(x_TD[rows_R], mlp.w_in.dense(x_TD.dtype)).chunk(2, -1)
        F.linear(F.silu(gate_RF) * up_RF, mlp.w_out.dense(x_TD.dtype))


def _bytes(mlp: KernelMlp) -> float:
    parts = [one for one in (mlp.w_in, mlp.w_out) if isinstance(one, GroupedMatrix)]
    return sum(one.codes_RB.nbytes + one.meta_RMG.nbytes for one in parts)


def _flops(mlp: KernelMlp, rows_R: Tensor) -> float:
    into, out = mlp.argument.w_in, mlp.argument.w_out
    return 2 * len(rows_R) * (into.rows * into.cols + out.rows * out.cols)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--save", action="store_true")
    settings = parser.parse_args()
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu shows only that the script runs")
    tokens, widths = (TOKENS, [*PLANES]) if device.type == "cuda" else (TOKENS[:2], [3])
    results: dict[str, Any] = ceilings(device, 1 << (30 if device.type == "cuda" else 20))
    print(results)
    for bits in widths:
        for count in tokens:
            name = f"linear, int{bits}, {count} tokens"
            results[name] = linear(settings.width, bits, count, device)
            print(name, results[name])
    for title, formats in {**{f"int{b}": [b] for b in widths}, "mixed": [*PLANES]}.items():
        block = Block(formats, settings, device)
        for count in tokens:
            name = f"block, {title}, {count} tokens"
            results[name] = block.measure(count)
            print(name, results[name])
    if settings.save:
        notes = f"MoE block of {settings.experts} experts, {settings.width} by {settings.inner}"
        print(write("triton-kernels", results, notes=notes))


if __name__ == "__main__":
    main()
