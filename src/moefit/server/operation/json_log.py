"""Logs as one JSON object per line (`--log-json`).

Lines pass through a bounded queue to a thread that writes them, so that a pipe that nobody reads
stops neither the event loop nor the engine. Lines that do not fit are counted and dropped.
"""

import json
import logging
import os
import select
import sys
import threading
from datetime import UTC, datetime
from queue import Full, Queue
from time import monotonic, sleep
from types import TracebackType
from typing import Any

from moefit.server.operation.request_id import current_request

MAX_WAITING_LINES = 8192
MAX_CHARACTERS = 16_384  # of a message or a traceback
_FLUSH_SECONDS = 1.0
_OURS = "moefit"


class JsonFormatter(logging.Formatter):
    """Format a record as a JSON object: time, level, logger, message, request_id, fields, error."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _shortened(record.getMessage()),
            "request_id": current_request.get(),
        }
        for name, value in getattr(record, "fields", {}).items():
            if line.get(name) is None:  # fields never replace what every line has
                line[name] = value
        if record.exc_info:
            line["error"] = _shortened(self.formatException(record.exc_info))
        known = {name: value for name, value in line.items() if value is not None}
        return json.dumps(known, default=str)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."


class JsonHandler(logging.Handler):
    """Format records where they are logged, and write the lines in a thread of its own.

    Args:
        descriptor: Open file to write to.
        most: Lines that may wait to be written.

    Attributes:
        dropped: Lines that did not fit since the last one that did.
    """

    def __init__(self, descriptor: int, *, most: int = MAX_WAITING_LINES):
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.dropped = 0
        self._descriptor, self._lines = descriptor, Queue[str](most)
        writer = threading.Thread(target=self._write_all, name="moefit-log", daemon=True)
        writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's line, or count it if too many wait; never block."""
        try:
            line = self.format(record)
            if self.dropped:
                self._lines.put_nowait(self._lost_line())
                self.dropped = 0
            self._lines.put_nowait(line)
        except Full:
            self.dropped += 1
        except Exception:  # noqa: BLE001 - a line must not stop what is logged
            self.dropped += 1

    def flush(self) -> None:
        """Wait for a moment until all lines have been written."""
        deadline = monotonic() + _FLUSH_SECONDS
        while self._lines.unfinished_tasks and monotonic() < deadline:
            sleep(0.005)

    def _lost_line(self) -> str:
        message = f"{self.dropped} lines were dropped: they were not read fast enough"
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, message, None, None)
        return self.format(record)

    def _write(self, content: bytes) -> int:
        """Write some bytes and return how many, also where another process made it non-blocking."""
        while True:
            try:
                return os.write(self._descriptor, content)
            except BlockingIOError:
                _wait_until_writable(self._descriptor)

    def _write_all(self) -> None:
        while True:
            left = f"{self._lines.get()}\n".encode()
            try:
                while left:
                    left = left[self._write(left) :]
            except OSError:  # the reader is gone: nobody can be told
                pass
            finally:
                self._lines.task_done()


def _wait_until_writable(descriptor: int) -> None:
    waits = select.poll()
    waits.register(descriptor, select.POLLOUT)
    waits.poll()


def log_json() -> None:
    """Write all logs of this process to standard error as JSON lines, until it ends.

    Ours from level INFO on; those of libraries, warnings and uncaught exceptions from WARNING on.
    """
    root = logging.getLogger()
    root.handlers[:] = [JsonHandler(sys.stderr.fileno())]
    root.setLevel(logging.WARNING)
    logging.getLogger(_OURS).setLevel(logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda failed: _log_uncaught(
        failed.exc_type, failed.exc_value, failed.exc_traceback
    )


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    made = error if error is not None else kind()
    logging.getLogger(_OURS).critical("uncaught exception", exc_info=(kind, made, trace))
