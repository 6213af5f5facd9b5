"""Which configurations are worth having within so many bytes of slots.

Owns the allocator: for each policy, rest format and exchange rate between loss and time, blocks'
options are chosen along their convex hulls, which is within one step of the optimum as far as
blocks' costs add up. All that comes out is judged by the models proper. `genetic.py` tries to do
better.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moefit.plan.chosen import QualityModel
from moefit.plan.configuration import Configuration
from moefit.plan.experiments import Shapes
from moefit.plan.latency import LatencyModel
from moefit.plan.options import Option, PolicyChoice, mixtures_of, options_of
from moefit.serve.precision import Choice, allocate, ladder

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
        knowledge = additive.knowledge
        mixtures = {
            name: mixtures_of(name, knowledge, additive.power_of(name)) for name in knowledge.shapes
        }
        self.fields = [
            Field(
                policy=policy,
                options={
                    name: options_of(name, policy, mixtures, additive, latency)
                    for name in knowledge.shapes
                },
            )
            for policy in policies
        ]
        self.seated = _seated(self.fields[0], knowledge.shapes)

    def judged(self, configuration: Configuration, nbytes: int, found_by: str) -> Point:
        """By the models proper."""
        return Point(
            configuration=configuration,
            loss=self.quality.loss(configuration),
            seconds=self.latency.seconds(configuration),
            nbytes=nbytes,
            found_by=found_by,
        )


def allocated(models: Models, rooms: Mapping[str, int]) -> list[Point]:
    """The allocator's proposals; rooms: bytes that slots may take, by rest format."""
    scale = _typical_rate(models)
    found: list[Point] = []
    for rest, room in rooms.items():
        for field in (models.seated, *models.fields):
            for rate in _RATES:
                chosen = chosen_within(field, rate * scale, room)
                if chosen is not None:
                    nbytes = sum(one.nbytes for one in chosen.values())
                    configuration = field.configuration(chosen, rest)
                    found.append(models.judged(configuration, nbytes, "allocator"))
    return found


def _seated(field: Field, shapes: Shapes) -> Field:
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
                Choice(format=str(number), nbytes=one.nbytes, error=one.nats + rate * one.seconds)
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
