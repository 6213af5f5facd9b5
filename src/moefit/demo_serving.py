"""The serving part of the demo: the shipped model with decreasing memory for its experts.

Each row is a budget with all experts at the precision that fits (`auto`), or with some experts at
full precision and a mode for the others. The latter rows reuse one loaded model, so each starts
with the resident experts of the previous one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter
from rich.console import Console

from moefit.api import load
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.evaluate.loading import REFERENCE
from moefit.evaluate.passage import held_out_text
from moefit.evaluate.perplexity import Text
from moefit.evaluate.report import step_table
from moefit.evaluate.stepwise import Progress, StepScore, score_steps
from moefit.serve.config import Mode
from moefit.serve.memory.budget import format_bytes
from moefit.serve.model import ServedModel

RULE = "top_k:4"
SHARES = {"1/2": 1 / 2, "1/3": 1 / 3}
MODES: tuple[Mode, ...] = ("exact", "bounded", "virtual")
AUTO = "auto"
AUTO_SHARES = {**SHARES, "1/5": 1 / 5}
INITIAL_MEMORY = "16GiB"  # until the budget is set
CONTEXT = 128
ROUNDING = (
    "(agree: with one forward pass over all experts. Without compiled kernels, bfloat16 decoding "
    "rounds differently, so the most likely token may differ even if all experts are resident.)"
)
TOKENS = 256  # including the prompts of the windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The result for one budget and mode."""

    memory: str
    expert_bytes: int
    score: StepScore

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return f"{self.memory} {self.score.mode}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "memory": self.memory,
            "expert_bytes": self.expert_bytes,
            **self.score.as_dict(),
        }


def run(console: Console, *, max_tokens: int = TOKENS) -> list[Row]:
    """Serve the shipped model in several budgets and print a table.

    Args:
        console: Where to print.
        max_tokens: Most tokens to decode per row.

    Returns:
        The table's rows, the first with all experts in memory.
    """
    with load(REFERENCE, context=CONTEXT) as served, console.status("serving") as status:

        def progress(done: int, total: int) -> None:
            mode, slots = served.policy.mode, sum(served.report()["slots"].values())
            status.update(f"{mode}, {slots} experts in memory: {done} of {total} tokens")

        rows = list(_rows(served, max_tokens, progress))
    size = format_bytes(rows[0].expert_bytes)
    title = f"shipped model, {RULE}, decoding {rows[0].score.tokens} tokens; experts: {size}"
    console.print(step_table({row.name: row.score for row in rows}, title))
    console.print(ROUNDING, markup=False, highlight=False)
    return rows


def _rows(served: ServedModel, max_tokens: int, progress: Progress) -> Iterator[Row]:
    assert isinstance(served.model, DsMoeForCausalLM)
    served.model.set_inference_rule(RULE)
    text = held_out_text(served.tokenizer, CONTEXT, max_tokens)
    served.set_residents({name: range(one.num_experts) for name, one in served.blocks.items()})
    full = _row(served, "all", score_steps(served, text, progress=progress))
    yield full
    yield from _auto_rows(served, text, full.expert_bytes, progress)
    for name, share in SHARES.items():
        slots = [max(1, round(share * one.num_experts)) for one in served.budget.blocks]
        served.set_memory(served.budget.total_for_slots(slots))
        for mode in MODES:
            served.set_mode(mode)
            yield _row(served, name, score_steps(served, text, progress=progress))


def _auto_rows(
    full: ServedModel, text: Text, native_bytes: int, progress: Progress
) -> Iterator[Row]:
    """Yield rows with all experts in memory, at formats that take a share of the native bytes."""
    with load(REFERENCE, context=CONTEXT, precision=AUTO, memory=INITIAL_MEMORY) as served:
        assert isinstance(served.model, DsMoeForCausalLM)
        served.model.set_inference_rule(RULE)
        for name, share in AUTO_SHARES.items():
            served.set_memory(served.budget.fixed + round(share * native_bytes))
            served.settle_precision()
            score = score_steps(served, text, reference=full, progress=progress)
            yield _row(served, name, replace(score, mode=AUTO))


def _row(served: ServedModel, memory: str, score: StepScore) -> Row:
    return Row(memory=memory, expert_bytes=served.report()["slot_bytes"], score=score)


def draw(axes: Axes, rows: list[Row]) -> None:
    """Plot each mode's increase of perplexity over the memory of experts."""
    for mode, points in _lines(rows).items():
        axes.plot(list(points), list(points.values()), "o-", label=mode)
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(bottom=-0.5)
    axes.invert_xaxis()
    axes.set_title("shipped model, served")
    axes.set_xlabel("bytes of experts in memory, %")
    axes.set_ylabel("perplexity above all experts', %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _lines(rows: list[Row]) -> Mapping[str, dict[float, float]]:
    """Return loss by share of bytes, both in percent, for each mode; "all" belongs to each."""
    lines: dict[str, dict[float, float]] = {mode: {} for mode in (*MODES, AUTO)}
    for row in rows:
        point = {100 * row.expert_bytes / rows[0].expert_bytes: 100 * row.score.loss}
        for mode in lines if row.memory == "all" else (row.score.mode,):
            lines[mode].update(point)
    return lines
