"""Tasks whose questions lie in a folder, for machines that cannot reach the Hugging Face Hub.

`DIR/TASK.jsonl` has one question per line, in one of two forms:

    {"query": TEXT, "choices": [TEXT, ...], "gold": INDEX}
    {"context_options": [TEXT, ...], "continuation": TEXT, "gold": INDEX}

The second is for WinoGrande, where a context is chosen. The model reads the same text as with
lm-evaluation-harness's own task of that name: `query` is what precedes "Answer:", if it asks so.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moefit.errors import DataError
from moefit.tasks.harness import Dataset, DatasetDict

_ASK = ("piqa", "sciq", "arc_easy", "arc_challenge")  # lm-eval's text ends with "Answer:"
_CHOICES = ("query", "choices", "gold")
_CONTEXTS = ("context_options", "continuation", "gold")


def local_task(folder: Path, name: str) -> dict[str, Any]:
    """Return the configuration of a task for lm-evaluation-harness.

    Args:
        folder: With the questions.
        name: Of the task.

    Raises:
        DataError: There is no such file, or a line of it is not a question.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in folder.glob("*.jsonl"))) or "none"
        raise DataError(
            f"{folder} has no questions of {name!r} (it has: {found}); put them into {path}, one "
            'a line as {"query": TEXT, "choices": [TEXT, ...], "gold": INDEX}, or leave '
            "--task-data out to download tasks from the Hugging Face Hub"
        )
    rows = _read(path)
    by_context = _CONTEXTS[0] in rows[0]

    def questions(**_: object) -> Any:
        return DatasetDict({"test": Dataset.from_list(rows)})

    metrics = ["acc"] if by_context else ["acc", "acc_norm"]
    ending = "{{query.rstrip()}}\nAnswer:" if name in _ASK else "{{query}}"
    return {
        "task": name,
        "custom_dataset": questions,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "gold" if by_context else ending,
        "doc_to_choice": _CONTEXTS[0] if by_context else "choices",
        "doc_to_target": "continuation" if by_context else "gold",
        "metric_list": [
            {"metric": one, "aggregation": "mean", "higher_is_better": True} for one in metrics
        ],
        "metadata": {"version": 1.0},
    }


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    rows = [_question(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} is empty; it needs one question a line")
    if len({frozenset(row) for row in rows}) > 1:
        raise DataError(f"{path} has questions of both forms; use one form in a file")
    return rows


def _question(path: Path, number: int, line: str) -> dict[str, Any]:
    where = f"line {number} of {path}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    fields = _CONTEXTS if isinstance(row, Mapping) and _CONTEXTS[0] in row else _CHOICES
    if not isinstance(row, Mapping) or not set(fields) <= set(row):
        raise DataError(
            f"{where} is not a question: it needs {', '.join(_CHOICES)}, or {', '.join(_CONTEXTS)}"
        )
    options, text = (row[fields[0]], row[fields[1]])
    if fields is _CHOICES:
        options, text = text, options
    strings = isinstance(options, list) and all(isinstance(one, str) for one in options)
    if not (strings and len(options) > 1 and isinstance(text, str)):
        raise DataError(f"{where} needs two or more texts to choose from, and one text beside")
    if row["gold"] not in range(len(options)) or isinstance(row["gold"], bool):
        raise DataError(
            f"{where} has gold {row['gold']!r}, but its choices are 0 to {len(options) - 1}"
        )
    return {name: row[name] for name in fields}
