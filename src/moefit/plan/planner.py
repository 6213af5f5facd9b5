"""Plan how to serve a profiled model within a memory budget.

Fits the models of quality and latency, searches the configurations and checks them against
serving's own memory estimate. `caveats` returns warnings where the profile supports a plan poorly.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.plan.configuration import Configuration, Lengths
from moefit.plan.experiments import FORMATS, has_encoder, policy_choices
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
    allocator_points,
    pareto,
    placed_bytes,
)
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.memory.budget import at_least, format_bytes

_MAX_SPEED_ERROR = 0.3  # twice the usual median error on an idle machine


def caveats(profile: Profile, experts: float, device: str, speed: HeldOutError) -> list[str]:
    """Return warnings, one line each.

    Args:
        profile: The profile that a plan is based on.
        experts: Experts that a token uses, averaged over blocks.
        device: The device that is planned for.
        speed: Held-out error of the latency model.
    """
    samples = quality_samples(profile)
    expensive = [
        _expensive_mode(mode, some, profile, experts)
        for mode in ("bounded", "virtual")
        if (some := [one for one in samples if one.configuration.mode == mode])
    ]
    messages = (_other_machine(profile, device), _unreliable_speed(speed), *expensive)
    return [one for one in messages if one is not None]


def _expensive_mode(
    mode: str, samples: list[Sample], profile: Profile, experts: float
) -> str | None:
    mild = min(samples, key=lambda one: one.divergence)
    loss = math.expm1(mild.divergence)
    if loss <= DEFAULT_LOSS:
        return None
    share = mild.configuration.slots / sum(profile.experts.values())
    return (
        f"mode {mode} is expensive for this model: even with {share:.0%} of the experts in memory "
        f"its measured loss of perplexity is {loss:.1%}, with {mild.moved:.1%} of router weight "
        f"substituted; a token uses {experts:.1f} experts per block"
    )


def _unreliable_speed(speed: HeldOutError) -> str | None:
    if speed.median <= _MAX_SPEED_ERROR:
        return None
    return (
        f"predicted speeds are unreliable: half of the measured ones differ by more than "
        f"{speed.median:.0%} from their prediction, as happens when other programs run during the "
        "measurement; run moefit profile --again while the machine is idle"
    )


def _other_machine(profile: Profile, device: str) -> str | None:
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
        "differ; run moefit profile on this one to measure them"
    )


def _check_lengths(profile: Profile, lengths: Lengths | None) -> None:
    if lengths is None:
        return
    if profile.facts.lengths is None:
        raise ConfigError(
            "lengths of sources and outputs are for encoder-decoders, and this model is a decoder, "
            "whose plans are per decoded token; leave them out"
        )
    if not (lengths.source >= 1 and lengths.target >= 1):
        raise ConfigError(
            f"a source of {lengths.source:g} tokens and an output of {lengths.target:g}: give 1 or "
            "more of each"
        )


class Planner:
    """Plans for one model.

    Args:
        skeleton: The model without weights.
        profile: Its finished profile.
        context: Tokens that the KV cache is reserved for.
        device: Where the model will be served.
        constraints: What else the budget must hold, and what must not change.
        lengths: Of an encoder-decoder's requests; by default those of the profile's pairs.

    Attributes:
        models: Predict loss and time, with loads from the page cache.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        profile: Profile,
        *,
        context: int = 2048,
        device: str = "cpu",
        constraints: PlanConstraints = NO_CONSTRAINTS,
        lengths: Lengths | None = None,
    ):
        self.profile, self.context = profile, context
        self.lengths = lengths or profile.facts.lengths
        _check_lengths(profile, lengths)
        self._skeleton, self._constraints, self._device = skeleton, constraints, device
        # First, because it may measure this process before the models below take memory.
        self.slot_budgets = SlotBudget(
            skeleton,
            profile.experts,
            context=context,
            device=device,
            constraints=constraints,
        )
        self.features: Features = features_of(profile)
        self.quality: QualityModel = fit_quality(profile, self.features)
        self.latency: LatencyModel = fit_latency(profile, self.features, lengths=lengths)
        known = all(one.rule_known for one in self.features.blocks.values())
        encoder = has_encoder(profile.facts.shapes)
        self._policies = policy_choices(known_rules=known, encoder=encoder)
        self.models = Models(self.quality, self.latency, self._policies)
        self._cold_models: Models | None = None
        self._uniform = [
            self.models.predict(one, placed_bytes(one, self.features.shapes), "one format for all")
            for name in constraints.dense_formats
            for one in self.slot_budgets.uniform_configurations(name)
        ]

    def front(self, memory: int) -> list[Point]:
        """Return the Pareto front of loss and time within a budget.

        Args:
            memory: The budget in bytes.

        Raises:
            BudgetTooSmallError: No configuration fits.
        """
        if memory < (min_bytes := self.slot_budgets.min_bytes):
            raise BudgetTooSmallError(
                f"a budget of {format_bytes(memory)} is below the minimum for this model, "
                f"{format_bytes(min_bytes)}; give {at_least(min_bytes)}, or a shorter context"
            )
        slot_budgets = self.slot_budgets.by_dense_format(memory)
        models = self._models_for(memory)
        plain = [
            models.predict(one.configuration, one.nbytes, one.found_by) for one in self._uniform
        ]
        proposed = [point for some in slot_budgets for point in allocator_points(models, some)]
        return pareto(self.slot_budgets.fitting([*plain, *proposed], memory))

    def _models_for(self, memory: int) -> Models:
        """Return the models; loads are cold if the page cache cannot hold the files."""
        shapes = self.features.shapes.values()
        files = sum(one.slot_bytes[FORMATS[0]] * one.num_experts for one in shapes)
        if files <= self.profile.facts.machine["memory"] - memory:
            return self.models
        if self._cold_models is None:
            cold = fit_latency(self.profile, self.features, cold=True, lengths=self.lengths)
            self._cold_models = Models(self.quality, cold, self._policies)
        return self._cold_models

    def plan(self, memory: int, target: Target | None = None) -> tuple[Plan, list[Point]]:
        """Plan for a budget.

        Args:
            memory: The budget in bytes.
            target: What the plan must satisfy.

        Returns:
            The plan, and the front that it was chosen from.

        Raises:
            BudgetTooSmallError: No configuration fits.
            ConfigError: None satisfies the target. The message names the nearest ones.
        """
        front = self.front(memory)
        target = target or Target()
        point = self._chooser.choose(front, target, memory)
        return self.make_plan(point, memory, target), front

    @property
    def _chooser(self) -> PlanChooser:
        known = {one.model: one.median for one in self.latency.comparison}
        return PlanChooser(
            margin=self.quality.margin, tolerance=min(0.1, max(0.02, known[self.latency.name]))
        )

    def make_plan(self, point: Point, memory: int | None, target: Target | None = None) -> Plan:
        """Return the plan for a point of a front; `memory` and `target` are recorded in it."""
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
            sequences=self._constraints.sequences,
            prompt_logits=self._constraints.prompt_logits,
            kv_cache=self._constraints.kv_cache,
            step_tokens=self._constraints.step_tokens,
            target=target or Target(),
            lengths=self.lengths,
            predicted=Prediction(
                loss=point.loss,
                margin=self.quality.margin,
                speed=point.speed,
                expert_bytes=point.nbytes,
                misses=float(np.mean(self.latency.features.misses(configuration))),
                moved=float(np.mean(self.features.moved(configuration))),
            ),
        )

    def fronts_by_budget(self, count: int = 10) -> Iterator[tuple[int, list[Point]]]:
        """Yield budgets, from the smallest to all experts resident, with their fronts.

        Budgets are spaced by equal ratios of slot bytes. Each front includes the points of smaller
        budgets.
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
        """Return the smallest budget with a plan that satisfies a target, to within 0.5%.

        Returns:
            Bytes, or None if no budget is large enough.

        Raises:
            ConfigError: A value of the target is out of range.
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
        """Return how many sequences of each length fit, by length in tokens."""
        if plan.memory is None:
            return {}
        token, row = self._per_token(plan.configuration), self._per_sequence(plan.configuration)
        step = self._constraints.step_tokens or 0
        context = max(self.context, min(step, self._longest or step))
        now = self.slot_budgets.estimate(plan.configuration, context=context).planned_bytes
        taken = now - context * token - self._constraints.sequences * row
        longest = self._longest or max(lengths)
        return {
            length: max(0, int((plan.memory - taken) // max(1, length * token + row)))
            for length in lengths
            if length <= longest
        }

    @property
    def _longest(self) -> int | None:
        """Return the tokens of the model's longest text; None if its configuration has no limit."""
        config = self._skeleton.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    def warnings(self) -> list[str]:
        """Return warnings about the profile; see `caveats`."""
        experts = float(np.mean([one.experts for one in self.features.blocks.values()]))
        speed = next(one for one in self.latency.comparison if one.model == self.latency.name)
        return caveats(self.profile, experts, self._device, speed)

    def _per_token(self, configuration: Configuration) -> int:
        # Beyond a step, if the model's texts are that long: activations are the same in both then.
        most = max(64, self._constraints.step_tokens or 0) + 64
        most = min(most, self._longest or most)
        least = max(1, most - 64)
        low, high = (self.slot_budgets.estimate(configuration, context=n) for n in (least, most))
        more = high.kv_cache + high.workspace - low.kv_cache - low.workspace
        return more // max(1, most - least)

    def _per_sequence(self, configuration: Configuration) -> int:
        """Return the bytes of one more sequence's logits."""
        budgets = [self.slot_budgets.estimate(configuration, sequences=number) for number in (1, 2)]
        return budgets[1].workspace - budgets[0].workspace

    def _satisfies(self, memory: int, target: Target) -> bool:
        front = self.front(memory)
        return any(self._chooser.satisfies(one, target) for one in front)
