"""Show a training run: the `Watcher` interface, the terminal display and the loss curve.

The trainer reports to a `Watcher` and knows nothing of terminals. `curve.png` is drawn from the
log when a run ends.
"""

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
    """Training and held-out loss, and below them the MLP routers' state if there are any.

    Raises OSError if it cannot be written; what stood at `path` is then untouched.
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
    beside = path.with_name(f".writing-{path.name}")  # the ending says which format to write
    try:
        figure.savefig(beside, dpi=120)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


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
        "mlp_h_e_given_x": "H(e|x) / ln E: indecision per token",
        "mlp_active": "active share at the log's epsilon",
        "mlp_dead": "dead share",
    }
    steps = [record["step"] for record in routed]
    for name, label in labels.items():
        axes.plot(steps, [record[name] for record in routed], label=label, lw=1)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("MLP routers, mean over layers")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


class Watcher(Protocol):
    """Is told what happens; shows it or not."""

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        """Bytes of text done, of how many."""
        ...

    def started(self, *, step: int, steps: int, facts: dict[str, Any]) -> None:
        """The first step is about to run; `facts` say what on."""
        ...

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """A step is done; `values` are the latest loss, speed and so on."""
        ...

    def event(self, text: str) -> None:
        """Something else worth a line happened."""
        ...


LINE_EVERY_SECONDS = 30.0


class Display:
    """Shows loss, tokens/s, MFU and time left; use through `display()`."""

    def __init__(self, console: Console, progress: Progress):
        self._console, self._progress = console, progress
        self._task: TaskID | None = None
        self._stage: str | None = None
        self._last_line = 0.0

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        """Bytes of text done, of how many."""
        if stage != self._stage:
            self._restart(stage, total)
        assert self._task is not None
        self._progress.update(
            self._task, completed=done, total=total, numbers=f"{done / 1e6:.1f} MB of text"
        )

    def started(self, *, step: int, steps: int, facts: dict[str, Any]) -> None:
        """The first step is about to run."""
        self._console.print(
            f"{facts['parameters'] / 1e6:.2f} M parameters, {facts['train_tokens'] / 1e6:.2f} M "
            f"training tokens ({facts['epochs']:.2f} epochs), {facts['precision']} on "
            f"{facts['device']} with {facts['threads']} threads, "
            f"ceiling {facts['peak_flops'] / 1e9:,.0f} GFLOP/s"
        )
        self._restart("training", steps)
        assert self._task is not None
        self._progress.update(self._task, completed=step)

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """A step is done."""
        numbers = (
            f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tok/s  "
            f"MFU {values['mfu']:.0%}"
        )
        if "held_out_loss" in values:
            numbers += f"  held out {values['held_out_loss']:.3f}"
        assert self._task is not None
        self._progress.update(self._task, completed=step, numbers=numbers)
        # Where nobody sees a bar move (a log file), say the same as a line now and then.
        due = values["seconds"] - self._last_line > LINE_EVERY_SECONDS
        if due and not self._console.is_terminal:
            self._last_line = values["seconds"]
            self._console.print(f"step {step}: {numbers}")

    def event(self, text: str) -> None:
        """Something else worth a line happened."""
        self._console.print(text, soft_wrap=True, markup=False)

    def _restart(self, stage: str, total: int | None) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._stage = stage
        self._task = self._progress.add_task(stage, total=total, numbers="")


@contextmanager
def display(console: Console) -> Iterator[Display]:
    """A live display for the length of the block."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        yield Display(console, progress)
