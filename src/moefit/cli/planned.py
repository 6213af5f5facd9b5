"""Serve by a plan: `--plan`, `--max-loss`, `--min-speed`.

Where a plan must be made first, `moefit plan` runs in a process of its own, so that its memory does
not count against the budget.
"""

import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moefit.api import folder_of
from moefit.cli.app import ADVANCED, error_of, say
from moefit.cli.options import MemoryOptions
from moefit.device import planned_device
from moefit.errors import ConfigError
from moefit.plan.plan_file import Plan, Target, check_checkpoint, read_plan
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.memory.budget import format_bytes
from moefit.serve.memory.estimate import held_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanProcess:
    """What `moefit plan` is asked for.

    process: bytes of the process that will serve; the plan's own would be another's. concurrency:
    requests at once, of a server. dtype, rest: what the model is loaded in already, if it is.
    """

    model: str
    memory: str | int
    context: int
    device: str
    process: int
    target: Target
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
            "max-loss": None if self.target.max_loss is None else f"{100 * self.target.max_loss}%",
            "min-speed": self.target.min_speed,
            "max-concurrency": self.concurrency,
            "dtype": self.dtype,
            "dense-precision": self.rest,
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
                raise error_of(done.stdout) or ConfigError(
                    f"planning ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}"
                )
            return read_plan(file)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """A plan to serve by, or a promise to plan for."""

    plan: Annotated[
        Path | None,
        typer.Option(
            help="serve by a plan that moefit plan --save wrote", rich_help_panel=ADVANCED
        ),
    ] = None
    max_loss: Annotated[
        str | None,
        typer.Option(
            help="plan for --memory: the fastest that loses at most this in perplexity, such as 3%",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    min_speed: Annotated[
        float | None,
        typer.Option(
            help="plan for --memory: the most accurate with at least this many tokens/s",
            rich_help_panel=ADVANCED,
        ),
    ] = None

    @property
    def wanted(self) -> bool:
        """Whether any was given."""
        return not (self.plan is self.max_loss is self.min_speed is None)

    def plan_for(
        self, model: str, room: MemoryOptions, concurrency: int | None = None, helpers: int = 0
    ) -> Plan:
        """The plan of the file, or one made now from the model's profile.

        concurrency: of a server, how many requests run at once. helpers: as of `LoadSettings`.
        Raises ConfigError for a plan of another checkpoint, and what planning raises.
        """
        if self.plan is not None:
            if not (self.max_loss is self.min_speed is None):
                raise ConfigError(
                    "--plan says all; --max-loss and --min-speed make a plan: give one of the two"
                )
            plan = read_plan(self.plan)
            check_checkpoint(plan, build_skeleton(folder_of(model)), self.plan)
            if room.context != plan.context:
                say(f"note: the plan reserves {plan.context:,} tokens at once, whatever --context")
            return plan
        if room.memory is None:
            raise ConfigError("--max-loss and --min-speed plan for a budget; give --memory too")
        return PlanProcess(
            model=model,
            memory=room.memory,
            context=room.context,
            device=room.device,
            process=held_bytes(planned_device(room.device)) + helpers,
            target=target_of(self.max_loss, self.min_speed),
            concurrency=concurrency,
        ).carry_out()


NO_PLAN = PlanOptions()


def target_of(max_loss: str | None, min_speed: float | None) -> Target:
    """Return the target that options describe. Raises ConfigError for an invalid share or speed.

    >>> target_of("3%", None).max_loss
    0.03
    """
    share = None if max_loss is None else _share(max_loss)
    target = Target(max_loss=share, min_speed=min_speed)
    target.check()
    return target


def _share(text: str) -> float:
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        raise ConfigError(
            f"--max-loss {text!r} is no share of perplexity; give one such as 3% or 0.03"
        ) from None
    if share >= 1 and not percent:
        raise ConfigError(
            f"--max-loss {text} is {share:.0%} of perplexity; give {number}% if that is meant, or "
            f"{share:.0%} if it is not a slip"
        )
    return share


def forbid_with_plan(**given: Any) -> None:
    """Raise ConfigError if something is given that a plan decides; None is not given."""
    if odd := [f"--{name}" for name, value in given.items() if value is not None]:
        raise ConfigError(
            f"{', '.join(odd)}: a plan decides this; leave it out, or --plan, --max-loss and "
            "--min-speed"
        )


def in_a_line(plan: Plan) -> str:
    """Return what a plan predicts, in one line."""
    one = plan.predicted
    return (
        f"{plan.configuration.describe()}: perplexity {one.loss:+.2%} (give or take "
        f"{one.margin:.2%}), {one.speed:.2f} tokens/s, {format_bytes(one.expert_bytes)} of experts"
    )


def say_packing(plan: Plan, model: str) -> None:
    """What would make fetching fast, if anything is fetched."""
    formats = {name for one in plan.configuration.placement.values() for name in one.formats}
    if plan.predicted.misses and (some := sorted(formats - {"native"})):
        say(
            "note: speed is predicted for packed experts: "
            f"moefit pack {shlex.quote(model)} --formats {','.join(some)}"
        )
