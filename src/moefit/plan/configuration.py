"""One way to serve a model: slots and formats of each block, and the mode with its parameters."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moefit.serve.cache.scores import VirtualExpertManager
from moefit.serve.config import BlockPlacement, Mode, Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of an encoder-decoder's requests: of the source, and of the output."""

    source: float
    target: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChoice:
    """A serving mode with its parameter."""

    mode: Mode
    bound: float = 0.0
    every: int = 1
    prefill: Mode = "exact"

    @property
    def key(self) -> str:
        """Name of the policy's curves."""
        value = {"exact": "", "bounded": f":{self.bound:g}", "virtual": f":{self.every}"}
        return self.mode + value[self.mode]


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What the planner chooses.

    Attributes:
        placement: Slots and formats of each block.
        dense_precision: Format of all weights except the experts'.
        mode: What happens when an expert is not resident.
        bound: Maximum share of router weight that may be substituted; bounded mode only.
        every: Block steps between two updates of the resident experts; virtual mode only.
        prefill: The same as `mode` for prompts and sources.
    """

    placement: Placement
    dense_precision: str = "native"
    mode: Mode = "exact"
    bound: float = 0.0
    every: int = 1
    prefill: Mode = "exact"

    @property
    def slots(self) -> int:
        """Number of slots in all blocks."""
        return sum(one.slots for one in self.placement.values())

    @property
    def policy(self) -> PolicyChoice:
        """Mode, bound and interval; values without effect in the mode are normalized."""
        return PolicyChoice(
            mode=self.mode,
            bound=self.bound if self.mode == "bounded" else 0.0,
            every=self.every if self.mode == "virtual" else 1,
            prefill=self.prefill,
        )

    @property
    def manager(self) -> VirtualExpertManager:
        """The manager of the virtual mode."""
        return VirtualExpertManager(every=self.every)

    def load_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `LoadSettings`."""
        return {
            "placement": self.placement,
            "dense_precision": self.dense_precision,
            "mode": self.mode,
            "manager": self.manager,
        }

    def policy_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `Policy`."""
        bound = {"bound": self.bound} if self.mode == "bounded" else {}
        return {"prefill": self.prefill, **bound}

    def describe(self) -> str:
        """Return a one-line summary: slots by format, the mode, the dense weights' format."""
        formats: Counter[str] = Counter()
        for one in self.placement.values():
            formats.update(one.formats if one.by_expert else {one.formats[0]: one.slots})
        slots = " + ".join(f"{count} {name}" for name, count in sorted(formats.items()))
        dense = (
            "" if self.dense_precision == "native" else f", dense weights {self.dense_precision}"
        )
        mode = {
            "exact": "exact",
            "bounded": f"bounded {self.bound:g}",
            "virtual": f"virtual, update every {self.every}",
        }[self.mode]
        return f"{slots}, {mode}{dense}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "mode": self.mode,
            "bound": self.bound,
            "every": self.every,
            "prefill": self.prefill,
            "rest": self.dense_precision,
            "blocks": {
                name: {"slots": one.slots, "formats": list(one.formats)}
                for name, one in self.placement.items()
            },
        }


def configuration_from(values: Mapping[str, Any]) -> Configuration:
    """Return the configuration that `as_dict` was called on.

    Raises:
        KeyError: A value is missing.
        TypeError: A value has the wrong type.
        ValueError: A value is out of range.
    """
    return Configuration(
        placement={
            str(name): BlockPlacement(slots=one["slots"], formats=tuple(one["formats"]))
            for name, one in dict(values["blocks"]).items()
        },
        dense_precision=values["rest"],
        mode=values["mode"],
        bound=values["bound"],
        every=values["every"],
        prefill=values.get("prefill", "exact"),  # absent in plans for decoders written before
    )


def uniform(
    experts: Mapping[str, int], format: str, slots: Mapping[str, int] | None = None, **more: Any
) -> Configuration:
    """Return a configuration with one format for all experts.

    Args:
        experts: Number of experts by block.
        format: The format.
        slots: Number of slots by block; None for one per expert.
        more: Further fields of `Configuration`.
    """
    counts = slots or experts
    placement = {name: BlockPlacement(slots=counts[name], formats=(format,)) for name in experts}
    return Configuration(placement=placement, **more)
