"""The folder of a run: lock, configuration, log and profiles.

The log is JSON Lines, with TensorBoard files and a run of Weights & Biases if configured. Resuming
drops records after the checkpoint.
"""

import importlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from moefit.errors import CheckpointError, ConfigError
from moefit.folders import exclusive_folder
from moefit.train.checkpoint import checkpoints
from moefit.train.config import TrainConfig, make_config
from moefit.yaml_text import load_yaml

CONFIG = "config.yaml"
_LOG = logging.getLogger(__name__)
_ELSEWHERE = "free disk space or give another folder with out=FOLDER"

# Settings that may change when a run is resumed. `RunState` compares the precision that `auto`
# resolves to.
CHANGEABLE = (
    *("log", "checkpoint", "out", "data.cache_dir", "device", "precision"),
    *(f"parallel.{name}" for name in ("replicate", "reshard", "experts", "expert_tensor", "nodes")),
)


def locked(out: Path) -> AbstractContextManager[None]:
    """Return a context that creates the folder and holds its lock; see `exclusive_folder`."""
    busy = (
        f"another process is training in {out}; wait for it or stop it, or give another folder "
        "with out=FOLDER"
    )
    return exclusive_folder(out, busy=busy, elsewhere=_ELSEWHERE)


def check_same_config(out: Path, config: TrainConfig) -> None:
    """Raise ConfigError if `out` has checkpoints that were made with other settings."""
    path = out / CONFIG
    if not path.is_file() or not checkpoints(out):
        return
    before = _read_config(path).model_dump(mode="json")
    differing = sorted(_differences(before, config.model_dump(mode="json")))
    if differing:
        raise ConfigError(
            f"{out} contains a run with other settings ({', '.join(differing)}); resume it with "
            "the same ones, or give another folder with out=FOLDER"
        )


def _read_config(path: Path) -> TrainConfig:
    """Read a stored configuration; settings that were added since have their defaults."""
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ConfigError("it is empty" if tree is None else f"it is a {type(tree).__name__}")
        return make_config(tree)
    except (OSError, ValueError) as error:  # ConfigError is a ValueError
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} should contain the settings of the run's checkpoints but cannot be read "
            f"({reason}); remove the file if they were made with the present settings, or give "
            "another folder with out=FOLDER"
        ) from error


def _differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    if where in CHANGEABLE:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            inner = f"{where}.{key}" if where else key
            yield from _differences(before.get(key), after.get(key), inner)
    elif before != after:
        yield where


def save_config(out: Path, config: TrainConfig) -> None:
    """Write the resolved configuration into the folder.

    Raises:
        CheckpointError: It cannot be written.
    """
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    try:
        write_atomically(out / CONFIG, text)
    except OSError as error:
        raise _unwritable(out, error) from error


def mark(path: Path) -> None:
    """Create an empty file in a run's folder; raises CheckpointError if it cannot be written."""
    try:
        path.touch()
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content as a whole; a file that has this content already is not written."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    partial = path.with_name(f".{path.name}.writing")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write into {out}: {error.strerror or error}; {_ELSEWHERE}")


LOG = "log.jsonl"


class RunLog:
    """Appends records with a `kind` and a `step` to the log.

    Args:
        out: The run's folder.
        resumed_step: Step of the checkpoint; later records are dropped.
        tensorboard: Whether to write scalars to TensorBoard files too.
        wandb: Settings of the run, whose scalars go to Weights & Biases too; None if they do not.

    Raises:
        CheckpointError: The log cannot be written.
        ConfigError: TensorBoard or wandb is not installed, or wandb cannot start a new run; a
            resumed run goes on without it.
    """

    def __init__(
        self,
        out: Path,
        *,
        resumed_step: int,
        tensorboard: bool,
        wandb: Mapping[str, Any] | None = None,
    ):
        self._path = out / LOG
        self._writers: list[_ScalarWriter] = []
        if tensorboard:
            self._writers.append(_TensorBoard(out, resumed_step))
        records = read_log(out) if resumed_step else []
        kept = [record for record in records if record["step"] <= resumed_step]
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error
        if wandb is None:
            return
        try:  # last, because it tells a server that the run has begun
            self._writers.append(_WeightsAndBiases(out, resumed_step, wandb))
        except ConfigError as error:
            if resumed_step:  # such as after a failure that took the network too
                _LOG.warning("warning: the run goes on without Weights & Biases: %s", error)
                return
            self.close()
            raise

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a record and flush it.

        Raises:
            CheckpointError: It cannot be written.
        """
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        scalars = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        for writer in self._writers:
            writer.add(scalars, step)

    def close(self) -> None:
        """Close the files."""
        try:
            for writer in self._writers:
                writer.close()
        finally:
            try:
                self._file.close()  # writes what a failed flush left in the buffer
            except OSError as error:
                raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"cannot write the log {self._path}: {error.strerror or error}; free disk space, then "
            "run the same command again to resume from the last checkpoint"
        )


class NoLog:
    """The log of all processes but the main one: nothing."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return the records of a run, oldest first, without lines that are none, as a crash leaves.

    Raises:
        CheckpointError: The log cannot be read.
    """
    path = out / LOG
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(
            f"cannot read the log {path}: {error.strerror or error}; make it readable, or remove "
            "it to continue without its records"
        ) from error
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
    return records


def last_record(records: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """Return the newest record of a kind; None if there is none.

    >>> last_record([{"kind": "eval", "step": 4}, {"kind": "train", "step": 5}], "eval")
    {'kind': 'eval', 'step': 4}
    """
    return next((record for record in reversed(records) if record["kind"] == kind), None)


class _ScalarWriter(Protocol):
    """Where the log's numbers go besides its file."""

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Add numbers by name."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class _TensorBoard:
    """Writes into `tensorboard` of a run's folder."""

    def __init__(self, out: Path, resumed_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard=true needs tensorboard; install it with: "
                "pip install 'moefit[tensorboard]'"
            ) from error
        folder = str(out / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=resumed_step + 1)

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """Sends to Weights & Biases as its environment variables say, such as WANDB_MODE=offline.

    A resumed run goes on as the same run there. Steps that it has already, because they were
    computed after the checkpoint, it ignores. What fails once the run has begun ends the sending,
    not the run: the log's file has everything.
    """

    def __init__(self, out: Path, resumed_step: int, config: Mapping[str, Any]):
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                f"log.wandb=true needs wandb ({error}); install it with: pip install "
                "'moefit[wandb]'"
            ) from error
        try:
            self._run: Any = wandb.init(
                dir=str(out),
                id=_wandb_id(out, is_new=not resumed_step),
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", "moefit"),
                name=os.environ.get("WANDB_NAME", out.absolute().name),
                config=dict(config),
                settings=wandb.Settings(console="off"),  # the terminal has a progress bar
            )
        except (wandb.Error, OSError, ValueError) as error:  # the last: of a bad variable
            raise ConfigError(
                f"Weights & Biases cannot start ({' '.join(str(error).split())}); log in with "
                "`wandb login`, set WANDB_MODE=offline to send the run later with `wandb sync`, or "
                "leave log.wandb out"
            ) from error

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        if scalars and self._run is not None:
            self._do(lambda run: run.log(dict(scalars), step=step))

    def close(self) -> None:
        if self._run is not None:
            self._do(lambda run: run.finish())

    def _do(self, call: Callable[[Any], None]) -> None:
        try:
            call(self._run)
        except Exception as error:  # noqa: BLE001 - of a process and a network that are not ours
            self._run = None
            _LOG.warning("warning: nothing more is sent to Weights & Biases: %s", error)


def _wandb_id(out: Path, *, is_new: bool) -> str:
    """Return the name by which Weights & Biases knows a run; another one for a new run."""
    path = out / "wandb-id"
    if is_new or not path.is_file():
        write_atomically(path, secrets.token_hex(6))
    return path.read_text("utf-8")


PROFILE = "profile"


class StepProfiler:
    """Records some steps with torch's profiler, each process in files of its own.

    Perfetto (https://ui.perfetto.dev) shows traces, https://docs.pytorch.org/memory_viz snapshots
    of memory.

    Args:
        out: The run's folder.
        steps: First and last step; None records nothing.
        rank: Of this process, part of the names of files.
        device: Of this process.
    """

    def __init__(
        self, out: Path, steps: tuple[int, int] | None, *, rank: int, device: torch.device
    ):
        self._folder, self._name = out / PROFILE, str(rank)
        self._first, self._last = steps or (0, 0)
        self._on_gpu = device.type == "cuda"
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Begin to record at the first of the steps, or of those that are left of a resumed run."""
        if self._profile is not None or not self._first <= step <= self._last:
            return
        if step > self._first:  # beside the files of the steps before
            self._name = f"{self._name}-from-step-{step}"
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()

    def after(self, step: int) -> str | None:
        """Write the files if the step is the last; return what to say about them."""
        return self.finish() if step == self._last else None

    def finish(self) -> str | None:
        """Write the files of what is being recorded, if anything; return what to say about them."""
        if self._profile is None:
            return None
        self._profile.stop()
        trace = self._folder / f"trace-{self._name}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(trace))
            if self._on_gpu:
                snapshot = self._folder / f"memory-{self._name}.pickle"
                torch.cuda.memory._dump_snapshot(str(snapshot))
        except (OSError, RuntimeError) as error:
            return f"the profile cannot be written into {self._folder}: {error}"
        finally:
            self._profile = None
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)
        return f"profile: {trace}"
