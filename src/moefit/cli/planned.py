"""Options by which a command serves as planned: --plan, --max-loss, --min-speed."""

import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moefit.api import folder_of
from moefit.cli.app import say
from moefit.cli.options import Room
from moefit.errors import ConfigError
from moefit.plan.plan_file import Plan, read_plan, refuse_other
from moefit.plan.promise import Promise
from moefit.serve.skeleton import build


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan to serve by, or a promise to plan for."""

    plan: Annotated[
        Path | None, typer.Option(help="serve as a plan of moefit plan --save says")
    ] = None
    max_loss: Annotated[
        str | None,
        typer.Option(help="plan for --memory: the fastest that loses at most this, such as 3%"),
    ] = None
    min_speed: Annotated[
        float | None,
        typer.Option(help="plan for --memory: the best that makes at least so many tokens/s"),
    ] = None

    @property
    def wanted(self) -> bool:
        """Whether any was given."""
        return not (self.plan is self.max_loss is self.min_speed is None)

    def plan_for(self, model: str, room: Room) -> Plan:
        """The plan of the file, or one made now from the model's profile.

        Raises ConfigError for a plan of another checkpoint, and what planning raises.
        """
        if self.plan is not None:
            if not (self.max_loss is self.min_speed is None):
                raise ConfigError(
                    "--plan says all; --max-loss and --min-speed make a plan: give one of the two"
                )
            plan = read_plan(self.plan)
            refuse_other(plan, build(folder_of(model)), self.plan)
            return plan
        if room.memory is None:
            raise ConfigError("--max-loss and --min-speed plan for a budget; give --memory too")
        return self._planned_now(model, room)

    def _planned_now(self, model: str, room: Room) -> Plan:
        """In a process of its own, whose memory is then none of the budget."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plan.json"
            command = ["plan", model, "--memory", str(room.memory), "--context", str(room.context)]
            command += ["--device", room.device, "--budgets", "0", "--save", str(file)]
            if self.max_loss is not None:
                command += ["--max-loss", self.max_loss]
            if self.min_speed is not None:
                command += ["--min-speed", str(self.min_speed)]
            done = subprocess.run(
                [sys.executable, "-m", "moefit", *command, "--json"],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                said = done.stderr.rpartition("Error: ")[2].strip() or f"exit {done.returncode}"
                raise ConfigError(" ".join(said.split()))
            return read_plan(file)


NOTHING_PLANNED = Planned()


def promise_of(max_loss: str | None, min_speed: float | None) -> Promise:
    """From options. Raises ConfigError for what is no share or no speed.

    >>> promise_of("3%", None).max_loss
    0.03
    """
    share: float | None = None
    if max_loss is not None:
        try:
            text = max_loss.strip()
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            raise ConfigError(
                f"--max-loss {max_loss!r} is no share of perplexity; give one such as 3% or 0.03"
            ) from None
    promise = Promise(max_loss=share, min_speed=min_speed)
    promise.check()
    return promise


def refuse_beside_plan(**given: Any) -> None:
    """Raise ConfigError if something is given that a plan decides; None is not given."""
    if odd := [f"--{name}" for name, value in given.items() if value is not None]:
        raise ConfigError(
            f"{', '.join(odd)}: a plan decides this; leave it out, or --plan, --max-loss and "
            "--min-speed"
        )


def say_packing(plan: Plan, model: str) -> None:
    """What would make fetching fast, if anything is fetched."""
    formats = {name for one in plan.configuration.placement.values() for name in one.formats}
    if plan.predicted.misses and (some := sorted(formats - {"native"})):
        say(
            "note: speed is predicted for packed experts: "
            f"moefit pack {shlex.quote(model)} --formats {','.join(some)}"
        )
