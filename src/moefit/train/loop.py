"""Run training from the configuration to the last checkpoint.

`train` locks the folder, prepares the data, resumes from the newest checkpoint and draws the loss
curve.
"""

import os
import secrets
import socket
import time
from contextlib import ExitStack, closing
from pathlib import Path

from moefit.errors import DataError
from moefit.signals import stop_on_signal
from moefit.train import checkpoint
from moefit.train.checkpoint import not_shared
from moefit.train.config import TrainConfig
from moefit.train.data.tokens import PreparedData, prepare, prepare_shards
from moefit.train.display import NoDisplay, TrainingCallback, draw_curve
from moefit.train.parallel.parallelism import machines
from moefit.train.parallel.processes import OneProcess, Processes
from moefit.train.run_folder import (
    check_same_config,
    last_record,
    locked,
    mark,
    read_log,
    save_config,
)
from moefit.train.trainer import Trainer, TrainResult

CURVE = "curve.png"


def train(
    config: TrainConfig, callback: TrainingCallback, processes: Processes | None = None
) -> TrainResult:
    """Train, or resume training, as configured.

    Args:
        config: The run's configuration.
        callback: Receives progress; called in the main process.
        processes: That train together, as `joined_processes` returns them; by default only this.

    Raises:
        ConfigError: The configuration contradicts itself, the run in its folder or the processes.
        DataError: The text cannot be read, is too short, or has changed.
        CheckpointError: A checkpoint is damaged or cannot be written.
        DivergenceError: A loss, gradient or weight is not finite.
        ElsewhereError: Another process raises one of these.
        LostProcessError: Another process ended or does not answer.
    """
    out = Path(config.out).expanduser()
    processes = processes or OneProcess()
    processes.check_alike(config.model_dump(mode="json"))
    with ExitStack() as stack:

        def begin() -> TrainResult | None:
            stack.enter_context(locked(out))
            check_same_config(out, config)
            return _finished_result(out, config.steps)

        finished = processes.on_main(begin)
        _check_shared(out, processes)
        shown = callback if processes.is_main else NoDisplay()
        result = finished or _train(out, config, shown, processes)
        curve = out / CURVE
        drawn = finished is not None and curve.is_file()
        if processes.is_main and result.step == config.steps and not drawn:
            try:
                draw_curve(read_log(out), curve)
            except OSError as error:  # does not fail the run
                callback.on_message(
                    f"the run is finished, but {curve} could not be drawn: "
                    f"{error.strerror or error}; free disk space, then run the same command again"
                )
        return result


_VISIBLE_SECONDS = 10.0  # network file systems may show a new file some seconds later


def _check_shared(out: Path, processes: Processes) -> None:
    """Raise CheckpointError, before any step, if a process has another folder of the same name."""
    if processes.size == 1:
        return
    name = processes.every(secrets.token_hex(8))[0]
    marker = out / f".shared-{name}"

    def check() -> None:
        waited = 0.0
        while not os.path.exists(marker):
            if waited >= _VISIBLE_SECONDS:
                raise not_shared(out)
            time.sleep(0.1)
            waited += 0.1

    processes.on_main(lambda: mark(marker))
    try:
        processes.agreed(check)
    finally:
        if processes.is_main:
            marker.unlink(missing_ok=True)


def _finished_result(out: Path, steps: int) -> TrainResult | None:
    """Return the result of a run that is complete; None if anything remains to be done."""
    found = checkpoint.checkpoints(out)
    if not found or checkpoint.step_of(found[-1]) != steps:
        return None
    evaluated = last_record(read_log(out), "eval")
    if evaluated is None or evaluated["step"] != steps:
        return None  # the process ended before its last evaluation
    checkpoint.verify(found[-1])
    return TrainResult(
        step=steps, checkpoint=found[-1], held_out_loss=evaluated["loss"], stopped_by=None
    )


def _train(
    out: Path, config: TrainConfig, callback: TrainingCallback, processes: Processes
) -> TrainResult:
    data = _prepared(config, callback, processes)
    trainer = processes.agreed(lambda: Trainer(config, out, data, callback, processes))
    with closing(trainer.log):
        # After validation, so that an invalid configuration is never stored.
        processes.on_main(lambda: save_config(out, config))
        trainer.log.write("run", trainer.first_step, trainer.info)
        for source in trainer.info["sources"]:
            callback.on_message(
                "{path}: weight {weight:g}, {tokens} tokens, {epochs:.2f} epochs".format(**source)
            )
        callback.on_start(step=trainer.first_step, steps=config.steps, info=trainer.info)
        with stop_on_signal() as request:
            return processes.agreed(lambda: trainer.run(request))


def _prepared(
    config: TrainConfig, callback: TrainingCallback, processes: Processes
) -> PreparedData:
    """Return the data, which the main process prepares while others wait."""

    def check() -> None:
        try:
            files = (data.train, data.held_out, *data.shards)
            reason = "" if all(file.is_complete() for file in files) else "they are not there"
            for file in files if not reason else ():
                file.open()
        except OSError as error:
            reason = error.strerror or str(error)
        if reason:
            raise DataError(
                f"{socket.gethostname()} does not see the token files in {data.train.path.parent} "
                f"that process 0 wrote ({reason}); give a folder that all machines share and may "
                "read with data.cache_dir="
            )

    def prepare_all() -> PreparedData:
        settings, length, progress = config.data, config.seq_len, callback.on_prepare
        whole = prepare(settings, seq_len=length, progress=progress)
        count = machines(config, processes)
        if settings.shard_by == "none" or count == 1:
            return whole
        return prepare_shards(settings, whole, count, seq_len=length, progress=progress)

    data = processes.on_main(prepare_all)
    processes.agreed(check)
    return data
