"""The DS-MoE paper's comparison at small scale: dense, sparse MoE and DS-MoE on the same tokens.

Scores finished runs of `moefit train` (configs/small-*.yaml, or the reference pair) on all of their
held-out text: the DS-MoE under several rules, the others under their own. Plots perplexity over
active parameters.

    python benchmarks/paper_in_small.py dense=RUN smoe=RUN dsmoe=RUN [--name novels] [--save]
    python benchmarks/paper_in_small.py --redraw RECORD
"""

import argparse
import json
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
# Share of parameters that is active, and perplexity over the dense twin's, of Tables 3 and 5.
PAPER = {
    "x threshold, 1B, 3B and 6B": [
        (0.41, 20.37 / 20.48),
        (0.34, 15.48 / 14.77),
        (0.29, 13.89 / 12.98),
    ],
    "+ top_k, 3B and 6B": [(1039 / 2793, 15.63 / 14.77), (2043 / 6338, 13.92 / 12.98)],
    "1 sparse, 1B": [(419 / 1042, 21.09 / 20.48)],
}


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
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN")
    parser.add_argument("--name", default="")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--redraw", type=Path, metavar="RECORD", help="draw its picture, only")
    options = parser.parse_args()
    if options.redraw:
        redraw(options.redraw)
        return
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
    """Draw perplexity by active parameters, and beside it both as shares of the dense twin's."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    dense = math.exp(results["dense"]["scores"][0].loss) if "dense" in results else None
    markers = iter("sD^vP*X")
    for name, result in results.items():
        for kind, members in _by_kind(result["scores"]).items():
            ys = [math.exp(one.loss) for one in members]
            how: dict = {"label": f"{name}, {kind}", "ms": 4, "lw": 1, "marker": "o"}
            if len(members) == 1:  # hollow and large, so that nothing hides it
                how |= {"marker": next(markers), "ms": 10, "mfc": "none", "ls": ""}
            (line,) = left.plot([one.active_parameters / 1e6 for one in members], ys, **how)
            if dense is not None:
                how |= {"color": line.get_color()}
                xs = [one.active_share for one in members]
                right.plot(xs, [y / dense for y in ys], **how)
    left.set(xlabel="active parameters without embeddings, millions", ylabel="held-out perplexity")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    for label, points in PAPER.items() if dense is not None else ():
        right.plot(*zip(*points, strict=True), "k" + label[0], ms=7, label=f"paper, {label[2:]}")
    right.axhline(1, color="grey", lw=1)
    right.set(xlabel="share of parameters that is active", ylabel="perplexity, of the dense twin's")
    right.set(xlim=(0.25, 1.03), ylim=(0.9, 1.3))
    right.legend(handles=right.get_lines()[-1 - len(PAPER) : -1], fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _by_kind(scores: list[Score]) -> dict[str, list[Score]]:
    """Return the scores of each kind of rule, by active parameters."""
    if len(scores) == 1:
        return {"own rule": scores}
    kinds: dict[str, list[Score]] = {}
    for one in sorted(scores, key=lambda one: one.active_parameters):
        rule = Rule.parse(one.rule)
        if not rule.renormalize:
            kinds.setdefault(rule.kind, []).append(one)
    return kinds


def redraw(path: Path) -> None:
    """Draw the picture of a record again."""
    results = json.loads(path.read_text())["results"]
    for one in results.values():
        one["scores"] = [Score(**row) for row in one["scores"]]
    draw(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
