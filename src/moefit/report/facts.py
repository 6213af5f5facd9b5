"""What is known of a run: its log, model, scores, and what was measured while serving it."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from moefit.api import folder_of
from moefit.checkpoint.config import config_from, read_config
from moefit.dsmoe.card import ModelCard, model_card
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import register
from moefit.errors import ConfigError, DataError
from moefit.evaluate.evaluated_model import evaluated_model
from moefit.evaluate.kernel_experts import use_kernels
from moefit.evaluate.loading import REFERENCE, computed_whole, load_full_model
from moefit.evaluate.passage import read_text
from moefit.evaluate.perplexity import Progress, Score, score
from moefit.moe.routing import Rule
from moefit.tasks.rows import ScoreRow, read_rows
from moefit.train.run_folder import LOG, read_log

SCORES = "scores"
"""Folder in a run with the results of `moefit eval --tasks --out RUN/scores`."""
PLAN = "plan.json"
"""File in a run with what `moefit plan RUN --json` prints."""
_CONTEXT = 256
_ROUTERS = ("mlp_mi", "mlp_h_e", "mlp_h_e_given_x", "mlp_active", "mlp_dead")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRow:
    """A model served with one budget and mode.

    Attributes:
        memory: The budget, as it was given.
        mode: For experts that are not resident.
        tokens_per_second: Of decoding one sequence.
        prefill_tokens_per_second: Of its prompt.
        hit_rate: Share of expert uses that found the expert resident.
        peak_process_bytes: Peak resident set of the process.
        perplexity: While decoding step by step; None in mode exact, which changes nothing.
        loss: Its relative increase over the full model's; None likewise.
    """

    memory: str
    mode: str
    tokens_per_second: float
    prefill_tokens_per_second: float
    hit_rate: float
    peak_process_bytes: int
    perplexity: float | None
    loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a page shows of one run or model.

    Attributes:
        name: As commands call it: on the Hub, or its folder here.
        given: The argument that it was found by.
        folder: Of the model.
        config: Its configuration.
        card: Of a DS-MoE; None for other families.
        records: The training log; empty without one.
        by_rule: Perplexity by inference rule; empty if the family has none.
        tasks: Scores on tasks.
        serving: By budget and mode.
        front: Points of the planner: loss, tokens_per_second, expert_bytes.
    """

    name: str
    given: str
    folder: Path
    config: PreTrainedConfig
    card: ModelCard | None
    records: Sequence[Mapping[str, Any]]
    by_rule: Sequence[Score]
    tasks: Sequence[ScoreRow]
    serving: Sequence[ServingRow]
    front: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What is measured for a page.

    Attributes:
        text: To measure perplexity on; None for the held-out standard library.
        max_tokens: Tokens of it; 0 to measure no perplexity.
        rules: Inference rules; empty for the default ones.
        budgets: Memory budgets to serve with.
        modes: Modes to serve in.
    """

    text: Path | None = None
    max_tokens: int = 8192
    rules: Sequence[Rule] = ()
    budgets: Sequence[str] = ()
    modes: Sequence[str] = ("exact", "virtual")


def gather(run: str, measured: Measurements, progress: Progress | None = None) -> RunFacts:
    """Read a run's folder and measure the rest.

    Args:
        run: A training run, a model folder, `reference`, or a name on the Hub.
        measured: What is measured.
        progress: As for `evaluate.perplexity.score`.

    Raises:
        MoefitError: The model cannot be read or measured; a file of the run is damaged.
    """
    folder = folder_of(run)
    home = folder if run == REFERENCE else Path(run).expanduser()
    register()
    config = config_from(read_config(folder), folder)
    return RunFacts(
        name=name_of(run),
        given=run,
        folder=folder,
        config=config,
        card=model_card(config) if isinstance(config, DsMoeConfig) else None,
        records=_records(home),
        by_rule=_by_rule(folder, measured, progress),
        tasks=read_rows(home / SCORES),
        serving=[
            _served(run, memory, mode) for memory in measured.budgets for mode in measured.modes
        ],
        front=_front(home / PLAN),
    )


def name_of(run: str) -> str:
    """Return how a page's commands call a model: the folder's name, unless it is on the Hub."""
    home = Path(run).expanduser()
    return home.resolve().name if run != REFERENCE and home.exists() else run


def labels_of(runs: Sequence[RunFacts]) -> list[str]:
    """Return different labels for runs: their names, or what tells those of one name apart."""
    names, given = [one.name for one in runs], [one.given for one in runs]
    if len({*names}) == len(names):
        return names
    if len({*given}) == len(given):
        return given
    return [f"{one} ({number})" for number, one in enumerate(given, 1)]


def _records(home: Path) -> list[dict[str, Any]]:
    """Return the log's records. Raises DataError for one that no run writes."""
    found = read_log(home)
    for one in found:
        needed = ["step"]
        needed += ["loss"] if one["kind"] in ("train", "eval") else []
        needed += _ROUTERS if "mlp_mi" in one else []
        needed += ["tokens_per_step"] if "tokens_per_step" in one else []
        wrong = [name for name in needed if not isinstance(one.get(name), int | float)]
        if wrong:
            raise DataError(
                f"{home / LOG} has a record {str(one)[:120]} whose {wrong[0]} is no number; remove "
                "that line"
            )
    return found


def _by_rule(folder: Path, measured: Measurements, progress: Progress | None) -> list[Score]:
    if not measured.max_tokens or not computed_whole(folder):
        return []
    model, tokenizer = load_full_model(str(folder))
    use_kernels(model)
    text = read_text(measured.text, tokenizer, _CONTEXT, measured.max_tokens)
    rules = measured.rules or evaluated_model(model).default_rules()
    return score(model, text, rules, progress)


def _served(run: str, memory: str, mode: str) -> ServingRow:
    """Measure in processes of their own, since a budget is of a whole process."""
    how = (run, "--memory", memory, "--mode", mode, "--json")
    speed = _measure("bench", *how)
    quality = None if mode == "exact" else _measure("eval", *how, "--max-tokens", "1024")
    return ServingRow(
        memory=memory,
        mode=mode,
        tokens_per_second=speed["tokens_per_second"],
        prefill_tokens_per_second=speed["prefill_tokens_per_second"],
        hit_rate=speed["hit_rate"],
        peak_process_bytes=speed["peak_process_bytes"],
        perplexity=None if quality is None else quality["stepwise"],
        loss=None if quality is None else quality["loss"],
    )


def _measure(command: str, *arguments: str) -> dict[str, Any]:
    made = subprocess.run(
        [sys.executable, "-m", "moefit", command, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        found = json.loads(made.stdout)
    except ValueError:
        found = {"error": {"message": made.stderr.strip()[-300:] or "no message"}}
    if made.returncode or "error" in found:
        message = found.get("error", {}).get("message", f"exit code {made.returncode}")
        raise ConfigError(f"moefit {command} {' '.join(arguments)} failed: {message}")
    return found


def _front(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        points = [one for budget in found["budgets"] for one in budget["front"]] or found["front"]
        return [
            {name: float(one[name]) for name in ("loss", "tokens_per_second", "expert_bytes")}
            for one in points
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not what moefit plan MODEL --json prints ({error!r}); write it again, or "
            "remove it"
        ) from error
