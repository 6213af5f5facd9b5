"""Record the routing of a text, and replay it with fewer experts resident.

`record_routes` runs the model in exact mode and records what each block's router chose. Replaying
the record gives misses, swaps and substituted weight for any number of slots and any policy,
without the model. `Curves` hold them at a few slot counts per block. Blocks of an encoder compute a
whole source at once, so that theirs are per source, for a few lengths of sources.

Shapes: B sequences, T tokens, D model width, K chosen per token, E experts.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moefit.plan.configuration import Lengths, PolicyChoice
from moefit.plan.experiments import policy_choices, slot_counts
from moefit.serve.cache.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.cache.scores import ExpertImportanceEstimator, VirtualExpertManager
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.config import Policy
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.model import ServedModel
from moefit.serve.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The routing of one step in one block: of one token, or of all tokens of a source.

    Attributes:
        chosen: Chosen experts.
        weights: Their router weights.
        scores: Scores of all experts; of several tokens none.
        norm: Norm of the block's input.
        tokens: Number of tokens.
    """

    chosen: Sequence[int]
    weights: Sequence[float]
    scores: Sequence[float]
    norm: float = 1.0
    tokens: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """Means per token of a replay.

    Attributes:
        misses: Experts that the token waited for.
        swaps: Experts loaded in the background.
        moved: Share of router weight that was substituted.
    """

    misses: float
    swaps: float
    moved: float


@dataclass(slots=True)
class _Sums:
    misses: int = 0
    swaps: int = 0
    moved: float = 0.0


class _Block:
    """The resident experts and scores of one block during a replay."""

    def __init__(self, num_experts: int, slots: int):
        self.eviction = POLICIES[DEFAULT_POLICY]()
        self.slot_table = SlotTable(num_experts, slots, self.eviction)
        self.importance = ExpertImportanceEstimator(num_experts)
        self.num_experts = num_experts

    def observe(self, step: Step) -> None:
        weights = {
            expert: step.norm * weight
            for expert, weight in zip(step.chosen, step.weights, strict=True)
        }
        self.eviction.observe(weights, step.tokens)
        self.importance.observe(weights, step.tokens)

    def fetch(self, needed: Sequence[int]) -> int:
        """Load the missing experts one by one and return their number."""
        residents = self.slot_table.residents
        absent = [expert for expert in needed if expert not in residents]
        left = set(needed)
        for number, expert in enumerate(absent):
            slot = self.slot_table.reserve(expert, protected=left)
            if slot is None:  # fewer slots than experts: evict those that have been computed
                left = set(absent[number:])
                slot = self.slot_table.reserve(expert, protected=left)
            assert slot is not None
            self.slot_table.publish(slot)
        return len(absent)

    def swap(self, manager: VirtualExpertManager) -> int:
        swaps = manager.plan(
            list(self.slot_table.residents), self.importance.scores(), empty=self.slot_table.empty
        )
        for one in swaps:
            if one.evict is not None:
                self.slot_table.evict(one.evict)
            slot = self.slot_table.reserve(one.load)
            assert slot is not None
            self.slot_table.publish(slot)
        return len(swaps)


def replay_exact(steps: Sequence[Step], num_experts: int, slots: int) -> ReplayResult:
    """Replay exact mode: fetch every chosen expert."""
    return replay_bounded(steps, num_experts, slots, bound=-1.0)


def replay_bounded(
    steps: Sequence[Step], num_experts: int, slots: int, *, bound: float, protected: int = 1
) -> ReplayResult:
    """Replay bounded mode.

    Args:
        steps: The recorded routing.
        num_experts: Experts of the block.
        slots: Its slots.
        bound: Maximum share of a token's router weight that is substituted; other missing experts
            are fetched.
        protected: Number of chosen experts of largest weight that are never substituted.
    """
    block, sums = _Block(num_experts, slots), _Sums()
    for step in steps:
        block.observe(step)
        lost: list[int] = []
        if block.slot_table.residents:
            lost = replaceable(step, block.slot_table.residents, bound, protected)
        better = substitutes(step, block.slot_table.residents, len(lost)) if lost else []
        lost = lost[: len(better)]
        total = sum(step.weights)
        if lost and total:
            weight = dict(zip(step.chosen, step.weights, strict=True))
            sums.moved += sum(weight[expert] for expert in lost) / total
        sums.misses += block.fetch([*(e for e in step.chosen if e not in lost), *better])
    return _means(sums, len(steps))


def replay_virtual(
    steps: Sequence[Step], num_experts: int, slots: int, manager: VirtualExpertManager
) -> ReplayResult:
    """Replay virtual mode: use resident experts only; fetch while there are empty slots."""
    block, sums = _Block(num_experts, slots), _Sums()
    for number, step in enumerate(steps, start=1):
        block.observe(step)
        if block.slot_table.empty:
            sums.misses += block.fetch(step.chosen)
        else:
            total = sum(step.weights)
            here = block.slot_table.residents
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
    """Return the chosen experts that may be substituted, in the order of the choice.

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
    """Return the resident experts of highest score that the token does not use yet."""
    free = [e for e in residents if e not in step.chosen]
    return sorted(free, key=lambda e: (-step.scores[e], e))[:count]


def _means(sums: _Sums, steps: int) -> ReplayResult:
    count = max(1, steps)
    return ReplayResult(
        misses=sums.misses / count, swaps=sums.swaps / count, moved=sums.moved / count
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The recorded routing of one block.

    Attributes:
        steps: One step per token.
        mass_E: Each expert's share of router weight.
        output_energy_E: Each expert's share of the output energy.
        experts: Experts that a token uses on average.
        rule_known: Whether the router's scoring rule was recognized.
    """

    steps: Sequence[Step]
    mass_E: Sequence[float]
    output_energy_E: Sequence[float]
    experts: float
    rule_known: bool = True


@torch.inference_mode()
def record_routes(served: ServedModel, windows: Windows) -> dict[str, Routes]:
    """Run windows one after the other and record the routing of each block.

    Args:
        served: The model, in exact mode.
        windows: Token ids.
    """
    steps: dict[str, list[Step]] = {name: [] for name in served.blocks}
    for experts in served.blocks.values():
        experts.enable_stats()
    with _recording(served, steps):
        for row in range(len(windows)):
            served.model(**windows.inputs(row, served.model.device), use_cache=False)
    return {name: _routes(steps[name], served.blocks[name]) for name in steps}


@contextmanager
def _recording(served: ServedModel, steps: dict[str, list[Step]]) -> Iterator[None]:
    hooks: list[RemovableHandle] = []
    for name, experts in served.blocks.items():

        def record(module: VirtualExperts, args: tuple[Tensor, ...], name: str = name) -> None:
            steps[name] += _steps(module, *args)

        hooks.append(experts.register_forward_pre_hook(record))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _steps(experts: VirtualExperts, x: Tensor, *arguments: Tensor) -> Iterator[Step]:
    x_TD = x.reshape(-1, x.shape[-1])
    routing = experts.block.layout.routing(len(x_TD), *arguments)
    ids, weights = routing.ids_TK.tolist(), routing.weights_TK.float().abs().tolist()
    norms = x_TD.float().norm(dim=-1).tolist()
    scores = _scores(experts, len(x_TD))
    for chosen, heavy, norm, score in zip(ids, weights, norms, scores, strict=True):
        pairs = [(e, w) for e, w in zip(chosen, heavy, strict=True) if e < experts.num_experts]
        yield Step(
            chosen=[e for e, _ in pairs], weights=[w for _, w in pairs], scores=score, norm=norm
        )


def _scores(experts: VirtualExperts, tokens: int) -> list[list[float]]:
    """Return the scores that substitutes are chosen by; zeros if the scoring rule is unknown."""
    if experts.scoring is None or experts.state.logits_TE is None:
        return [[0.0] * experts.num_experts] * tokens
    logits_TE = experts.state.logits_TE.reshape(-1, experts.num_experts)
    return experts.scoring.preference(logits_TE, experts.bias_E).float().tolist()


def _routes(steps: Sequence[Step], experts: VirtualExperts) -> Routes:
    mass = [0.0] * experts.num_experts
    for step in steps:
        total = sum(step.weights) or 1.0
        for expert, weight in zip(step.chosen, step.weights, strict=True):
            mass[expert] += weight / total
    return Routes(
        steps=steps,
        mass_E=_shares(mass),
        output_energy_E=_shares(experts.output_energy.scores()),
        experts=sum(len(step.chosen) for step in steps) / max(1, len(steps)),
        rule_known=experts.scoring is not None or not experts.reachable,
    )


def _shares(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else 1 / len(values) for value in values]


Curves = Mapping[str, Mapping[int, ReplayResult]]
"""Results by policy, then by number of slots."""


def make_curves(routes: Routes, num_experts: int, depth: float) -> dict[str, dict[str, Any]]:
    """Compute all curves of one block.

    Args:
        routes: The recorded routing.
        num_experts: Experts of the block.
        depth: Position of the block in the model, 0 to 1.
    """
    return {
        policy.key: {
            str(slots): list(astuple(_replayed(policy, routes, num_experts, slots, depth)))
            for slots in slot_counts(num_experts)
        }
        for policy in policy_choices()
    }


SOURCE_LENGTHS = (1 / 4, 1 / 2, 1, 2, 4, 8)  # of the recorded sources' mean
_LEAST_SOURCES = 4


def make_source_curves(
    routes: Routes, num_experts: int, source_tokens: float
) -> dict[str, dict[str, Any]]:
    """Compute the curves of an encoder's block, by length of the source in tokens.

    Sources of other lengths than the recorded ones are made of consecutive recorded tokens.

    Args:
        routes: The recorded routing.
        num_experts: Experts of the block.
        source_tokens: Mean length of the recorded sources.
    """
    found: dict[str, dict[str, Any]] = {}
    for length in sorted({max(1, round(share * source_tokens)) for share in SOURCE_LENGTHS}):
        starts = range(0, len(routes.steps) - length + 1, length)
        sources = [merged(routes.steps[start : start + length]) for start in starts]
        if len(sources) < _LEAST_SOURCES and found:
            break
        found[str(length)] = {
            policy.key: {
                str(slots): list(
                    astuple(
                        replay_virtual(
                            sources, num_experts, slots, VirtualExpertManager(every=policy.every)
                        )
                        if policy.mode == "virtual"
                        else replay_exact(sources, num_experts, slots)
                    )
                )
                for slots in slot_counts(num_experts)
            }
            for policy in policy_choices()
        }
    return found


def merged(steps: Sequence[Step]) -> Step:
    """Return the tokens of one pass as one step, which needs all experts that any of them chose.

    >>> one = Step(chosen=[1], weights=[0.5], scores=[])
    >>> merged([one, Step(chosen=[1, 0], weights=[1, 2], scores=[])])
    Step(chosen=(1, 0), weights=(1.5, 2), scores=(), norm=1.0, tokens=2)
    """
    weights: dict[int, float] = {}
    for step in steps:
        for expert, weight in zip(step.chosen, step.weights, strict=True):
            weights[expert] = weights.get(expert, 0) + weight
    norm = sum(step.norm for step in steps) / len(steps)
    return Step(
        chosen=tuple(weights),
        weights=tuple(weights.values()),
        scores=(),
        norm=norm,
        tokens=len(steps),
    )


def _replayed(
    policy: PolicyChoice, routes: Routes, experts: int, slots: int, depth: float
) -> ReplayResult:
    if policy.mode == "exact":
        return replay_exact(routes.steps, experts, slots)
    if policy.mode == "bounded":
        bound = Policy(bound=policy.bound).bound_at(depth)
        return replay_bounded(routes.steps, experts, slots, bound=bound)
    manager = VirtualExpertManager(every=policy.every)
    return replay_virtual(routes.steps, experts, slots, manager)


def read_curves(values: Mapping[str, Any], num_experts: int) -> Curves:
    """Return the curves that `make_curves` computed, with zeros for all experts resident."""
    nothing = ReplayResult(misses=0.0, swaps=0.0, moved=0.0)
    return {
        policy: {
            **{
                int(slots): ReplayResult(misses=point[0], swaps=point[1], moved=point[2])
                for slots, point in sorted(points.items(), key=lambda one: int(one[0]))
            },
            num_experts: nothing,
        }
        for policy, points in values.items()
    }


def read_source_curves(values: Mapping[str, Any], num_experts: int, lengths: Lengths) -> Curves:
    """Return the curves that `make_source_curves` computed, for requests of these lengths.

    Misses and swaps are per token of the output. Between two known lengths of sources they are
    interpolated; the shortest and the longest stand for what is beyond them.
    """
    by_length = {int(one): read_curves(some, num_experts) for one, some in values.items()}
    nearest = min(max(lengths.source, min(by_length)), max(by_length))
    below = max(one for one in by_length if one <= nearest)
    above = min(one for one in by_length if one >= nearest)
    share = (nearest - below) / max(1, above - below)
    return {
        policy: {
            slots: _per_token(_between(low, by_length[above][policy][slots], share), lengths)
            for slots, low in points.items()
        }
        for policy, points in by_length[below].items()
    }


def _per_token(source: ReplayResult, lengths: Lengths) -> ReplayResult:
    return ReplayResult(
        misses=source.misses / lengths.target,
        swaps=source.swaps / lengths.target,
        moved=source.moved,
    )


def interpolated(curves: Curves, policy: str, slots: int) -> ReplayResult:
    """Interpolate linearly between two points of a curve."""
    points = curves[policy]
    if slots in points:
        return points[slots]
    below = max(known for known in points if known < slots)
    above = min(known for known in points if known > slots)
    return _between(points[below], points[above], (slots - below) / (above - below))


def _between(low: ReplayResult, high: ReplayResult, share: float) -> ReplayResult:
    return ReplayResult(
        misses=low.misses + share * (high.misses - low.misses),
        swaps=low.swaps + share * (high.swaps - low.swaps),
        moved=low.moved + share * (high.moved - low.moved),
    )
