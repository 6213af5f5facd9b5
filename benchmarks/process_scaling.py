"""Weak and strong scaling of training over 1, 2 and 4 processes on one machine, by layout.

Each process has one thread on one core. On a machine with fewer cores than processes an ideal step
is not N times as fast, so a layout is compared with the same work without communication: as many
processes that each train a model of their own, at the same time, on the same cores, on as many
sequences as their share of the batch. Efficiency is that time divided by the layout's. Layouts and
the work alone take turns; a step's time is that of its slowest process, after a barrier.

    python benchmarks/process_scaling.py [--repeats 7] [--save]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import forked
import record
import torch

from moefit.train.config import make_config
from moefit.train.model import build_model, loss_weights
from moefit.train.optimizer import make_optimizer
from moefit.train.parallel.parallelism import parallelism
from moefit.train.parallel.processes import OneProcess, Processes
from moefit.train.step import Stepper, make_losses

LENGTH, VOCABULARY = 128, 1024
DENSE = {
    "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_experts": 16,
}  # fmt: skip
# Wide enough that only the chosen experts are computed, alone as with all_to_all.
SPARSE = {
    **DENSE, "intermediate_size": 264, "training_rule": "top_k:2", "inference_rule": "top_k:2",
}  # fmt: skip
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "data": (DENSE, {}),
    "data, reshard: false": (DENSE, {"reshard": False}),
    "replicate: 2": (DENSE, {"replicate": 2}),
    "expert_tensor: 2": (DENSE, {"expert_tensor": 2}),
    "expert_tensor: 4": (DENSE, {"expert_tensor": 4}),
    "sparse, data": (SPARSE, {}),
    "sparse, all_to_all": (SPARSE, {"experts": "all_to_all"}),
}
SIZES = ((1, 16), (1, 4), (2, 8), (2, 4), (4, 4))
"""Processes, and sequences of each: 16 in all is strong scaling, 4 each is weak."""


def stepper(
    model: dict[str, Any], layout: dict[str, Any], sequences: int, processes: Processes
) -> Callable[[], None]:
    """Return a function that trains one step on `sequences` of all processes together."""
    config = make_config(
        {
            "model": model, "loss": {"mlp_mi": 1e-3} if model is DENSE else {},
            "batch_size": sequences, "seq_len": LENGTH, "parallel": layout,
        }
    )  # fmt: skip
    cpu = torch.device("cpu")
    made = build_model(config, vocab_size=VOCABULARY, eos_token_id=0)
    made.train()
    parallel = parallelism(config, processes, cpu)
    parallel.wrap(made)
    losses = make_losses(made, loss_weights(config, made), compile=False, total=parallel.total)
    one = Stepper(
        model=made, optimizer=make_optimizer(made, config.optimizer), losses=losses, device=cpu,
        bf16=False, clip=1.0, parallel=parallel,
    )  # fmt: skip
    chance = torch.Generator().manual_seed(0)
    batch = torch.randint(0, VOCABULARY, (sequences, LENGTH + 1), generator=chance)

    def step() -> None:
        one.step([batch], 1)

    return step


def times(processes: Processes, own: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of a step, by layout, and of the same work alone."""
    size = processes.size
    steps = {
        "alone": stepper(DENSE, {}, own, OneProcess()),
        "sparse, alone": stepper(SPARSE, {}, own, OneProcess()),
    }
    for name, (model, layout) in LAYOUTS.items():
        copies = layout.get("replicate", 1) * layout.get("expert_tensor", 1)
        if size > 1 and size % copies == 0 and (size > 2 or "replicate" not in layout):
            steps[name] = stepper(model, layout, own * size, processes)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1 + repeats):
        for name, step in steps.items():
            processes.most(0)  # a barrier
            began = time.perf_counter()
            step()
            slowest = max(processes.every(time.perf_counter() - began))
            if number:  # the first is a warm-up
                found[name].append(slowest)
    return {name: statistics.median(one) for name, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    rows = []
    for size, own in SIZES:

        def work(processes: Processes, own: int = own) -> dict[str, float]:
            return times(processes, own, given.repeats)

        seconds = forked.results(size, work)[0]
        efficiency = {
            name: seconds["sparse, alone" if LAYOUTS[name][0] is SPARSE else "alone"] / one
            for name, one in seconds.items()
            if name in LAYOUTS
        }
        row = {"processes": size, "sequences_each": own, "seconds": seconds}
        rows.append({**row, "efficiency": efficiency})
        print(size, own, {name: f"{one:.3f} s" for name, one in seconds.items()}, flush=True)
        print({name: f"{one:.0%}" for name, one in efficiency.items()}, flush=True)
    if given.save:
        notes = (
            "Medians of steps that take turns. Efficiency: seconds of the same work alone, in as "
            "many processes on the same cores, divided by the layout's."
        )
        print(record.write("process-scaling", rows, notes=notes))


if __name__ == "__main__":
    main()
