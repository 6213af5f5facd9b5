"""Who is told what a run is doing.

The loop says what happens and prints nothing; `display.py` shows it, tests listen in silence.
"""

from typing import Any, Protocol


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
