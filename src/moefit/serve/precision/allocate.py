"""Which precision each expert deserves: bytes go where they take away most error.

Owns the choice of a format per expert under one sum of bytes, and which changes lead there. An
expert's error at a format is its sensitivity times the format's relative squared error; errors add
up. Pure: what is decided here, `upgrades.py` carries out.
"""

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One format that an expert may have."""

    format: str
    nbytes: int
    error: float


Ladder = Sequence[Choice]
"""Choices from the smallest to the largest, each with less error than those before."""


def ladder(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """The choices worth having: each step down in error costs more bytes per error than the last.

    That is the lower convex hull of error against bytes, along which the greedy way of
    `allocate` is the Lagrangian optimum of the knapsack.

    >>> ladder([Choice(format="a", nbytes=1, error=9), Choice(format="b", nbytes=2, error=8),
    ...         Choice(format="c", nbytes=3, error=1)])[-1].format
    'c'
    """
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (one.nbytes, one.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return tuple(hull)


def _gain(low: Choice, high: Choice) -> float:
    """Error taken away per byte."""
    return (low.error - high.error) / (high.nbytes - low.nbytes)


def allocate(
    ladders: Mapping[Key, Ladder], sensitivity: Mapping[Key, float], room: int
) -> dict[Key, Choice]:
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


def loss(choices: Mapping[Key, Choice], sensitivity: Mapping[Key, float]) -> float:
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
