"""Picture of expert_dropout.py: losses and bytes by the share of experts in memory."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLUMNS = 3
TICKS = (0, 5, 10, 20, 50, 100, 200, 500, 1000)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the losses with few experts, a panel for each mode, and losses over bytes at a third."""
    measured = {point["mode"] for result in results.values() for point in result["mean"]["points"]}
    modes = [mode for mode in ("virtual", "bounded", "exact") if mode in measured]
    third = [1] if "exact" in modes else []
    panels = 1 + len(modes) + len(third)
    rows = -(-panels // COLUMNS)
    columns = min(panels, COLUMNS)
    figure = Figure(figsize=(4.6 * columns, 3.9 * rows), layout="constrained")
    axes_of = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in axes_of[panels:]:
        axes.remove()
    axes_of = axes_of[:panels]
    for name, result in results.items():
        few = result["mean"]["few"].items()
        experts = int(result["seeds"][0]["full_memory"]["experts"])
        _line(axes_of[0], name, [(100 * int(n) / experts, one["loss"], 100) for n, one in few])
        for axes, mode in zip(axes_of[1:], modes, strict=False):
            key, scale = ("bytes_per_token", 1 / 1024) if mode == "exact" else ("loss", 100)
            points = [one for one in result["mean"]["points"] if one["format"] == "native"]
            line = [one for one in points if one["mode"] == mode]
            line = sorted(line, key=lambda one: one["share"])
            _line(axes, name, [(100 * one["share"], one[key], scale) for one in line])
        for _ in third:
            _draw_bytes(axes_of[-1], name, result["mean"])
    titles = ("fixed, one pass per window", *modes, *("a third: exact and bounded" for _ in third))
    for axes, title in zip(axes_of, titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("KiB per token" if title.startswith("a third") else "experts in memory, %")
        axes.set_ylabel("KiB per token" if title == "exact" else "perplexity above all experts, %")
        axes.grid(alpha=0.3)
        if title in ("fixed, one pass per window", "virtual"):
            axes.set_yscale("symlog", linthresh=10)
            axes.set_yticks(TICKS, [f"{tick}" for tick in TICKS])
            axes.minorticks_off()
    if third:
        axes_of[-1].set_ylabel("perplexity above the base in full memory, %")
        axes_of[-1].set_xlim(left=0)
    axes_of[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_bytes(axes: Any, name: str, means: dict[str, Any]) -> None:
    """Draw what a third of the experts costs beside the base in full memory, over what it reads."""
    found = sorted(
        (
            one["bytes_per_token"]["mean"] / 1024,
            100 * ((1 + means["to_base"]["mean"]) * (1 + one["loss"]["mean"]) - 1),
        )
        for one in means["points"]
        if one["format"] == "native"
        and abs(one["share"] - 1 / 3) < 1e-3
        and one["mode"].startswith(("exact", "bounded"))
    )
    axes.plot(*zip(*found, strict=True), "o-", ms=4, label=name)


def _line(axes: Any, name: str, points: list[tuple[float, dict[str, Any], float]]) -> None:
    xs, values = [x for x, _, _ in points], [one["mean"] * scale for _, one, scale in points]
    errors = [(one["interval"] or 0) * scale for _, one, scale in points]
    axes.errorbar(xs, values, errors, fmt="o-", ms=4, capsize=2, label=name)
