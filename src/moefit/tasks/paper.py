"""DS-MoE's published zero-shot scores (arXiv 2404.05567, Table 3), to show beside one's own.

They were measured with lm-evaluation-harness; the paper does not say which of its accuracies they
are. Active parameters are means over all six tasks, without embeddings. DS-MoE infers by the
threshold rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_TASKS = ("hellaswag", "piqa", "winogrande", "sciq", "arc_easy", "arc_challenge")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedScore:
    """A row of the table.

    Attributes:
        name: Of the model.
        accuracy: By task, in percent.
        active_parameters: Mean over the tasks.
        active_share: Share of the hidden units, as a fraction.
    """

    name: str
    accuracy: Mapping[str, float]
    active_parameters: float
    active_share: float


def _row(name: str, accuracies: str, active: float, share: float) -> PublishedScore:
    values = map(float, accuracies.split())
    return PublishedScore(
        name=name,
        accuracy=dict(zip(_TASKS, values, strict=True)),
        active_parameters=active * 1e6,
        active_share=share,
    )


TABLE_3 = (
    _row("Dense-1B", "33.1 66.6 51.1 80.0 50.8 21.5", 1017, 1.0),
    _row("SMoE-1B", "32.8 66.4 52.4 79.7 50.7 21.7", 419, 0.40),
    _row("SMoE-1.5B", "33.1 67.7 52.5 79.7 50.5 22.8", 419, 0.29),
    _row("DS-MoE-1B", "33.7 68.1 50.8 81.1 52.4 22.2", 439, 0.41),
    _row("Dense-3B", "40.4 71.4 58.7 86.0 59.6 26.1", 2705, 1.0),
    _row("SMoE-5B", "40.1 70.7 56.5 85.6 58.4 24.8", 1212, 0.25),
    _row("DS-MoE-3B", "39.3 71.6 57.9 85.6 57.7 24.9", 934, 0.34),
    _row("Dense-6B", "44.3 72.2 59.9 88.0 62.9 27.9", 6186, 1.0),
    _row("DS-MoE-6B", "43.5 73.0 57.9 86.9 61.9 27.9", 1813, 0.29),
)
"""All rows, with scores in percent."""
CHANCE = {name: 50.0 if name in ("piqa", "winogrande") else 25.0 for name in _TASKS}
"""Percent of a random choice by task; a few ARC questions have three or five choices."""
