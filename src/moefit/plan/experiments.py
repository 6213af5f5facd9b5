"""Choose the configurations that a profile measures.

Each has a name: one block at a time, one format for all, random mixtures, formats by output energy,
and a few shares of slots in each mode. The choice is deterministic.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moefit.plan.configuration import Configuration, PolicyChoice, uniform
from moefit.serve.config import BlockPlacement, Mode
from moefit.serve.precision.allocate import FormatChoice, allocate, ladder

FORMATS = ("native", "int8", "int6", "int5", "int4", "int3", "int2")
DENSE_FORMATS = ("native", "int8")
BOUNDS = (0.1, 0.3, 0.5)
EVERY = (1, 8)
PROBED = ("int2", "int3")
_MAX_GROUPS = 8  # each takes about a minute for a model that fills the machine
_CURVE_POINTS = 8
_MIXED = 8
_BITS = (3.0, 3.6, 4.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """The properties of a block that experiments depend on; a profile stores them.

    Attributes:
        num_experts: Number of experts.
        weights: Number of weights in one expert.
        slot_bytes: Bytes of a slot, by format.
        errors: Relative squared error of each expert's weights, by format.
        in_encoder: Whether the block is in the encoder of an encoder-decoder.
    """

    name: str = ""
    num_experts: int
    weights: int
    slot_bytes: Mapping[str, int]
    errors: Mapping[str, Sequence[float]]
    in_encoder: bool = False


Shapes = Mapping[str, BlockShape]


def quality_names(shapes: Shapes) -> list[str]:
    """Return the names of the configurations that are measured over whole windows."""
    return [
        *(f"uniform/{name}" for name in FORMATS[1:]),
        *(f"rest/{name}" for name in DENSE_FORMATS[1:]),
        *(f"block/{name}/{group}" for name in PROBED for group in range(len(groups(shapes)))),
        *(f"mixed/{number}" for number in range(_MIXED)),
        *(f"loudness/{bits:g}" for bits in _BITS),
    ]


def groups(shapes: Shapes) -> list[list[str]]:
    """Return the blocks that are probed together: each alone, or neighbours if there are many."""
    names = list(shapes)
    count = min(len(names), _MAX_GROUPS)
    ends = [round(number * len(names) / count) for number in range(count + 1)]
    return [names[a:b] for a, b in pairwise(ends)]


def quality_configuration(
    name: str, shapes: Shapes, output_energy: Mapping[str, Sequence[float]]
) -> Configuration:
    """Return the configuration of a name from `quality_names`.

    Args:
        name: The name.
        shapes: The blocks.
        output_energy: Each expert's share of its block's output energy, by block.
    """
    kind, _, what = name.partition("/")
    experts = {block: shape.num_experts for block, shape in shapes.items()}
    if kind == "uniform":
        return uniform(experts, what)
    if kind == "rest":
        return uniform(experts, "native", dense_precision=what)
    if kind == "loudness":
        return by_output_energy(shapes, output_energy, float(what))
    if kind == "block":
        format, _, group = what.partition("/")
        some = groups(shapes)[int(group)]
        formats = {block: format if block in some else "native" for block in shapes}
    else:
        generator = random.Random(int(what))
        centre = generator.choice(range(2, len(FORMATS)))
        near = FORMATS[centre - 2 : centre + 2]
        formats = {block: generator.choice(near) for block in shapes}
    placement = {
        block: BlockPlacement(slots=experts[block], formats=(formats[block],)) for block in shapes
    }
    return Configuration(placement=placement)


def by_output_energy(
    shapes: Shapes, output_energy: Mapping[str, Sequence[float]], bits: float
) -> Configuration:
    """Allocate formats by expert according to output energy, as `--precision auto` does.

    Args:
        shapes: The blocks.
        output_energy: Each expert's share of its block's output energy, by block.
        bits: Mean bits per weight.
    """
    ladders = {
        (name, expert): ladder(
            [
                FormatChoice(format=f, nbytes=shape.slot_bytes[f], error=shape.errors[f][expert])
                for f in FORMATS
            ]
        )
        for name, shape in shapes.items()
        for expert in range(shape.num_experts)
    }
    sensitivity = {(name, expert): output_energy[name][expert] + 1e-6 for name, expert in ladders}
    max_bytes = sum(bits / 8 * shape.weights * shape.num_experts for shape in shapes.values())
    chosen = allocate(ladders, sensitivity, round(max_bytes))
    placement = {
        name: BlockPlacement(
            slots=shape.num_experts,
            formats=tuple(chosen[name, e].format for e in range(shape.num_experts)),
        )
        for name, shape in shapes.items()
    }
    return Configuration(placement=placement)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stepwise:
    format: str
    share: float
    mode: Mode = "exact"
    bound: float = 0.0
    every: int = 1
    dense_precision: str = "native"


_STEPWISE = (
    _Stepwise(format="native", share=1),
    _Stepwise(format="int4", share=1),
    _Stepwise(format="int2", share=1, dense_precision="int8"),
    _Stepwise(format="int8", share=0.6),
    _Stepwise(format="int4", share=0.4),
    _Stepwise(format="int3", share=0.25, dense_precision="int8"),
    _Stepwise(format="int8", share=0.6, mode="bounded", bound=0.1),
    _Stepwise(format="int8", share=0.4, mode="bounded", bound=0.3),
    _Stepwise(format="int4", share=0.25, mode="bounded", bound=0.3),
    _Stepwise(format="int8", share=0.5, mode="bounded", bound=0.5),
    _Stepwise(format="int8", share=0.8, mode="virtual"),
    _Stepwise(format="int8", share=0.6, mode="virtual", every=8),
    _Stepwise(format="int4", share=0.45, mode="virtual"),
)


def stepwise_names() -> list[str]:
    """Return the names of the configurations that are decoded token by token."""
    return [
        f"{number}-{one.mode}-{one.format}-{one.share:g}" for number, one in enumerate(_STEPWISE)
    ]


def stepwise_configuration(name: str, shapes: Shapes, packed: Collection[str]) -> Configuration:
    """Return the configuration of a name from `stepwise_names`.

    Where not all experts are resident, the number of slots varies between blocks.

    Args:
        name: The name.
        shapes: The blocks.
        packed: Formats that the experts are packed in. Configurations that fetch use the
            checkpoint's own format in place of others, because encoding at each fetch is slow.
    """
    number = int(name.partition("-")[0])
    one, generator = _STEPWISE[number], random.Random(number)
    slots = {
        block: shape.num_experts
        if one.share == 1
        else min(
            shape.num_experts,
            max(1, round(shape.num_experts * one.share * generator.uniform(0.7, 1.3))),
        )
        for block, shape in shapes.items()
    }
    experts = {block: shape.num_experts for block, shape in shapes.items()}
    format = one.format if one.share == 1 or one.format in packed else "native"
    return uniform(
        experts,
        format,
        slots,
        mode=one.mode,
        bound=one.bound,
        every=one.every,
        prefill=_prefill(one.mode, has_encoder(shapes)),
        dense_precision=one.dense_precision,
    )


def has_encoder(shapes: Shapes) -> bool:
    """Return whether any of the blocks is in an encoder."""
    return any(one.in_encoder for one in shapes.values())


def _prefill(mode: Mode, encoder: bool) -> Mode:
    """Return the mode of prompts and sources.

    Prompts are exact. So are sources but in virtual mode: half of the experts are used for nothing
    else, and it is meant never to wait for any.
    """
    return "virtual" if encoder and mode == "virtual" else "exact"


def policy_choices(*, known_rules: bool = True, encoder: bool = False) -> list[PolicyChoice]:
    """Return the policies that curves are computed for.

    Args:
        known_rules: Whether the routers' scoring rules are known; without, only exact is possible.
        encoder: Whether the model has an encoder with experts.
    """
    exact = [PolicyChoice(mode="exact")]
    bounded = [PolicyChoice(mode="bounded", bound=bound) for bound in BOUNDS]
    prefill = _prefill("virtual", encoder)
    virtual = [PolicyChoice(mode="virtual", every=every, prefill=prefill) for every in EVERY]
    return [*exact, *bounded, *virtual] if known_rules else exact


def slot_counts(num_experts: int) -> list[int]:
    """Return the slot counts that curves have points for, fewer than all experts."""
    count = min(num_experts - 1, _CURVE_POINTS)
    evenly = (round(number * num_experts / (count + 1)) for number in range(1, count + 1))
    return sorted({1, *(max(1, slots) for slots in evenly)})
