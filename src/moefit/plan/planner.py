"""From a profile to answers: the plan for a budget, the front over budgets, what fits.

Owns the order of things: models are fitted, rooms reckoned with serving's own ledger, the searches
run, and of what they find the promise chooses. Knows nothing of how anything is printed.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moefit.device import planned_device
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.plan import genetic
from moefit.plan.chosen import QualityModel, fit_quality, quality_samples
from moefit.plan.configuration import Configuration, uniform
from moefit.plan.experiments import FORMATS, RESTS
from moefit.plan.features import Knowledge, knowledge_of
from moefit.plan.latency import LatencyModel, fit_latency
from moefit.plan.options import placed_bytes, policy_choices
from moefit.plan.plan_file import Plan, Prediction
from moefit.plan.profile import Profile
from moefit.plan.search import Models, Point, allocated, pareto
from moefit.serve.budget import MemoryBudget, format_bytes
from moefit.serve.ledger import held_bytes
from moefit.serve.reckon import ledger
from moefit.serve.settings import LoadSettings
from moefit.serve.skeleton import Skeleton

SLACK = 8 << 20  # bytes that loading in another process may differ by
_STILL = 0.05  # experts a token that are waited for, where none shall be
DEFAULT_LOSS = 0.02  # what is promised where nobody asks for anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """At most this loss of perplexity, or at least this many tokens a second; both None: neither.

    Without either, the fastest whose loss is at most `DEFAULT_LOSS` is wanted, or else the best.
    """

    max_loss: float | None = None
    min_speed: float | None = None

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be promised."""
        if self.max_loss is not None and not 0 <= self.max_loss < math.inf:
            raise ConfigError(f"max-loss {self.max_loss!r}, but it is a share, such as 3% or 0.03")
        if self.min_speed is not None and not 0 < self.min_speed < math.inf:
            raise ConfigError(f"min-speed {self.min_speed!r}, but it is tokens a second, above 0")


class Planner:
    """One model with its profile. context: tokens that the KV cache is reserved for."""

    def __init__(
        self,
        skeleton: Skeleton,
        profile: Profile,
        *,
        context: int = 2048,
        device: str = "cpu",
        search: bool = True,
    ):
        self.profile, self.context = profile, context
        self._skeleton, self._device = skeleton, device
        self._process = held_bytes(planned_device(device))  # before this planning takes its own
        self.knowledge: Knowledge = knowledge_of(profile)
        self.quality: QualityModel = fit_quality(profile, self.knowledge)
        self.latency: LatencyModel = fit_latency(profile, self.knowledge)
        self._models = Models(self.quality, self.latency, policy_choices())
        self._cold_models: Models | None = None
        self._search = search
        self._simple = {rest: self._simple_ledgers(rest) for rest in RESTS}
        self._plain = [
            self._models.judged(one, placed_bytes(one, self.knowledge.shapes), "one format for all")
            for rest in RESTS
            for one in self._simple_configurations(rest)
        ]

    @property
    def searched_by(self) -> str:
        """Which searches run."""
        both = self._search and genetic.available()
        return "allocator and genetic search" if both else "allocator"

    def floor(self) -> int:
        """The least budget that any configuration fits in."""
        return min(needed(one) for some in self._simple.values() for one in some) + SLACK

    def everything(self) -> int:
        """The budget that holds all experts as they are in the checkpoint."""
        return needed(self._ledger(uniform(self.profile.experts, "native"))) + SLACK

    def front(self, memory: int, *, search: bool | None = None) -> list[Point]:
        """What is worth having within a budget: none is better in both loss and speed.

        Raises BudgetTooSmallError below the floor.
        """
        if memory < (floor := self.floor()):
            raise BudgetTooSmallError(
                f"a budget of {format_bytes(memory)} is below the least that this model can be "
                f"planned in, {format_bytes(floor)}; give at least {floor} bytes, or a shorter "
                "context"
            )
        rooms, models = self._rooms(memory), self._models_beside(memory)
        plain = [models.judged(one.configuration, one.nbytes, one.found_by) for one in self._plain]
        proposed = [point for some in rooms for point in allocated(models, some)]
        points = self._fitting([*plain, *proposed], memory)
        if self._search if search is None else search:
            more = genetic.evolved(models, rooms[0], pareto(points))
            points += self._fitting(more, memory)
        return pareto(points)

    def front_of_slots(self, nbytes: int, *, fetching: bool = True) -> list[Point]:
        """The same, if only the slots' bytes are bounded; empty if nothing fits.

        fetching False: only what waits for no expert, but at most for one in twenty tokens.
        """
        room = {RESTS[0]: nbytes}
        points = self._of_kind(allocated(self._models, room), fetching=fetching)
        if self._search:
            more = genetic.evolved(self._models, room, pareto(points))
            points += self._of_kind(more, fetching=fetching)
        return pareto(points)

    def _of_kind(self, points: Sequence[Point], *, fetching: bool) -> list[Point]:
        if fetching:
            return list(points)
        misses = self.knowledge.misses
        return [one for one in points if sum(misses(one.configuration)) < _STILL]

    def _models_beside(self, memory: int) -> Models:
        """Where the page cache beside a budget cannot hold the experts' files, loads are cold."""
        shapes = self.knowledge.shapes.values()
        files = sum(one.slot_bytes[FORMATS[0]] * one.num_experts for one in shapes)
        if files <= self.profile.facts.machine["memory"] - memory:
            return self._models
        if self._cold_models is None:
            cold = fit_latency(self.profile, self.knowledge, cold=True)
            self._cold_models = Models(self.quality, cold, policy_choices())
        return self._cold_models

    def plan(self, memory: int, promise: Promise | None = None) -> tuple[Plan, list[Point]]:
        """The plan for a budget, and the front that it was chosen from.

        Raises ConfigError if the promise can't be kept, with the nearest that can be.
        """
        front = self.front(memory)
        point = self._chosen(front, promise or Promise(), memory)
        return self.plan_of(point, memory), front

    def plan_of(self, point: Point, memory: int | None) -> Plan:
        """A point as a plan."""
        facts = self.profile.facts
        configuration = point.configuration
        return Plan(
            configuration=configuration,
            memory=memory,
            context=self.context,
            fingerprint=facts.fingerprint,
            dtype=facts.dtype,
            rule=facts.rule,
            source=facts.source,
            predicted=Prediction(
                loss=point.loss,
                margin=self.quality.margin,
                speed=point.speed,
                expert_bytes=point.nbytes,
                misses=float(np.mean(self.knowledge.misses(configuration))),
                moved=float(np.mean(self.knowledge.moved(configuration))),
            ),
        )

    def over_budgets(self, count: int = 10) -> Iterator[tuple[int, list[Point]]]:
        """Budgets from the floor to everything, evenly in ratio of slots' bytes, and fronts.

        What fits a smaller budget fits a larger one, so no front is behind the one before.
        """
        low, high = self.floor(), self.everything()
        fixed = min(one.fixed for some in self._simple.values() for one in some)
        known: list[Point] = []
        for number in range(count):
            share = number / max(1, count - 1)
            memory = round(fixed + (low - fixed) * ((high - fixed) / (low - fixed)) ** share)
            known = pareto([*known, *self.front(max(low, memory), search=False)])
            yield memory, known

    def smallest_budget(self, max_loss: float) -> int | None:
        """The least budget with a configuration of at most this loss, within half a percent."""
        low, high = self.floor(), self.everything()
        if not self._keeps(high, max_loss):
            return None
        if self._keeps(low, max_loss):
            return low
        while high - low > 0.005 * high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._keeps(middle, max_loss) else (middle, high)
        return high

    def sequences(self, plan: Plan, lengths: Sequence[int] = (512, 2048, 8192)) -> dict[int, int]:
        """How many sequences of each length fit beside the plan's experts."""
        if plan.memory is None:
            return {}
        per_token = self._per_token(plan.configuration)
        free = plan.memory - needed(self._ledger(plan.configuration)) + self.context * per_token
        longest = getattr(
            self._skeleton.model.config.get_text_config(decoder=True),
            "max_position_embeddings",
            None,
        )
        return {
            length: max(0, int(free // (length * max(1, per_token))))
            for length in lengths
            if longest is None or length <= longest
        }

    def warnings(self) -> list[str]:
        """Where this model takes approximation badly, with what was measured."""
        found: list[str] = []
        samples = [
            one for one in quality_samples(self.profile) if one.configuration.mode != "exact"
        ]
        for mode in ("bounded", "virtual"):
            some = [one for one in samples if one.configuration.mode == mode]
            if not some:
                continue
            mild = min(some, key=lambda one: one.divergence)
            loss = math.expm1(mild.divergence)
            if loss > DEFAULT_LOSS:
                share = mild.configuration.slots / sum(self.profile.experts.values())
                found.append(
                    f"mode {mode} is expensive for this model: even with {share:.0%} of the "
                    f"experts in memory it was measured to lose {loss:.1%} of perplexity, moving "
                    f"{mild.moved:.1%} of router weight; it uses "
                    f"{self._experts_per_token():.1f} experts a token and block"
                )
        return found

    def _experts_per_token(self) -> float:
        return float(np.mean([one.experts for one in self.knowledge.blocks.values()]))

    def _per_token(self, configuration: Configuration) -> int:
        some = self._ledger(configuration, context=64)
        more = self._ledger(configuration, context=128)
        return (more.kv_cache + more.workspace - some.kv_cache - some.workspace) // 64

    def _keeps(self, memory: int, max_loss: float) -> bool:
        front = self.front(memory, search=False)
        return min(one.loss for one in front) <= max_loss

    def _chosen(self, front: Sequence[Point], promise: Promise, memory: int) -> Point:
        promise.check()
        good = [
            one
            for one in front
            if (promise.max_loss is None or one.loss + self._margin(one) <= promise.max_loss)
            and (promise.min_speed is None or one.speed >= promise.min_speed)
        ]
        if promise.max_loss is not None and not good:
            self._refuse(front, promise, memory)
        if promise.min_speed is not None:
            if not good:
                self._refuse(front, promise, memory)
            return min(good, key=lambda one: (one.loss, one.seconds))
        if promise.max_loss is None:
            good = [one for one in front if one.loss <= DEFAULT_LOSS]
            if not good:
                return min(front, key=lambda one: one.loss)
        return self._best_of_fastest(good)

    def _best_of_fastest(self, points: Sequence[Point]) -> Point:
        """The best of those that predictions can't tell from the fastest."""
        known = {one.model: one.median for one in self.latency.comparison}
        tolerance = min(0.1, max(0.02, known[self.latency.name]))
        fastest = min(one.seconds for one in points)
        near = [one for one in points if one.seconds <= fastest * (1 + tolerance)]
        return min(near, key=lambda one: (one.loss, one.seconds))

    def _margin(self, point: Point) -> float:
        """What may be added to a predicted loss; nothing where nothing is lost."""
        return min(self.quality.margin, max(0.0, point.loss))

    def _refuse(self, front: Sequence[Point], promise: Promise, memory: int) -> None:
        best, fastest = min(front, key=lambda p: p.loss), min(front, key=lambda p: p.seconds)
        given = []
        if promise.max_loss is not None:
            given.append(f"a loss of at most {promise.max_loss:.2%}")
        if promise.min_speed is not None:
            given.append(f"at least {promise.min_speed:g} tokens/s")
        raise ConfigError(
            f"{' and '.join(given)} cannot be promised in {format_bytes(memory)}; there, the best "
            f"loses {best.loss + self._margin(best):.2%} at {best.speed:.2f} tokens/s, and the "
            f"fastest makes {fastest.speed:.2f} tokens/s at a loss of {fastest.loss:.2%}"
        )

    def _fitting(self, points: Sequence[Point], memory: int) -> list[Point]:
        """Those whose ledger, reckoned as loading does, is within the budget."""
        known: dict[Hashable, int] = {}
        kept: list[Point] = []
        for point in points:
            key = self._staging_key(point.configuration)
            if key not in known:
                known[key] = self._ledger(point.configuration).fixed
            if known[key] + point.nbytes + SLACK <= memory:
                kept.append(point)
        return kept

    def _staging_key(self, configuration: Configuration) -> Hashable:
        """What fixed bytes depend on: formats by block, and which blocks have fewer seats."""
        experts = self.profile.experts
        blocks = tuple(
            (name, one.slots < experts[name], *sorted(set(one.formats)))
            for name, one in configuration.placement.items()
        )
        return configuration.rest, blocks

    def _ledger(self, configuration: Configuration, context: int | None = None) -> MemoryBudget:
        settings = LoadSettings(
            device=self._device,
            context=context or self.context,
            dtype=self._skeleton.dtype,
            placement=configuration.placement,
            rest=configuration.rest,
        )
        return replace(ledger(self._skeleton, settings), process=self._process)

    def _simple_configurations(self, rest: str) -> list[Configuration]:
        """The same format for all, with one slot a block and with all; one is the smallest."""
        experts = self.profile.experts
        return [
            uniform(experts, format, slots, rest=rest)
            for format in FORMATS
            for slots in (dict.fromkeys(experts, 1), experts)
        ]

    def _simple_ledgers(self, rest: str) -> list[MemoryBudget]:
        return [self._ledger(one) for one in self._simple_configurations(rest)]

    def _rooms(self, memory: int) -> list[dict[str, int]]:
        """Bytes for slots by rest format: if nothing is staged beside them, and if most is.

        What is staged follows from the formats chosen, so both are tried, and what then does not
        fit is left out.
        """
        fixed = {rest: sorted(one.fixed for one in some) for rest, some in self._simple.items()}
        return [
            {rest: memory - some[which] - SLACK for rest, some in fixed.items()}
            for which in (0, -1)
        ]


def needed(budget: MemoryBudget) -> int:
    """Bytes in all of a ledger with planned slots."""
    assert budget.planned is not None
    return budget.fixed + budget.planned.nbytes
