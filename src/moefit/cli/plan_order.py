"""Ordering a plan: made by a process of its own, whose memory is then none of the budget's.

Owns the command line of that process and what comes back from it. Knows nothing of planning.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moefit import errors
from moefit.errors import ConfigError, MoefitError
from moefit.plan.plan_file import Plan, read_plan
from moefit.plan.promise import Promise


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOrder:
    """What `moefit plan` is asked for.

    process: bytes of the process that will serve; the plan's own would be another's. concurrency:
    requests at once, of a server. dtype, rest: what the model is loaded in already, if it is.
    """

    model: str
    memory: str | int
    context: int
    device: str
    process: int
    promise: Promise
    concurrency: int | None = None
    dtype: str | None = None
    rest: str | None = None

    def arguments(self, save: Path) -> list[str]:
        """Of the command `moefit`."""
        options = {
            "memory": self.memory,
            "context": self.context,
            "device": self.device,
            "process-bytes": self.process,
            "max-loss": None
            if self.promise.max_loss is None
            else f"{100 * self.promise.max_loss}%",
            "min-speed": self.promise.min_speed,
            "max-concurrency": self.concurrency,
            "dtype": self.dtype,
            "rest": self.rest,
            "budgets": 0,
            "save": save,
        }
        given = [
            word
            for name, value in options.items()
            if value is not None
            for word in (f"--{name}", str(value))
        ]
        return ["plan", self.model, *given, "--json"]

    def carry_out(self) -> Plan:
        """The plan. Raises the error that the process ends with if there is none."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plan.json"
            done = subprocess.run(
                [sys.executable, "-m", "moefit", *self.arguments(file)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise _said(done.stderr, done.returncode)
            return read_plan(file)


def _said(stderr: str, code: int) -> MoefitError:
    """The error that the process ended with, of the same kind."""
    found = re.search(r"^error: (\w+): (.*)", stderr, re.MULTILINE | re.DOTALL)
    if found is None:
        return ConfigError(f"planning ended with exit code {code}: {stderr.strip()[-300:]}")
    kind = getattr(errors, found[1], ConfigError)
    return kind(" ".join(found[2].split()))
