"""What a run writes down: one JSON object a line, and TensorBoard on request.

Owns `OUT/log.jsonl`. A resumed run drops the lines after the step it resumes from, so that the
file tells one story. Knows nothing of what the numbers mean.
"""

import json
from pathlib import Path
from typing import Any

from moefit.errors import ConfigError


class RunLog:
    """Appends records; each has a `kind` and a `step`."""

    def __init__(self, out: Path, *, resumed_step: int, tensorboard: bool):
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / "log.jsonl"
        kept = [record for record in read_log(out) if record["step"] <= resumed_step]
        if resumed_step == 0:
            kept = []
        self._path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._writer = _tensorboard(out, resumed_step) if tensorboard else None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one record and have it on its way to the disk."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Finish the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_log(out: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a line cut short by a crash is left out."""
    path = out / "log.jsonl"
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _tensorboard(out: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "log.tensorboard=true needs tensorboard; install it with: "
            "pip install 'moefit[tensorboard]'"
        ) from error
    return SummaryWriter(str(out / "tensorboard"), purge_step=resumed_step + 1)
