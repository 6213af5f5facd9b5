"""What slots for attention experts (JetMoE's and DS-MoE's MoA) would gain: a computation of shapes.

A model in a budget B reads, per token, the chosen bytes of what is absent. With attention experts
always in memory, all misses are MLP experts; with slots for both, each kind has the same share of
its bytes in memory. Routing is uniform, so that an expert is in memory with the probability of its
kind's share: an expert's chance to be chosen is K / E.
"""

import argparse
from typing import Any

import record
from transformers import JetMoeConfig

from moefit.dsmoe.presets import preset, preset_names


def jetmoe() -> dict[str, Any]:
    config = JetMoeConfig()
    heads = config.num_key_value_heads * config.kv_channels
    return {
        "layers": config.num_hidden_layers,
        "attention": (config.num_local_experts, 2 * config.hidden_size * heads),
        "mlp": (config.num_local_experts, 3 * config.hidden_size * config.intermediate_size),
        "chosen": (config.num_experts_per_tok, config.num_experts_per_tok),
        "vocabulary": config.vocab_size * config.hidden_size,
    }


def dsmoe(name: str, chosen: int) -> dict[str, Any]:
    """The inference rule applies to both kinds; K is at most the number of attention experts."""
    config = preset(name)
    assert config.num_key_value_heads is not None and config.head_dim is not None
    inner = config.num_key_value_heads * config.head_dim
    matrices = 3 if config.mlp_type == "swiglu" else 2
    return {
        "layers": config.num_hidden_layers,
        "attention": (config.num_attention_experts, 2 * config.hidden_size * inner),
        "mlp": (config.num_experts, matrices * config.hidden_size * config.intermediate_size),
        "chosen": (min(chosen, config.num_attention_experts), chosen),
        "vocabulary": config.vocab_size * config.hidden_size,
    }


def gain(shape: dict[str, Any]) -> dict[str, float]:
    """Return shares of weights, and weights read per token with and without such slots."""
    (few, small), (many, large) = shape["attention"], shape["mlp"]
    chosen_attention, chosen_mlp = shape["chosen"]
    attention, mlp = few * small * shape["layers"], many * large * shape["layers"]
    budget = attention + mlp / 3  # a third of the MLP experts beside all attention experts
    active = shape["layers"] * (chosen_attention * small + chosen_mlp * large)
    in_memory = shape["layers"] * chosen_mlp * large * (1 - (budget - attention) / mlp)
    in_slots = active * (1 - budget / (attention + mlp))
    total = attention + mlp + shape["vocabulary"]
    least = shape["layers"] * (small + large), attention + shape["layers"] * large
    return {
        "attention_share": attention / total,
        "mlp_share": mlp / total,
        "chosen_attention": chosen_attention / few,
        "chosen_mlp": chosen_mlp / many,
        "read_with_slots_relative": in_slots / in_memory,
        "least_lower_by": (least[1] - least[0]) / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    shapes = {"JetMoE-8B, top 2": jetmoe()}
    for name in preset_names():
        if preset(name).num_attention_experts > 1:
            shapes |= {f"{name}, top {k}": dsmoe(name, k) for k in (2, 4)}
    results = {name: gain(shape) for name, shape in shapes.items()}
    for name, one in results.items():
        print(name, {key: round(value, 3) for key, value in one.items()})
    if given.record:
        notes = (
            "Memory: all attention experts and a third of the MLP experts, or as many bytes of "
            "both. read_with_slots_relative: weights read per token, slots for both against MLP "
            "experts alone. least_lower_by: of the least memory, in shares of all weights."
        )
        print(record.write("attention-experts", results, notes=notes))


if __name__ == "__main__":
    main()
