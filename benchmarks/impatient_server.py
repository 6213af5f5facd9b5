"""`python -m moefit`, with times that suit the soak test.

Its KV cache gives back after seconds what no request needs, not after a minute, which is how often
the test kills it. Files of prefixes are written as slowly as on a busy disk: on a tmpfs a file
takes less than a millisecond, and no kill would meet one.
"""

import builtins
import runpy
import time
from io import FileIO
from typing import Any

from moefit.engine.context import reservation
from moefit.engine.prefix import store

PART, PAUSE = 16 << 10, 0.02  # bytes, and seconds before each of them


class SlowFile(FileIO):
    """A file that is written in parts."""

    def write(self, content: Any) -> int:
        """Write everything."""
        view, done = memoryview(content), 0
        while done < len(view):
            time.sleep(PAUSE)
            done += super().write(view[done : done + PART])
        return done


def slow_open(file: Any, mode: str = "r", *args: Any, **how: Any) -> Any:
    """Open a file as `open` does, but to be written slowly."""
    return SlowFile(file, mode) if mode == "wb" else builtins.open(file, mode, *args, **how)


reservation.GIVE_BACK_AFTER = 2.0
store.__dict__["open"] = slow_open

if __name__ == "__main__":
    runpy.run_module("moefit", run_name="__main__")
