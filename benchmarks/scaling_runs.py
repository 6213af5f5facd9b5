"""Train small dense, sparse and DS-MoE models on a grid of sizes and tokens, for a law of our own.

    python benchmarks/scaling_runs.py --text TEXTS --out RUNS [--plan | --time]

`--plan` prints the grid and predicts how long it takes from one short run, which `--time` measures.
Otherwise the runs are trained one after the other on one thread; those that were stopped resume
and finished ones are left as they are. `scaling_law.py` fits and compares.

N is the total without embeddings. At one size all kinds have the same width, layers, attention and
total width of the MLPs, which E experts divide. `sparse` models train and serve top-2, `dsmoe`
train all experts and add the mutual-information loss. All see the same text, tokenizer, batches
and learning rates.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moefit.dsmoe import block
from moefit.dsmoe.card import ModelCard, model_card
from moefit.dsmoe.config import DsMoeConfig
from moefit.train.config import TrainConfig, make_config
from moefit.train.data.tokens import prepare
from moefit.train.display import NoDisplay
from moefit.train.loop import train

VOCABULARY, SEQUENCE, BATCH = 1024, 128, 8
TOKENS_PER_STEP = SEQUENCE * BATCH
MILLION = 1 << 20  # of tokens
TIMED_STEPS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Width, layers and width of all experts of a layer together."""

    width: int
    layers: int
    mlp_width: int


SIZES = {
    "small": Size(width=32, layers=2, mlp_width=128),
    "medium": Size(width=64, layers=2, mlp_width=256),
    "large": Size(width=96, layers=3, mlp_width=448),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run of the grid: tokens in millions."""

    kind: str
    experts: int
    size: str
    tokens: float

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.kind}-{self.experts}-{self.size}-{self.tokens:g}m"

    @property
    def steps(self) -> int:
        """Of training."""
        return round(self.tokens * MILLION / TOKENS_PER_STEP)


# Every size and number of tokens in each kind, and every number of experts at every size.
_MIXTURES = (
    *((4, "small", 1), (4, "medium", 0.5), (4, "medium", 2), (4, "large", 1)),
    *((8, "small", 0.5), (8, "small", 2), (8, "medium", 1), (8, "large", 0.5), (8, "large", 2)),
)
_DENSE = (
    *(("small", 0.5), ("small", 2), ("medium", 0.5), ("medium", 1), ("medium", 2)),
    *(("large", 0.5), ("large", 2)),
)
_NOT_SPARSE = ((4, "medium", 0.5),)  # the grid has 24 runs


def grid() -> list[Planned]:
    """Return all runs, those with the fewest operations first."""
    runs = [Planned(kind="dense", experts=1, size=size, tokens=tokens) for size, tokens in _DENSE]
    for kind in ("sparse", "dsmoe"):
        for run in _MIXTURES:
            if kind != "sparse" or run not in _NOT_SPARSE:
                experts, size, tokens = run
                runs.append(Planned(kind=kind, experts=experts, size=size, tokens=tokens))
    return sorted(runs, key=flops)


def model_settings(run: Planned) -> dict[str, Any]:
    """Return the fields of a run's model."""
    size = SIZES[run.size]
    settings: dict[str, Any] = {
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width // run.experts,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 32,
        "num_experts": run.experts,
        "max_position_embeddings": SEQUENCE,
        "qk_norm": True,
        "tie_word_embeddings": True,
    }
    if run.kind == "sparse":
        rule = "top_k:2:renormalize"
        return settings | {
            "training_rule": rule,
            "inference_rule": rule,
            "routed_scaling_factor": 2,
        }
    if run.kind == "dsmoe":
        return settings | {"routed_scaling_factor": run.experts}
    return settings


def card_of(run: Planned) -> ModelCard:
    """Return the parameters of a run's model."""
    return model_card(DsMoeConfig(vocab_size=VOCABULARY, **model_settings(run)))


def flops(run: Planned) -> float:
    """Return the operations of a run's training."""
    return card_of(run).training_flops_per_token(SEQUENCE) * run.steps * TOKENS_PER_STEP


def run_config(run: Planned, text: Path, out: Path, short: int | None = None) -> TrainConfig:
    """Return a run's settings.

    Args:
        run: Which.
        text: Folder or file to train on; some of its documents are held out.
        out: Folder of all runs.
        short: Steps of a run that only measures the speed.
    """
    losses = {
        "sparse": {"load_balancing": 0.005},
        "dsmoe": {"mlp_mi": 0.01, "mi_ramp": [0.3, 0.6]},
    }
    steps = short or run.steps
    return make_config(
        {
            "out": str(out / run.name),
            "model": model_settings(run),
            "loss": losses.get(run.kind, {}),
            "data": {
                "sources": [str(text)],
                "held_out_fraction": 0.05,
                "max_bytes": 12_000_000,
                "vocab_size": VOCABULARY,
                "cache_dir": str(out / "data"),
            },
            "optimizer": {"lr": 3e-3, "warmup_steps": min(50, steps // 4)},
            "steps": steps,
            "seq_len": SEQUENCE,
            "batch_size": BATCH,
            "log": {"every": 50, "eval_every": max(steps // 2, 1), "eval_tokens": 65536},
            "checkpoint": {"every": 250, "keep": 1},
        }
    )


def timed(run: Planned, text: Path, out: Path) -> float:
    """Return the seconds of processor time per operation of a short run like `run`."""
    config = run_config(run, text, out, TIMED_STEPS)
    prepare(config.data, seq_len=SEQUENCE)
    with TemporaryDirectory(dir=out) as folder:
        begin = time.process_time()
        train(config.model_copy(update={"out": folder}), NoDisplay())
        return (time.process_time() - begin) / (flops(run) * TIMED_STEPS / run.steps)


def show_plan(runs: list[Planned], seconds_per_flop: float | None) -> None:
    """Print the grid, with predicted durations if the speed is known."""
    table = Table("run", "total N", "active N", "tokens", "1e12 FLOPs", "minutes")
    for run in runs:
        card = card_of(run)
        minutes = flops(run) * seconds_per_flop / 60 if seconds_per_flop else float("nan")
        table.add_row(
            run.name,
            f"{card.total_without_embeddings:,}",
            f"{card.active(card.inference_rule):,}",
            f"{run.steps * TOKENS_PER_STEP:,}",
            f"{flops(run) / 1e12:.2f}",
            f"{minutes:.1f}",
        )
    Console(width=110).print(table)
    total = sum(map(flops, runs))
    print(f"{len(runs)} runs, {total:.3g} FLOPs", end="")
    print(f", {total * seconds_per_flop / 60:.0f} minutes" if seconds_per_flop else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="file or folder to train on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", action="store_true", help="print the grid only")
    parser.add_argument("--time", action="store_true", help="measure a short run for --plan")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    block.WIDE_UP_TO = 0  # chosen experts one by one: half the time in float32
    runs, speed = grid(), arguments.out / "speed.json"
    if arguments.time:
        arguments.out.mkdir(parents=True, exist_ok=True)
        medium = next(run for run in runs if run.size == "medium")
        speed.write_text(json.dumps(timed(medium, arguments.text, arguments.out)) + "\n")
    if arguments.plan or arguments.time:
        show_plan(runs, json.loads(speed.read_text()) if speed.is_file() else None)
        return
    for run in runs:
        begin = time.process_time()
        result = train(run_config(run, arguments.text, arguments.out), NoDisplay())
        if result.stopped_by is not None:
            print(f"stopped by {result.stopped_by} in {run.name}; the same command resumes")
            return
        minutes = (time.process_time() - begin) / 60
        print(f"{run.name}: {result.held_out_loss:.4f} nats, {minutes:.1f} min", flush=True)


if __name__ == "__main__":
    main()
