"""Choose a format for each expert that minimises the total error within a number of bytes.

`ladder` keeps the formats of one expert that are worth their bytes, smallest first; `allocate`
spends bytes where they reduce the error most. Pure functions; `upgrades.py` carries them out.
"""

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moefit.moe.families import MoeBlock
from moefit.quant.format import FORMATS, Format
from moefit.serve.packed.store import PackedStore

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatChoice:
    """A format for an expert, with its size and its (relative) error."""

    format: str
    nbytes: int
    error: float


Ladder = Sequence[FormatChoice]
"""Choices in order of size, each with less error than the one before."""


def ladder(choices: Sequence[FormatChoice]) -> tuple[FormatChoice, ...]:
    """Return the choices on the lower convex hull of error against bytes.

    Along the hull each step saves less error per byte than the one before, so the greedy algorithm
    of `allocate` gives the Lagrangian optimum of the knapsack problem.

    >>> steps = ladder([FormatChoice(format="a", nbytes=1, error=9),
    ...                 FormatChoice(format="b", nbytes=2, error=8),
    ...                 FormatChoice(format="c", nbytes=3, error=1)])
    >>> [choice.format for choice in steps]
    ['a', 'c']
    """
    hull: list[FormatChoice] = []
    for choice in sorted(choices, key=lambda one: (one.nbytes, one.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return tuple(hull)


def _gain(low: FormatChoice, high: FormatChoice) -> float:
    """Return the error saved per byte."""
    return (low.error - high.error) / (high.nbytes - low.nbytes)


def allocate(
    ladders: Mapping[Key, Ladder], sensitivity: Mapping[Key, float], nbytes: int
) -> dict[Key, FormatChoice]:
    """Choose formats with the least total error in at most `nbytes` bytes.

    Each key starts with its smallest choice, even if these exceed `nbytes`. Then the step that
    saves the most error per byte is taken as long as one fits, which is within one step of the
    optimum.

    Args:
        ladders: The choices of each key, as returned by `ladder`.
        sensitivity: Factor of each key's error in the total.
        nbytes: Bytes for all keys together.
    """
    chosen = dict.fromkeys(ladders, 0)
    free = nbytes - sum(steps[0].nbytes for steps in ladders.values())
    order = {key: number for number, key in enumerate(ladders)}
    heap: list[tuple[float, int, Key]] = []

    def push(key: Key) -> None:
        steps, at = ladders[key], chosen[key]
        if at + 1 < len(steps):
            gain = sensitivity[key] * _gain(steps[at], steps[at + 1])
            heapq.heappush(heap, (-gain, order[key], key))

    for key in ladders:
        push(key)
    while heap:
        _, _, key = heapq.heappop(heap)
        steps, at = ladders[key], chosen[key]
        growth = steps[at + 1].nbytes - steps[at].nbytes
        if growth > free:
            continue
        free -= growth
        chosen[key] += 1
        push(key)
    return {key: ladders[key][at] for key, at in chosen.items()}


def weighted_error(choices: Mapping[Key, FormatChoice], sensitivity: Mapping[Key, float]) -> float:
    """Return the sum of sensitivity * error."""
    return sum(sensitivity[key] * choice.error for key, choice in choices.items())


def smoothed(scores: Sequence[float], prior: float) -> list[float]:
    """Return the scores plus `prior` times their mean.

    Keeps the sensitivity of experts above zero that were not used lately: they may be used again.

    >>> smoothed([0.0, 2.0], 0.5)
    [0.5, 2.5]
    """
    mean = sum(scores) / len(scores) if scores else 0.0
    return [score + prior * (mean or 1.0) for score in scores]


ExpertKey = tuple[str, int]
"""Block name and expert number."""
AUTO_FORMATS = ("int2", "int3", "int4", "int5", "int6", "int8", "native")


def initial_choices(
    ladders: Mapping[ExpertKey, Ladder], extra_bytes: int
) -> dict[ExpertKey, FormatChoice]:
    """Choose formats before any token was seen, with equal sensitivity for all experts.

    Args:
        ladders: The choices of each expert.
        extra_bytes: Bytes to spend beyond those of the smallest formats.
    """
    smallest = sum(ladder[0].nbytes for ladder in ladders.values())
    return allocate(ladders, dict.fromkeys(ladders, 1.0), smallest + extra_bytes)


def by_expert(ladders: Mapping[str, Sequence[Ladder]]) -> dict[ExpertKey, Ladder]:
    """Return the ladders of blocks, keyed by expert."""
    return {
        (name, expert): steps
        for name, of_block in ladders.items()
        for expert, steps in enumerate(of_block)
    }


def ladders_of(block: MoeBlock, packed: PackedStore) -> tuple[Ladder, ...]:
    """Return each expert's ladder over `AUTO_FORMATS`.

    Errors are those measured when packing if all formats are packed with the same calibration (or
    all without), so that they can be compared; else the expected error of each format.
    """
    specs = block.layout.specs
    errors = {name: [format.expected_error] * block.num_experts for name, format in _formats()}
    encoded = [(name, format) for name, format in _formats() if format.is_encoded]
    if all(packed.has(block.name, format) for _, format in encoded) and (
        len({packed.calibration(block.name, format) for _, format in encoded}) == 1
    ):
        for name, format in encoded:
            errors[name] = list(packed.relative_errors(block.name, format))
    return tuple(
        ladder(
            [
                FormatChoice(format=name, nbytes=format.nbytes(specs), error=errors[name][expert])
                for name, format in _formats()
            ]
        )
        for expert in range(block.num_experts)
    )


def _formats() -> list[tuple[str, Format]]:
    return [(name, FORMATS[name]) for name in AUTO_FORMATS]
