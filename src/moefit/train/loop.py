"""A training run from its configuration to its last checkpoint.

Owns the run's folder: one run lives in it, its resolved configuration stands there, and the same
command goes on where it stopped. What happens in between is `run.py`'s.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from moefit.errors import CheckpointError, ConfigError
from moefit.train.config import TrainConfig
from moefit.train.curve import draw_curve
from moefit.train.log import read_log
from moefit.train.run import Run, TrainResult
from moefit.train.signals import stop_on_signal
from moefit.train.tokens import prepare
from moefit.train.watcher import Watcher


def train(config: TrainConfig, watcher: Watcher) -> TrainResult:
    """Run, or resume, the training that `config` describes.

    Raises ConfigError, DataError, CheckpointError, or DivergenceError naming the last good
    checkpoint.
    """
    out = Path(config.out)
    _claim(out, config)
    data = prepare(config.data, seq_len=config.seq_len, progress=watcher.preparing)
    run = Run(config, data, watcher)
    run.resume()
    run.log.write("run", run.first_step, run.facts)
    watcher.started(step=run.first_step, steps=config.steps, facts=run.facts)
    with stop_on_signal() as request:
        result = run.until_done(request)
    run.log.close()
    if config.steps == result.step:
        draw_curve(read_log(out), out / "curve.png")
    return result


def _claim(out: Path, config: TrainConfig) -> None:
    """Save the resolved configuration; refuse a folder that holds another run."""
    path = out / "config.yaml"
    resolved = config.model_dump(mode="json")
    if path.is_file():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        differing = sorted(_differences(before, resolved))
        if differing:
            raise ConfigError(
                f"{out} holds a run with other settings ({', '.join(differing)}); resume it with "
                "the same ones, or give another folder with out=FOLDER"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {out}: {error.strerror}; give another folder with out=FOLDER"
        ) from error


def _differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Settings that would make a resumed run another one; log and checkpoint rhythm may change."""
    if where in ("log", "checkpoint", "out", "data.cache_dir"):
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            inner = f"{where}.{key}" if where else key
            yield from _differences(before.get(key), after.get(key), inner)
    elif before != after:
        yield where
