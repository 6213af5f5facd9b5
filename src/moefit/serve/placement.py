"""Which experts have a seat, and in which format: block by block, as a planner has decided.

Owns that record, what may stand in it, and the bytes that its slots take. It takes the place of
equal shares in one format, which is what a budget alone would give. Knows nothing of how anybody
came to decide so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moefit.errors import ConfigError
from moefit.formats.format import Format, parse_format
from moefit.moe.families import MoeBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlacement:
    """One block: its slots, and one format for all of them, or one for each expert.

    Formats by expert need a slot for each expert, which then stays where it is.
    """

    slots: int
    formats: tuple[str, ...]

    @property
    def by_expert(self) -> bool:
        """Whether every expert has its own slot, of its own format."""
        return len(self.formats) > 1

    def format_of(self, expert: int) -> Format:
        """The format that an expert lies in when it is in memory."""
        return parse_format(self.formats[expert if self.by_expert else 0])

    def distinct(self) -> tuple[Format, ...]:
        """Its formats, each once."""
        return tuple(parse_format(name) for name in dict.fromkeys(self.formats))

    def largest(self, block: MoeBlock) -> Format:
        """The format whose slots are the largest."""
        return max(self.distinct(), key=lambda format: format.nbytes(block.layout.specs))

    def nbytes(self, block: MoeBlock) -> int:
        """Bytes of its slots."""
        specs = block.layout.specs
        if not self.by_expert:
            return self.slots * self.distinct()[0].nbytes(specs)
        sizes = {format.name: format.nbytes(specs) for format in self.distinct()}
        return sum(sizes[name] for name in self.formats)


Placement = Mapping[str, BlockPlacement]
"""By block name."""


def check_placement(placement: Placement, blocks: Sequence[MoeBlock]) -> None:
    """Raise ConfigError if it is not one of these blocks, or cannot be."""
    if set(placement) != {block.name for block in blocks}:
        known = [block.name for block in blocks]
        odd = sorted(set(placement).symmetric_difference(known))
        raise ConfigError(
            f"a placement of {len(placement)} blocks does not fit a model with {len(known)} of "
            f"them; they differ in {', '.join(odd[:3])}; plan anew for this model"
        )
    for block in blocks:
        _check_block(placement[block.name], block)


def _check_block(one: BlockPlacement, block: MoeBlock) -> None:
    if type(one.slots) is not int or not 1 <= one.slots <= block.num_experts:
        raise ConfigError(
            f"{block.name} is given {one.slots!r} slots, but it has {block.num_experts} experts: "
            f"give 1 to {block.num_experts}"
        )
    one.distinct()  # refuse what does not exist
    wanted = 1 if one.slots < block.num_experts else block.num_experts
    if len(one.formats) not in (1, wanted):
        raise ConfigError(
            f"{block.name} is given {len(one.formats)} formats for {one.slots} slots and "
            f"{block.num_experts} experts; give one format, or one for each expert where every "
            "expert has a slot"
        )
