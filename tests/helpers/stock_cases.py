"""What the tests of transformers' expert parallelism do in each of several processes."""

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.distributed import DistributedConfig

from moefit.errors import ConfigError
from moefit.train.parallel.processes import Processes, joined_processes
from moefit.train.parallel.transformers_ep import register_expert_parallelism

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3, "pad_token_id": None,
    "eos_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
MODELS = {
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SHAPE, intermediate_size=16)),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, intermediate_size=16, moe_intermediate_size=16, head_dim=8)
    ),
}


def built(name: str) -> PreTrainedModel:
    """Return a model, alike in every process, whose sums are in an order of its own."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    model.set_experts_implementation("eager")
    return model


def spread(model: PreTrainedModel, **settings) -> PreTrainedModel:
    """Distribute a model as `from_pretrained(distributed_config=...)` does, without loading."""
    kind = type(model)
    config, _, mesh = kind.prepare_distribute_model(DistributedConfig(**settings))
    return kind.maybe_distribute_model(model, config, mesh)


def gradients(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """Return the loss, and the whole gradients."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = [p.grad for p in model.parameters()]
    return loss.item(), [g.full_tensor() if isinstance(g, DTensor) else g for g in found]


def equality(processes: Processes, ep_size: int) -> dict[str, list[float]]:
    """Return, per model and way, the differences from one process, and those between the ways."""
    size = processes.size
    ids = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(1))
    found = {}
    names = register_expert_parallelism(processes_per_machine=size // 2)
    for name in MODELS:
        loss, wanted = gradients(built(name), ids)
        done = []
        for way in names:
            model = spread(built(name), fsdp_size=size, ep_size=ep_size, ep_implementation=way)
            mine, parts = gradients(model, ids.chunk(size)[processes.rank])
            done.append(parts)
            differences = [float((a - b).abs().max()) for a, b in zip(parts, wanted, strict=True)]
            whole = processes.sums([mine])[0] / size
            found[f"{name} {way}"] = [abs(whole - loss), max(differences)]
        unequal = sum(int((a != b).sum()) for a, b in zip(*done, strict=True))
        found[f"{name} ways"] = [unequal, 0]
    return found


def limited(processes: Processes) -> list[float]:
    """Return the share of tokens without an output, with a capacity: in training, and outside."""
    register_expert_parallelism(capacity_factor=0.5, processes_per_machine=1)
    model = spread(
        built("olmoe"), fsdp_size=processes.size, ep_size=processes.size,
        ep_implementation="moefit_hierarchical",
    )  # fmt: skip
    experts, seen = model.model.layers[0].mlp.experts, []
    x_TD = torch.randn(64, 32)
    ids_TK = torch.zeros(64, 1, dtype=torch.long)
    for training in (True, False):
        experts.train(training)
        y_TD = experts(x_TD, ids_TK, torch.ones(64, 1))
        seen.append(float((y_TD == 0).all(-1).float().mean()))
    return seen


def refusals(processes: Processes) -> list[str]:
    """Return what is said about settings that do not work."""
    said = []
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + processes.rank)  # machines that are not alike
    for more, settings in (
        ({}, {"fsdp_size": processes.size, "ep_size": processes.size}),
        ({}, {"tp_size": processes.size, "ep_size": processes.size}),
        ({"capacity_factor": 0.0}, {}),
    ):
        try:
            register_expert_parallelism(**more)
            spread(built("olmoe"), ep_implementation="moefit_flat", **settings)
        except ConfigError as error:
            said.append(str(error))
    assert all(one == said for one in processes.every(said)), "all refuse, and alike"
    return said


def main() -> None:
    """Run the cases."""
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    done: dict[str, object] = {}
    with joined_processes() as processes:
        for case in cases:
            name, _, detail = case.partition(":")
            if name == "equality":
                done[case] = equality(processes, int(detail))
            else:
                done[case] = {"limited": limited, "refusals": refusals}[name](processes)
        if processes.is_main:
            (folder / "results.json").write_text(json.dumps(done))
