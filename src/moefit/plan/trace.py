"""What misses and what moves if only some experts of a block are in memory: routes, replayed.

Owns decoding a recorded text again in thought, block by block, with the serving half's own
decisions (eviction, manager, importance) and slots that hold nothing. Pure; the rule of the bounded
mode is `serve/reroute.py`'s, for one token and in plain Python. It assumes that a block's input is
the full model's, whatever earlier blocks have moved.

Shapes: T tokens, E experts, K chosen per token.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moefit.serve.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.importance import ExpertImportanceEstimator
from moefit.serve.manager import VirtualExpertManager
from moefit.serve.residency import Residency


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One token in one block: chosen experts with their router weight, all experts' scores, |x|."""

    chosen: Sequence[int]
    weights: Sequence[float]
    scores: Sequence[float]
    norm: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Means per token: experts that had to be read while it waited, swaps, router weight moved."""

    misses: float
    swaps: float
    moved: float


@dataclass(slots=True)
class _Sums:
    misses: int = 0
    swaps: int = 0
    moved: float = 0.0


class _Block:
    """Residents and scores of one block in the course of a replay."""

    def __init__(self, num_experts: int, slots: int):
        self.eviction = POLICIES[DEFAULT_POLICY]()
        self.residency = Residency(num_experts, slots, self.eviction)
        self.importance = ExpertImportanceEstimator(num_experts)
        self.num_experts = num_experts

    def observe(self, step: Step) -> None:
        weights = {
            expert: step.norm * weight
            for expert, weight in zip(step.chosen, step.weights, strict=True)
        }
        self.eviction.observe(weights)
        self.importance.observe(weights)

    def fetch(self, needed: Sequence[int]) -> int:
        """Make room for what is not there, one by one; returns how many those were."""
        residents = self.residency.residents
        absent = [expert for expert in needed if expert not in residents]
        left = set(needed)
        for number, expert in enumerate(absent):
            slot = self.residency.reserve(expert, protected=left)
            if slot is None:  # more are needed than slots: what is computed gives its slot up
                left = set(absent[number:])
                slot = self.residency.reserve(expert, protected=left)
            assert slot is not None
            self.residency.publish(slot)
        return len(absent)

    def swap(self, manager: VirtualExpertManager) -> int:
        swaps = manager.plan(
            list(self.residency.residents), self.importance.scores(), empty=self.residency.empty
        )
        for one in swaps:
            if one.evict is not None:
                self.residency.evict(one.evict)
            slot = self.residency.reserve(one.load)
            assert slot is not None
            self.residency.publish(slot)
        return len(swaps)


def replay_exact(steps: Sequence[Step], num_experts: int, slots: int) -> Replayed:
    """Everything that is chosen is fetched."""
    return replay_bounded(steps, num_experts, slots, bound=-1.0)


def replay_bounded(
    steps: Sequence[Step], num_experts: int, slots: int, *, bound: float, protected: int = 1
) -> Replayed:
    """At most `bound` of a token's weight moves to residents; what else is absent is fetched."""
    block, sums = _Block(num_experts, slots), _Sums()
    for step in steps:
        block.observe(step)
        lost: list[int] = []
        if block.residency.residents:
            lost = replaceable(step, block.residency.residents, bound, protected)
        better = substitutes(step, block.residency.residents, len(lost)) if lost else []
        lost = lost[: len(better)]
        total = sum(step.weights)
        if lost and total:
            weight = dict(zip(step.chosen, step.weights, strict=True))
            sums.moved += sum(weight[expert] for expert in lost) / total
        sums.misses += block.fetch([*(e for e in step.chosen if e not in lost), *better])
    return _means(sums, len(steps))


def replay_virtual(
    steps: Sequence[Step], num_experts: int, slots: int, manager: VirtualExpertManager
) -> Replayed:
    """Residents alone answer; while slots are empty, what is chosen is fetched."""
    block, sums = _Block(num_experts, slots), _Sums()
    for number, step in enumerate(steps, start=1):
        block.observe(step)
        if block.residency.empty:
            sums.misses += block.fetch(step.chosen)
        else:
            total = sum(step.weights)
            here = block.residency.residents
            absent = [
                weight
                for expert, weight in zip(step.chosen, step.weights, strict=True)
                if expert not in here
            ]
            sums.moved += sum(absent) / total if total else 0.0
        if manager.due(number):
            sums.swaps += block.swap(manager)
    return _means(sums, len(steps))


def replaceable(step: Step, residents: Collection[int], bound: float, protected: int) -> list[int]:
    """Chosen experts that may be given up, in the order of the choice.

    >>> step = Step(chosen=[0, 1, 2], weights=[0.6, 0.3, 0.1], scores=[3, 2, 1, 0])
    >>> replaceable(step, {0, 3}, 0.2, 1)
    [2]
    """
    total = sum(step.weights)
    pairs = list(zip(step.chosen, step.weights, strict=True))
    by_weight = sorted(range(len(pairs)), key=lambda k: -pairs[k][1])
    open_ones = [k for k in by_weight[protected:] if pairs[k][0] not in residents]
    lost: set[int] = set()
    spent = 0.0
    for k in reversed(open_ones):
        spent += pairs[k][1] / max(total, 1e-20)
        if spent > bound + 1e-6:
            break
        lost.add(k)
    return [pairs[k][0] for k in sorted(lost)]


def substitutes(step: Step, residents: Collection[int], count: int) -> list[int]:
    """The best residents that the token does not use yet."""
    free = [e for e in residents if e not in step.chosen]
    return sorted(free, key=lambda e: (-step.scores[e], e))[:count]


def _means(sums: _Sums, steps: int) -> Replayed:
    count = max(1, steps)
    return Replayed(misses=sums.misses / count, swaps=sums.swaps / count, moved=sums.moved / count)
