"""Compare the simulator with the speed-ups that MoNDE's authors report over fetching on demand.

    python benchmarks/monde_claims.py [--save]

The paper (arXiv 2405.18832) reports 4.9 times for encoders and 1.5 times for decoders, for whole
models whose time outside of experts it does not state. So speed-ups of the experts alone are
printed, and the time per layer outside of them with which the reported ones would come out. Routing
is random, with the skew of natural text (1) and equal shares (0).
"""

import argparse
from typing import Any

import record
from rich.console import Console
from rich.table import Table

from moefit.serve.hybrid.rules import fetch_all, monde
from moefit.simulate.costs import expert_costs, find_hardware, find_shape
from moefit.simulate.routing import Workload, random_routing, steps_of
from moefit.simulate.timeline import Cache, Simulation

CASES = {  # sequences of 512 tokens in an encoder, or as many tokens in a decoder
    "encoder": (4.9, Workload(prompt=4 * 512, steps=4)),
    "decoder": (1.5, Workload(batch=4, steps=64)),
}
SHAPES = ("switch-large-128", "nllb-moe-54b")
PROMPTS = (256, 512, 1024, 2048, 4096)  # tokens of an encoder's step


def measure(shape_name: str, part: str, skew: float, slots: int) -> dict[str, float]:
    claimed, workload = CASES[part]
    return compared(shape_name, workload, skew, slots, claimed)


def compared(
    shape_name: str, workload: Workload, skew: float, slots: int, claimed: float
) -> dict[str, float]:
    shape = find_shape(shape_name)
    costs = expert_costs(find_hardware("monde"), shape)
    length = workload.prompt or workload.steps
    number = workload.steps if workload.prompt else workload.batch
    ids_TLK = random_routing(shape, skew, number * length)
    sequences = [ids_TLK[n * length : (n + 1) * length] for n in range(number)]
    slow, fast = (
        Simulation(costs, shape, rule, Cache(slots=kept)).run(steps_of(sequences, workload))
        for rule, kept in ((fetch_all, slots), (monde, 0))
    )
    before, after = slow.seconds / slow.layers, fast.seconds / fast.layers
    return {
        "fetch_all_ms": 1e3 * before,
        "monde_ms": 1e3 * after,
        "speed_up": before / after,
        "claimed": claimed,
        "outside_ms": 1e3 * max(0.0, (before - claimed * after) / (claimed - 1)),
    }


def by_tokens() -> list[dict[str, Any]]:
    """Return encoders' speed-ups by tokens of a step, and their mean over both models.

    An expert of t tokens is read once and computed t times, so that the far side computes longer
    than it reads from `ridge` tokens on, whatever the expert's size.
    """
    device, found = find_hardware("monde"), []
    ridge = device.far_flops / device.far_bandwidth  # 2 bytes and 2 FLOP per weight
    for skew in (0.0, 1.0):
        for tokens in PROMPTS:
            workload, row = Workload(prompt=tokens, steps=2), dict[str, Any]()
            for name in SHAPES:
                row[name] = compared(name, workload, skew, 0, CASES["encoder"][0])["speed_up"]
            mean = sum(row.values()) / len(row)
            found.append({"skew": skew, "tokens": tokens, "ridge": ridge} | row | {"mean": mean})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    table = Table(title="experts of one layer, MoNDE's hardware", title_justify="left")
    for name in ("model", "part", "skew", "slots of fetching", "fetch ms", "MoNDE ms", "speed-up"):
        table.add_column(name, justify="right")
    table.add_column("reported")
    table.add_column("with ms outside")
    results = []
    for shape in SHAPES:
        for part in CASES:
            for skew, slots in ((0.0, 0), (1.0, 0), (1.0, 64)):
                found = measure(shape, part, skew, slots)
                results.append({"shape": shape, "part": part, "skew": skew, "slots": slots} | found)
                numbers = (f"{value:.3g}" for value in found.values())
                table.add_row(shape, part, f"{skew:g}", str(slots), *numbers)
    Console(width=110).print(table)
    for row in by_tokens():
        results.append(row)
        print({name: round(value, 2) for name, value in row.items()})
    if arguments.save:
        notes = "milliseconds per MoE layer, from the simulator; nothing was timed"
        print(record.write("monde-claims", results, notes=notes))


if __name__ == "__main__":
    main()
