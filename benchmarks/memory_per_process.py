"""Memory of weights, gradients and optimizer per process, against FSDP's arithmetic.

A DS-MoE of P parameters is trained for two steps by 1, 2 and 4 processes with gloo, in several
layouts. In float32 with AdamW, one of N processes should hold 4 P / N bytes of weights, as many of
gradients, and 8 P / N of optimizer state; while it computes, also whole weights: those of one layer
and of what belongs to no layer, or with `reshard: false` of all layers. (The next layer, gathered
ahead, is in a buffer of its own.) Experts that `expert_tensor` divides are gathered in part only.

    python benchmarks/memory_per_process.py [--save]
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import forked
import record
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from moefit.train.config import TrainConfig, make_config
from moefit.train.model import build_model, loss_weights
from moefit.train.optimizer import make_optimizer
from moefit.train.parallel.parallelism import parallelism
from moefit.train.parallel.processes import Processes
from moefit.train.step import Stepper, make_losses

LAYERS, BATCH, LENGTH, VOCABULARY = 6, 8, 64, 2048
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "data, reshard: false": {"reshard": False},
    "data, mixed_precision: bf16": {"mixed_precision": "bf16"},
    "replicate: 2": {"replicate": 2},
    "expert_tensor: 2": {"expert_tensor": 2},
}


def settings(layout: dict[str, Any]) -> TrainConfig:
    return make_config(
        {
            "model": {
                "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": LAYERS,
                "num_attention_heads": 4, "num_experts": 16,
            },
            "loss": {"mlp_mi": 1e-3}, "batch_size": BATCH, "seq_len": LENGTH, "steps": 2,
            "optimizer": {"warmup_steps": 0}, "parallel": layout,
        }
    )  # fmt: skip


def here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nbytes(tensors: Iterator[Tensor]) -> int:
    return sum(here(one).nbytes for one in tensors)


@dataclass(slots=True)
class Gathered:
    """Bytes of gathered weights, and the most that there were when a layer began."""

    model: nn.Module
    most: int = 0
    handles: list[Any] = field(default_factory=list)

    def watch(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.register_forward_pre_hook(self._look)
                module.register_full_backward_pre_hook(self._look)

    def _look(self, *_: Any) -> None:
        found = 0
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for parameter in group.fsdp_params:
                        outputs = parameter.all_gather_outputs
                        found += sum(one.untyped_storage().nbytes() for one in outputs)
        self.most = max(self.most, found)


def allocated_peak(profiled: profile) -> int:
    """Return the most bytes that were allocated at once, above those at the beginning."""
    assert profiled.profiler is not None
    kineto: Any = profiled.profiler.kineto_results
    events = [one for one in kineto.events() if one.name() == "[memory]"]
    now = most = 0
    for one in sorted(events, key=lambda one: one.start_ns()):
        now += one.nbytes()
        most = max(most, now)
    return most


def measured(processes: Processes, name: str) -> dict[str, int]:
    """Train two steps in a layout; return bytes of this process."""
    config, cpu = settings(LAYOUTS[name]), torch.device("cpu")
    model = build_model(config, vocab_size=VOCABULARY, eos_token_id=0)
    model.train()
    parameters = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    layers = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    parallel = parallelism(config, processes, cpu)
    parallel.wrap(model)
    gathered = Gathered(model)
    gathered.watch()
    optimizer = make_optimizer(model, config.optimizer)
    losses = make_losses(model, loss_weights(config, model), compile=False, total=parallel.total)
    gradients = 0

    def count(*_: Any) -> None:
        nonlocal gradients
        gradients = nbytes(p.grad for p in model.parameters() if p.grad is not None)

    optimizer.register_step_pre_hook(count)
    stepper = Stepper(
        model=model, optimizer=optimizer, losses=losses, device=cpu, bf16=False, clip=1.0,
        parallel=parallel,
    )  # fmt: skip
    chance = torch.Generator().manual_seed(0)
    batch = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=chance)
    stepper.step([batch], 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        stepper.step([batch], 1)
    states = (v for state in optimizer.state.values() for v in state.values())
    return {
        "parameters": parameters,
        "of_experts": experts,
        "of_layers": layers,
        "weights": nbytes(iter(model.parameters())),
        "gradients": gradients,
        "optimizer": nbytes(one for one in states if isinstance(one, Tensor) and one.ndim),
        "gathered": gathered.most,
        "step": allocated_peak(profiled),
    }


def expected(found: dict[str, int], name: str, size: int) -> dict[str, float]:
    """Return the bytes of FSDP's arithmetic."""
    layout = LAYOUTS[name]
    copies = layout.get("replicate", 1)
    tensor = layout.get("expert_tensor", 1)
    width = 2 if layout.get("mixed_precision") else 4
    shared = found["parameters"] - found["of_experts"]
    # Outside the experts, processes of a group hold the same.
    mine = shared * tensor * copies / size + found["of_experts"] * copies / size
    layer = (found["of_layers"] - found["of_experts"]) / LAYERS
    layer += found["of_experts"] / tensor / LAYERS
    outside = found["parameters"] - found["of_layers"]
    count = LAYERS if layout.get("reshard") is False else 1
    whole = 0.0 if size == 1 else width * (count * layer + outside)
    return {"weights": 4 * mine, "gradients": 4 * mine, "optimizer": 8 * mine, "gathered": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    rows = []
    for size in (1, 2, 4):
        names = [
            name
            for name, layout in LAYOUTS.items()
            if size > 1 and (size > 2 or "replicate" not in layout)
        ] or ["data"]

        def work(processes: Processes, names: list[str] = names) -> list[dict[str, int]]:
            return [measured(processes, name) for name in names]

        for name, *of_ranks in zip(names, *forked.results(size, work), strict=True):
            most = {key: max(one[key] for one in of_ranks) for key in of_ranks[0]}
            wanted = expected(most, name, size)
            ratios = {key: most[key] / value for key, value in wanted.items() if value}
            rows.append(
                {"processes": size, "layout": name, "measured": most, "expected": wanted,
                 "ratios": ratios}
            )  # fmt: skip
            shown = {key: f"{most[key] / 1e6:.2f} MB" for key in (*wanted, "step")}
            print(size, name, shown, {k: f"{v:.4f}" for k, v in ratios.items()}, flush=True)
    if given.save:
        notes = (
            "Bytes of the process that holds most. `gathered`: whole weights, the most when a "
            "layer begins forward or backward. `step`: the most that a step allocated at once, "
            "with activations, gradients and gathered weights, above what there was before it."
        )
        print(record.write("memory-per-process", rows, notes=notes))


if __name__ == "__main__":
    main()
