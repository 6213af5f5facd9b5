"""The picture of `swapmoe_experiment.py`: Rouge-2, bytes and latency over memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

LABELS = {
    ("plain", "virtual"): "virtual, with swaps",
    ("plain", "frequency"): "most used experts, fixed",
    ("plain", "pruned"): "pruned by norm",
    ("plain", "pruned, dropped"): "pruned by use, tokens dropped",
    ("dropout", "virtual"): "virtual, trained with expert dropout",
}
TIMED = {"exact": "C7", "on-demand": "C5", "virtual": "C0", "frequency": "C1"}


def draw(found: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the results of the stages into a file."""
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _rouge(left, found)
    _bytes(middle, found["latency"])
    _latency(right, found.get("shape", []))
    for axes in (left, middle, right):
        axes.set_xlabel("experts in memory, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _rouge(axes: Any, found: Mapping[str, list[dict[str, Any]]]) -> None:
    full = {one["model"]: one for one in found["quality"] if one["share"] == 1}
    axes.axhline(full["plain"]["rouge_2"], color="C7", lw=1, label="exact, on-demand, bounded")
    for number, (key, label) in enumerate(LABELS.items()):
        line = [one for one in found["quality"] if (one["model"], one["policy"]) == key]
        line = [full[key[0]], *line] if line else []
        xs, ys = ([100 * one["share"] for one in line], [one["rouge_2"] for one in line])
        axes.errorbar(xs, ys, [one["error"] for one in line], fmt="o-", ms=4, label=label,
                      color=f"C{number}")  # fmt: skip
    for name, marker in {"ours": "*", "SwapMoE's": "P", "ours, native experts": "X"}.items():
        some = [one for one in found.get("plans", []) if one["plan"] == name]
        if not some:
            continue
        axes.plot([100 * one["share"] for one in some], [one["rouge_2"] for one in some], marker,
                  ms=8, color="k", label=f"planner: {name}")  # fmt: skip
    axes.axhline(found["copied"][0]["rouge_2"], color="C7", ls=":", label="source as it is")
    axes.set_title("Rouge-2 (small model)")


def _bytes(axes: Any, points: list[dict[str, Any]]) -> None:
    for policy, color in TIMED.items():
        line = [one for one in points if (one["policy"], one["rate"]) == (policy, None)]
        xs = [100 * one["share"] for one in line]
        ys = [one["bytes_per_token"] / 1024 for one in line]
        axes.plot(xs, ys, "o-", ms=4, color=color, label=policy)
    axes.set_title("KiB read per token (small model)")


def _latency(axes: Any, points: list[dict[str, Any]]) -> None:
    for policy, color in TIMED.items():
        for rate, style in ((None, ":"), ("0.4GB", "-")):
            line = [one for one in points if (one["policy"], one["rate"]) == (policy, rate)]
            first = [one for one in points if one["share"] == 1 and one["rate"] == rate]
            if not line:
                continue
            line = line if policy == "exact" else [*first, *line]
            where = "page cache" if rate is None else "0.4 GB/s"
            axes.plot([100 * one["share"] for one in line], [one["seconds"] for one in line],
                      style, marker="o", ms=4, color=color, label=f"{policy}, {where}")  # fmt: skip
    axes.set_yscale("log")
    axes.set_title("seconds per sentence (shape of switch-base-16)")
