"""How many bytes a budget leaves for slots, and which configurations fit it.

Owns the reckoning, by serving's own ledger. What is fixed depends on the formats that are chosen,
for some need staging, so rooms are tried and what then does not fit is left out.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from moefit.device import planned_device
from moefit.plan.configuration import Configuration, uniform
from moefit.plan.experiments import FORMATS, RESTS
from moefit.plan.search import Point
from moefit.serve.budget import MemoryBudget
from moefit.serve.ledger import held_bytes
from moefit.serve.reckon import ledger
from moefit.serve.settings import LoadSettings
from moefit.serve.skeleton import Skeleton

SLACK = 8 << 20  # bytes that loading in another process may differ by


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What a plan must leave room for, and what it can't change, beside context and device.

    sequences, prompt_logits, helpers: as of `LoadSettings`. process: bytes of the one that
    will serve, with its libraries and helpers; None is this one as it is now. rests: what the other
    weights may be encoded in.
    """

    sequences: int = 1
    prompt_logits: int = 0
    helpers: int = 0
    process: int | None = None
    rests: Sequence[str] = RESTS


ANY = Circumstances()


class Rooms:
    """Of one model with so many experts by block."""

    def __init__(
        self,
        skeleton: Skeleton,
        experts: Mapping[str, int],
        *,
        context: int,
        device: str,
        circumstances: Circumstances = ANY,
    ):
        self._skeleton, self._experts = skeleton, experts
        self._context, self._device, self._given = context, device, circumstances
        process = circumstances.process
        if process is None:
            process = held_bytes(planned_device(device)) + circumstances.helpers
        self._process = process
        self._simple = {
            rest: [self.ledger(one) for one in self.simple(rest)] for rest in circumstances.rests
        }

    @property
    def floor(self) -> int:
        """The least budget that any configuration fits in."""
        return min(needed(one) for some in self._simple.values() for one in some) + SLACK

    @property
    def everything(self) -> int:
        """The budget that holds all experts as they are in the checkpoint."""
        whole = uniform(self._experts, FORMATS[0], rest=self._given.rests[0])
        return needed(self.ledger(whole)) + SLACK

    @property
    def fixed(self) -> int:
        """The least that all but slots takes."""
        return min(one.fixed for some in self._simple.values() for one in some)

    def fitting(self, points: Sequence[Point], memory: int) -> list[Point]:
        """Those whose ledger, reckoned as loading does, is within the budget."""
        known: dict[Hashable, int] = {}
        kept: list[Point] = []
        for point in points:
            key = self._staging_key(point.configuration)
            if key not in known:
                known[key] = self.ledger(point.configuration).fixed
            if known[key] + point.nbytes + SLACK <= memory:
                kept.append(point)
        return kept

    def _staging_key(self, configuration: Configuration) -> Hashable:
        """What fixed bytes depend on: formats by block, and which blocks have fewer seats."""
        experts = self._experts
        blocks = tuple(
            (name, one.slots < experts[name], *sorted(set(one.formats)))
            for name, one in configuration.placement.items()
        )
        return configuration.rest, blocks

    def ledger(
        self,
        configuration: Configuration,
        context: int | None = None,
        sequences: int | None = None,
    ) -> MemoryBudget:
        """As loading would reckon it; context and sequences None: the planned ones."""
        settings = LoadSettings(
            device=self._device,
            context=context or self._context,
            dtype=self._skeleton.dtype,
            placement=configuration.placement,
            rest=configuration.rest,
            sequences=sequences or self._given.sequences,
            prompt_logits=self._given.prompt_logits,
        )
        return replace(ledger(self._skeleton, settings), process=self._process)

    def simple(self, rest: str) -> list[Configuration]:
        """The same format for all, with one slot a block and with all; one is the smallest."""
        experts = self._experts
        return [
            uniform(experts, format, slots, rest=rest)
            for format in FORMATS
            for slots in (dict.fromkeys(experts, 1), experts)
        ]

    def of(self, memory: int) -> list[dict[str, int]]:
        """Bytes for slots by rest format: if nothing is staged beside them, and if most is.

        What is staged follows from the formats chosen, so both are tried, and what then does not
        fit is left out.
        """
        fixed = {rest: sorted(one.fixed for one in some) for rest, some in self._simple.items()}
        return [
            {rest: memory - some[which] - SLACK for rest, some in fixed.items()}
            for which in (0, -1)
        ]


def needed(budget: MemoryBudget) -> int:
    """Bytes in all of a ledger with planned slots."""
    assert budget.planned is not None
    return budget.fixed + budget.planned.nbytes
