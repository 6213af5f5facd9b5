"""Choose a format for each expert so that the total error is least within a number of bytes.

`ladder` keeps the formats worth having for one expert, smallest first; `allocate` spends the bytes
where they reduce the error most. Decisions only: `upgrades.py` carries them out.
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
    """One format that an expert may have."""

    format: str
    nbytes: int
    error: float


Ladder = Sequence[FormatChoice]
"""Choices from the smallest to the largest, each with less error than those before."""


def ladder(choices: Sequence[FormatChoice]) -> tuple[FormatChoice, ...]:
    """The choices worth having: each step down in error costs more bytes per error than the last.

    That is the lower convex hull of error against bytes, along which the greedy way of
    `allocate` is the Lagrangian optimum of the knapsack.

    >>> ladder([Choice(format="a", nbytes=1, error=9), Choice(format="b", nbytes=2, error=8),
    ...         Choice(format="c", nbytes=3, error=1)])[-1].format
    'c'
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
    """Error taken away per byte."""
    return (low.error - high.error) / (high.nbytes - low.nbytes)


def allocate(
    ladders: Mapping[Key, Ladder], sensitivity: Mapping[Key, float], room: int
) -> dict[Key, FormatChoice]:
    """The choices of least error in sum that take at most `room` bytes.

    Everyone gets its smallest choice, whatever `room` is. Then the step that takes away most error
    per byte is taken, as long as one fits; this is within one step of the optimum.
    """
    chosen = dict.fromkeys(ladders, 0)
    room -= sum(steps[0].nbytes for steps in ladders.values())
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
        more = steps[at + 1].nbytes - steps[at].nbytes
        if more > room:
            continue
        room -= more
        chosen[key] += 1
        push(key)
    return {key: ladders[key][at] for key, at in chosen.items()}


def weighted_error(choices: Mapping[Key, FormatChoice], sensitivity: Mapping[Key, float]) -> float:
    """The error that is left, in sum."""
    return sum(sensitivity[key] * choice.error for key, choice in choices.items())


def smoothed(scores: Sequence[float], prior: float) -> list[float]:
    """Sensitivities from observed scores; each has at least the share `prior` of their mean.

    An expert that has not been seen for a while may be asked for at the next token.

    >>> smoothed([0.0, 2.0], 0.5)
    [0.5, 2.5]
    """
    mean = sum(scores) / len(scores) if scores else 0.0
    return [score + prior * (mean or 1.0) for score in scores]


ExpertKey = tuple[str, int]
"""Block name and expert."""
AUTO_FORMATS = ("int2", "int3", "int4", "int5", "int6", "int8", "native")


def initial_choices(
    ladders: Mapping[ExpertKey, Ladder], room: int
) -> dict[ExpertKey, FormatChoice]:
    """What experts have before anything is known of their use; `room`: bytes beyond the smallest
    formats'."""
    smallest = sum(ladder[0].nbytes for ladder in ladders.values())
    return allocate(ladders, dict.fromkeys(ladders, 1.0), smallest + room)


def by_expert(ladders: Mapping[str, Sequence[Ladder]]) -> dict[ExpertKey, Ladder]:
    """Ladders of blocks as those of experts."""
    return {
        (name, expert): steps
        for name, of_block in ladders.items()
        for expert, steps in enumerate(of_block)
    }


def ladders_of(block: MoeBlock, packed: PackedStore) -> tuple[Ladder, ...]:
    """The formats that each expert of a block may have, with what each loses.

    That was measured of each expert where all of the formats are packed, with the same calibration
    or with none, and is else what is to be expected of any.
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
