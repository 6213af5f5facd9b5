"""Save checkpoints: of one process at once, of many in the background.

Many processes copy their parts to the CPU and write them while training goes on. When all parts are
on disk, the main process adds a model folder made of them and publishes the whole by renaming it.
"""

import copy
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefit.checkpoint.model_folder import save_tokenizer
from moefit.train import checkpoint
from moefit.train.memory.low_rank import merged
from moefit.train.parallel.state import SHARDED, RunState, load_alone

_WAIT = timedelta(minutes=30)  # for the part of another process, which may be on a slow disk
_FAILURES = (OSError, RuntimeError, ValueError, SafetensorError, CheckpointException)


class Saver(Protocol):
    """Saves checkpoints of a run."""

    def save(self, step: int, seconds: float) -> None:
        """Begin to save a checkpoint; wait for the previous one first.

        Raises:
            CheckpointError: This or the previous one cannot be written.
        """
        ...

    def finish(self) -> None:
        """Wait until the last checkpoint is complete; raises CheckpointError as `save` does."""
        ...


class WholeSaver:
    """Saves the checkpoints of one process.

    Args:
        out: The run's folder.
        state: What to save.
        tokenizer: Saved with the model.
        keep: Number of checkpoints to keep.
    """

    def __init__(self, out: Path, state: RunState, tokenizer: PreTrainedTokenizerBase, keep: int):
        self._out, self._state, self._tokenizer, self._keep = out, state, tokenizer, keep

    def save(self, step: int, seconds: float) -> None:
        """Save a checkpoint; see `Saver`."""
        snapshot = checkpoint.Snapshot(
            step=step,
            model=merged(self._state.model),
            tokenizer=self._tokenizer,
            state=self._state.state_dict(seconds),
        )
        checkpoint.save(self._out, snapshot, keep=self._keep)

    def finish(self) -> None:
        """Do nothing: `save` has finished."""


class ShardedSaver:
    """Saves the checkpoints of many processes in the background; all processes call it alike.

    Args:
        out: The run's folder, which all processes see.
        state: What to save.
        tokenizer: Saved with the model.
        keep: Number of checkpoints to keep.
    """

    def __init__(self, out: Path, state: RunState, tokenizer: PreTrainedTokenizerBase, keep: int):
        self._out, self._state, self._tokenizer, self._keep = out, state, tokenizer, keep
        # Its messages must not meet those of training, which goes on.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_WAIT))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._step = 0

    def save(self, step: int, seconds: float) -> None:
        """Copy the state to the CPU and write it in the background; see `Saver`."""
        self.finish()
        processes = self._state.processes
        building = processes.on_main(lambda: self._begin(step))
        processes.agreed(lambda: self._check_visible(building))
        facts = {**self._state.shared_state(seconds), "step": step}
        parts = cast(
            "Future[Any]",
            async_save(
                self._state.sharded_tensors(),
                checkpoint_id=building / SHARDED,
                process_group=self._group,
            ),
        )
        self._step = step
        config = copy.deepcopy(self._state.model.config)
        publish = self._publication(building, facts, config) if processes.is_main else lambda: None
        self._pending = self._thread.submit(_after, parts, publish)

    def finish(self) -> None:
        """Wait until the last checkpoint is complete; see `Saver`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            # Process 0 publishes the whole model; the others wait as long as it computes.
            self._state.processes.on_main(lambda: self._result(pending))
            self._state.processes.agreed(lambda: self._result(pending))

    def _begin(self, step: int) -> Path:
        try:
            return checkpoint.begin(self._out, step)
        except OSError as error:
            raise checkpoint.unwritable(self._out, step, error) from error

    def _check_visible(self, building: Path) -> None:
        if not building.is_dir():
            raise checkpoint.not_shared(self._out)

    def _publication(
        self, building: Path, facts: dict[str, Any], config: Any
    ) -> Callable[[], None]:
        """Return what the main process does when all parts are on disk."""
        kind = type(self._state.model)

        def publish() -> None:
            whole = whole_model(kind, config, building / SHARDED)
            whole.save_pretrained(building)
            save_tokenizer(self._tokenizer, building)
            torch.save(facts, building / checkpoint.STATE)
            checkpoint.publish(self._out, building, facts["step"], keep=self._keep)

        return publish

    def _result(self, pending: "Future[None]") -> None:
        try:
            pending.result()
        except _FAILURES as error:
            building = self._out / f".{checkpoint.PREFIX}{self._step:08d}{checkpoint.BUILDING}"
            shutil.rmtree(building, ignore_errors=True)
            raise checkpoint.unwritable(self._out, self._step, _cause(error)) from error


def _after(parts: "Future[Any]", publish: Callable[[], None]) -> None:
    parts.result()
    publish()


def _cause(error: BaseException) -> BaseException:
    """Return the error of the process that could not write, if several report it."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def whole_model(kind: type[PreTrainedModel], config: Any, sharded: Path) -> PreTrainedModel:
    """Return a model on the CPU with the weights of a folder of parts.

    Args:
        kind: The model's class.
        config: Its configuration.
        sharded: The folder.
    """
    with torch.device("meta"):
        model = kind(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    load_alone({"model": model.state_dict()}, sharded)
    return model
