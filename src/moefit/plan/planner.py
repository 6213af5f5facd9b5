"""From a profile to plans: the plan for a budget, the front over budgets, the smallest budget.

Fits the models, searches the configurations and checks them against serving's own memory estimate.
`caveats` warns where the profile supports a plan poorly.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from moefit.errors import BudgetTooSmallError
from moefit.plan.configuration import Configuration
from moefit.plan.experiments import FORMATS
from moefit.plan.fitting import Features, HeldOutError, features_of
from moefit.plan.latency import LatencyModel, fit_latency
from moefit.plan.plan_file import DEFAULT_LOSS, Plan, PlanChooser, Prediction, Target
from moefit.plan.profile import Profile, machine
from moefit.plan.quality import QualityModel, fit_quality, quality_samples
from moefit.plan.reference import Sample
from moefit.plan.search import (
    NO_CONSTRAINTS,
    Models,
    PlanConstraints,
    Point,
    SlotBudget,
    allocated,
    needed,
    pareto,
    placed_bytes,
    policy_choices,
)
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.memory.budget import at_least, format_bytes

_UNSURE = 0.3  # twice what predictions of speed are off by where nothing else runs


def caveats(profile: Profile, experts: float, device: str, speed: HeldOutError) -> list[str]:
    """Remarks, each a line. experts: that a token uses, in the mean over blocks. speed: what its
    predictions are worth.
    """
    samples = quality_samples(profile)
    dear = [
        _dear(mode, some, profile, experts)
        for mode in ("bounded", "virtual")
        if (some := [one for one in samples if one.configuration.mode == mode])
    ]
    return [one for one in (_foreign(profile, device), _unsure(speed), *dear) if one is not None]


def _dear(mode: str, samples: list[Sample], profile: Profile, experts: float) -> str | None:
    mild = min(samples, key=lambda one: one.divergence)
    loss = math.expm1(mild.divergence)
    if loss <= DEFAULT_LOSS:
        return None
    share = mild.configuration.slots / sum(profile.experts.values())
    return (
        f"mode {mode} is expensive for this model: even with {share:.0%} of the experts in memory "
        f"it was measured to lose {loss:.1%} of perplexity, moving {mild.moved:.1%} of router "
        f"weight; it uses {experts:.1f} experts a token and block"
    )


def _unsure(speed: HeldOutError) -> str | None:
    if speed.median <= _UNSURE:
        return None
    return (
        f"speeds are not to be relied on: half of those that were measured differ by more than "
        f"{speed.median:.0%} from what the others predict, as where a machine is busy with other "
        "things; moefit profile --again on an idle one measures times anew"
    )


def _foreign(profile: Profile, device: str) -> str | None:
    then, now = profile.facts.machine, machine(device)
    differing = [
        f"{name} was {then.get(name)}, is {value}"
        for name, value in now.items()
        if then.get(name) != value
    ]
    if not differing:
        return None
    return (
        f"the profile was measured on another machine ({'; '.join(differing)}), so speeds will "
        "differ; moefit profile on this one measures them"
    )


_STILL = 0.05  # experts a token that are waited for, where none shall be


class Planner:
    """One model with its profile. context: tokens that the KV cache is reserved for."""

    def __init__(
        self,
        skeleton: Skeleton,
        profile: Profile,
        *,
        context: int = 2048,
        device: str = "cpu",
        circumstances: PlanConstraints = NO_CONSTRAINTS,
    ):
        self.profile, self.context = profile, context
        self._skeleton, self._given, self._device = skeleton, circumstances, device
        # First of all, for it takes this process for the one that will serve.
        self.slot_budgets = SlotBudget(
            skeleton,
            profile.experts,
            context=context,
            device=device,
            circumstances=circumstances,
        )
        self.features: Features = features_of(profile)
        self.quality: QualityModel = fit_quality(profile, self.features)
        self.latency: LatencyModel = fit_latency(profile, self.features)
        known = all(one.rule_known for one in self.features.blocks.values())
        self._policies = policy_choices(known_rules=known)
        self._models = Models(self.quality, self.latency, self._policies)
        self._cold_models: Models | None = None
        self._plain = [
            self._models.judged(one, placed_bytes(one, self.features.shapes), "one format for all")
            for rest in circumstances.rests
            for one in self.slot_budgets.simple(rest)
        ]

    def front(self, memory: int) -> list[Point]:
        """What is worth having within a budget: none is better in both loss and speed.

        Raises BudgetTooSmallError below the floor.
        """
        if memory < (floor := self.slot_budgets.min_bytes):
            raise BudgetTooSmallError(
                f"a budget of {format_bytes(memory)} is below the least that this model can be "
                f"planned in, {format_bytes(floor)}; give {at_least(floor)}, or a shorter "
                "context"
            )
        slot_budgets, models = self.slot_budgets.of(memory), self._models_beside(memory)
        plain = [models.judged(one.configuration, one.nbytes, one.found_by) for one in self._plain]
        proposed = [point for some in slot_budgets for point in allocated(models, some)]
        return pareto(self.slot_budgets.fitting([*plain, *proposed], memory))

    def front_of_slots(self, nbytes: int, *, fetching: bool = True) -> list[Point]:
        """The same, if only the slots' bytes are bounded; empty if nothing fits.

        fetching False: only what waits for no expert, but at most for one in twenty tokens.
        """
        room = {self._given.rests[0]: nbytes}
        return pareto(self._of_kind(allocated(self._models, room), fetching=fetching))

    def _of_kind(self, points: Sequence[Point], *, fetching: bool) -> list[Point]:
        if fetching:
            return list(points)
        misses = self.features.misses  # the virtual mode's are those of its first tokens
        return [
            one
            for one in points
            if one.configuration.mode == "virtual" or sum(misses(one.configuration)) < _STILL
        ]

    def _models_beside(self, memory: int) -> Models:
        """Where the page cache beside a budget cannot hold the experts' files, loads are cold."""
        shapes = self.features.shapes.values()
        files = sum(one.slot_bytes[FORMATS[0]] * one.num_experts for one in shapes)
        if files <= self.profile.facts.machine["memory"] - memory:
            return self._models
        if self._cold_models is None:
            cold = fit_latency(self.profile, self.features, cold=True)
            self._cold_models = Models(self.quality, cold, self._policies)
        return self._cold_models

    def plan(self, memory: int, target: Target | None = None) -> tuple[Plan, list[Point]]:
        """The plan for a budget, and the front that it was chosen from.

        Raises ConfigError if the promise can't be kept, with the nearest that can be.
        """
        front = self.front(memory)
        target = target or Target()
        point = self._chooser.choose(front, target, memory)
        return self.plan_of(point, memory, target), front

    @property
    def _chooser(self) -> PlanChooser:
        known = {one.model: one.median for one in self.latency.comparison}
        return PlanChooser(
            margin=self.quality.margin, tolerance=min(0.1, max(0.02, known[self.latency.name]))
        )

    def plan_of(self, point: Point, memory: int | None, target: Target | None = None) -> Plan:
        """A point as a plan, chosen to keep a promise."""
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
            sequences=self._given.sequences,
            prompt_logits=self._given.prompt_logits,
            target=target or Target(),
            predicted=Prediction(
                loss=point.loss,
                margin=self.quality.margin,
                speed=point.speed,
                expert_bytes=point.nbytes,
                misses=float(np.mean(self.features.misses(configuration))),
                moved=float(np.mean(self.features.moved(configuration))),
            ),
        )

    def over_budgets(self, count: int = 10) -> Iterator[tuple[int, list[Point]]]:
        """Budgets from the floor to everything, evenly in ratio of slots' bytes, and fronts.

        What fits a smaller budget fits a larger one, so no front is behind the one before.
        """
        low, high = self.slot_budgets.min_bytes, self.slot_budgets.all_resident_bytes
        fixed = self.slot_budgets.fixed
        known: list[Point] = []
        for number in range(count):
            share = number / max(1, count - 1)
            memory = round(fixed + (low - fixed) * ((high - fixed) / (low - fixed)) ** share)
            known = pareto([*known, *self.front(max(low, memory))])
            yield memory, known

    def smallest_budget(self, target: Target) -> int | None:
        """The least budget that a plan can keep the promise in, within half a percent; None: none.

        Raises ConfigError for what cannot be promised anywhere.
        """
        target.check()
        low, high = self.slot_budgets.min_bytes, self.slot_budgets.all_resident_bytes
        if not self._satisfies(high, target):
            return None
        if self._satisfies(low, target):
            return low
        while high - low > 0.005 * high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._satisfies(middle, target) else (middle, high)
        return high

    def sequences(self, plan: Plan, lengths: Sequence[int] = (512, 2048, 8192)) -> dict[int, int]:
        """How many sequences of each length fit beside the plan's experts."""
        if plan.memory is None:
            return {}
        token, row = self._per_token(plan.configuration), self._per_sequence(plan.configuration)
        now = needed(self.slot_budgets.ledger(plan.configuration))
        taken = now - self.context * token - self._given.sequences * row
        longest = getattr(
            self._skeleton.model.config.get_text_config(decoder=True),
            "max_position_embeddings",
            None,
        )
        return {
            length: max(0, int((plan.memory - taken) // max(1, length * token + row)))
            for length in lengths
            if longest is None or length <= longest
        }

    def warnings(self) -> list[str]:
        """What whoever plans should know beforehand; see `caveats`."""
        experts = float(np.mean([one.experts for one in self.features.blocks.values()]))
        speed = next(one for one in self.latency.comparison if one.model == self.latency.name)
        return caveats(self.profile, experts, self._device, speed)

    def _per_token(self, configuration: Configuration) -> int:
        some = self.slot_budgets.ledger(configuration, context=64)
        more = self.slot_budgets.ledger(configuration, context=128)
        return (more.kv_cache + more.workspace - some.kv_cache - some.workspace) // 64

    def _per_sequence(self, configuration: Configuration) -> int:
        """Its logits."""
        ledgers = [self.slot_budgets.ledger(configuration, sequences=number) for number in (1, 2)]
        return ledgers[1].workspace - ledgers[0].workspace

    def _satisfies(self, memory: int, target: Target) -> bool:
        front = self.front(memory)
        return any(self._chooser.satisfies(one, target) for one in front)
