"""The sections of a page, from what is known of its runs."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from moefit.report.blocks import Block, Code, Heading, Paragraph, Picture, Table
from moefit.report.facts import RunFacts, labels_of
from moefit.report.pictures import draw_by_rule, draw_front, draw_losses, draw_training
from moefit.serve.memory.budget import format_bytes
from moefit.tasks.paper import CHANCE

_FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "num_experts",
    "num_attention_experts",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "inference_rule",
)
_ROUTERS = {
    "mlp_h_e": "entropy of the mean choice, of its largest (1: all experts are used equally)",
    "mlp_h_e_given_x": "entropy of one token's choice, of its largest (0: one expert)",
    "mlp_mi": "mutual information of token and expert, of its largest",
    "mlp_active": "share of experts above the log's epsilon",
    "mlp_dead": "share of experts that no token of the batch chose",
}


def page(runs: Sequence[RunFacts], folder: Path) -> list[Block]:
    """Return the page's blocks and write its pictures.

    Args:
        runs: What is known of each.
        folder: For the pictures.

    Raises:
        ConfigError: A picture cannot be written.
    """
    labels = labels_of(runs)
    blocks: list[Block] = [Heading(" and ".join(labels), 1)]
    if len(runs) > 1:
        blocks += _comparison(runs, labels, folder)
    for number, run in enumerate(runs):
        if len(runs) > 1:
            blocks.append(Heading(labels[number]))
        prefix = f"{number}-" if len(runs) > 1 else ""
        blocks += _sections(run, folder, prefix)
    return blocks


def _comparison(runs: Sequence[RunFacts], labels: Sequence[str], folder: Path) -> Iterator[Block]:
    yield Table(
        ["run", "steps", "held-out loss", "parameters without embeddings"],
        [
            [label, _last(one, "step"), _last(one, "loss", "eval"), _total(one)]
            for label, one in zip(labels, runs, strict=True)
        ],
    )
    file = folder / "losses.png"
    records = [one.records for one in runs]
    if draw_losses(dict(zip(labels, records, strict=True)), file):
        yield Picture(file, "Held-out loss of the runs by step")


def _sections(run: RunFacts, folder: Path, prefix: str) -> Iterator[Block]:
    yield from _model(run)
    yield from _training(run, folder / f"{prefix}training.png")
    yield from _rules(run, folder / f"{prefix}rules.png")
    yield from _tasks(run)
    yield from _serving(run)
    yield from _plan(run, folder / f"{prefix}plan.png")
    yield from _use(run)


def _model(run: RunFacts) -> Iterator[Block]:
    config = run.config
    yield Heading("Model", 3)
    rows = [["family", str(config.model_type)]]
    rows += [[name, str(getattr(config, name))] for name in _FIELDS if hasattr(config, name)]
    if run.card is not None:
        rows.append(["parameters", f"{run.card.total:,}"])
        rows.append(["without embeddings and head", f"{run.card.total_without_embeddings:,}"])
    yield Table(["", ""], rows)


def _training(run: RunFacts, file: Path) -> Iterator[Block]:
    train = [one for one in run.records if one.get("kind") == "train"]
    if not train:
        return
    yield Heading("Training", 3)
    first = next((one for one in run.records if one.get("kind") == "run"), {})
    rows = [["optimizer steps", _last(run, "step")]]
    if "tokens_per_step" in first:
        rows.append(["tokens", f"{int(first['tokens_per_step']) * int(train[-1]['step']):,}"])
    rows += [["last training loss, nats per token", _last(run, "loss")]]
    rows += [["last held-out loss, nats per token", _last(run, "loss", "eval")]]
    yield Table(["", ""], rows)
    draw_training(run.records, file)
    yield Picture(file, "Training and held-out loss by step, and the routers' state")
    routed = [
        [words, f"{train[-1][name]:.3f}"] for name, words in _ROUTERS.items() if name in train[-1]
    ]
    if routed:
        yield Table(["MLP routers at the last step, mean over layers", ""], routed)


def _rules(run: RunFacts, file: Path) -> Iterator[Block]:
    if not run.by_rule:
        return
    yield Heading("Perplexity by inference rule", 3)
    yield Table(
        ["rule", "MLP experts", "active parameters", "share", "perplexity", "bits per byte"],
        [
            [
                one.rule,
                f"{one.mlp_experts:.2f}",
                f"{one.active_parameters:,}",
                f"{one.active_share:.0%}",
                f"{one.perplexity:.3f}",
                f"{one.bits_per_byte:.4f}",
            ]
            for one in run.by_rule
        ],
    )
    tokens = run.by_rule[0].tokens
    yield Paragraph(f"Over {tokens:,} tokens. Parameters are counted without embeddings and head.")
    draw_by_rule(run.by_rule, file)
    yield Picture(file, "Perplexity over active parameters by inference rule")


def _tasks(run: RunFacts) -> Iterator[Block]:
    if not run.tasks:
        return
    names = sorted({task for row in run.tasks for task in row.accuracy})
    yield Heading("Tasks", 3)
    rows = [
        [row.name, *(row.cell(task) for task in names), _millions(row.active_parameters)]
        for row in run.tasks
    ]
    chance = [f"{CHANCE[task]:.1f}" if task in CHANCE else "" for task in names]
    yield Table(
        ["rule and settings", *names, "active parameters"], [*rows, ["chance", *chance, ""]]
    )
    counts = {task: max(row.questions.get(task, 0) for row in run.tasks) for task in names}
    asked = ", ".join(f"{task} {count:,}" for task, count in counts.items())
    yield Paragraph(
        "Accuracy in percent by lm-evaluation-harness, ± half the 95% interval. "
        f"Questions: {asked}."
    )
    close = [task for task in names if task in CHANCE and _at_chance(run, task)]
    if close:
        yield Paragraph(f"At chance within the intervals, by every rule: {', '.join(close)}.")


def _at_chance(run: RunFacts, task: str) -> bool:
    rows = [row for row in run.tasks if task in row.accuracy]
    return all(
        abs(row.accuracy[task] - CHANCE[task]) <= row.interval.get(task, 0.0) for row in rows
    )


def _serving(run: RunFacts) -> Iterator[Block]:
    if not run.serving:
        return
    yield Heading("Serving in a memory budget", 3)
    rows = [
        [
            f"{one.memory}, {one.mode}",
            f"{one.tokens_per_second:.2f}",
            f"{one.prefill_tokens_per_second:.1f}",
            f"{one.hit_rate:.1%}",
            format_bytes(one.peak_process_bytes),
            "" if one.loss is None else f"{one.loss:+.1%}",
        ]
        for one in run.serving
    ]
    header = ["budget, mode", "tokens/s", "prompt tokens/s", "experts found", "peak", "perplexity"]
    yield Table(header, rows)
    yield Paragraph(
        "Decoding one sequence on the machine that made this page. Perplexity is relative to the "
        "full model's; mode exact does not change it."
    )


def _plan(run: RunFacts, file: Path) -> Iterator[Block]:
    if not run.front:
        return
    yield Heading("Planned configurations", 3)
    draw_front(run.front, file)
    yield Picture(file, "Predicted loss over tokens/s of the planner's configurations")


def _use(run: RunFacts) -> Iterator[Block]:
    yield Heading("Use", 3)
    name = shlex.quote(run.name)
    lines = ["pip install moefit", f"moefit serve {name}"]
    if run.card is not None:
        few = max(1, run.card.num_experts // 4)
        lines.append(f"moefit eval {name} --rule dense --rule top_k:{few}")
    yield Code("\n".join(lines))


def _last(run: RunFacts, field: str, kind: str = "train") -> str:
    found = [one[field] for one in run.records if one.get("kind") == kind and field in one]
    if not found:
        return ""
    return f"{found[-1]:,}" if isinstance(found[-1], int) else f"{found[-1]:.4f}"


def _total(run: RunFacts) -> str:
    return "" if run.card is None else f"{run.card.total_without_embeddings:,}"


def _millions(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:,.2f} M"
