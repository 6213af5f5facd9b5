"""Search for what to train: candidates, their Pareto front, and Yun et al.'s two algorithms.

A candidate is a shape trained on the tokens that the budget pays for, and served in a precision.
`best_quality` finds the lowest loss under a cap of serving cost, `least_cost` the cheapest serving
of a given loss (arXiv 2404.02852, section 5). Both bisect the size of the model, along the family
of shapes, for every number of experts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from moefit.advise.hardware import Device
from moefit.advise.laws import REFUSED_BEYOND, Law
from moefit.advise.serving import (
    PRECISIONS,
    QUANTISATION_NATS,
    Limits,
    MemoryCost,
    ServedSizes,
    memory_cost,
    served_sizes,
)
from moefit.advise.shapes import VOCABULARY, Shape, family, short_count
from moefit.advise.throughput import Traffic, TrafficCost, one_sequence_bytes, traffic_cost
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.serve.memory.budget import at_least, format_bytes

LEAST_TOKENS_PER_PARAMETER = 0.1


@dataclass(frozen=True)
class Question:
    """What is to be trained and served.

    Attributes:
        law: By which losses are predicted.
        flops: Training budget.
        device: That serves.
        limits: Memory and speed.
        traffic: Requests; None if one sequence at a time is served.
        max_tokens: Most training tokens; None for as many as the budget pays for.
        precisions: In which experts may be held.
        vocabulary: V.
    """

    law: Law
    flops: float
    device: Device
    limits: Limits = field(default_factory=Limits)
    traffic: Traffic | None = None
    max_tokens: float | None = None
    precisions: tuple[str, ...] = PRECISIONS
    vocabulary: int = VOCABULARY

    def tokens(self, shape: Shape) -> float:
        """Return the tokens that a shape is trained on; 0 if the budget does not pay for them."""
        paid = self.flops / shape.training_flops(1)
        fixed = self.law.fixed_tokens
        if fixed is not None:
            return fixed if fixed <= min(paid, self.max_tokens or math.inf) else 0.0
        return min(paid, self.max_tokens or math.inf)

    def loss(self, shape: Shape) -> float:
        """Return the law's loss of a shape; infinite where it cannot be trained."""
        tokens = self.tokens(shape)
        if tokens < LEAST_TOKENS_PER_PARAMETER * shape.active or self.law.refuses(shape, tokens):
            return math.inf
        return self.law.loss(shape, tokens)

    @cached_property
    def families(self) -> dict[tuple[int, int], list[Shape]]:
        """Shapes for which the law has a loss, smallest first, by experts and granularity.

        Raises:
            ConfigError: There are none at all.
        """
        found = {
            (experts, granularity): [
                shape
                for shape in family(experts, granularity, self.vocabulary)
                if math.isfinite(self.loss(shape))
            ]
            for experts in self.law.experts
            for granularity in self.law.granularities
            if experts > 1 or granularity == 1
        }
        if not any(found.values()):
            raise ConfigError(self._no_shape())
        return {key: shapes for key, shapes in found.items() if shapes}

    def _no_shape(self) -> str:
        """Return why no shape can be trained, and the budgets with which one can."""
        least, most, smallest = self._budgets()
        if self.max_tokens is not None and least <= self.flops <= most:
            return (
                f"{short_count(self.max_tokens)} training tokens are too few: {self.law.name} says "
                f"something from {short_count(least / smallest.training_flops(1))} on, for "
                f"{short_count(smallest.active)} active parameters; give --max-tokens of that, or "
                "a law fitted to your own runs (moefit law fit)"
            )
        if self.flops < least:
            why = (
                f"the smallest has {short_count(smallest.active)} active parameters and needs "
                f"{short_count(least / smallest.training_flops(1))} tokens: give at least "
                f"{_rounded_up(least):.2g}"
            )
        else:
            why = (
                f"a law is refused beyond {REFUSED_BEYOND:g} times its runs: give at most "
                f"{_rounded_down(most):.2g}"
            )
        return (
            f"with a budget of {self.flops:.3g} FLOPs there is no model of which {self.law.name} "
            f"says anything; {why}, or another --law, such as one fitted to your own runs (moefit "
            "law fit)"
        )

    def _budgets(self) -> tuple[float, float, Shape]:
        """Return the least and most FLOPs for which the law says something, and its first shape."""
        ranges, law = self.law.ranges, self.law
        low, high = ranges.get("parameters", (0.0, math.inf))
        shapes = [
            one
            for one in family(law.experts[0], law.granularities[0], self.vocabulary)
            if low / REFUSED_BEYOND <= one.count(law.counts) <= high * REFUSED_BEYOND
        ] or list(family(law.experts[0], law.granularities[0], self.vocabulary))[:1]
        few, many = ranges.get("tokens", (0.0, math.inf))
        rare, dense = ranges.get("tokens_per_parameter", (0.0, math.inf))
        smallest, largest = shapes[0], shapes[-1]
        least_tokens = law.fixed_tokens or max(
            few / REFUSED_BEYOND,
            max(rare / REFUSED_BEYOND, LEAST_TOKENS_PER_PARAMETER) * smallest.active,
        )
        most_tokens = law.fixed_tokens or REFUSED_BEYOND * min(many, dense * largest.active)
        return (
            smallest.training_flops(least_tokens),
            largest.training_flops(most_tokens),
            smallest,
        )

    @cached_property
    def useful(self) -> dict[tuple[int, int], list[Shape]]:
        """Shapes up to the loss-optimal one, smallest first, by experts and granularity.

        A larger one has a higher loss and serves more slowly.
        """
        found: dict[tuple[int, int], list[Shape]] = {}
        for key, shapes in self.families.items():
            losses = list(map(self.loss, shapes))
            found[key] = shapes[: losses.index(min(losses)) + 1]
        return found

    def optimal(self, key: tuple[int, int]) -> Shape:
        """Return the loss-optimal shape of a family: experts and granularity."""
        return self.useful[key][-1]

    def served(self, shape: Shape, precision: str) -> "Candidate | None":
        """Return a shape with its serving cost; None if it does not fit or is too slow."""
        found = self.fitting(shape, precision)
        return found if found is not None and self.meets(found) else None

    def fitting(self, shape: Shape, precision: str) -> "Candidate | None":
        """Return a shape with its serving cost, whatever its speed; None if it does not fit."""
        sizes = served_sizes(
            shape, precision, context=self.limits.context, is_gpu=self.device.is_gpu
        )
        limits, devices = self.limits, 1 if self.traffic is None else self.traffic.devices
        pooled = replace(limits, memory=(limits.memory or self.device.memory) * devices)
        memory = memory_cost(sizes, self.device, pooled)
        if memory is None:
            return None
        traffic = None
        if self.traffic is not None:
            traffic = traffic_cost(sizes, self.device, limits, self.traffic)
            if traffic is None:
                return None
        return Candidate(
            shape=shape,
            tokens=self.tokens(shape),
            law_loss=self.loss(shape),
            precision=precision,
            sizes=sizes,
            memory=memory,
            traffic=traffic,
        )

    def least_memory(self, shape: Shape, precision: str) -> int:
        """Return the least bytes of each device with which a shape can be served."""
        sizes = served_sizes(
            shape, precision, context=self.limits.context, is_gpu=self.device.is_gpu
        )
        if self.traffic is None:
            if self.limits.storage_bandwidth is None:
                return sizes.resident
            return min(sizes.resident, sizes.budget.min_bytes)
        # One copy is shared by a power of two of devices; see `traffic_cost`.
        sharing = 1 << (self.traffic.devices.bit_length() - 1)
        least = sum(one_sequence_bytes(sizes, self.traffic))
        return math.ceil(max(sizes.resident / self.traffic.devices, least / sharing))

    def meets(self, candidate: "Candidate") -> bool:
        """Return whether a candidate is fast enough."""
        speed = self.limits.min_speed
        if speed is not None and candidate.speed < speed:
            return False
        if self.traffic is None or candidate.traffic is None:
            return True
        return candidate.traffic.capacity >= self.traffic.tokens_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model to train, and what serving it costs.

    Attributes:
        shape: The model.
        tokens: Training tokens.
        law_loss: As the law predicts it, in nats per token.
        precision: Format of experts.
        sizes: Bytes.
        memory: Cost of one sequence.
        traffic: Cost of the traffic, if there is any.
    """

    shape: Shape
    tokens: float
    law_loss: float
    precision: str
    sizes: ServedSizes
    memory: MemoryCost
    traffic: TrafficCost | None

    @property
    def loss(self) -> float:
        """The law's loss plus what the precision costs, in nats per token."""
        return self.law_loss + QUANTISATION_NATS[self.precision]

    @property
    def speed(self) -> float:
        """Tokens per second of one sequence."""
        return 1 / self.memory.seconds

    @property
    def cost(self) -> float:
        """Serving cost: device-seconds per token under traffic, else seconds per token."""
        return self.memory.seconds if self.traffic is None else self.traffic.device_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        shape = self.shape
        traffic = self.traffic
        return {
            "active_parameters": shape.active,
            "total_parameters": shape.total,
            "experts": shape.num_experts,
            "granularity": shape.granularity,
            "top_k": shape.top_k,
            "layers": shape.layers,
            "width": shape.width,
            "expert_width": shape.expert_width,
            "tokens": self.tokens,
            "training_flops": shape.training_flops(self.tokens),
            "learning_rate": shape.learning_rate,
            "loss": self.loss,
            "law_loss": self.law_loss,
            "precision": self.precision,
            "dense_precision": self.sizes.dense_precision,
            "resident_bytes": self.memory.resident,
            "read_bytes_per_token": self.memory.read,
            "storage_bytes_per_token": self.memory.fetched,
            "tokens_per_second": self.speed,
            "device_seconds_per_token": None if traffic is None else traffic.device_seconds,
            "devices": None if traffic is None else traffic.devices,
            "sequences": None if traffic is None else traffic.sequences,
            "capacity_tokens_per_second": None if traffic is None else traffic.capacity,
        }


def pareto_front(
    candidates: Iterable[Candidate], cost: Callable[[Candidate], float] = lambda one: one.cost
) -> list[Candidate]:
    """Return the candidates that no other beats in both loss and cost, cheapest first."""
    front: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (cost(one), one.loss)):
        if not front or one.loss < front[-1].loss:
            front.append(one)
    return front


def candidates(question: Question) -> Iterator[Candidate]:
    """Yield all candidates that fit and are fast enough, up to the loss-optimal size."""
    for shapes in question.useful.values():
        for shape in shapes:
            for precision in question.precisions:
                if (found := question.served(shape, precision)) is not None:
                    yield found


def best_quality(question: Question) -> Candidate:
    """Return the lowest loss under the caps of memory, speed and traffic (algorithm 2).

    For each number of experts and precision, bisect the size between the smallest shape and the
    loss-optimal one for the largest that can be served; the remaining budget gives its tokens.

    Raises:
        BudgetTooSmallError: No model fits in the memory.
        ConfigError: No model that fits is fast enough.
    """
    found = []
    for small in question.useful.values():
        for precision in question.precisions:
            last = _last_true(
                small, lambda shape, p=precision: question.served(shape, p) is not None
            )
            if last is not None and (one := question.served(last, precision)) is not None:
                found.append(one)
    if not found:
        raise _unserved(question)
    return min(found, key=lambda one: (one.loss, one.cost))


def least_cost(question: Question, target: float) -> Candidate:
    """Return the cheapest serving with at most a loss of `target` (algorithm 1).

    For each number of experts, bisect the size on the small side of the loss-optimal one, where
    the loss falls with size, for the smallest with the loss.

    Args:
        question: With its budget and caps.
        target: Loss in nats, such as that of a loss-optimal model with other experts.

    Raises:
        BudgetTooSmallError: No model fits in the memory.
        ConfigError: No model that can be served has the loss.
    """
    found: list[Candidate] = []
    for small in question.useful.values():
        for precision in question.precisions:
            allowed = target - QUANTISATION_NATS[precision]
            worse = _last_true(small, lambda shape, limit=allowed: question.loss(shape) > limit)
            index = 0 if worse is None else small.index(worse) + 1
            if index < len(small) and (one := question.served(small[index], precision)):
                found.append(one)
    if not found:
        best = best_quality(question)
        reached = math.ceil(1000 * best.loss) / 1000
        raise ConfigError(
            f"no model has a loss of at most {target:.4g} nats at this budget within these limits; "
            f"the lowest is {best.loss:.4f} ({best.shape.describe()}, "
            f"{short_count(best.tokens)} tokens): give --max-loss {reached}, or a larger budget"
        )
    return min(found, key=lambda one: (one.cost, one.loss))


def _last_true(shapes: Sequence[Shape], holds: Callable[[Shape], bool]) -> Shape | None:
    """Return the last shape of a prefix for which `holds` is true, by bisection."""
    low, high = 0, len(shapes)
    while low < high:
        middle = (low + high) // 2
        if holds(shapes[middle]):
            low = middle + 1
        else:
            high = middle
    return shapes[low - 1] if low else None


def _unserved(question: Question) -> ConfigError | BudgetTooSmallError:
    """Return the error of a question without any candidate; names the nearest that works."""
    smallest = [
        question.fitting(shapes[0], precision)
        for shapes in question.families.values()
        for precision in question.precisions
    ]
    fitting = [one for one in smallest if one is not None]
    limits, traffic = question.limits, question.traffic
    if not fitting:
        least = min(
            question.least_memory(shapes[0], precision)
            for shapes in question.families.values()
            for precision in question.precisions
        )
        memory = int(limits.memory or question.device.memory)
        devices = 1 if traffic is None else traffic.devices
        each = "" if devices == 1 else f" on each of {devices} devices"
        return BudgetTooSmallError(
            f"no model of the law's sizes fits in {format_bytes(memory)} ({memory} bytes){each}; "
            f"the smallest needs {at_least(least)}{each}: give that, or a shorter --context"
        )
    if limits.min_speed is not None:
        fastest = max(one.speed for one in fitting)
        if fastest < limits.min_speed:
            return ConfigError(
                f"no model that fits decodes {limits.min_speed:g} tokens/s on "
                f"{question.device.name}; the fastest reaches {fastest:.3g}: give --min-speed "
                f"{_rounded_down(fastest):g}, or faster hardware"
            )
    assert traffic is not None
    capacity = max(one.traffic.capacity for one in fitting if one.traffic is not None)
    rate = capacity / traffic.answer
    return ConfigError(
        f"{traffic.requests:g} requests/s with answers of {traffic.answer:g} tokens are "
        f"{traffic.tokens_per_second:.3g} tokens/s, but {traffic.devices} x {question.device.name} "
        f"serves at most {capacity:.3g} with the smallest model; give --requests "
        f"{_rounded_down(rate):g}, or more --devices"
    )


def _rounded_up(value: float) -> float:
    """Round up to two significant digits.

    >>> _rounded_up(1.941e14)
    200000000000000.0
    """
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step) * step:.6g}")


def _rounded_down(value: float) -> float:
    """Round down to two significant digits.

    >>> _rounded_down(0.1289), _rounded_down(37.9)
    (0.12, 37.0)
    """
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.floor(value / step) * step:.6g}")
