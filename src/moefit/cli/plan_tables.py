"""A plan and what it was chosen from, for people: tables and a picture.

Knows nothing of how they came about.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.table import Table

from moefit.errors import ConfigError
from moefit.evaluate.report import narrow_table
from moefit.plan.fitting import Held
from moefit.plan.plan_file import Plan
from moefit.plan.search import Point
from moefit.serve.budget import format_bytes

Fronts = Mapping[int, Sequence[Point]]
"""By budget in bytes."""
_WIDE = 0.02  # from this loss on, small ones need a logarithmic axis to be told apart


def plan_table(plan: Plan, title: str) -> Table:
    """The choice: what is predicted, and block by block what is where."""
    table = narrow_table(title)
    table.add_column("block", no_wrap=True)
    for name in ("slots", "formats"):
        table.add_column(name, justify="right" if name == "slots" else "left")
    for name, one in plan.configuration.placement.items():
        counts = {format: one.formats.count(format) for format in dict.fromkeys(one.formats)}
        formats = " + ".join(f"{count} {format}" for format, count in sorted(counts.items()))
        table.add_row(name, str(one.slots), formats if one.by_expert else one.formats[0])
    return table


def in_a_line(plan: Plan) -> str:
    """What is predicted."""
    one = plan.predicted
    return (
        f"{plan.configuration.in_words()}: perplexity {one.loss:+.2%} (give or take "
        f"{one.margin:.2%}), {one.speed:.2f} tokens/s, {format_bytes(one.expert_bytes)} of experts"
    )


def front_table(fronts: Fronts, title: str) -> Table:
    """A row for each budget: its best, and its fastest within a loss of two percent."""
    table = narrow_table(title)
    for name in ("memory", "loss", "tok/s", "configuration"):
        table.add_column(name, justify="left" if name == "configuration" else "right")
    for memory, points in fronts.items():
        for number, one in enumerate(_shown(points)):
            table.add_row(
                "" if number else format_bytes(memory),
                f"{one.loss:+.2%}",
                f"{one.speed:.2f}",
                one.configuration.in_words(),
            )
    return table


def _shown(points: Sequence[Point]) -> list[Point]:
    """The fastest within two percent of loss, and the best."""
    good = [one for one in points if one.loss <= 0.02]
    fastest = min(good or points, key=lambda one: one.seconds)
    best = min(points, key=lambda one: one.loss)
    return [fastest] if best is fastest else [fastest, best]


def held_table(rows: Iterable[Held], title: str) -> Table:
    """What models' predictions were worth on samples that they had not seen."""
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
    """Raise ConfigError for a picture that could not be drawn, before long work."""
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
    """Loss and tokens/s against bytes, one dot for each point of each front.

    Raises ConfigError if the file cannot be written.
    """
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
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(
            f"cannot write the picture {path}: {error.strerror or error}; name a file in a folder "
            "that can be written to"
        ) from error
