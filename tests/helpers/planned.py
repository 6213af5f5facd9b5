"""A simulated profile with known sensitivities, times and routes."""

import math
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tiny_served import tiny
from transformers import PreTrainedModel

from moefit.moe.layouts import find_blocks
from moefit.plan.configuration import Configuration
from moefit.plan.experiments import (
    DENSE_FORMATS,
    FORMATS,
    BlockShape,
    quality_configuration,
    quality_names,
    stepwise_configuration,
    stepwise_names,
)
from moefit.plan.fitting import Features, features_of
from moefit.plan.latency import part_times, parts_of
from moefit.plan.profile import VERSION, Profile, ProfileFacts, machine
from moefit.plan.profiler import wanted
from moefit.plan.quality import compare_quality
from moefit.plan.reference import Sample
from moefit.plan.trace import Routes, Step, make_curves
from moefit.quant.error_model import GAUSSIAN
from moefit.quant.format import FORMATS as ALL_FORMATS
from moefit.quant.format import weights_in
from moefit.serve.config import BlockPlacement

EXPERTS, K = 8, 2
BITS = {"native": 16, "int8": 8.5, "int6": 6.5, "int5": 5.5, "int4": 4.5, "int3": 3.5, "int2": 2.5}
FIRST, MIDDLE, LAST = (f"model.layers.{number}.mlp.experts" for number in range(3))
SENSITIVITY = {FIRST: 0.6, MIDDLE: 0.03, LAST: 0.1}
SECONDS = (0.004, 1.1, 0.7, 1.2, 0.2)


@cache
def planned_model() -> PreTrainedModel:
    """The model of the simulated profile."""
    return tiny(
        "Mixtral", num_hidden_layers=3, hidden_size=128, intermediate_size=160,
        dtype=torch.bfloat16,
    )  # fmt: skip


def shapes(num_experts: int = EXPERTS) -> dict[str, BlockShape]:
    return dict(_blocks(num_experts))


@cache
def _blocks(num_experts: int) -> dict[str, BlockShape]:
    found = {block.name: block.layout.specs for block in find_blocks(planned_model())}
    assert list(found) == list(SENSITIVITY)
    return {
        name: BlockShape(
            name=name,
            num_experts=num_experts,
            weights=weights_in(specs),
            slot_bytes={f: ALL_FORMATS[f].nbytes(specs) for f in FORMATS},
            errors={f: [GAUSSIAN[f]] * num_experts for f in FORMATS},
        )
        for name, specs in found.items()
    }


def walk(num_experts: int = EXPERTS, tokens: int = 200, seed: int = 0) -> list[Step]:
    """Routes with some persistence and a few preferred experts."""
    generator = random.Random(seed)
    state, steps = [generator.random() for _ in range(num_experts)], []
    for _ in range(tokens):
        state = [0.85 * s + generator.gauss(0.1 * (e % 3), 0.3) for e, s in enumerate(state)]
        chosen = sorted(range(num_experts), key=lambda e, s=state: -s[e])[:K]
        heavy = [math.exp(state[e]) for e in chosen]
        steps.append(
            Step(chosen=chosen, weights=[w / sum(heavy) for w in heavy], scores=list(state))
        )
    return steps


@cache
def profile(*, noise: float = 0.0, seed: int = 0) -> Profile:
    """A complete profile whose samples follow known formulas with relative noise."""
    blocks = _blocks(EXPERTS)
    facts = ProfileFacts(
        version=VERSION,
        fingerprint="f" * 32,
        source="nowhere",
        dtype="bfloat16",
        rule=None,
        machine=machine(),
        text="none",
        text_digest="0" * 16,
        tokens=2048,
        context=256,
        blocks=tuple(blocks.values()),
        wanted=tuple(wanted(shapes())),
    )
    items: dict[str, Any] = {"bandwidth": {"storage": 4e8, "memory": 2e10}}
    items["routes"] = {name: _routed(number, name) for number, name in enumerate(SENSITIVITY)}
    for name in FORMATS:
        items[f"format/{name}"] = {
            "block": {"1": 1e-3 + 1e-4 * BITS[name], "4": 2e-3, "16": 4e-3, "64": 9e-3},
            "cold": 2e-3 * BITS[name],
            "warm": 4e-4 * BITS[name],
            "packed": True,
            "nbytes": blocks[FIRST].slot_bytes[name],
        }
    items |= {
        f"rest/{name}": {"seconds": 0.01 if name == "native" else 0.007} for name in DENSE_FORMATS
    }
    known = features_of(Profile(facts=facts, items=items))
    generator = random.Random(seed)
    output_energy = {name: block.output_energy_E for name, block in known.blocks.items()}
    for name in quality_names(shapes()):
        configuration = quality_configuration(name, shapes(), output_energy)
        items[f"quality/{name}"] = _sample(configuration, known, generator, noise).as_dict()
    done = Profile(facts=facts, items=items)
    for name in stepwise_names():
        configuration = stepwise_configuration(name, shapes(), FORMATS)
        seconds = law_of_time(configuration, done, known) * (1 + generator.gauss(0, noise))
        one = _sample(configuration, known, generator, noise, seconds)
        items[f"steps/{name}"] = one.as_dict()
    done = Profile(facts=facts, items=items)
    return done.with_item("models", {"quality": compare_quality(done, known)})


def _routed(number: int, name: str) -> dict[str, Any]:
    steps = walk(seed=number)
    mass = [0.0] * EXPERTS
    for step in steps:
        for expert, weight in zip(step.chosen, step.weights, strict=True):
            mass[expert] += weight / len(steps)
    loud = [one**1.5 for one in mass]
    loud = [one / sum(loud) for one in loud]
    routes = Routes(steps=steps, mass_E=mass, output_energy_E=loud, experts=K)
    depth = (number + 0.5) / len(SENSITIVITY)
    return {
        "mass": mass,
        "loudness": loud,
        "experts": float(K),
        "rule_known": True,
        "curves": make_curves(routes, EXPERTS, depth),
    }


def law_of_loss(configuration: Configuration, known: Features) -> float:
    """Return KL: slightly nonlinear in the blocks' errors, plus a cost of moved weight."""
    noises = dict(zip(SENSITIVITY, known.noises(configuration), strict=True))
    total = sum(SENSITIVITY[name] * noise for name, noise in noises.items())
    total += 4e-4 * (configuration.dense_precision != "native")
    moved = sum(known.moved(configuration)) / len(SENSITIVITY)
    price = {"exact": 0.0, "bounded": 0.4 * moved**1.1, "virtual": 2.5 * moved**1.4}
    return total + total**2 + price[configuration.mode]


def law_of_time(configuration: Configuration, done: Profile, known: Features) -> float:
    parts = parts_of(configuration, part_times(done, cold=False), known)
    return sum(a * b for a, b in zip(parts, SECONDS, strict=True))


def _sample(
    configuration: Configuration,
    known: Features,
    generator: random.Random,
    noise: float,
    seconds: float | None = None,
) -> Sample:
    divergence = law_of_loss(configuration, known) * (1 + generator.gauss(0, noise))
    nats = divergence + (generator.gauss(0, 1e-3) if noise else 0.0)
    return Sample(
        configuration=configuration,
        divergence=divergence,
        loss=2.0 + nats,
        full_loss=2.0,
        tokens=1000,
        seconds=seconds,
        moved=sum(known.moved(configuration)) / len(SENSITIVITY),
    )


def unseen(number: int, seed: int = 99) -> list[Configuration]:
    """Return random configurations that profiles do not measure."""
    generator = random.Random(seed)
    found: list[Configuration] = []
    for _ in range(number):
        mode = generator.choice(("exact", "exact", "bounded", "virtual"))
        slots: Mapping[str, int] = {
            name: EXPERTS if generator.random() < 0.5 else generator.randint(2, EXPERTS)
            for name in SENSITIVITY
        }
        found.append(
            Configuration(
                placement={
                    name: BlockPlacement(slots=slots[name], formats=(generator.choice(FORMATS),))
                    for name in SENSITIVITY
                },
                mode=mode,  # pyright: ignore[reportArgumentType]
                bound=generator.choice((0.1, 0.3, 0.5)) if mode == "bounded" else 0.0,
                every=generator.choice((1, 8)) if mode == "virtual" else 1,
            )
        )
    return found
