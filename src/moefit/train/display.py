"""Show a training run: the `TrainingCallback` interface, terminal display and loss curve."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def draw_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Draw training and held-out loss and, if there are any, the MLP routers' statistics.

    Args:
        records: The run's log.
        path: Image file; replaced only when it has been written completely.

    Raises:
        OSError: The file cannot be written.
    """
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval"]
    routed = [record for record in train if "mlp_mi" in record]
    figure = Figure(figsize=(8, 7 if routed else 4), layout="constrained")
    axes = figure.subplots(2 if routed else 1, 1, squeeze=False, sharex=True)[:, 0]
    _draw_losses(axes[0], train, held_out)
    if routed:
        _draw_routers(axes[1], routed)
    axes[-1].set_xlabel("optimizer step")
    partial = path.with_name(f".writing-{path.name}")  # its suffix chooses the format
    try:
        figure.savefig(partial, dpi=120)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _draw_losses(axes: Any, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], label="training", lw=1)
    if held_out:
        steps, losses = [r["step"] for r in held_out], [r["loss"] for r in held_out]
        axes.plot(steps, losses, "o-", label="held out", ms=3)
    axes.set_ylabel("cross-entropy, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_routers(axes: Any, routed: list[dict[str, Any]]) -> None:
    labels = {
        "mlp_h_e": "H(e) / ln E: balance over the batch",
        "mlp_h_e_given_x": "H(e|x) / ln E: entropy per token",
        "mlp_active": "active experts at the log's epsilon",
        "mlp_dead": "unused experts",
    }
    steps = [record["step"] for record in routed]
    for name, label in labels.items():
        axes.plot(steps, [record[name] for record in routed], label=label, lw=1)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("MLP routers, mean over layers")
    axes.grid(alpha=0.3)
    # Above the axes: H(e) lies at their upper edge, the share of unused experts at the lower one.
    axes.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


class TrainingCallback(Protocol):
    """Receives the progress of a run."""

    def on_prepare(self, stage: str, done: int, total: int | None) -> None:
        """Called during data preparation with bytes of text done and in total, if known."""
        ...

    def on_start(self, *, step: int, steps: int, info: dict[str, Any]) -> None:
        """Called before the first step; `info` describes model, data and device."""
        ...

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Called after each step with the latest loss, speed and so on."""
        ...

    def on_message(self, text: str) -> None:
        """Called for other events."""
        ...


class NoDisplay:
    """A `TrainingCallback` that shows nothing: of all processes but the main one."""

    def on_prepare(self, stage: str, done: int, total: int | None) -> None:
        """Do nothing."""

    def on_start(self, *, step: int, steps: int, info: dict[str, Any]) -> None:
        """Do nothing."""

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Do nothing."""

    def on_message(self, text: str) -> None:
        """Do nothing."""


LINE_EVERY_SECONDS = 30.0


class Display:
    """A `TrainingCallback` that shows loss, tokens/s, MFU and time left; see `display`."""

    def __init__(self, console: Console, progress: Progress):
        self._console, self._progress = console, progress
        self._task: TaskID | None = None
        self._stage: str | None = None
        self._last_line = 0.0

    def on_prepare(self, stage: str, done: int, total: int | None) -> None:
        """Show the progress of data preparation."""
        if stage != self._stage:
            self._restart(stage, total)
        assert self._task is not None
        self._progress.update(
            self._task, completed=done, total=total, numbers=f"{done / 1e6:.1f} MB of text"
        )

    def on_start(self, *, step: int, steps: int, info: dict[str, Any]) -> None:
        """Show what is trained and start the progress bar."""
        self._console.print(
            f"{info['parameters'] / 1e6:.2f} M parameters, {info['train_tokens'] / 1e6:.2f} M "
            f"training tokens ({info['epochs']:.2f} epochs), {info['precision']} on "
            f"{info['device']} with {info['threads']} threads, "
            f"peak {info['peak_flops'] / 1e9:,.0f} GFLOP/s{_processes(info)}"
        )
        self._restart("training", steps)
        assert self._task is not None
        self._progress.update(self._task, completed=step)

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Show the values of a step."""
        numbers = (
            f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tok/s  "
            f"MFU {values['mfu']:.0%}"
        )
        if "held_out_loss" in values:
            numbers += f"  held out {values['held_out_loss']:.3f}"
        assert self._task is not None
        self._progress.update(self._task, completed=step, numbers=numbers)
        # Not a terminal (a log file, say): print lines instead of a progress bar.
        due = values["seconds"] - self._last_line > LINE_EVERY_SECONDS
        if due and not self._console.is_terminal:
            self._last_line = values["seconds"]
            self._console.print(f"step {step}: {numbers}")

    def on_message(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, soft_wrap=True, markup=False)

    def _restart(self, stage: str, total: int | None) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._stage = stage
        self._task = self._progress.add_task(stage, total=total, numbers="")


def _processes(info: dict[str, Any]) -> str:
    """Return how many processes train, if there are several."""
    if info.get("processes", 1) == 1:
        return ""
    machines = f" on {info['nodes']} machines" if info["nodes"] > 1 else ""
    return f", {info['processes']} processes{machines}"


@contextmanager
def display(console: Console) -> Iterator[Display]:
    """Show a live display for the duration of the context."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        yield Display(console, progress)
