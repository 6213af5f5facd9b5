"""What the models know of a configuration: its precision and its residency, block by block.

Owns these numbers, from a profile's blocks, loudness and curves; nothing is measured or fitted.

Shapes: L blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moefit.plan.configuration import Configuration
from moefit.plan.curves import Curves, at, policy_key, read_curves
from moefit.plan.experiments import Shapes
from moefit.plan.profile import Profile
from moefit.serve.placement import BlockPlacement


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKnowledge:
    """One block: each expert's share of router weight and of output, experts a token, curves.

    rule_known: whether its router's rule is, so that routes may be changed.
    """

    mass_E: Sequence[float]
    loudness_E: Sequence[float]
    experts: float
    curves: Curves
    rule_known: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """All blocks of a profile, in order."""

    shapes: Shapes
    blocks: Mapping[str, BlockKnowledge]

    def noise(self, name: str, placement: BlockPlacement, power: float = 1.0) -> float:
        """Squared error that a block's formats add, as a share of its output; errors to a power."""
        shape, known = self.shapes[name], self.blocks[name]
        if not placement.by_expert:
            errors = shape.errors[placement.formats[0]]
            return sum(
                share * error**power for share, error in zip(known.loudness_E, errors, strict=True)
            )
        return sum(
            share * shape.errors[format][expert] ** power
            for expert, (share, format) in enumerate(
                zip(known.loudness_E, placement.formats, strict=True)
            )
        )

    def noises(
        self, configuration: Configuration, powers: Mapping[str, float] | None = None
    ) -> list[float]:
        """Of all blocks, L; powers by block, one if not given."""
        placement = configuration.placement
        return [
            self.noise(name, placement[name], powers[name] if powers else 1.0)
            for name in self.shapes
        ]

    def misses(self, configuration: Configuration) -> list[float]:
        """Experts that a token waits for in each block, L."""
        key = policy_key(*configuration.policy)
        return [
            at(self.blocks[name].curves, key, configuration.placement[name].slots).misses
            for name in self.shapes
        ]

    def swaps(self, configuration: Configuration) -> list[float]:
        """Experts that come in the background, a token, L."""
        key = policy_key(*configuration.policy)
        return [
            at(self.blocks[name].curves, key, configuration.placement[name].slots).swaps
            for name in self.shapes
        ]

    def moved(self, configuration: Configuration) -> list[float]:
        """Share of a token's router weight that goes elsewhere in each block, L."""
        key = policy_key(*configuration.policy)
        return [
            at(self.blocks[name].curves, key, configuration.placement[name].slots).moved
            for name in self.shapes
        ]


def knowledge_of(profile: Profile) -> Knowledge:
    """From a profile's items."""
    shapes = profile.facts.shapes
    blocks = {
        name: BlockKnowledge(
            mass_E=one["mass"],
            loudness_E=one["loudness"],
            experts=one["experts"],
            curves=read_curves(one["curves"], shapes[name].num_experts),
            rule_known=one["rule_known"],
        )
        for name, one in profile.items["routes"].items()
    }
    return Knowledge(shapes=shapes, blocks=blocks)
