"""Output of `moefit plan`: tables, a chart, and plain values for JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moefit.cli.app import say
from moefit.cli.planned import in_a_line
from moefit.errors import ConfigError
from moefit.evaluate.report import narrow_table
from moefit.plan.fitting import HeldOutError
from moefit.plan.plan_file import Plan, Target
from moefit.plan.planner import Planner
from moefit.plan.search import Point
from moefit.serve.memory.budget import format_bytes

Fronts = Mapping[int, Sequence[Point]]
"""By budget in bytes."""
_WIDE = 0.02  # losses above this make the axis logarithmic


def plan_table(plan: Plan, title: str) -> Table:
    """Return a table with a plan's predictions and its formats and slots by block."""
    table = narrow_table(title)
    table.add_column("block", no_wrap=True)
    for name in ("slots", "formats"):
        table.add_column(name, justify="right" if name == "slots" else "left")
    for name, one in plan.configuration.placement.items():
        counts = {format: one.formats.count(format) for format in dict.fromkeys(one.formats)}
        formats = " + ".join(f"{count} {format}" for format, count in sorted(counts.items()))
        table.add_row(name, str(one.slots), formats if one.by_expert else one.formats[0])
    return table


def front_table(fronts: Fronts, title: str) -> Table:
    """Return a table with the best and the fastest configuration of each budget."""
    table = narrow_table(title)
    for name in ("memory", "loss", "tok/s", "configuration"):
        table.add_column(name, justify="left" if name == "configuration" else "right")
    for memory, points in fronts.items():
        for number, one in enumerate(_shown(points)):
            table.add_row(
                "" if number else format_bytes(memory),
                f"{one.loss:+.2%}",
                f"{one.speed:.2f}",
                one.configuration.describe(),
            )
    return table


def _shown(points: Sequence[Point]) -> list[Point]:
    """Return the fastest point within a loss of two percent, and the best point."""
    good = [one for one in points if one.loss <= 0.02]
    fastest = min(good or points, key=lambda one: one.seconds)
    best = min(points, key=lambda one: one.loss)
    return [fastest] if best is fastest else [fastest, best]


def held_table(rows: Iterable[HeldOutError], title: str) -> Table:
    """Return a table of models' errors on samples that they were not fitted to."""
    table = narrow_table(title)
    table.add_column("model")
    for name in ("cases", "median error", "mean", "worst", "rank correlation"):
        table.add_column(name, justify="right")
    for one in rows:
        table.add_row(
            one.model,
            str(one.cases),
            f"{one.median:.1%}",
            f"{one.mean:.1%}",
            f"{one.worst:.0%}",
            f"{one.correlation:.3f}",
        )
    return table


def check_picture(path: Path, budgets: int) -> None:
    """Raise ConfigError if the chart cannot be written, before planning starts."""
    from matplotlib.backend_bases import FigureCanvasBase  # slow to import

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(
            f"a picture cannot be written as {path.name!r}; give a name that ends in .png or .svg"
        )
    if budgets < 1:
        raise ConfigError("a picture shows what budgets give, and --budgets is 0; give 1 or more")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {path.absolute().parent} to write {path.name} into")


def draw(fronts: Fronts, path: Path, title: str) -> None:
    """Plot loss and tokens/s over bytes for each point of each front.

    Raises:
        ConfigError: The file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    losses, speeds = figure.subplots(1, 2)
    dots = [(memory / 2**20, one) for memory, points in fronts.items() for one in points]
    for mode in ("exact", "bounded", "virtual"):
        if not (some := [(x, one) for x, one in dots if one.configuration.mode == mode]):
            continue
        losses.plot([x for x, _ in some], [100 * p.loss for _, p in some], "o", ms=4, label=mode)
        speeds.plot([x for x, _ in some], [p.speed for _, p in some], "o", ms=4, label=mode)
    best = [
        (memory / 2**20, min(points, key=lambda p: p.loss)) for memory, points in fronts.items()
    ]
    losses.plot([x for x, _ in best], [100 * p.loss for _, p in best], "-", lw=1, color="grey")
    if max((one.loss for _, one in dots), default=0.0) > _WIDE:
        losses.set_yscale("symlog", linthresh=0.1)
    losses.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    losses.set_ylabel("perplexity above the full model's, % (predicted)")
    speeds.set_ylabel("tokens/s (predicted)")
    speeds.set_ylim(0, 1.08 * max((one.speed for _, one in dots), default=1.0))
    for axes in (losses, speeds):
        axes.set_xlabel("memory, MiB")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(
            f"cannot write the picture {path}: {error.strerror or error}; name a file in a folder "
            "that can be written to"
        ) from error


def plan_dict(
    planner: Planner, plan: Plan | None, front: list[Point], fronts: dict[int, list[Point]]
) -> dict[str, Any]:
    """Return plain values for JSON: the plan, if any, its front, and other budgets' fronts."""
    return {
        "plan": plan and plan.as_dict(),
        "front": [_point_dict(one) for one in front],
        "budgets": [
            {"memory": memory, "front": [_point_dict(one) for one in points]}
            for memory, points in fronts.items()
        ],
        "floor": planner.slot_budgets.min_bytes,
        "everything": planner.slot_budgets.all_resident_bytes,
        "sequences": planner.sequences(plan) if plan else {},
        "warnings": planner.warnings(),
        "quality_models": [asdict(one) for one in planner.quality.comparison],
        "latency_models": [asdict(one) for one in planner.latency.comparison],
    }


def _point_dict(one: Point) -> dict[str, Any]:
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
    """Print tables and notes; `smallest` if the plan's budget was found, not given."""
    out = Console()
    if plan is not None and plan.memory is not None:
        out.print(plan_table(plan, f"{model} in {format_bytes(plan.memory)}"))
        say(in_a_line(plan))
        if smallest:
            say(f"this is the smallest budget that meets the target: {plan.memory} bytes")
        for length, count in planner.sequences(plan).items():
            some = "1 sequence" if count == 1 else f"{count} sequences"
            say(f"the plan leaves memory for {some} of {length} tokens")
        if plan.step_tokens is not None:
            say(
                f"it reserves activations for {plan.step_tokens} tokens at once, as servers compute"
            )
    if fronts:
        out.print(front_table(fronts, f"{model}: what budgets give (predicted)"))
    for loss in (0.01, 0.03):
        size = planner.smallest_budget(Target(max_loss=loss))
        if size is not None:
            say(f"smallest budget for a loss of {loss:.0%}: {format_bytes(size)} ({size} bytes)")
    for warning in planner.warnings():
        say(f"warning: {warning}")
    out.print(held_table(planner.quality.comparison, "quality models on samples not fitted to"))
    out.print(held_table(planner.latency.comparison, "speed models on runs not fitted to"))
    facts = planner.profile.facts
    say(f"profile: {facts.tokens:,} tokens of {facts.text}")
    if planner.lengths is not None:
        say(
            f"tokens/s are of outputs of {planner.lengths.target:.0f} tokens, with the time to "
            f"encode sources of {planner.lengths.source:.0f}"
        )
