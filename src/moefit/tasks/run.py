"""Score a model on tasks, a row per inference rule, and keep each row in a folder.

A row is lm-evaluation-harness's own result with the key `moefit`: rule, settings, and active
parameters counted over the tokens of all tasks, as in DS-MoE's Table 3.
"""

import difflib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefit.errors import CheckpointError, ConfigError, DataError, in_brief
from moefit.moe.routing import Rule
from moefit.tasks.answers import AnswerFile, digest, fingerprint
from moefit.tasks.harness import DatasetsError, TaskManager, plain, simple_evaluate
from moefit.tasks.lm import MoefitLM
from moefit.tasks.local_data import form_of, local_task
from moefit.tasks.rows import KEY, SUFFIX
from moefit.tasks.scored_model import ScoredModel

_RESAMPLES = 1000
_FILES = ("adapter", "plan")
"""Settings that are paths of files on which answers depend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """Tasks that can be scored.

    Attributes:
        specs: What lm-evaluation-harness loads them by: names, or configurations.
        manager: What loads them.
        limit: Most questions of a task; None for all.
        few_shot: Solved questions before each one; None for the task's own number.
    """

    specs: Sequence[str | Mapping[str, Any]]
    manager: Any
    limit: int | None = None
    few_shot: int | None = None


def find_tasks(
    names: Sequence[str],
    data: Path | None = None,
    *,
    limit: int | None = None,
    few_shot: int | None = None,
) -> Tasks:
    """Find tasks by name and load their questions.

    Args:
        names: Such as `hellaswag`.
        data: A folder with their questions (`local_data`); None to download them.
        limit: Most questions of a task.
        few_shot: Solved questions before each one.

    Raises:
        ConfigError: lm-evaluation-harness has no such task, or none is given.
        DataError: The questions cannot be read or downloaded.
    """
    if not names:
        raise ConfigError("no tasks are given; name some, such as --tasks hellaswag,piqa")
    if data is not None:
        specs = [local_task(data, name, few_shot) for name in names]
        manager = TaskManager(include_defaults=False)
        return Tasks(specs=specs, manager=manager, limit=limit, few_shot=few_shot)
    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.5)
            nearest = f"; the nearest is {near[0]!r}" if near else ""
            raise ConfigError(
                f"lm-evaluation-harness has no task {name!r}{nearest} "
                "(`lm_eval ls tasks` lists all)"
            )
    try:
        manager.load(list(names))
    except (OSError, DatasetsError, ValueError) as error:
        raise DataError(
            f"the questions of {', '.join(names)} cannot be downloaded: {in_brief(error, 160)}; "
            "without the Hugging Face Hub, put them into a folder as TASK.jsonl, one a line as "
            f"{form_of(names[0])}, and give --task-data FOLDER"
        ) from error
    return Tasks(specs=list(names), manager=manager, limit=limit, few_shot=few_shot)


def score_tasks(  # noqa: PLR0913 - keywords
    scored: ScoredModel,
    tasks: Tasks,
    *,
    rule: Rule | None = None,
    settings: Mapping[str, Any] | None = None,
    out: Path | None = None,
    batch_size: int = 8,
    samples: bool = False,
) -> dict[str, Any]:
    """Score a model under one rule.

    Args:
        scored: The model.
        tasks: The tasks.
        rule: Inference rule; None for the model's own.
        settings: How it was loaded: `memory`, `mode` and so on. They name the row.
        out: Folder in which answers are kept as they come, and the result at the end. What is
            known there is not computed again.
        batch_size: Most sequences that are read together.
        samples: Whether the result has all questions with the model's answers.

    Returns:
        lm-evaluation-harness's results, with the key `moefit`.

    Raises:
        ConfigError: The model does not support the rule, or `out` has answers that were made with
            other settings.
        CheckpointError: `out` cannot be written, or the model's output is not finite.
    """
    if rule is not None:
        scored.use(rule)
    how = {key: value for key, value in (settings or {}).items() if value is not None}
    name = row_name(scored.rule, how)
    depends_on = _depends_on(scored, how)
    file = None if out is None else out / f"{_file_name(name)}.answers.jsonl"
    answers = AnswerFile(file, depends_on)
    known, began = len(answers), time.perf_counter()
    lm = MoefitLM(scored, batch_size=batch_size, answers=answers, name=name)
    try:
        result: Any = simple_evaluate(
            lm,
            tasks=list(tasks.specs),
            num_fewshot=tasks.few_shot,
            limit=tasks.limit,
            task_manager=tasks.manager,
            bootstrap_iters=_RESAMPLES,  # of metrics without a formula; accuracies have one
            log_samples=samples,
        )
    finally:
        answers.close()
    result[KEY] = {
        "name": name,
        "model": str(scored.folder),
        "dtype": str(scored.model.dtype).removeprefix("torch."),
        "rule": depends_on["rule"],
        "settings": how,
        **_active(scored, lm),
        "seconds": time.perf_counter() - began,
        "answers_known_before": known,
    }
    if out is not None:
        save(result, out / f"{_file_name(name)}{SUFFIX}")
    return result


def _depends_on(scored: ScoredModel, how: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that answers depend on beside the questions."""
    return {
        "model": fingerprint(scored.folder),
        "rule": None if scored.rule is None else str(scored.rule),
        "dtype": str(scored.model.dtype),
        **how,
        **{f"files of {key}": digest(Path(how[key])) for key in _FILES if key in how},
        **({"batch_size": 1} if scored.one_at_a_time else {}),
    }


def row_name(rule: Rule | None, settings: Mapping[str, Any]) -> str:
    """Return a row's name.

    >>> row_name(Rule.parse("top_k:4"), {"memory": "700MiB", "mode": "virtual"})
    'top_k:4 memory=700MiB mode=virtual'
    """
    parts = [f"{key}={value}" for key, value in settings.items()]
    return " ".join([str(rule or "model's own"), *parts])


def save(result: Mapping[str, Any], path: Path) -> None:
    """Write a row as JSON. Raises CheckpointError if it cannot be written."""
    text = json.dumps(result, indent=1, default=plain, ensure_ascii=False)
    partial = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def _file_name(name: str) -> str:
    """Return a row's name without characters that a file's name should not have.

    >>> _file_name("threshold:0.48 memory=700MiB")
    'threshold-0.48-memory-700MiB'
    """
    return re.sub(r"[^\w.]+", "-", name)


def _active(scored: ScoredModel, lm: MoefitLM) -> dict[str, Any]:
    """Return the active parameters and experts, means over the tokens of all requests."""
    evaluated, rule, asked = scored.evaluated, scored.rule, lm.asked
    tokens = sum(one.tokens for one in asked)
    if evaluated is None or rule is None or not tokens:
        return {"tokens": tokens}
    mlp = sum(one.mlp_experts for one in asked) / tokens
    attention = sum(one.attention_experts for one in asked) / tokens
    active = evaluated.active(rule, mlp or None, attention or None)
    return {
        "tokens": tokens,
        "active_parameters": active,
        "active_share": active / evaluated.total,
        "mlp_experts": mlp or float(rule.k or evaluated.num_experts),
        "attention_experts": attention or float(evaluated.num_attention_experts),
    }
