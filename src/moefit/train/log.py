"""What a run writes down: one JSON object a line, and TensorBoard on request.

Owns `OUT/log.jsonl`. A resumed run drops the lines after the step it resumes from, so that the
file tells one story. Knows nothing of what the numbers mean.
"""

import json
from pathlib import Path
from typing import Any

from moefit.errors import CheckpointError, ConfigError
from moefit.train.folder import write_whole

LOG = "log.jsonl"


class RunLog:
    """Appends records; each has a `kind` and a `step`. Raises CheckpointError if it can't."""

    def __init__(self, out: Path, *, resumed_step: int, tensorboard: bool):
        self._path = out / LOG
        self._writer = _tensorboard(out, resumed_step) if tensorboard else None
        records = read_log(out) if resumed_step else []
        kept = [record for record in records if record["step"] <= resumed_step]
        try:
            out.mkdir(parents=True, exist_ok=True)
            _rewrite(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one record and have it on its way to the disk."""
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Finish the files."""
        if self._writer is not None:
            self._writer.close()
        try:
            self._file.close()  # a record that found no room is tried once more here
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"cannot write the log {self._path}: {error.strerror or error}; make room, then run "
            "the same command again: it goes on from the last checkpoint"
        )


def read_log(out: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a line cut short by a crash is left out.

    Raises CheckpointError if the file cannot be read.
    """
    path = out / LOG
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(
            f"cannot read the log {path}: {error.strerror or error}; make it readable, or remove "
            "it to go on without what it holds"
        ) from error
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def last_record(records: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """The newest record of that kind, if there is one.

    >>> last_record([{"kind": "eval", "step": 4}, {"kind": "train", "step": 5}], "eval")
    {'kind': 'eval', 'step': 4}
    """
    return next((record for record in reversed(records) if record["kind"] == kind), None)


def _rewrite(path: Path, text: str) -> None:
    """Leave alone a file that holds `text` already: most resumed runs drop nothing."""
    if not path.is_file() or path.read_bytes() != text.encode():
        write_whole(path, text)


def _tensorboard(out: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "log.tensorboard=true needs tensorboard; install it with: "
            "pip install 'moefit[tensorboard]'"
        ) from error
    return SummaryWriter(str(out / "tensorboard"), purge_step=resumed_step + 1)
