"""What `moefit plan` shows: tables and remarks for people, plain values for programs.

Owns the words and the order. Knows nothing of options, nor of how a plan is made.
"""

from dataclasses import asdict
from typing import Any

from rich.console import Console

from moefit.cli.app import say
from moefit.plan import genetic
from moefit.plan.plan_file import Plan
from moefit.plan.planner import Planner
from moefit.plan.promise import Promise
from moefit.plan.report import front_table, held_table, in_a_line, plan_table
from moefit.plan.search import Point
from moefit.serve.budget import format_bytes


def plan_dict(
    planner: Planner, plan: Plan | None, front: list[Point], fronts: dict[int, list[Point]]
) -> dict[str, Any]:
    """Plain values, for JSON: the plan, if there is one, its front, and other budgets' fronts."""
    return {
        "plan": plan and plan.as_dict(),
        "front": [_point(one) for one in front],
        "budgets": [
            {"memory": memory, "front": [_point(one) for one in points]}
            for memory, points in fronts.items()
        ],
        "floor": planner.rooms.floor,
        "everything": planner.rooms.everything,
        "sequences": planner.sequences(plan) if plan else {},
        "warnings": planner.warnings(),
        "searched_by": planner.searched_by,
        "quality_models": [asdict(one) for one in planner.quality.comparison],
        "latency_models": [asdict(one) for one in planner.latency.comparison],
    }


def _point(one: Point) -> dict[str, Any]:
    return {
        "loss": one.loss,
        "tokens_per_second": one.speed,
        "expert_bytes": one.nbytes,
        "found_by": one.found_by,
        "configuration": one.configuration.as_dict(),
    }


def print_plan(
    planner: Planner,
    plan: Plan | None,
    fronts: dict[int, list[Point]],
    model: str,
    *,
    smallest: bool,
) -> None:
    """Tables and remarks, for people; smallest: the plan's budget was not given but found."""
    out = Console()
    if plan is not None and plan.memory is not None:
        out.print(plan_table(plan, f"{model} in {format_bytes(plan.memory)}"))
        say(in_a_line(plan))
        if smallest:
            say(f"that is the smallest budget that keeps it: {plan.memory} bytes")
        for length, count in planner.sequences(plan).items():
            some = "1 sequence" if count == 1 else f"{count} sequences"
            say(f"fits {some} of {length} tokens beside its experts")
    if fronts:
        out.print(front_table(fronts, f"{model}: what budgets give (predicted)"))
    for loss in (0.01, 0.03):
        size = planner.smallest_budget(Promise(max_loss=loss))
        if size is not None:
            say(f"smallest budget for a loss of {loss:.0%}: {format_bytes(size)} ({size} bytes)")
    for warning in planner.warnings():
        say(f"warning: {warning}")
    out.print(held_table(planner.quality.comparison, "quality models on samples not fitted to"))
    out.print(held_table(planner.latency.comparison, "speed models on runs not fitted to"))
    if not genetic.available():
        say("note: the genetic search needs pymoo (pip install 'moefit[plan]'); allocator only")
    facts = planner.profile.facts
    say(f"profile: {facts.tokens:,} tokens of {facts.text}")
