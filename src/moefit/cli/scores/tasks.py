"""`moefit eval --tasks`: scores on lm-evaluation-harness's tasks, a row per inference rule."""

import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from moefit.api import folder_of
from moefit.checkpoint.tokenizer import refuse_without_tokenizer
from moefit.cli.app import print_json, say
from moefit.cli.loading import WHOLE_WINDOWS, is_served, load_served
from moefit.cli.options import ServingOptions, torch_dtype
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import ConfigError
from moefit.evaluate.report import narrow_table
from moefit.moe.routing import Rule
from moefit.serve.hf.generation_config import IGNORE
from moefit.tasks.paper import CHANCE, TABLE_3
from moefit.tasks.rows import ScoreRow, rows_of
from moefit.tasks.scored_model import load_scored, scored

_NAMED = ("memory", "exact", "precision", "dense_precision", "kv_cache", "mode", "prefill", "bound",
          "plan", "max_loss", "min_speed", "adapter")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskChoice:
    """Which tasks are scored, and how.

    Attributes:
        names: Tasks, separated by commas.
        data: Folder with their questions; None to download them.
        limit: Most questions of a task.
        few_shot: Solved questions before each one.
        batch_size: Most sequences that are read together.
        context: Most tokens of a question; None for the model's own number, if it is loaded whole.
        out: Folder in which answers and results are kept.
        as_json: Print lm-evaluation-harness's results instead of a table.
    """

    names: str
    data: Path | None
    limit: int | None
    few_shot: int | None
    batch_size: int
    context: int | None
    out: Path | None
    as_json: bool


def evaluate_tasks(
    model: str, rules: Sequence[Rule], options: ServingOptions, choice: TaskChoice
) -> None:
    """Score a model on tasks and print a row per rule.

    Args:
        model: As on the command line.
        rules: A row each; empty for the model's own rule.
        options: Memory, precision and mode; with any, the model is served.
        choice: The tasks.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, a task is unknown, or the model does
            not support a rule.
    """
    run = _lm_eval()
    refuse_without_tokenizer(folder_of(model))
    names = [name.strip() for name in choice.names.split(",") if name.strip()]
    tasks = run.find_tasks(names, choice.data, limit=choice.limit, few_shot=choice.few_shot)
    with ExitStack() as stack:
        if is_served(model, options):
            how = {"prompt_logits": WHOLE_WINDOWS, "generation_config": IGNORE}
            loaded = scored(load_served(model, options, **how), context=options.context)
        else:
            dtype = torch_dtype(options.dtype)
            loaded = load_scored(model, device=options.device, dtype=dtype, context=choice.context)
        stack.enter_context(loaded)
        results = [
            run.score_tasks(
                loaded,
                tasks,
                rule=rule,
                settings={**_settings(options), "context": loaded.context},
                out=choice.out,
                batch_size=choice.batch_size,
            )
            for rule in rules or [None]
        ]
        is_dsmoe = isinstance(loaded.model, DsMoeForCausalLM)
    if choice.as_json:
        print_json(json.loads(json.dumps(results, default=run.plain)))
        return
    show(results, names, model, beside_paper=is_dsmoe)
    if choice.out is not None:
        say(f"results and answers are in {choice.out}; the same line continues from there")


def show(
    results: Sequence[dict[str, Any]], names: Sequence[str], model: str, *, beside_paper: bool
) -> None:
    """Print the rows, and beside those of a DS-MoE the paper's."""
    rows = rows_of(results)
    shown = sorted({task for row in rows for task in row.accuracy}, key=_order(names))
    table = narrow_table(f"{model}: accuracy in percent, ± half the 95% interval")
    table.add_column("inference rule")
    for task in (*(_SHORT.get(task, task) for task in shown), "mean", "active", "share"):
        table.add_column(task, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, *(row.cell(task) for task in shown), *_summary(row, shown))
    if all(task in CHANCE for task in shown):
        chance = [CHANCE[task] for task in shown]
        table.add_row("chance", *(f"{one:.1f}" for one in chance), _mean(chance), "", "")
        if beside_paper:
            table.add_section()
            for one in TABLE_3:
                values = [one.accuracy[task] for task in shown]
                cells = [f"{value:.1f}" for value in values]
                active = f"{one.active_parameters / 1e6:,.0f} M"
                share = f"{one.active_share:.0%}"
                table.add_row(f"paper: {one.name}", *cells, _mean(values), active, share)
    Console().print(table)


_SHORT = {
    "hellaswag": "HellaSwag",
    "piqa": "PIQA",
    "winogrande": "WinoGr.",
    "sciq": "SciQ",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
}


def _order(names: Sequence[str]) -> Any:
    places = {name: place for place, name in enumerate(names)}
    return lambda task: (places.get(task, len(places)), task)


def _summary(row: ScoreRow, shown: Sequence[str]) -> tuple[str, str, str]:
    """Return mean accuracy, active parameters and their share."""
    active = "" if row.active_parameters is None else f"{row.active_parameters / 1e6:,.2f} M"
    share = "" if row.active_share is None else f"{row.active_share:.0%}"
    values = [row.accuracy[task] for task in shown if task in row.accuracy]
    return _mean(values), active, share


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f}" if values else ""


def _settings(options: ServingOptions) -> dict[str, Any]:
    """Return the options that differ from their defaults, as they are on the command line."""
    defaults = {one.name: one.default for one in fields(ServingOptions)}
    named = {name: getattr(options, name) for name in _NAMED}
    return {
        name.replace("_", "-"): str(getattr(value, "value", value))
        for name, value in named.items()
        if value != defaults[name]
    }


def _lm_eval() -> Any:
    """Return `moefit.tasks.run`; raises ConfigError if lm-evaluation-harness is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries of tasks that are not used here
            found = import_module("moefit.tasks.run")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("moefit"):
            raise
        raise ConfigError(
            f"--tasks needs lm-evaluation-harness, and {error.name} is not installed; run "
            "`pip install 'moefit[tasks]'`"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its tables and bars say the rest
    return found
