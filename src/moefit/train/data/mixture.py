"""Draw the sequences of a run from several sources, in proportion to weights.

What is drawn depends only on seed and the sequence's number in the run, so a resumed run and any
number of processes see the same order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

BLOCK = 256
"""Sequences that are put in random order together."""
_STREAM = 3_000_003  # apart from other random numbers of the same seed


@dataclass(frozen=True, slots=True)
class Mixture:
    """Which source each sequence of a run is drawn from.

    Sources take turns as evenly as their weights allow, and each block of consecutive sequences is
    then put in random order. So the first n sequences have nearly the right proportions for any n,
    and each source is used from its first sequence on, without gaps.

    Attributes:
        weights: By source, not negative, and not all zero; they need not sum to one.
        seed: Not negative.
    """

    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        assert min(self.weights) >= 0 < sum(self.weights), "DataConfig checks this"

    def drawn(self, index: int) -> tuple[int, int]:
        """Return the source of a sequence, and how many of it come before; `index` is from 0."""
        block, place = divmod(index, BLOCK)
        turn = block * BLOCK + _order(self.seed, block)[place]
        before, after = self.counts(turn), self.counts(turn + 1)
        source = next(n for n, count in enumerate(before) if after[n] > count)
        return source, before[source]

    def counts(self, turns: int) -> list[int]:
        """Return how many of the first turns each source has.

        >>> Mixture((0.5, 0.3, 0.2), seed=0).counts(10)
        [5, 3, 2]
        """
        counts: list[int] = []
        shares, left = _shares(self.weights), turns
        rest = sum(shares)
        # Each source in turn takes its part of what is left, rounded: a part of a count that grows
        # by at most one grows by at most one too, so that each turn belongs to one source.
        for share in shares:
            count = (2 * left * share + rest) // (2 * rest) if rest else 0
            counts.append(count)
            left, rest = left - count, rest - share
        return counts


@lru_cache(maxsize=16)
def _shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Return whole numbers in the proportion of weights as they are written: exact arithmetic."""
    parts = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(part.denominator for part in parts))
    return tuple(int(part * common) for part in parts)


@lru_cache(maxsize=16)
def _order(seed: int, block: int) -> list[int]:
    return np.random.default_rng([seed, _STREAM, block]).permutation(BLOCK).tolist()
