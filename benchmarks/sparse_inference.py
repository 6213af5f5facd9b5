"""Compare the speed of dense and top-K inference in prefill and decoding.

One model with random weights; rules are interleaved in one process. The ceiling of prefill is a
square matrix product in the same precision, that of decoding the measured memory bandwidth, since
each active weight is read once per token.

    python benchmarks/sparse_inference.py [--preset dsmoe-1b] [--layers 6] [--save]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import record
import torch
from rich.console import Console
from rich.table import Table

from moefit.dsmoe.card import model_card
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.dsmoe.presets import preset
from moefit.moe.routing import Rule
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
    output = model(ids[:, :8], use_cache=True, logits_to_keep=1)
    began = time.perf_counter()
    for position in range(tokens):
        token = ids[:, 8 + position : 9 + position]
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return (time.perf_counter() - began) / tokens


def interleaved(
    model: DsMoeForCausalLM, rules: list[str], rounds: int, measure: Callable[[], float]
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
    parser.add_argument("--preset", default="dsmoe-1b")
    parser.add_argument("--layers", type=int, default=6, help="of the preset's, to save time")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rules", nargs="+", default=["dense", "top_k:8", "top_k:6", "top_k:4"])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    peak = measured_peak_flops(torch.device("cpu"), dtype, seconds=2.0)
    bandwidth = read_bandwidth()
    torch.manual_seed(0)
    config = preset(options.preset, num_hidden_layers=options.layers)
    model = DsMoeForCausalLM(config).to(dtype).eval()
    ids = torch.randint(config.vocab_size, (1, max(options.prompt, 64)))
    prefills = interleaved(
        model, options.rules, options.rounds, lambda: prefill(model, ids[:, : options.prompt])
    )
    decodes = interleaved(model, options.rules, options.rounds, lambda: decode(model, ids, 16))
    card, rows = model_card(config), []
    for rule in options.rules:
        parsed = Rule.parse(rule)
        active = card.active(parsed) + config.vocab_size * config.hidden_size
        flops = card.forward_flops_per_token(parsed, context=(options.prompt + 1) / 2)
        flops -= 2 * config.vocab_size * config.hidden_size  # prefill keeps one token's logits
        took, a_token = statistics.median(prefills[rule]), statistics.median(decodes[rule])
        rows.append(
            {
                "rule": rule,
                "active_parameters": card.active(parsed),
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
    title = (
        f"{options.preset}, {options.layers} layers, {options.dtype}, prompt {options.prompt}; "
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
        notes = "Random weights; medians of interleaved rounds; decode reads each weight once."
        print(record.write("sparse-inference", results, notes=notes, suffix=options.dtype))


if __name__ == "__main__":
    main()
