"""The DS-MoE paper's comparison at small scale: dense, sparse MoE and DS-MoE on the same tokens.

Scores finished runs of `moefit train` (configs/small-*.yaml, or the reference pair) on all of their
held-out text: the DS-MoE under several rules, the others under their own. Plots perplexity over
active parameters.

    python benchmarks/paper_in_small.py dense=RUN smoe=RUN dsmoe=RUN [--name novels] [--save]
"""

import argparse
import math
from pathlib import Path

import record
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console

from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.evaluate.loading import load_full_model
from moefit.evaluate.perplexity import Score, Text, score
from moefit.evaluate.report import score_table
from moefit.moe.routing import Rule
from moefit.train.config import make_config
from moefit.train.data.tokens import PreparedData, prepare
from moefit.train.run_folder import read_log

KS = (8, 6, 4, 3, 2)
EPSILONS = (0.25, 0.48, 0.6, 0.75, 1.0)


def rules_for(model: DsMoeForCausalLM) -> list[Rule]:
    own = Rule.parse(model.config.training_rule)
    if model.config.num_experts == 1 or own.kind != "dense":
        return [own]
    return [
        own,
        *(Rule(kind="top_k", k=k) for k in KS),
        *(Rule(kind="top_k", k=k, renormalize=True) for k in KS[2:4]),
        *(Rule(kind="threshold", epsilon=epsilon) for epsilon in EPSILONS),
        *(Rule(kind="threshold_top_k", epsilon=epsilon) for epsilon in EPSILONS[1:]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--name", default="")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    runs = dict(run.split("=", 1) for run in options.runs)
    results = {name: one_run(Path(out), options.max_tokens) for name, out in runs.items()}
    for name, result in results.items():
        Console(width=120).print(score_table(result["scores"], name))
    fingerprints = {result["data"] for result in results.values()}
    assert len(fingerprints) == 1, "the runs saw different data"
    if options.save:
        rows = {
            name: {**result, "scores": [one.as_dict() for one in result["scores"]]}
            for name, result in results.items()
        }
        notes = (
            "All held-out tokens; bf16 autocast with AMX. Active parameters without embeddings and "
            "head, as in the paper; hours of training include evaluations."
        )
        path = record.write("paper-in-small", rows, notes=notes, suffix=options.name)
        draw(results, path.with_suffix(".png"))
        print(path)


def one_run(out: Path, max_tokens: int | None) -> dict:
    config = make_config(yaml.safe_load((out / "config.yaml").read_text()))
    data = prepare(config.data, seq_len=config.seq_len)
    model, _ = load_full_model(str(out))
    assert isinstance(model, DsMoeForCausalLM)
    trained = [r for r in read_log(out) if r["kind"] == "train"][-1]
    bf16 = bool(torch.cpu._is_amx_tile_supported())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        scores = score(model, held_out_of_run(data, config.seq_len, max_tokens), rules_for(model))
    return {
        "config": {
            "model": config.model.settings,
            "loss": config.loss.model_dump(),
            "optimizer": config.optimizer.model_dump(mode="json"),
            "steps": config.steps,
            "batch_size": config.batch_size,
            "seq_len": config.seq_len,
            "seed": config.seed,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_trained": trained["step"] * config.batch_size * config.seq_len,
        "hours": trained["seconds"] / 3600,
        "data": data.fingerprint,
        "scores": scores,
    }


def held_out_of_run(data: PreparedData, seq_len: int, max_tokens: int | None) -> Text:
    ids_T = torch.from_numpy(data.held_out.open().astype("int64"))
    return Text(
        ids_T=ids_T,
        text_bytes=data.held_out.text_bytes,
        context=seq_len,
        max_tokens=max_tokens,
        batch_size=16,
    )


def draw(results: dict[str, dict], path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        scores: list[Score] = result["scores"]
        kinds: dict[str, list[Score]] = {}
        for one in scores:
            rule = Rule.parse(one.rule)
            kind = rule.kind if len(scores) > 1 else "own rule"
            if not rule.renormalize or len(scores) == 1:
                kinds.setdefault(kind, []).append(one)
        for kind, members in kinds.items():
            members = sorted(members, key=lambda one: one.active_parameters)
            xs = [one.active_parameters / 1e6 for one in members]
            ys = [math.exp(one.loss) for one in members]
            axes.plot(xs, ys, "o-", ms=4, lw=1, label=f"{name}, {kind}")
    axes.set_xlabel("active parameters without embeddings, millions")
    axes.set_ylabel("held-out perplexity")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
