"""A training run on the terminal: a progress bar, and a line now and then.

Implements the loop's `Watcher` with rich. Knows nothing of training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

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
