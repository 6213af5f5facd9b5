"""Answers of a model to the requests of tasks, kept in a file so that a run can be continued.

The file is JSON Lines: what the answers depend on, then one line per answer, written when its
batch is done. An incomplete last line, of a process that was killed, is dropped.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moefit.checkpoint.config import CONFIG
from moefit.errors import CheckpointError, ConfigError
from moefit.folders import is_gguf

_WEIGHTS = ("*.safetensors", "*.gguf")


@dataclass(frozen=True, slots=True)
class Answer:
    """The log-likelihood of some tokens after others, and what it took.

    Attributes:
        loglikelihood: Sum over the predicted tokens, in nats.
        greedy: Whether each of them was the most likely one.
        tokens: Tokens that the model read.
        mlp_experts: Active MLP experts, the mean over layers, summed over these tokens.
        attention_experts: The same of attention experts.
    """

    loglikelihood: float
    greedy: bool
    tokens: int
    mlp_experts: float
    attention_experts: float


class _NoAnswerError(Exception):
    """A line has another form than those of answers."""


class AnswerFile:
    """Answers by request, in memory and in a file if there is one.

    Args:
        path: The file; None keeps answers in memory only.
        settings: What the answers depend on: model, rule, precision and so on.

    Raises:
        ConfigError: The file has answers that were made with other settings.
        CheckpointError: The file cannot be read or written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]):
        self._known: dict[str, Answer] = {}
        self._file = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(path)
            _check_same(path, lines[:1], settings)
            self._known = dict(map(_known, lines[1:]))
            if not lines:
                path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be used: {error.strerror or error}; give another --out"
            ) from error
        except (TypeError, KeyError, _NoAnswerError) as error:
            raise CheckpointError(
                f"{path} has lines that are no answers; remove it, or give another --out"
            ) from error

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Answer | None:
        """Return the answer to a request, if it is known."""
        return self._known.get(key)

    def add(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Keep a batch of answers."""
        for key, answer in answers:
            self._known[key] = answer
            if self._file is not None:
                line = {"request": key, "answer": asdict(answer)}
                self._file.write(json.dumps(line) + "\n")
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def request_key(context: Iterable[int], continuation: Iterable[int]) -> str:
    """Return what identifies a request: a digest of its token ids.

    >>> request_key([1], [2, 3]) == request_key([1, 2], [3])
    False
    """
    text = json.dumps([list(context), list(continuation)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def fingerprint(folder: Path) -> str:
    """Return a digest of a model's configuration and of its weight files' sizes and times."""
    files = [folder] if is_gguf(folder) else sorted(p for w in _WEIGHTS for p in folder.glob(w))
    found = hashlib.sha256()
    if (folder / CONFIG).is_file():
        found.update((folder / CONFIG).read_bytes())
    for file in files:
        status = file.stat()
        found.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()[:16]


def digest(path: Path) -> str:
    """Return a digest of a file's bytes, or of those of all files in a folder.

    Raises:
        CheckpointError: A file cannot be read.
    """
    path = path.expanduser()
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as opened:
                inner = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
        found.update(f"{file.relative_to(path)} {inner}\n".encode())
    return found.hexdigest()[:16]


def _whole_lines(path: Path) -> list[Any]:
    """Return the file's records; cut off an incomplete last line."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    try:
        return [json.loads(line) for line in whole.decode().splitlines()]
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove it, or give another --out"
        ) from error


def _known(line: Any) -> tuple[str, Answer]:
    """Return a line's request and answer."""
    request, answer = line["request"], Answer(**line["answer"])
    numbers = (answer.loglikelihood, answer.mlp_experts, answer.attention_experts)
    if not (
        isinstance(request, str)
        and all(isinstance(one, float) and math.isfinite(one) for one in numbers)
        and isinstance(answer.greedy, bool)
        and isinstance(answer.tokens, int)
    ):
        raise _NoAnswerError
    return request, answer


def _check_same(path: Path, first: list[Any], settings: Mapping[str, Any]) -> None:
    if not first:
        return
    before, now = first[0]["settings"], json.loads(json.dumps(settings))
    if not isinstance(before, dict):
        raise _NoAnswerError
    differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differing:
        listed = ", ".join(
            f"{key} {before.get(key)!r} instead of {now.get(key)!r}" for key in differing
        )
        raise ConfigError(
            f"{path} has answers that were made with {listed}; give another --out, or remove it"
        )
