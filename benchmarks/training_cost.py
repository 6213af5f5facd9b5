"""Compare the speed of training steps: dense, DS-MoE, sparse MoE, and transformers' OLMoE.

All models have the same parameters (without routers) and see the same tokens; their steps are
interleaved in one process, so that other load affects all alike. A step is forward pass, backward
pass and AdamW. The ceiling is a square matrix product in the same precision.

    python benchmarks/training_cost.py [--compile] [--rounds 12] [--save]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import record
import torch
from rich.console import Console
from rich.table import Table
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.dense_experts import DENSE_EXPERTS, register_dense_experts
from moefit.dsmoe.losses import RouterLossWeights
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.train.optimizer import make_optimizer
from moefit.train.settings import OptimizerConfig
from moefit.train.step import Stepper, make_losses
from moefit.train.throughput import measured_peak_flops, training_flops_per_token

SIZES = {
    "small": {"width": 256, "layers": 8, "heads": 4, "expert": 64, "batch": 16, "length": 256},
    "gpu": {"width": 1024, "layers": 24, "heads": 16, "expert": 256, "batch": 32, "length": 1024},
}


@dataclass
class Contestant:
    name: str
    step: Callable[[], None]
    flops_per_token: float
    parameters: int
    seconds: list[float]


def dsmoe(size: dict[str, int], **settings) -> PreTrainedModel:
    return DsMoeForCausalLM(
        DsMoeConfig(
            vocab_size=4096,
            hidden_size=size["width"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["heads"] // 2,
            qk_norm=True,
            **settings,
        )
    )


def olmoe(size: dict[str, int], implementation: str) -> PreTrainedModel:
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=4096,
            hidden_size=size["width"],
            intermediate_size=size["expert"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["heads"] // 2,
            num_experts=16,
            num_experts_per_tok=16,
            eos_token_id=0,
            pad_token_id=None,
        )
    )
    model.set_experts_implementation(implementation)
    return model


def models(size: dict[str, int]) -> dict[str, Callable[[], PreTrainedModel]]:
    expert = size["expert"]
    register_dense_experts()
    return {
        "plain dense (ours)": lambda: dsmoe(size, num_experts=1, intermediate_size=16 * expert),
        "DS-MoE, all 16 experts (ours)": lambda: dsmoe(
            size, num_experts=16, intermediate_size=expert
        ),
        "DS-MoE with MoA of 2 (ours)": lambda: dsmoe(
            size, num_experts=16, intermediate_size=expert, num_attention_experts=2
        ),
        "sparse MoE, top 4 of 16 (ours)": lambda: dsmoe(
            size, num_experts=16, intermediate_size=expert, training_rule="top_k:4"
        ),
        "OLMoE k=16, our dense experts": lambda: olmoe(size, DENSE_EXPERTS),
        "OLMoE k=16, grouped_mm (transformers)": lambda: olmoe(size, "grouped_mm"),
        "OLMoE k=16, eager (transformers)": lambda: olmoe(size, "eager"),
    }


def contestant(
    name: str, build: Callable[[], PreTrainedModel], size: dict[str, int], options
) -> Contestant:
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = build().train()
    model.to(device)  # pyright: ignore[reportArgumentType]
    eager = device.type == "cpu" and options.bf16
    model.set_attn_implementation("eager" if eager else "sdpa")
    moa = getattr(model.config, "num_attention_experts", 1) > 1
    sparse = getattr(model.config, "training_rule", "dense") != "dense"
    mi = RouterLossWeights(mlp_mi=0.005, attention_mi=0.005 if moa else 0.0)
    weights = RouterLossWeights(load_balancing=0.01, z=0.001, k=4) if sparse else mi
    # transformers' loops over experts have data-dependent shapes, which break torch.compile.
    compiled = options.compile and not sparse and "transformers" not in name
    stepper = Stepper(
        model=model,
        optimizer=make_optimizer(model, OptimizerConfig()),
        losses=make_losses(model, weights, compile=compiled),
        device=device,
        bf16=options.bf16,
        clip=1.0,
    )
    ids_BL1 = torch.randint(4096, (size["batch"], size["length"]), device=device)

    def step() -> None:
        stepper.step([ids_BL1], 1)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return Contestant(
        name=name,
        step=step,
        flops_per_token=training_flops_per_token(model, size["length"]),
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=[],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fp32", dest="bf16", action="store_false")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    size = SIZES[options.size]
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    peak = measured_peak_flops(torch.device(options.device), dtype, seconds=2.0)
    entries = [contestant(name, build, size, options) for name, build in models(size).items()]
    for entry in entries:
        entry.step()
        entry.step()
    for _ in range(options.rounds):
        for entry in entries:
            began = time.perf_counter()
            entry.step()
            entry.seconds.append(time.perf_counter() - began)
    report(entries, size, peak, options)


def report(entries: list[Contestant], size: dict[str, int], peak: float, options) -> None:
    tokens = size["batch"] * size["length"]
    base = entries[0].seconds
    rows = []
    for entry in entries:
        median = statistics.median(entry.seconds)
        ratios = [b / s for b, s in zip(base, entry.seconds, strict=True)]
        rows.append(
            {
                "name": entry.name,
                "parameters": entry.parameters,
                "tokens_per_second": tokens / median,
                "to_plain_dense": statistics.median(ratios),
                "share_of_peak": entry.flops_per_token * tokens / median / peak,
            }
        )
    precision = "bf16" if options.bf16 else "fp32"
    compiled = ", compiled where possible" if options.compile else ""
    table = Table(title=f"{options.size}, {precision}{compiled}, peak {peak / 1e9:,.0f} GFLOP/s")
    for column in ("contestant", "tokens/s", "to plain dense", "share of peak"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['to_plain_dense']:.2f}",
            f"{row['share_of_peak']:.0%}",
        )
    Console().print(table)
    if options.save:
        suffix = f"{options.size}-{precision}" + ("-compiled" if options.compile else "")
        notes = (
            "Median of interleaved rounds; to_plain_dense is the median of per-round ratios. "
            "FLOPs count active parameters, so a sparse step has fewer. The OLMoE class computes "
            "its own load-balancing loss in addition to moefit's; both are included."
        )
        results = {"size": size, "peak_flops": peak, "rounds": options.rounds, "rows": rows}
        print(record.write("training-cost", results, notes=notes, suffix=suffix))


if __name__ == "__main__":
    main()
