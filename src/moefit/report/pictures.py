"""The pictures of a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moefit.errors import ConfigError
from moefit.evaluate.perplexity import Score
from moefit.train.display import draw_curve


def draw_training(records: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the losses of one run and its routers' state. Raises ConfigError if unwritable."""
    try:
        draw_curve([dict(one) for one in records], file)
    except OSError as error:
        raise _unwritable(file, error) from error


def draw_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> bool:
    """Draw held-out loss of several runs by step; return False if none has any."""
    curves = {
        name: [one for one in records if one.get("kind") == "eval"]
        for name, records in runs.items()
    }
    if not any(curves.values()):
        return False
    figure, axes = _figure("optimizer step", "held-out loss, nats per token")
    for name, records in curves.items():
        steps, losses = [one["step"] for one in records], [one["loss"] for one in records]
        axes.plot(steps, losses, "o-", ms=3, lw=1, label=name)
    axes.legend(fontsize=8)
    _save(figure, file)
    return True


def draw_by_rule(scores: Sequence[Score], file: Path) -> None:
    """Draw perplexity over active parameters, each kind of rule in its colour."""
    figure, axes = _figure("active parameters, million", "perplexity")
    kinds = list(dict.fromkeys(one.rule.split(":")[0] for one in scores))
    for kind in kinds:
        some = sorted(
            (one for one in scores if one.rule.split(":")[0] == kind),
            key=lambda one: one.active_parameters,
        )
        where = [one.active_parameters / 1e6 for one in some]
        axes.plot(where, [one.perplexity for one in some], "o-", ms=4, lw=1, label=kind)
    axes.legend(fontsize=8)
    _save(figure, file)


def draw_front(points: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the planner's predicted loss over predicted tokens/s."""
    figure, axes = _figure("tokens/s (predicted)", "perplexity above the full model's, %")
    speeds = [one["tokens_per_second"] for one in points]
    axes.plot(speeds, [100 * one["loss"] for one in points], "o", ms=4)
    _save(figure, file)


def _figure(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    try:
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write the picture {file}: {error.strerror or error}; give another --out"
    )
