"""Search for the best configurations within a number of bytes.

The options of each block (formats, slots, policies) with their bytes, predicted loss and time; the
bytes that a memory budget leaves for slots; and the allocation that trades them off, which gives a
Pareto front.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moefit.device import planned_device
from moefit.plan.configuration import Configuration, uniform
from moefit.plan.experiments import (
    DENSE_FORMATS,
    FORMATS,
    BlockShape,
    Shapes,
    policies,
    slot_counts,
)
from moefit.plan.fitting import Features
from moefit.plan.latency import LatencyModel
from moefit.plan.quality import AdditiveModel, QualityModel
from moefit.plan.trace import interpolated, policy_key
from moefit.serve.config import BlockPlacement, LoadSettings, Mode
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.memory.estimate import held_bytes, memory_budget
from moefit.serve.precision.allocate import FormatChoice, allocate, ladder

_MIXTURES = 14  # of formats by expert, between the smallest format for all and the largest


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChoice:
    """A mode with its parameter."""

    mode: Mode
    bound: float = 0.0
    every: int = 1

    @property
    def key(self) -> str:
        """As curves name it."""
        return policy_key(self.mode, self.bound, self.every)


def policy_choices(*, known_rules: bool = True) -> list[PolicyChoice]:
    """All that curves were made for; only exact where routers' rules are not known."""
    found: list[PolicyChoice] = []
    for name in policies():
        mode, _, value = name.partition(":")
        if mode == "exact":
            found.append(PolicyChoice(mode="exact"))
        elif mode == "bounded" and known_rules:
            found.append(PolicyChoice(mode="bounded", bound=float(value)))
        elif known_rules:
            found.append(PolicyChoice(mode="virtual", every=int(value)))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way for one block: bytes of its slots, nats and seconds that it adds to a token."""

    placement: BlockPlacement
    nbytes: int
    nats: float
    seconds: float


def options_of(
    name: str,
    policy: PolicyChoice,
    mixtures: Mapping[str, list[BlockPlacement]],
    quality: AdditiveModel,
    latency: LatencyModel,
) -> list[Option]:
    """Of one block under one policy."""
    features = quality.features
    shape, curves = features.shapes[name], features.blocks[name].curves
    counts = [*slot_counts(shape.num_experts), shape.num_experts]
    if shape.num_experts <= 16:
        counts = list(range(1, shape.num_experts + 1))
    placements = [
        BlockPlacement(slots=slots, formats=(format,)) for format in FORMATS for slots in counts
    ]
    found: list[Option] = []
    for placement in (*placements, *mixtures[name]):
        here = interpolated(curves, policy.key, placement.slots)
        found.append(
            Option(
                placement=placement,
                nbytes=placement_bytes(placement, shape),
                nats=quality.block(name, placement, policy.mode, here.moved),
                seconds=latency.block(name, placement, policy.key, here.misses, here.swaps),
            )
        )
    return found


def placement_bytes(placement: BlockPlacement, shape: BlockShape) -> int:
    """Bytes of a block's slots."""
    if not placement.by_expert:
        return placement.slots * shape.slot_bytes[placement.formats[0]]
    return sum(shape.slot_bytes[format] for format in placement.formats)


def placed_bytes(configuration: Configuration, shapes: Shapes) -> int:
    """Bytes of all slots."""
    return sum(
        placement_bytes(configuration.placement[name], shape) for name, shape in shapes.items()
    )


def mixtures_of(name: str, features: Features, power: float) -> list[BlockPlacement]:
    """Formats by expert, everyone seated, for a few sums of bytes; loud experts have more bits."""
    shape, output_energy_E = features.shapes[name], features.blocks[name].output_energy_E
    ladders = {
        expert: ladder(
            [
                FormatChoice(
                    format=format,
                    nbytes=shape.slot_bytes[format],
                    error=shape.errors[format][expert] ** power,
                )
                for format in FORMATS
            ]
        )
        for expert in range(shape.num_experts)
    }
    weights = {expert: share + 1e-6 for expert, share in enumerate(output_energy_E)}
    low = min(shape.slot_bytes.values()) * shape.num_experts
    high = shape.slot_bytes["int6"] * shape.num_experts
    found: dict[tuple[str, ...], BlockPlacement] = {}
    for number in range(1, _MIXTURES + 1):
        chosen = allocate(ladders, weights, round(low * (high / low) ** (number / _MIXTURES)))
        formats = tuple(chosen[expert].format for expert in range(shape.num_experts))
        if len(set(formats)) > 1:
            found[formats] = BlockPlacement(slots=shape.num_experts, formats=formats)
    return list(found.values())


_RATES = (0.0, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A configuration and what is predicted of it: loss of perplexity, seconds a token, bytes."""

    configuration: Configuration
    loss: float
    seconds: float
    nbytes: int
    found_by: str = "allocator"

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return 1 / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """All options of all blocks under one policy."""

    policy: PolicyChoice
    options: Mapping[str, Sequence[Option]]

    def configuration(self, chosen: Mapping[str, Option], rest: str) -> Configuration:
        """With these options."""
        return Configuration(
            placement={name: one.placement for name, one in chosen.items()},
            rest=rest,
            mode=self.policy.mode,
            bound=self.policy.bound,
            every=self.policy.every,
        )


class Models:
    """Both models, and what follows from them alone: the fields of options."""

    def __init__(
        self, quality: QualityModel, latency: LatencyModel, policies: Iterable[PolicyChoice]
    ):
        self.quality, self.latency = quality, latency
        additive = quality.additive
        features = additive.features
        mixtures = {
            name: mixtures_of(name, features, additive.power_of(name)) for name in features.shapes
        }
        self.fields = [
            Field(
                policy=policy,
                options={
                    name: options_of(name, policy, mixtures, additive, latency)
                    for name in features.shapes
                },
            )
            for policy in policies
        ]
        self.fully_resident = _fully_resident(self.fields[0], features.shapes)

    def judged(self, configuration: Configuration, nbytes: int, found_by: str) -> Point:
        """By the models proper."""
        return Point(
            configuration=configuration,
            loss=self.quality.loss(configuration),
            seconds=self.latency.seconds(configuration),
            nbytes=nbytes,
            found_by=found_by,
        )


def allocated(models: Models, slot_budgets: Mapping[str, int]) -> list[Point]:
    """The allocator's proposals; rooms: bytes that slots may take, by rest format."""
    scale = _typical_rate(models)
    found: list[Point] = []
    for rest, room in slot_budgets.items():
        for field in (models.fully_resident, *models.fields):
            for rate in _RATES:
                chosen = chosen_within(field, rate * scale, room)
                if chosen is not None:
                    nbytes = sum(one.nbytes for one in chosen.values())
                    configuration = field.configuration(chosen, rest)
                    found.append(models.judged(configuration, nbytes, "allocator"))
    return found


def _fully_resident(field: Field, shapes: Shapes) -> Field:
    """With a slot for every expert: nothing is ever fetched, so that quality need not pay time."""
    return Field(
        policy=field.policy,
        options={
            name: [one for one in some if one.placement.slots == shapes[name].num_experts]
            for name, some in field.options.items()
        },
    )


def _typical_rate(models: Models) -> float:
    """Nats that are worth as much as a second, as orders of magnitude go."""
    exact = models.fields[0]
    nats = sum(max(one.nats for one in some) for some in exact.options.values())
    seconds = sum(max(one.seconds for one in some) for some in exact.options.values())
    return nats / max(seconds, 1e-9)


def chosen_within(field: Field, rate: float, room: int) -> dict[str, Option] | None:
    """One option a block, of least nats + rate * seconds in sum; None if nothing fits."""
    ladders = {
        name: ladder(
            [
                FormatChoice(
                    format=str(number), nbytes=one.nbytes, error=one.nats + rate * one.seconds
                )
                for number, one in enumerate(options)
            ]
        )
        for name, options in field.options.items()
    }
    if sum(steps[0].nbytes for steps in ladders.values()) > room:
        return None
    chosen = allocate(ladders, dict.fromkeys(ladders, 1.0), room)
    return {name: field.options[name][int(one.format)] for name, one in chosen.items()}


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both loss and time, the fastest first."""
    best: list[Point] = []
    for one in sorted(points, key=lambda point: (point.seconds, point.loss)):
        if not best or one.loss < best[-1].loss - 1e-9:
            best.append(one)
    return best


SLACK = 8 << 20  # bytes that loading in another process may differ by


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConstraints:
    """What a plan must leave room for, and what it can't change, beside context and device.

    sequences, prompt_logits, helpers: as of `LoadSettings`. process: bytes of the one that
    will serve, with its libraries and helpers; None is this one as it is now. rests: what the other
    weights may be encoded in.
    """

    sequences: int = 1
    prompt_logits: int = 0
    helpers: int = 0
    process: int | None = None
    rests: Sequence[str] = DENSE_FORMATS


NO_CONSTRAINTS = PlanConstraints()


class SlotBudget:
    """Of one model with so many experts by block."""

    def __init__(
        self,
        skeleton: Skeleton,
        experts: Mapping[str, int],
        *,
        context: int,
        device: str,
        circumstances: PlanConstraints = NO_CONSTRAINTS,
    ):
        self._skeleton, self._experts = skeleton, experts
        self._context, self._device, self._given = context, device, circumstances
        process = circumstances.process
        if process is None:
            process = held_bytes(planned_device(device)) + circumstances.helpers
        self._process = process
        self._simple = {
            rest: [self.ledger(one) for one in self.simple(rest)] for rest in circumstances.rests
        }

    @property
    def min_bytes(self) -> int:
        """The least budget that any configuration fits in."""
        return min(needed(one) for some in self._simple.values() for one in some) + SLACK

    @property
    def all_resident_bytes(self) -> int:
        """The budget that holds all experts as they are in the checkpoint."""
        whole = uniform(self._experts, FORMATS[0], rest=self._given.rests[0])
        return needed(self.ledger(whole)) + SLACK

    @property
    def fixed(self) -> int:
        """The least that all but slots takes."""
        return min(one.fixed for some in self._simple.values() for one in some)

    def fitting(self, points: Sequence[Point], memory: int) -> list[Point]:
        """Those whose ledger, reckoned as loading does, is within the budget."""
        known: dict[Hashable, int] = {}
        kept: list[Point] = []
        for point in points:
            key = self._staging_key(point.configuration)
            if key not in known:
                known[key] = self.ledger(point.configuration).fixed
            if known[key] + point.nbytes + SLACK <= memory:
                kept.append(point)
        return kept

    def _staging_key(self, configuration: Configuration) -> Hashable:
        """What fixed bytes depend on: formats by block, and which blocks have fewer seats."""
        experts = self._experts
        blocks = tuple(
            (name, one.slots < experts[name], *sorted(set(one.formats)))
            for name, one in configuration.placement.items()
        )
        return configuration.rest, blocks

    def ledger(
        self,
        configuration: Configuration,
        context: int | None = None,
        sequences: int | None = None,
    ) -> MemoryBudget:
        """As loading would reckon it; context and sequences None: the planned ones."""
        settings = LoadSettings(
            device=self._device,
            context=context or self._context,
            dtype=self._skeleton.dtype,
            placement=configuration.placement,
            dense_precision=configuration.rest,
            sequences=sequences or self._given.sequences,
            prompt_logits=self._given.prompt_logits,
        )
        return replace(memory_budget(self._skeleton, settings), process=self._process)

    def simple(self, rest: str) -> list[Configuration]:
        """The same format for all, with one slot a block and with all; one is the smallest."""
        experts = self._experts
        return [
            uniform(experts, format, slots, rest=rest)
            for format in FORMATS
            for slots in (dict.fromkeys(experts, 1), experts)
        ]

    def of(self, memory: int) -> list[dict[str, int]]:
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
