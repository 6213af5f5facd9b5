"""Options by which a command serves as planned: --plan, --max-loss, --min-speed."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moefit.api import folder_of
from moefit.cli.app import say
from moefit.cli.options import Room
from moefit.cli.plan_order import PlanOrder
from moefit.device import planned_device
from moefit.errors import ConfigError
from moefit.plan.plan_file import Plan, read_plan, refuse_other
from moefit.plan.promise import Promise
from moefit.serve.ledger import held_bytes
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

    def plan_for(
        self, model: str, room: Room, concurrency: int | None = None, helpers: int = 0
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
            refuse_other(plan, build(folder_of(model)), self.plan)
            if room.context != plan.context:
                say(f"note: the plan reserves {plan.context:,} tokens at once, whatever --context")
            return plan
        if room.memory is None:
            raise ConfigError("--max-loss and --min-speed plan for a budget; give --memory too")
        return PlanOrder(
            model=model,
            memory=room.memory,
            context=room.context,
            device=room.device,
            process=held_bytes(planned_device(room.device)) + helpers,
            promise=promise_of(self.max_loss, self.min_speed),
            concurrency=concurrency,
        ).carry_out()


NOTHING_PLANNED = Planned()


def promise_of(max_loss: str | None, min_speed: float | None) -> Promise:
    """From options. Raises ConfigError for what is no share or no speed.

    >>> promise_of("3%", None).max_loss
    0.03
    """
    share = None if max_loss is None else _share(max_loss)
    promise = Promise(max_loss=share, min_speed=min_speed)
    promise.check()
    return promise


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
