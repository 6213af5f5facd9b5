"""One block's experts as people look at them: who is in memory, in which format, who matters.

Owns the record and reading it of a block. Whoever calls holds the lock that a step holds.
"""

from dataclasses import dataclass

from moefit.serve.virtual_experts import VirtualExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockView:
    """resident: ids of experts in memory. formats: of every expert, None for those that are not.

    importance: of every expert, to four digits, 1 for the most important one; all 0 before
    anything was computed.
    """

    name: str
    experts: int
    slots: int
    resident: tuple[int, ...]
    formats: tuple[str | None, ...]
    importance: tuple[float, ...]


def view_of(name: str, experts: VirtualExperts) -> BlockView:
    """The block as it is now."""
    residency, scores = experts.residency, experts.importance.scores()
    largest = max(scores, default=0.0) or 1.0
    resident = sorted(residency.residents)
    formats: list[str | None] = [None] * experts.num_experts
    for expert in resident:
        formats[expert] = experts.slots[residency.slot(expert)].format.name
    return BlockView(
        name=name,
        experts=experts.num_experts,
        slots=residency.number,
        resident=tuple(resident),
        formats=tuple(formats),
        importance=tuple(round(score / largest, 4) for score in scores),
    )
