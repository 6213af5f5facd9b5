"""What happened since when: the numbers behind `report()`.

Owns counting alone. An access is one (step, block, expert): however many tokens of a step use an
expert, it is needed once (event-atomic, arXiv 2608.07911).
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Counters:
    """Sums over all blocks. Masses are shares of router weight, one entry per block and step.

    substitutions: experts that a step asked for and others answered for.
    """

    hits: int = 0
    fetches: int = 0
    substitutions: int = 0
    swaps: int = 0
    wait_seconds: float = 0.0
    substituted: float = 0.0
    routed: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of accesses that found their expert in memory; 1 without accesses."""
        accesses = self.hits + self.fetches
        return self.hits / accesses if accesses else 1.0

    @property
    def substituted_mass(self) -> float:
        """Mean share of router weight that went to another expert than the router's choice."""
        return self.substituted / self.routed if self.routed else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rates = {"hit_rate": self.hit_rate, "substituted_mass": self.substituted_mass}
        return {**asdict(self), **rates}
