"""What serving traffic costs: device-seconds per token, by Yun et al.'s formula (arXiv 2404.02852).

On G devices of M0 bytes, a model of N_m bytes serves b = (G M0 - N_m) / ((p + n/2) k) sequences at
once, with prompts of p and answers of n tokens and k bytes of keys and values per token. Per step,
b/n prompts are read and b tokens decoded, so T = b / (prompt(p b/n) + decode(b)) tokens per second,
and a token costs G / T(G) device-seconds, least over G.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moefit.advise.hardware import Device, LatencyPoint
from moefit.advise.serving import Limits, ServedSizes
from moefit.quant.format import NATIVE

MOST_SEQUENCES = 256
"""Sequences at once, as vLLM limits them by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests that are to be served.

    Attributes:
        requests: Per second.
        prompt: Mean tokens of a prompt.
        answer: Mean tokens of an answer.
        devices: How many devices there are.
    """

    requests: float
    prompt: float = 512.0
    answer: float = 256.0
    devices: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers per second."""
        return self.requests * self.answer


class Latencies(Protocol):
    """Seconds of the two kinds of passes."""

    def prompt(self, sizes: ServedSizes, tokens: float, devices: int) -> float:
        """Return the seconds of a pass over prompts of `tokens` tokens together."""
        ...

    def decode(self, sizes: ServedSizes, sequences: float, devices: int) -> float:
        """Return the seconds of a step in which every sequence gets a token."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The larger of the time to multiply and the time to read: an upper bound on speed.

    Attributes:
        device: Whose rates are used.
        position: Mean number of tokens that a decoded token attends to.
    """

    device: Device
    position: float

    def prompt(self, sizes: ServedSizes, tokens: float, devices: int) -> float:
        """Return the seconds of a pass over prompts."""
        return self._pass(sizes, tokens, 0.0) / devices

    def decode(self, sizes: ServedSizes, sequences: float, devices: int) -> float:
        """Return the seconds of a step; it also reads the sequences' keys and values."""
        return self._pass(sizes, sequences, sequences * self.position) / devices

    def _pass(self, sizes: ServedSizes, tokens: float, cached: float) -> float:
        shape, device = sizes.shape, self.device
        multiplied = shape.active - shape.vocabulary * shape.width
        computing = 2 * multiplied * tokens / device.flops
        reading = (
            sizes.dense_read / device.rate(sizes.dense_precision)
            + sizes.expert_bytes(tokens) / device.rate(sizes.precision)
            + cached * sizes.kv_per_token / device.rate(NATIVE.name)
        )
        return max(computing, reading) + shape.layers * device.layer_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Linear interpolation of measured latencies, in tokens and in active parameters.

    Beyond the measured range they grow in proportion.

    Attributes:
        points: One per model and number of devices.
    """

    points: Sequence[LatencyPoint]

    def prompt(self, sizes: ServedSizes, tokens: float, devices: int) -> float:
        """Return the seconds of a pass over prompts."""
        known = {one.parameters: one.prompt for one in self.points if one.devices == devices}
        return _over_models(known, sizes.shape.active, tokens)

    def decode(self, sizes: ServedSizes, sequences: float, devices: int) -> float:
        """Return the seconds of a step."""
        known = {one.parameters: one.decode for one in self.points if one.devices == devices}
        return _over_models(known, sizes.shape.active, sequences)


def _over_models(known: dict, active: float, tokens: float) -> float:
    """Return infinity if no model was measured on that many devices."""
    if not known:
        return math.inf
    seconds = {size: _proportional(table, tokens) for size, table in known.items()}
    return _proportional(seconds, active)


def _proportional(table: dict, at: float) -> float:
    """Interpolate linearly; beyond the largest key the value grows in proportion."""
    keys = sorted(table)
    inside = float(np.interp(at, keys, [table[key] for key in keys]))
    return inside * max(1.0, at / keys[-1])


def latencies_of(device: Device, traffic: Traffic) -> Latencies:
    """Return the measured latencies of a device, or its roofline if there are none."""
    if device.latencies:
        return Measured(points=device.latencies)
    return Roofline(device=device, position=traffic.prompt + traffic.answer / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficCost:
    """What serving costs at full load.

    Attributes:
        devices: G, the devices that share one copy of the model.
        sequences: b, at once.
        tokens_per_second: T(G) of one copy.
        device_seconds: Per token of answers: G / T(G).
        capacity: Tokens per second of all copies that fit on the devices.
    """

    devices: int
    sequences: float
    tokens_per_second: float
    device_seconds: float
    capacity: float


def one_sequence_bytes(sizes: ServedSizes, traffic: Traffic) -> tuple[float, float]:
    """Return the bytes of a model without any KV cache, and those of one sequence's KV cache.

    Args:
        sizes: Of the model.
        traffic: Lengths.
    """
    # One sequence's cache is in the estimate; traffic counts all of them.
    held = sizes.resident - sizes.budget.kv_cache
    return held, (traffic.prompt + traffic.answer / 2) * sizes.kv_per_token


def traffic_cost(
    sizes: ServedSizes, device: Device, limits: Limits, traffic: Traffic
) -> TrafficCost | None:
    """Return the least cost over G; None if the model fits on no number of the devices.

    Args:
        sizes: Of the model.
        device: One device.
        limits: Memory of a device that may be used.
        traffic: Lengths, and how many devices there are.
    """
    latencies = latencies_of(device, traffic)
    memory = limits.memory or device.memory
    held, per_sequence = one_sequence_bytes(sizes, traffic)
    found: list[TrafficCost] = []
    count = 1
    while count <= traffic.devices:
        fitting = (count * memory - held) / per_sequence
        if fitting >= 1:
            sequences = min(fitting, MOST_SEQUENCES)
            prompts = latencies.prompt(sizes, traffic.prompt * sequences / traffic.answer, count)
            speed = sequences / (prompts + latencies.decode(sizes, sequences, count))
            found.append(
                TrafficCost(
                    devices=count,
                    sequences=sequences,
                    tokens_per_second=speed,
                    device_seconds=count / speed if speed else math.inf,
                    capacity=speed * (traffic.devices // count),
                )
            )
        count *= 2
    return min(found, key=lambda one: one.device_seconds, default=None)
