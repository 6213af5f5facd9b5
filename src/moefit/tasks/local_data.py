"""Tasks whose questions lie in a folder, for machines that cannot reach the Hugging Face Hub.

`DIR/TASK.jsonl` has one question per line, in one of two forms:

    {"query": TEXT, "choices": [TEXT, ...], "gold": INDEX}
    {"context_options": [TEXT, ...], "continuation": TEXT, "gold": INDEX}

`DIR/TASK.train.jsonl` has the solved questions that precede each one with `few_shot`, in the same
form. The second form is for WinoGrande, where a context is chosen. The model reads the same text as
with lm-evaluation-harness's own task of that name: `query` is what precedes "Answer:", if it asks
so.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moefit.errors import ConfigError, DataError
from moefit.tasks.harness import Dataset, DatasetDict

_ASK = ("piqa", "sciq", "arc_easy", "arc_challenge")  # lm-eval's text ends with "Answer:"
_CHOICES = ("query", "choices", "gold")
_CONTEXTS = ("context_options", "continuation", "gold")


def form_of(name: str) -> str:
    """Return the form of a line of a task's file, for messages.

    >>> form_of("winogrande")
    '{"context_options": [TEXT, ...], "continuation": TEXT, "gold": INDEX}'
    """
    if name == "winogrande":
        return '{"context_options": [TEXT, ...], "continuation": TEXT, "gold": INDEX}'
    query = r'"SUPPORT\nQuestion: QUESTION"' if name == "sciq" else "TEXT"
    return f'{{"query": {query}, "choices": [TEXT, ...], "gold": INDEX}}'


def local_task(folder: Path, name: str, few_shot: int | None = None) -> dict[str, Any]:
    """Return the configuration of a task for lm-evaluation-harness.

    Args:
        folder: With the questions.
        name: Of the task.
        few_shot: Solved questions before each one.

    Raises:
        ConfigError: The name has parts of a path.
        DataError: There is no such file, or a line of it is not a question.
    """
    if Path(name).name != name:
        raise ConfigError(
            f"{name!r} cannot name a task: --task-data has the folder, and --tasks the names of "
            "files in it, without .jsonl"
        )
    path = folder / f"{name}.jsonl"
    if not folder.is_dir():
        raise DataError(
            f"--task-data {folder} is not a folder; give the folder that has {path.name}"
        )
    if not path.is_file():
        stems = {file.stem for file in folder.glob("*.jsonl") if not file.stem.endswith(".train")}
        found = ", ".join(sorted(stems)) or "none"
        raise DataError(
            f"{folder} has no questions of {name!r} (it has: {found}); put them into {path}, one "
            f"a line as {form_of(name)}, or leave --task-data out to download tasks from the "
            "Hugging Face Hub"
        )
    rows = _read(path)
    splits = {"test": rows}
    if few_shot:
        splits["train"] = _solved(folder / f"{name}.train.jsonl", few_shot, like=rows[0])
    by_context = _CONTEXTS[0] in rows[0]

    def questions(**_: object) -> Any:
        return DatasetDict({split: Dataset.from_list(some) for split, some in splits.items()})

    def text(doc: Mapping[str, Any]) -> str:
        return f"{doc['query'].rstrip()}\nAnswer:" if name in _ASK else doc["query"]

    metrics = ["acc"] if by_context else ["acc", "acc_norm"]
    return {
        "task": name,
        "custom_dataset": questions,
        "test_split": "test",
        **({"training_split": "train"} if few_shot else {}),
        "output_type": "multiple_choice",
        # A template's text of digits alone would be read as the number of a choice.
        "doc_to_text": "gold" if by_context else text,
        "doc_to_choice": _CONTEXTS[0] if by_context else "choices",
        "doc_to_target": "continuation" if by_context else "gold",
        "metric_list": [
            {"metric": one, "aggregation": "mean", "higher_is_better": True} for one in metrics
        ],
        "metadata": {"version": 1.0},
    }


def _solved(path: Path, count: int, like: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the questions that precede others; those that are scored would give answers away."""
    if not path.is_file():
        raise DataError(
            f"--few-shot {count} needs solved questions besides those that are scored; put them "
            f"into {path}, in the same form, or leave --few-shot out"
        )
    rows = _read(path)
    if rows[0].keys() != like.keys():
        raise DataError(f"{path} has questions of another form than those that are scored")
    if len(rows) < count:
        raise DataError(
            f"{path} has {len(rows)} questions, and --few-shot {count} needs {count}; add some, or "
            f"give --few-shot {len(rows)}"
        )
    return rows


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
    if not all(one.strip() for one in (options if fields is _CHOICES else [text])):
        raise DataError(f"{where} has an empty answer, which no model can score; give it a text")
    if type(row["gold"]) is not int or row["gold"] not in range(len(options)):
        raise DataError(
            f"{where} has gold {row['gold']!r}, but its choices are 0 to {len(options) - 1}"
        )
    return {name: row[name] for name in fields}
