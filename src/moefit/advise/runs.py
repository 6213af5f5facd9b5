"""Training runs that a law is fitted to: read from a CSV file or from folders of `moefit train`.

Runs whose loss is not finite, that diverged or did not finish are left out and named. Runs of
different tokenizers or texts cannot be in one fit, since their losses are not comparable.

Shapes: R runs.
"""

import csv
import gzip
import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moefit.advise.forms import Form, Points
from moefit.advise.shapes import Count
from moefit.dsmoe.card import ModelCard, model_card
from moefit.dsmoe.config import DsMoeConfig
from moefit.errors import ConfigError, DataError
from moefit.yaml_text import load_yaml

REQUIRED = ("parameters", "tokens", "loss")
OPTIONAL = ("name", "experts", "tokenizer", "data", "diverged")
_DIVERGED = 0.5  # nats above the run's lowest held-out loss
_UNREADABLE = (ConfigError, OSError, ValueError, LookupError, TypeError, StopIteration)
_SPARE_RUNS = 2  # beyond the number of coefficients
_EQUAL = 1.01  # largest ratio of quantities that count as equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One finished training run.

    Attributes:
        name: For messages; unique among the runs of a fit.
        parameters: N.
        tokens: D.
        experts: E: all over active experts.
        loss: Final loss in nats per token.
        tokenizer: What identifies it; empty if it is not known.
        data: What identifies the text; empty if it is not known.
        left_out: Why it cannot be used; empty if it can.
    """

    name: str
    parameters: float
    tokens: float
    experts: float
    loss: float
    tokenizer: str = ""
    data: str = ""
    left_out: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Runs of a fit.

    Attributes:
        used: Runs to fit to.
        left_out: Names of others, with the reason.
        counts: Which parameters N counts.
    """

    used: tuple[Run, ...]
    left_out: Mapping[str, str]
    counts: Count

    @property
    def points(self) -> Points:
        """Sizes of all used runs, as arrays of R."""
        return points_of(self.used)

    @property
    def log_loss_R(self) -> np.ndarray:
        """Natural logarithms of their losses."""
        return np.log([one.loss for one in self.used])


def points_of(runs: Sequence[Run]) -> Points:
    """Return the sizes of runs as arrays of R."""
    return Points(
        parameters=np.array([one.parameters for one in runs]),
        tokens=np.array([one.tokens for one in runs]),
        experts=np.array([one.experts for one in runs]),
    )


def read_runs(
    paths: Sequence[Path],
    *,
    counts: Count = Count.active_with_embeddings,
    columns: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
) -> Runs:
    """Read runs.

    Args:
        paths: One CSV file (.csv or .csv.gz), or folders of `moefit train`.
        counts: Which parameters N counts; of a CSV file it only describes the column.
        columns: For a CSV file, the file's name of each of `REQUIRED` and `OPTIONAL`.
        drop: Names of runs to leave out, such as known outliers.

    Raises:
        DataError: A path cannot be read, lacks a column, or has runs of different tokenizers or
            texts.
        ConfigError: A run to drop does not exist.
    """
    if len(paths) == 1 and paths[0].name.endswith((".csv", ".csv.gz")):
        found = list(_read_csv(paths[0], columns or {}))
    else:
        _check_different(paths)
        found = [_read_folder(path, counts) for path in paths]
    unknown = sorted(set(drop) - {one.name for one in found})
    if unknown:
        names = sorted(
            (one.name for one in found), key=lambda name: not name.startswith(unknown[0])
        )
        raise ConfigError(
            f"--drop {unknown[0]}: there is no such run; names are such as {', '.join(names[:3])}"
        )
    left_out = {one.name: one.left_out for one in found if one.left_out}
    left_out |= dict.fromkeys(drop, "dropped, as the command says")
    used = tuple(one for one in found if one.name not in left_out)
    _check_comparable(used)
    return Runs(used=used, left_out=left_out, counts=counts)


def _check_different(folders: Sequence[Path]) -> None:
    for path, count in Counter(one.resolve() for one in folders).items():
        if count > 1:
            raise DataError(f"the run {path} is given {count} times; give each run once")


def _check_comparable(runs: Sequence[Run]) -> None:
    for quantity in ("tokenizer", "data"):
        groups: dict[str, list[str]] = {}
        for one in runs:
            groups.setdefault(getattr(one, quantity), []).append(one.name)
        if len(groups) > 1:
            some = "; ".join(
                f"{value or 'unknown'} ({len(names)} runs, such as {names[0]})"
                for value, names in groups.items()
            )
            raise DataError(
                f"the runs differ in {quantity}: {some}. Losses of different "
                f"{'tokenizers' if quantity == 'tokenizer' else 'texts'} cannot be compared; fit "
                "one group at a time"
            )


def check_enough(runs: Sequence[Run], form: Form) -> None:
    """Raise DataError if a form cannot be fitted to the runs, with how many are needed."""
    needed = len(form.coefficients) + _SPARE_RUNS
    if len(runs) < needed:
        raise DataError(
            f"{len(runs)} usable runs are too few for the form {form.name} with "
            f"{len(form.coefficients)} coefficients; it needs at least {needed}"
        )
    for quantity, least in form.varying.items():
        values = {getattr(one, quantity) for one in runs}
        if len(values) < least:
            raise DataError(
                f"the runs have only {len(values)} different {quantity}, and the form {form.name} "
                f"needs at least {least}; add runs that differ in it, or fit another --form"
            )
    for quantity in {"tokens", "experts"} - form.varying.keys():
        values = [getattr(one, quantity) for one in runs]
        if max(values) > _EQUAL * min(values):
            raise DataError(
                f"the runs have {quantity} from {min(values):.3g} to {max(values):.3g}, and the "
                f"form {form.name} has no term for them; fit runs of equal {quantity}, or another "
                "--form"
            )


def _read_csv(path: Path, columns: Mapping[str, str]) -> Iterator[Run]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        # Spreadsheets begin UTF-8 files with a byte order mark.
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header, rows = reader.fieldnames or (), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    if not rows:
        raise DataError(f"{path} has no runs; it needs a header and a row per run")
    for name, count in Counter(header).items():
        if count > 1:
            raise DataError(
                f"{path} has {count} columns {name!r}; give each column a name of its own"
            )
    names = {name: columns.get(name, name) for name in (*REQUIRED, *OPTIONAL)}
    known = [name for name in rows[0] if name is not None]
    for name in (*REQUIRED, *columns):
        if names.get(name, name) not in known:
            raise DataError(
                f"{path} has no column {names.get(name, name)!r} for {name}; it has "
                f"{', '.join(known)}: give --column {name}=NAME"
            )
    found = [
        _run_of_row(path, number, {key: row.get(name) or "" for key, name in names.items()})
        for number, row in enumerate(rows, start=2)
    ]
    counts = Counter(one.name for one in found)
    for number, one in enumerate(found, start=2):
        yield one if counts[one.name] == 1 else replace(one, name=f"{one.name}, line {number}")


def _run_of_row(path: Path, number: int, row: Mapping[str, str]) -> Run:
    values: dict[str, float] = {}
    for name in (*REQUIRED, "experts"):
        text = row[name] or ("1" if name == "experts" else "nan" if name == "loss" else "")
        try:
            values[name] = float(text)
        except ValueError:
            raise DataError(f"{path}, line {number}: {name} is {text!r}, not a number") from None
        if name == "experts" and not 1 <= values[name] < math.inf:
            raise DataError(
                f"{path}, line {number}: experts is {text}; the least is 1, a dense model"
            )
        if name != "loss" and not 0 < values[name] < math.inf:
            raise DataError(
                f"{path}, line {number}: {name} is {text}; it must be positive and finite"
            )
    left_out = ""
    if row["diverged"].strip().lower() in ("1", "true", "yes"):
        left_out = "it diverged"
    elif not 0 < values["loss"] < math.inf:
        left_out = f"its loss is {row['loss'] or 'missing'}"
    return Run(
        name=row["name"] or f"line {number}",
        tokenizer=row["tokenizer"],
        data=row["data"],
        left_out=left_out,
        **values,
    )


def _read_folder(folder: Path, counts: Count) -> Run:
    """Read a folder that `moefit train` wrote."""
    if running := _begun(folder):
        return running
    try:
        settings = load_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
        records = _records(folder)
        last = sorted(folder.glob("step-*"))[-1]
        model = json.loads((last / "config.json").read_text(encoding="utf-8"))
        tokenizer = (last / "tokenizer.json").read_bytes()
        steps, data = settings["steps"], settings["data"]
        tokens_per_step = next(one["tokens_per_step"] for one in records if one["kind"] == "run")
    except _UNREADABLE as error:
        raise _no_run(folder, error) from error
    if model.get("model_type") != DsMoeConfig.model_type:
        raise DataError(
            f"{folder} trained a {model.get('model_type')}; only runs with architecture dsmoe say "
            "how many of their experts are active in training"
        )
    card = model_card(DsMoeConfig.from_dict(model))
    losses = _held_out(records)
    text = {key: data.get(key) for key in ("sources", "held_out", "held_out_fraction", "max_bytes")}
    return Run(
        name=str(folder),
        parameters=float(counted(card, counts)),
        tokens=float(steps * tokens_per_step),
        experts=card.num_experts / _active_experts(card),
        loss=losses[-1] if losses else math.nan,
        tokenizer=hashlib.sha256(tokenizer).hexdigest()[:12],
        data=json.dumps(text),
        left_out=_unusable(losses, records, steps),
    )


def _begun(folder: Path) -> Run | None:
    """Return a run without a checkpoint, to be left out; None if there is one, or no run."""
    if not (folder / "config.yaml").is_file() or any(folder.glob("step-*")):
        return None
    try:
        load_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
        records = _records(folder) if (folder / "log.jsonl").exists() else []
    except _UNREADABLE as error:
        raise _no_run(folder, error) from error
    left_out = _divergence(_held_out(records), records) or "it has no checkpoint yet"
    nothing: dict[str, Any] = {"parameters": 1.0, "tokens": 1.0, "experts": 1.0, "loss": math.nan}
    return Run(name=str(folder), left_out=left_out, **nothing)


def _records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a log, without a last line that a training run has begun to write."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _held_out(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [one["loss"] for one in records if one["kind"] == "eval"]


def _no_run(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"{folder} is not a finished run of `moefit train` ({type(error).__name__}: {error}); "
        f"{_nearest(folder)}"
    )


def _nearest(folder: Path) -> str:
    """Return what to give instead of a folder that is no run."""
    runs = [path.parent for path in sorted(folder.glob("*/config.yaml"))]
    if runs:
        pattern = f"{folder}/*/config.yaml"
        return f"it contains {len(runs)}, such as {runs[0]}: give $(dirname {pattern})"
    return "give run folders, or one .csv file with a row per run"


def _unusable(losses: Sequence[Any], records: Sequence[Mapping[str, Any]], steps: int) -> str:
    if reason := _divergence(losses, records):
        return reason
    if not losses:
        return "its held-out loss is missing"
    done = max(one["step"] for one in records)
    return f"it stopped at step {done} of {steps}" if done < steps else ""


def _divergence(losses: Sequence[Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Return how a run diverged, as it says itself or by its held-out losses; empty if not."""
    for one in records:
        if one["kind"] == "diverged":
            return f"it diverged at step {one['step']}: {one['reason']}"
    if not losses:
        return ""
    if not _is_finite(losses[-1]):
        return "it diverged: its held-out loss is not finite"
    least = min(one for one in losses if _is_finite(one))
    if losses[-1] > least + _DIVERGED:
        return f"it diverged: its loss rose from {least:.3f} to {losses[-1]:.3f} nats"
    return ""


def _is_finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _active_experts(card: ModelCard) -> int:
    """Return the experts that a token trains; all of them under a rule without a number."""
    return card.training_rule.k or card.num_experts


def counted(card: ModelCard, counts: Count) -> int:
    """Return the parameters of a model as `counts` says; active ones are those in training."""
    parameters = card.parameters
    with_embeddings = counts in (Count.active_with_embeddings, Count.total_with_embeddings)
    embeddings = parameters.embeddings + card.head_matrix if with_embeddings else 0
    body = card.total_without_embeddings
    if counts in (Count.active, Count.active_with_embeddings):
        inactive = 1 - _active_experts(card) / card.num_experts
        body -= round(inactive * parameters.mlp_experts)
    return body + embeddings
