"""What can be chosen for one block: formats and slots, with what they take and what they cost.

Owns the list, from both models; every later choice is one option a block. The blocks' costs add up,
so that an allocator may choose them one by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moefit.plan.configuration import Configuration
from moefit.plan.curves import at, policy_key
from moefit.plan.experiments import FORMATS, BlockShape, Shapes, policies, slot_counts
from moefit.plan.features import Knowledge
from moefit.plan.latency import LatencyModel
from moefit.plan.quality import AdditiveModel
from moefit.serve.placement import BlockPlacement
from moefit.serve.policy import Mode
from moefit.serve.precision import Choice, allocate, ladder

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
    knowledge = quality.knowledge
    shape, curves = knowledge.shapes[name], knowledge.blocks[name].curves
    counts = [*slot_counts(shape.num_experts), shape.num_experts]
    if shape.num_experts <= 16:
        counts = list(range(1, shape.num_experts + 1))
    placements = [
        BlockPlacement(slots=slots, formats=(format,)) for format in FORMATS for slots in counts
    ]
    found: list[Option] = []
    for placement in (*placements, *mixtures[name]):
        here = at(curves, policy.key, placement.slots)
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


def mixtures_of(name: str, knowledge: Knowledge, power: float) -> list[BlockPlacement]:
    """Formats by expert, everyone seated, for a few sums of bytes; loud experts have more bits."""
    shape, loudness_E = knowledge.shapes[name], knowledge.blocks[name].loudness_E
    ladders = {
        expert: ladder(
            [
                Choice(
                    format=format,
                    nbytes=shape.slot_bytes[format],
                    error=shape.errors[format][expert] ** power,
                )
                for format in FORMATS
            ]
        )
        for expert in range(shape.num_experts)
    }
    weights = {expert: share + 1e-6 for expert, share in enumerate(loudness_E)}
    low = min(shape.slot_bytes.values()) * shape.num_experts
    high = shape.slot_bytes["int6"] * shape.num_experts
    found: dict[tuple[str, ...], BlockPlacement] = {}
    for number in range(1, _MIXTURES + 1):
        chosen = allocate(ladders, weights, round(low * (high / low) ** (number / _MIXTURES)))
        formats = tuple(chosen[expert].format for expert in range(shape.num_experts))
        if len(set(formats)) > 1:
            found[formats] = BlockPlacement(slots=shape.num_experts, formats=formats)
    return list(found.values())
