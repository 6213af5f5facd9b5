"""Rows of scores, read from lm-evaluation-harness's results; needs nothing of it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefit.errors import DataError

SUFFIX = ".tasks.json"
"""Of the files with a row each."""
KEY = "moefit"
"""What moefit adds to lm-evaluation-harness's results."""
_NORMAL_95 = 1.96  # standard errors on each side of a 95% interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """Scores of a model under one rule and with the same settings.

    Attributes:
        name: Rule and settings.
        accuracy: By task, in percent.
        interval: Half the 95% interval by task, in percent; absent with a single question.
        normalised: Accuracy where choices are judged by log-likelihood per byte, by task.
        questions: By task.
        active_parameters: Mean over the tokens of all tasks; None if it is not known.
        active_share: The same as a fraction of all parameters.
        seconds: Of scoring.
    """

    name: str
    accuracy: Mapping[str, float]
    interval: Mapping[str, float]
    normalised: Mapping[str, float]
    questions: Mapping[str, int]
    active_parameters: float | None
    active_share: float | None
    seconds: float

    def cell(self, task: str) -> str:
        """Return a task's accuracy and interval as text."""
        if task not in self.accuracy:
            return ""
        half = self.interval.get(task)
        return f"{self.accuracy[task]:.1f}" + ("" if half is None else f" ±{half:.1f}")


def rows_of(results: Iterable[Mapping[str, Any]]) -> list[ScoreRow]:
    """Return a row for each of lm-evaluation-harness's results."""
    return [_row(one) for one in results]


def read_rows(folder: Path) -> list[ScoreRow]:
    """Return the rows in a folder, in the order of the files' names.

    Raises:
        DataError: A file is damaged.
    """
    rows = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            rows.append(_row(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a result of moefit eval --tasks: {error!r}") from error
    return rows


def _row(result: Mapping[str, Any]) -> ScoreRow:
    own = result[KEY]
    tasks = result["results"]
    numbers = (own["seconds"], own.get("active_parameters", 0), own.get("active_share", 0))
    if not isinstance(own["name"], str) or not all(isinstance(one, int | float) for one in numbers):
        raise TypeError(f"the key {KEY!r} has values of other types")
    return ScoreRow(
        name=own["name"],
        accuracy=_percent(tasks, "acc,none"),
        interval={
            name: _NORMAL_95 * error for name, error in _percent(tasks, "acc_stderr,none").items()
        },
        normalised=_percent(tasks, "acc_norm,none"),
        questions={name: one["effective"] for name, one in result["n-samples"].items()},
        active_parameters=own.get("active_parameters"),
        active_share=own.get("active_share"),
        seconds=own["seconds"],
    )


def _percent(tasks: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Return a metric by task, without tasks that do not have it."""
    found = {name: values.get(metric) for name, values in tasks.items()}
    return {name: 100 * value for name, value in found.items() if isinstance(value, int | float)}
