"""Which experts shall come and go: SwapMoE's Virtual Expert Manager.

Owns the choice of swaps from scores and residents: amortised (a bounded number each time) and
with hysteresis, so that near-equals don't trade places for ever. Pure: what is decided here, the
transfer carries out, and a swap is seen only when its expert is whole.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """Put expert `load` where expert `evict` is; None if a slot is empty."""

    load: int
    evict: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualExpertManager:
    """When to swap, and what.

    `every` steps of a block, at most `max_swaps` experts change. A newcomer must beat the one
    that it displaces by the factor 1 + `margin`.
    """

    every: int = 1
    max_swaps: int = 1
    margin: float = 0.25

    def due(self, step: int) -> bool:
        """Whether the block's step is one at which swaps are planned."""
        return step % self.every == 0

    def plan(
        self,
        residents: Collection[int],
        scores: Sequence[float],
        *,
        empty: int = 0,
        filling: Collection[int] = (),
    ) -> tuple[Swap, ...]:
        """The swaps that gain most importance, best first.

        empty: slots that hold nothing; they are filled first, and cost no eviction.
        filling: experts that are being loaded already.

        >>> VirtualExpertManager(max_swaps=1).plan([0, 1], [0.1, 0.5, 0.9])
        (Swap(load=2, evict=0),)
        """
        absent = set(range(len(scores))) - set(residents) - set(filling)
        wanted = sorted(absent, key=lambda e: (-scores[e], e))[: self.max_swaps]
        swaps = [Swap(load=expert, evict=None) for expert in wanted[:empty]]
        weakest = sorted(residents, key=lambda e: (scores[e], e))
        for expert, old in zip(wanted[empty:], weakest, strict=False):
            if scores[expert] <= scores[old] * (1 + self.margin):
                break
            swaps.append(Swap(load=expert, evict=old))
        return tuple(swaps)
