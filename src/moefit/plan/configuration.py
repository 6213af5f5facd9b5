"""One way to serve a model: seats and formats block by block, the mode and its parameters.

Owns the record, its form in JSON, and what it says in a line. Knows nothing of how good or fast
it is.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moefit.serve.cache.scores import VirtualExpertManager
from moefit.serve.config import BlockPlacement, Mode, Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What a planner chooses: SwapMoE's slots per layer and update frequency, and more.

    rest: format of the weights that are no experts. bound is of the bounded mode, every (block
    steps between two updates of the residents) of the virtual one; both have no effect elsewhere.
    """

    placement: Placement
    rest: str = "native"
    mode: Mode = "exact"
    bound: float = 0.0
    every: int = 1

    @property
    def slots(self) -> int:
        """Of all blocks."""
        return sum(one.slots for one in self.placement.values())

    @property
    def policy(self) -> tuple[Mode, float, int]:
        """What the moved router weight and the misses depend on, beside slots."""
        return (
            self.mode,
            self.bound if self.mode == "bounded" else 0.0,
            self.every if self.mode == "virtual" else 1,
        )

    @property
    def manager(self) -> VirtualExpertManager:
        """Of the virtual mode."""
        return VirtualExpertManager(every=self.every)

    def load_settings(self) -> dict[str, Any]:
        """Keyword arguments of `LoadSettings` that make this so."""
        return {
            "placement": self.placement,
            "dense_precision": self.rest,
            "mode": self.mode,
            "manager": self.manager,
        }

    def policy_settings(self) -> dict[str, Any]:
        """And of `Policy`."""
        bound = {"bound": self.bound} if self.mode == "bounded" else {}
        return {"prefill": "exact", **bound}

    def in_words(self) -> str:
        """Formats with how many experts have them, slots where some are absent, the mode."""
        formats: Counter[str] = Counter()
        for one in self.placement.values():
            formats.update(one.formats if one.by_expert else {one.formats[0]: one.slots})
        seats = " + ".join(f"{count} {name}" for name, count in sorted(formats.items()))
        rest = "" if self.rest == "native" else f", rest {self.rest}"
        mode = {
            "exact": "exact",
            "bounded": f"bounded {self.bound:g}",
            "virtual": f"virtual, update every {self.every}",
        }[self.mode]
        return f"{seats}, {mode}{rest}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "mode": self.mode,
            "bound": self.bound,
            "every": self.every,
            "rest": self.rest,
            "blocks": {
                name: {"slots": one.slots, "formats": list(one.formats)}
                for name, one in self.placement.items()
            },
        }


def configuration_from(values: Mapping[str, Any]) -> Configuration:
    """From `as_dict`. Raises KeyError, TypeError or ValueError for anything else."""
    return Configuration(
        placement={
            str(name): BlockPlacement(slots=one["slots"], formats=tuple(one["formats"]))
            for name, one in dict(values["blocks"]).items()
        },
        rest=values["rest"],
        mode=values["mode"],
        bound=values["bound"],
        every=values["every"],
    )


def uniform(
    experts: Mapping[str, int], format: str, slots: Mapping[str, int] | None = None, **more: Any
) -> Configuration:
    """The same format for all; experts: how many each block has, slots: all if not given."""
    counts = slots or experts
    placement = {name: BlockPlacement(slots=counts[name], formats=(format,)) for name in experts}
    return Configuration(placement=placement, **more)
