"""Search for the best configurations within a number of bytes.

Lists the options of each block (formats, slots, policies) with their bytes, predicted loss and
time, computes the bytes that a memory budget leaves for slots, and allocates them. The result is a
Pareto front of loss and time.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moefit.device import planned_device
from moefit.plan.configuration import Configuration, PolicyChoice, uniform
from moefit.plan.experiments import (
    DENSE_FORMATS,
    FORMATS,
    BlockShape,
    Shapes,
    slot_counts,
)
from moefit.plan.fitting import Features
from moefit.plan.latency import LatencyModel
from moefit.plan.quality import AdditiveModel, QualityModel
from moefit.plan.trace import interpolated
from moefit.quant.kv_int8 import MODEL_CACHE
from moefit.serve.config import BlockPlacement, LoadSettings, Prefetch
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.memory.held import settled_bytes
from moefit.serve.precision.allocate import FormatChoice, allocate, ladder
from moefit.serve.prediction.probes import find_probes

_MIXTURES = 14  # sizes of placements with formats by expert that are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to serve one block.

    Attributes:
        placement: Slots and formats.
        nbytes: Bytes of the slots.
        nats: Predicted increase of the loss per token.
        seconds: Predicted time per token.
    """

    placement: BlockPlacement
    nbytes: int
    nats: float
    seconds: float


def block_options(
    name: str,
    policy: PolicyChoice,
    mixtures: Mapping[str, list[BlockPlacement]],
    quality: AdditiveModel,
    latency: LatencyModel,
) -> list[Option]:
    """Return the options of one block under one policy."""
    features = quality.features
    shape, curves = features.shapes[name], features.blocks[name].curves
    timed_curves = latency.features.blocks[name].curves  # for requests of other lengths, perhaps
    counts = [*slot_counts(shape.num_experts), shape.num_experts]
    if shape.num_experts <= 16:
        counts = list(range(1, shape.num_experts + 1))
    placements = [
        BlockPlacement(slots=slots, formats=(format,)) for format in FORMATS for slots in counts
    ]
    found: list[Option] = []
    for placement in (*placements, *mixtures[name]):
        here = interpolated(curves, policy.key, placement.slots)
        loads = interpolated(timed_curves, policy.key, placement.slots)
        found.append(
            Option(
                placement=placement,
                nbytes=placement_bytes(placement, shape),
                nats=quality.block(name, placement, policy.mode, here.moved),
                seconds=latency.block(name, placement, policy.key, loads.misses, loads.swaps),
            )
        )
    return found


def placement_bytes(placement: BlockPlacement, shape: BlockShape) -> int:
    """Return the bytes of one block's slots."""
    if not placement.by_expert:
        return placement.slots * shape.slot_bytes[placement.formats[0]]
    return sum(shape.slot_bytes[format] for format in placement.formats)


def placed_bytes(configuration: Configuration, shapes: Shapes) -> int:
    """Return the bytes of all slots."""
    return sum(
        placement_bytes(configuration.placement[name], shape) for name, shape in shapes.items()
    )


def mixed_placements(name: str, features: Features, power: float) -> list[BlockPlacement]:
    """Return placements of a fully resident block with formats by expert, of several sizes.

    Experts whose output has more energy get more bits.

    Args:
        name: The block.
        features: Errors and output energy of its experts.
        power: Exponent of the errors.
    """
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


# Nats per second that the allocation minimizes loss + rate * time for, over the typical rate.
_RATES = (0.0, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A configuration and what is predicted of it.

    Attributes:
        configuration: How the model is served.
        loss: Relative increase in perplexity over the full model.
        seconds: Decoding time per token.
        nbytes: Bytes of all slots.
        found_by: Name of the search that proposed it.
    """

    configuration: Configuration
    loss: float
    seconds: float
    nbytes: int
    found_by: str = "allocator"

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return 1 / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """All options of all blocks under one policy."""

    policy: PolicyChoice
    options: Mapping[str, Sequence[Option]]

    def configuration(self, chosen: Mapping[str, Option], dense_precision: str) -> Configuration:
        """Return the configuration with the chosen option of each block."""
        return Configuration(
            placement={name: one.placement for name, one in chosen.items()},
            dense_precision=dense_precision,
            mode=self.policy.mode,
            bound=self.policy.bound,
            every=self.policy.every,
            prefill=self.policy.prefill,
        )


class Models:
    """The quality and latency models, and the options of all blocks under each policy.

    Attributes:
        by_policy: Options under each policy.
        fully_resident: Those options under the first policy that keep all experts in memory.
    """

    def __init__(
        self, quality: QualityModel, latency: LatencyModel, policies: Iterable[PolicyChoice]
    ):
        self.quality, self.latency = quality, latency
        additive = quality.additive
        features = additive.features
        mixtures = {
            name: mixed_placements(name, features, additive.powers[name])
            for name in features.shapes
        }
        self.by_policy = [
            PolicyOptions(
                policy=policy,
                options={
                    name: block_options(name, policy, mixtures, additive, latency)
                    for name in features.shapes
                },
            )
            for policy in policies
        ]
        self.fully_resident = _fully_resident(self.by_policy[0], features.shapes)

    def predict(self, configuration: Configuration, nbytes: int, found_by: str) -> Point:
        """Predict loss and time of a configuration whose slots take `nbytes`."""
        return Point(
            configuration=configuration,
            loss=self.quality.loss(configuration),
            seconds=self.latency.seconds(configuration),
            nbytes=nbytes,
            found_by=found_by,
        )


def allocator_points(models: Models, slot_budgets: Mapping[str, int]) -> list[Point]:
    """Return the configurations that the allocation proposes.

    Args:
        models: Options and their predictions.
        slot_budgets: Bytes available for slots, by format of the dense weights.
    """
    scale = _typical_rate(models)
    found: list[Point] = []
    for dense_precision, max_bytes in slot_budgets.items():
        for options in (models.fully_resident, *models.by_policy):
            for rate in _RATES:
                chosen = allocate_options(options, rate * scale, max_bytes)
                if chosen is not None:
                    nbytes = sum(option.nbytes for option in chosen.values())
                    configuration = options.configuration(chosen, dense_precision)
                    found.append(models.predict(configuration, nbytes, "allocator"))
    return found


def _fully_resident(policy_options: PolicyOptions, shapes: Shapes) -> PolicyOptions:
    """Keep the options with a slot for every expert, which never fetch."""
    return PolicyOptions(
        policy=policy_options.policy,
        options={
            name: [one for one in some if one.placement.slots == shapes[name].num_experts]
            for name, some in policy_options.options.items()
        },
    )


def _typical_rate(models: Models) -> float:
    """Return the order of magnitude of nats per second over all options."""
    exact = models.by_policy[0]
    nats = sum(max(one.nats for one in some) for some in exact.options.values())
    seconds = sum(max(one.seconds for one in some) for some in exact.options.values())
    return nats / max(seconds, 1e-9)


def allocate_options(
    policy_options: PolicyOptions, rate: float, max_bytes: int
) -> dict[str, Option] | None:
    """Choose one option per block that minimizes the sum of nats + rate * seconds.

    Args:
        policy_options: The options of each block.
        rate: Nats that a second per token is worth.
        max_bytes: Bytes that all slots may take together.

    Returns:
        The option of each block, or None if even the smallest ones do not fit.
    """
    ladders = {
        name: ladder(
            [
                FormatChoice(
                    format=str(number), nbytes=one.nbytes, error=one.nats + rate * one.seconds
                )
                for number, one in enumerate(options)
            ]
        )
        for name, options in policy_options.options.items()
    }
    if sum(steps[0].nbytes for steps in ladders.values()) > max_bytes:
        return None
    chosen = allocate(ladders, dict.fromkeys(ladders, 1.0), max_bytes)
    return {name: policy_options.options[name][int(one.format)] for name, one in chosen.items()}


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both loss and time, fastest first."""
    best: list[Point] = []
    for one in sorted(points, key=lambda point: (point.seconds, point.loss)):
        if not best or one.loss < best[-1].loss - 1e-9:
            best.append(one)
    return best


SLACK = 8 << 20  # bytes by which a budget may differ when another process loads the model


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConstraints:
    """What a plan must leave memory for, and what it must not change.

    Attributes:
        sequences: As in `LoadSettings`.
        prompt_logits: As in `LoadSettings`, in bytes.
        helpers: As in `LoadSettings`, in bytes.
        process: Bytes of the process that will serve, with libraries and helpers; None for this
            process as it is now.
        dense_formats: Formats that the dense weights may have.
        kv_cache: As in `LoadSettings`.
        step_tokens: As in `LoadSettings`.
        prefetch: As in `LoadSettings`: a plan leaves room for the probes that it predicts with.
        prefetch_horizon: As in `LoadSettings`: how many layers ahead these predict.
    """

    sequences: int = 1
    prompt_logits: int = 0
    helpers: int = 0
    process: int | None = None
    dense_formats: Sequence[str] = DENSE_FORMATS
    kv_cache: str = MODEL_CACHE
    step_tokens: int | None = None
    prefetch: Prefetch = "off"
    prefetch_horizon: int = 1


NO_CONSTRAINTS = PlanConstraints()


class SlotBudget:
    """The bytes that a memory budget leaves for the slots of one model.

    Args:
        skeleton: The model without weights.
        experts: Number of experts by block.
        context: Tokens that the KV cache is reserved for.
        device: Where the model is served.
        constraints: What else the budget must hold.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        experts: Mapping[str, int],
        *,
        context: int,
        device: str,
        constraints: PlanConstraints = NO_CONSTRAINTS,
    ):
        self._skeleton, self._experts = skeleton, experts
        self._context, self._device, self._constraints = context, device, constraints
        process = constraints.process
        if process is None:
            process = settled_bytes(planned_device(device)) + constraints.helpers
        self._process = process
        # Once, since every estimate would look for the file and verify it.
        predicted = LoadSettings(
            device=device,
            dtype=skeleton.dtype,
            prefetch=constraints.prefetch,
            prefetch_horizon=constraints.prefetch_horizon,
        )
        predicted.check()
        self._probes = find_probes(skeleton, predicted).nbytes
        self._uniform = {
            name: [self.estimate(one) for one in self.uniform_configurations(name)]
            for name in constraints.dense_formats
        }

    @property
    def min_bytes(self) -> int:
        """The smallest budget that any configuration fits in."""
        return min(one.planned_bytes for some in self._uniform.values() for one in some) + SLACK

    @property
    def all_resident_bytes(self) -> int:
        """The budget that holds all experts in the checkpoint's own format."""
        dense = self._constraints.dense_formats[0]
        configuration = uniform(self._experts, FORMATS[0], dense_precision=dense)
        return self.estimate(configuration).planned_bytes + SLACK

    @property
    def fixed(self) -> int:
        """The smallest number of bytes of everything except slots."""
        return min(one.fixed for some in self._uniform.values() for one in some)

    def fitting(self, points: Sequence[Point], memory: int) -> list[Point]:
        """Return the points whose estimate, computed as for loading, is within the budget."""
        known: dict[Hashable, int] = {}
        kept: list[Point] = []
        for point in points:
            key = self._staging_key(point.configuration)
            if key not in known:
                known[key] = self.estimate(point.configuration).fixed
            if known[key] + point.nbytes + SLACK <= memory:
                kept.append(point)
        return kept

    def _staging_key(self, configuration: Configuration) -> Hashable:
        """Return what fixed bytes depend on: formats, and which blocks are not fully resident."""
        experts = self._experts
        blocks = tuple(
            (name, one.slots < experts[name], *sorted(set(one.formats)))
            for name, one in configuration.placement.items()
        )
        return configuration.dense_precision, blocks

    def estimate(
        self,
        configuration: Configuration,
        context: int | None = None,
        sequences: int | None = None,
    ) -> MemoryBudget:
        """Estimate the memory of a configuration as loading does.

        Args:
            configuration: How the model is served.
            context: Tokens of the KV cache; None for the planned context.
            sequences: Concurrent sequences; None for the planned number.
        """
        settings = LoadSettings(
            device=self._device,
            context=context or self._context,
            dtype=self._skeleton.dtype,
            placement=configuration.placement,
            dense_precision=configuration.dense_precision,
            sequences=sequences or self._constraints.sequences,
            prompt_logits=self._constraints.prompt_logits,
            kv_cache=self._constraints.kv_cache,
            step_tokens=self._constraints.step_tokens,
        )
        budget = memory_budget(self._skeleton, settings, probe_bytes=self._probes)
        return replace(budget, process=self._process)

    def uniform_configurations(self, dense_precision: str) -> list[Configuration]:
        """Return configurations with one format, with one slot per block and fully resident.

        The smallest configuration is among them.
        """
        experts = self._experts
        return [
            uniform(experts, format, slots, dense_precision=dense_precision)
            for format in FORMATS
            for slots in (dict.fromkeys(experts, 1), experts)
        ]

    def by_dense_format(self, memory: int) -> list[dict[str, int]]:
        """Return the bytes for slots, by format of the dense weights: most, then fewest.

        Staging memory depends on the formats that are chosen later, so both extremes are tried and
        `fitting` drops what exceeds the budget.
        """
        fixed = {name: sorted(one.fixed for one in some) for name, some in self._uniform.items()}
        return [
            {name: memory - some[index] - SLACK for name, some in fixed.items()}
            for index in (0, -1)
        ]
