"""Train the models that expert_dropout.py compares, from shared first halves.

    python benchmarks/expert_dropout_runs.py --text NOVELS --held-out FILE --out RUNS
        [--seeds 1,2,3] [--recipes base,nested,...] [--model sparse] [--steps 640]

Per seed, the base is trained plainly to the end. Recipes that have no effect before `begin` go on
from the base's checkpoint at that step (`continue_from`), or from that of the recipe that they are
`of`, so that they share its weights, batches and optimizer up to there and cost only the steps
after it. Runs that were stopped resume, and
finished ones are left as they are. All run one after the other, on the threads that torch has.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from moefit.dsmoe import block
from moefit.train.checkpoint import checkpoints, step_of
from moefit.train.config import make_config
from moefit.train.display import display
from moefit.train.loop import train

TOKENS = 1024  # of a step
CHECKPOINTS = 10  # of a run, evenly spaced: `begin` of every recipe is that of one
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "num_experts": 16,
    "qk_norm": True,
    "tie_word_embeddings": True,
}
_TOP_4 = {"training_rule": "top_k:4:renormalize", "inference_rule": "top_k:4:renormalize"}
MODELS: dict[str, dict[str, Any]] = {
    "sparse": {
        "model": {**SHAPE, **_TOP_4, "routed_scaling_factor": 4},
        "loss": {"load_balancing": 0.0025},
    },
    "dsmoe": {
        "model": {**SHAPE, "routed_scaling_factor": 16, "inference_rule": "top_k:4:renormalize"},
        "loss": {"mlp_mi": 0.01, "mi_ramp": [0.3, 0.6]},
    },
}
# For a busy machine: a fifth of the computation.
_SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MODELS |= {
    f"small-{name}": {**one, "model": {**one["model"], **_SMALL}} for name, one in MODELS.items()
}
# transformers' OLMoE, the class of the checkpoints that `moefit adapt` is for.
MODELS["small-olmoe"] = {
    "model": {
        "architecture": "olmoe",
        **{name: value for name, value in (SHAPE | _SMALL).items() if name != "qk_norm"},
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "loss": {"load_balancing": 0.0025},
}
# What 5 or 4 of 16 experts can reach at all: models that have no more, trained alone.
MODELS |= {
    f"small-sparse-{experts}": {
        **MODELS["small-sparse"],
        "model": {**MODELS["small-sparse"]["model"], "num_experts": experts},
    }
    for experts in (4, 5)
}
# The same weights in total and per token, in twice as many experts of half the width. The scale of
# the outputs is kept: a chosen expert has a weight of one on average, as above.
_TOP_8 = dict.fromkeys(_TOP_4, "top_k:8:renormalize")
_NARROW = {"intermediate_size": 32, **_TOP_8, "routed_scaling_factor": 8}
MODELS |= {
    f"small-sparse-narrow{name}": {
        **MODELS["small-sparse"],
        "model": {**MODELS["small-sparse"]["model"], **_NARROW, "num_experts": experts},
    }
    for name, experts in (("", 32), ("-11", 11), ("-8", 8))
}
NESTED = {"order": "nested", "share": 0.75, "begin": 0.5}
LATE = {**NESTED, "begin": 0.8}
MIXED_BITS = {"formats": ["int2", "int3", "int4"], "begin": 0.8}
# `begin` is where a recipe leaves the base: by default where expert dropout begins.
RECIPES: dict[str, dict[str, Any]] = {
    "base": {},
    "nested": {"expert_dropout": NESTED},
    "early": {"expert_dropout": {**NESTED, "begin": 0.3}},
    # Ways to a lower cost in full memory.
    "late": {"expert_dropout": LATE},
    "light": {"expert_dropout": {**LATE, "distillation_weight": 0.3}},
    "fewer": {"expert_dropout": {**LATE, "share": 0.375}},
    "local": {"loss": {"routing_locality": 0.5}, "begin": 0.5},
    "local-2": {"loss": {"routing_locality": 2.0}, "begin": 0.5},
    "budget": {"budget_aware": {"weight": 0.1, "ramp": [0.5, 0.6]}, "begin": 0.5},
    "budget-0.3": {"budget_aware": {"weight": 0.3, "ramp": [0.5, 0.6]}, "begin": 0.5},
    "budget-balanced": {
        "budget_aware": {"weight": 0.2, "ramp": [0.5, 0.6]},
        "loss": {"load_balancing": 0.02},
        "begin": 0.5,
    },
    "rounded": {"rounding": MIXED_BITS, "begin": 0.8},
    "nested-local": {"expert_dropout": NESTED, "loss": {"routing_locality": 0.5}},
    "nested-budget": {
        "expert_dropout": NESTED,
        "budget_aware": {"weight": 0.1, "ramp": [0.5, 0.6]},
    },
    "nested-rounded": {"expert_dropout": NESTED, "rounding": MIXED_BITS},
    # The last tenth of a nested training, again with experts rounded.
    "nested-last-rounded": {
        "of": "nested",
        "expert_dropout": NESTED,
        "rounding": {**MIXED_BITS, "begin": 0.9},
        "begin": 0.9,
    },
    "all": {
        "expert_dropout": NESTED,
        "budget_aware": {"weight": 0.1, "ramp": [0.5, 0.6]},
        "rounding": MIXED_BITS,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="file or folder to train on")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--model", choices=list(MODELS), default="sparse")
    parser.add_argument("--steps", type=int, default=640, help="a multiple of ten")
    arguments = parser.parse_args()
    # Chosen experts one by one: the same function, in half the processor time in float32 where the
    # processor has no matrix units.
    block.WIDE_UP_TO = 0
    for seed in map(int, arguments.seeds.split(",")):
        for name in arguments.recipes.split(","):
            tree = settings(name, seed, arguments)
            with display(Console()) as callback:
                print(name, seed, train(make_config(tree), callback))


def settings(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of one run."""
    recipe, model = RECIPES[name], MODELS[arguments.model]
    tree = {
        **model,
        "loss": {**model["loss"], **recipe.get("loss", {})},
        **{group: recipe.get(group) for group in ("expert_dropout", "budget_aware", "rounding")},
        "data": {
            "sources": [str(arguments.text)],
            "held_out": [str(arguments.held_out)],
            "vocab_size": 2048,
        },
        "optimizer": {"lr": 2e-3, "warmup_steps": 50},
        "log": {"eval_every": arguments.steps // 2, "eval_tokens": 16384},
        "checkpoint": {"every": arguments.steps // CHECKPOINTS, "keep": CHECKPOINTS},
        "steps": arguments.steps,
        "seq_len": 256,
        "batch_size": TOKENS // 256,
        "seed": seed,
        "out": str(_folder(arguments, name, seed)),
    }
    if name != "base":
        begin = recipe.get("begin") or recipe["expert_dropout"]["begin"]
        step = round(begin * arguments.steps)
        before = _folder(arguments, recipe.get("of", "base"), seed)
        tree["continue_from"] = str(_shared(before, step))
    return tree


def _folder(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    return arguments.out / f"{arguments.model}-{name}-{seed}"


def _shared(run: Path, step: int) -> Path:
    """Return the checkpoint of another run in which a recipe begins."""
    found = [one for one in checkpoints(run) if step_of(one) == step]
    if not found:
        raise SystemExit(f"{run} has no checkpoint of step {step}; train that recipe first")
    return found[0]


if __name__ == "__main__":
    main()
