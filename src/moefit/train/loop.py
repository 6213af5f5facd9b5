"""A training run from its configuration to its last checkpoint.

Owns the order around a run: claim the folder, prepare, build, train, draw. The same command goes
on where it stopped; a finished run is left as it is. What happens in between is `run.py`'s.
"""

from contextlib import closing
from pathlib import Path

from moefit.signals import stop_on_signal
from moefit.train import checkpoint
from moefit.train.config import TrainConfig
from moefit.train.curve import draw_curve
from moefit.train.folder import locked, refuse_another_run, save_config
from moefit.train.log import last_record, read_log
from moefit.train.run import Run, TrainResult
from moefit.train.tokens import prepare
from moefit.train.watcher import Watcher

CURVE = "curve.png"


def train(config: TrainConfig, watcher: Watcher) -> TrainResult:
    """Run, or resume, the training that `config` describes.

    Raises ConfigError, DataError, CheckpointError, or DivergenceError naming the last good
    checkpoint.
    """
    out = Path(config.out).expanduser()
    with locked(out):
        refuse_another_run(out, config)
        finished = _finished(out, config.steps)
        result = finished or _train(out, config, watcher)
        drawn = finished is not None and (out / CURVE).is_file()
        if result.step == config.steps and not drawn:
            _draw(out, watcher)
        return result


def _finished(out: Path, steps: int) -> TrainResult | None:
    """The result of a run that has nothing left to do, without building anything."""
    found = checkpoint.checkpoints(out)
    if not found or checkpoint.step_of(found[-1]) != steps:
        return None
    evaluated = last_record(read_log(out), "eval")
    if evaluated is None or evaluated["step"] != steps:
        return None  # killed before its last evaluation, which is still to be done
    checkpoint.verify(found[-1])
    return TrainResult(
        step=steps, checkpoint=found[-1], held_out_loss=evaluated["loss"], stopped_by=None
    )


def _train(out: Path, config: TrainConfig, watcher: Watcher) -> TrainResult:
    data = prepare(config.data, seq_len=config.seq_len, progress=watcher.preparing)
    run = Run(config, out, data, watcher)
    with closing(run.log):
        save_config(out, config)  # only now: a mistake in it must not claim the folder
        run.log.write("run", run.first_step, run.facts)
        watcher.started(step=run.first_step, steps=config.steps, facts=run.facts)
        with stop_on_signal() as request:
            return run.until_done(request)


def _draw(out: Path, watcher: Watcher) -> None:
    """Draw the curve; a run that is finished and good doesn't fail for want of a picture."""
    path = out / CURVE
    try:
        draw_curve(read_log(out), path)
    except OSError as error:
        watcher.event(
            f"the run is finished, but {path} could not be drawn: {error.strerror or error}; "
            "make room, then run the same command again"
        )
