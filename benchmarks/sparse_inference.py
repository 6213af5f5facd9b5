"""Compare the speed of dense and sparse inference in prefill and decoding.

The shipped model, or a preset with random weights; rules are interleaved in one process. The
ceiling of prefill is torch's square matrix product, in the precision that is faster here, that of
decoding the measured memory bandwidth, since each active weight is read once per token.

    python benchmarks/sparse_inference.py [reference | PRESET] [--layers 6] [--save]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table

from moefit.cache_argument import forward_with_cache
from moefit.dsmoe.card import model_card
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.dsmoe.presets import preset
from moefit.evaluate.kernel_experts import use_kernels
from moefit.evaluate.loading import REFERENCE, load_full_model
from moefit.evaluate.passage import held_out_text
from moefit.moe.routing import Rule, active_experts
from moefit.quant.cpu_kernels import status
from moefit.train.throughput import measured_peak_flops


def read_bandwidth(seconds: float = 1.0) -> float:
    """Return bytes per second of summing a buffer far larger than any cache."""
    buffer = torch.ones(1 << 28, dtype=torch.float32)
    buffer.sum()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        buffer.sum()
        count += 1
    return count * buffer.numel() * 4 / elapsed


@torch.inference_mode()
def prefill(model: DsMoeForCausalLM, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    model(ids, logits_to_keep=1)
    return time.perf_counter() - began


@torch.inference_mode()
def decode(model: DsMoeForCausalLM, ids: torch.Tensor, tokens: int) -> float:
    """Return seconds per token after a short prompt."""
    _, cache = forward_with_cache(model, None, input_ids=ids[:, :8], logits_to_keep=1)
    began = time.perf_counter()
    for position in range(tokens):
        token = ids[:, 8 + position : 9 + position]
        _, cache = forward_with_cache(model, cache, input_ids=token)
    return (time.perf_counter() - began) / tokens


def subject(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """Return the model and a prompt: text for the shipped model, else random tokens."""
    length = max(options.prompt, 64)
    if options.model == REFERENCE:
        model, tokenizer = load_full_model(REFERENCE, dtype=dtype)
        text = held_out_text(tokenizer, context=length, max_tokens=length)
        return model, next(text.batches())[:1, :length]
    torch.manual_seed(0)
    config = preset(options.model, num_hidden_layers=options.layers)
    ids = torch.randint(config.vocab_size, (1, length))
    made: Any = DsMoeForCausalLM(config)  # torch's `to` has no type for a dtype in a variable
    return made.to(dtype).eval(), ids


@torch.inference_mode()
def mean_experts(model: Any, ids: torch.Tensor, rule: str) -> tuple[float | None, float | None]:
    """Return the mean active MLP and attention experts of a rule with a threshold, else None."""
    parsed = Rule.parse(rule)
    if not parsed.kind.startswith("threshold"):
        return None, None
    model.set_inference_rule(rule)
    output = model(ids, output_router_logits=True)
    mlp, attention = (
        statistics.fmean(
            active_experts(one.softmax(-1), parsed).sum(-1).float().mean().item() for one in layers
        )
        if layers
        else None
        for layers in (output.router_logits, output.attention_router_logits)
    )
    return mlp, attention if parsed.kind == "threshold" else None


def interleaved(
    model: Any, rules: list[str], rounds: int, measure: Callable[[], float]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {rule: [] for rule in rules}
    for turn in range(rounds + 1):
        for rule in rules:
            model.set_inference_rule(rule)
            took = measure()
            if turn:  # the first round warms up
                seconds[rule].append(took)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=REFERENCE, help="reference, or a preset")
    parser.add_argument("--layers", type=int, default=6, help="of the preset's, to save time")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rules",
        nargs="+",
        default=["dense", "top_k:8", "top_k:6", "top_k:4", "top_k:2", "threshold:0.7"],
    )
    parser.add_argument("--torch", action="store_true", help="without the compiled kernels")
    parser.add_argument("--save", metavar="NAME", help="write a record with this name")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    # torch's bfloat16 products take half a minute each where only AVX2 computes them.
    fast = dtype if torch.cpu._is_avx512_bf16_supported() else torch.float32
    peak = measured_peak_flops(torch.device("cpu"), fast, seconds=1.0)
    bandwidth = read_bandwidth()
    model, ids = subject(options, dtype)
    config = model.config
    if not options.torch:
        use_kernels(model)
    prefills = interleaved(
        model, options.rules, options.rounds, lambda: prefill(model, ids[:, : options.prompt])
    )
    decodes = interleaved(model, options.rules, options.rounds, lambda: decode(model, ids, 16))
    card, rows = model_card(config), []
    for rule in options.rules:
        parsed, means = Rule.parse(rule), mean_experts(model, ids, rule)
        used = card.active(parsed, *means)
        active = used + config.vocab_size * config.hidden_size
        flops = card.forward_flops_per_token(
            parsed,
            context=(options.prompt + 1) / 2,
            mean_mlp_experts=means[0],
            mean_attention_experts=means[1],
        )
        flops -= 2 * config.vocab_size * config.hidden_size  # prefill keeps one token's logits
        took, a_token = statistics.median(prefills[rule]), statistics.median(decodes[rule])
        rows.append(
            {
                "rule": rule,
                "active_parameters": used,
                "active_share": used / card.total_without_embeddings,
                "prefill_tokens_per_second": options.prompt / took,
                "prefill_speedup": statistics.median(
                    d / s for d, s in zip(prefills["dense"], prefills[rule], strict=True)
                ),
                "prefill_share_of_flop_ceiling": flops * options.prompt / took / peak,
                "decode_tokens_per_second": 1 / a_token,
                "decode_speedup": statistics.median(
                    d / s for d, s in zip(decodes["dense"], decodes[rule], strict=True)
                ),
                "decode_share_of_bandwidth": active * dtype.itemsize / a_token / bandwidth,
            }
        )
    report(rows, peak, bandwidth, options)


def report(rows: list[dict], peak: float, bandwidth: float, options) -> None:
    by = "torch" if options.torch else f"kernels: {status()}"
    title = (
        f"{options.model}, {options.dtype}, {by}, prompt {options.prompt}; "
        f"ceilings {peak / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s"
    )
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{v:,.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=160).print(table)
    if options.save:
        results = {"peak_flops": peak, "read_bandwidth": bandwidth, "rows": rows}
        notes = "Medians of interleaved rounds; presets have random weights."
        print(record.write("sparse-inference", results, notes=notes, suffix=options.save))


if __name__ == "__main__":
    main()
