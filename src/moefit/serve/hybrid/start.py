"""Let a served model compute some of its misses in host memory, or say why it does not."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from moefit.errors import CheckpointError, MoefitError, in_brief
from moefit.moe.families import MoeBlock
from moefit.serve.cache.host_cache import HeldExpert, HostCache
from moefit.serve.cache.slot import Slot
from moefit.serve.hybrid.costs import Costs
from moefit.serve.hybrid.host_experts import HostExperts, HostSide
from moefit.serve.hybrid.measure import TwoSides, measure_costs
from moefit.serve.hybrid.rules import AUTO_COMPUTE, BEST, FETCH_ALL, RULES
from moefit.serve.io.device_copy import CopyEngine
from moefit.serve.layer.moe_layer import VirtualExperts

_MEASURED = 8  # experts in host memory


@dataclass(frozen=True, slots=True, kw_only=True)
class HostComputing:
    """Whether misses are computed in host memory.

    Attributes:
        side: What blocks share; None if there is an obstacle.
        rule: Name of the rule.
        obstacle: Why nothing is computed there; empty if something may be.
    """

    side: HostSide | None = None
    rule: str = FETCH_ALL
    obstacle: str = "the model is not on a GPU"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; costs are in seconds."""
        costs = None if self.side is None else asdict(self.side.costs)
        return {"rule": self.rule, "obstacle": self.obstacle, "costs": costs}

    def close(self, blocks: Sequence[VirtualExperts]) -> None:
        """Let all misses be fetched from now on. No step may be running."""
        for experts in blocks:
            experts.compute_in_host(None)
        if self.side is not None:
            self.side.close()


@dataclass(slots=True)
class _Sample:
    """Experts of one block in host memory, and a slot of the device that may be overwritten."""

    block: MoeBlock
    here: Slot
    held: list[HeldExpert] = field(default_factory=list)


def start_host_side(
    model: PreTrainedModel,
    blocks: Mapping[str, VirtualExperts],
    cache: HostCache | None,
    engine: CopyEngine,
    name: str,
) -> HostComputing:
    """Measure both sides, and let blocks divide their misses.

    Args:
        model: The model, on its device.
        blocks: The served blocks by name.
        cache: Experts in host memory; a few are read.
        engine: Copies between host memory and the device.
        name: Of a rule; `auto` is the one with the shortest layers.

    Raises:
        MoefitError: A rule given by name cannot be used, such as on a link without bandwidth.
        RuntimeError: The same for an error of torch.
    """
    rule = BEST if name == AUTO_COMPUTE else name
    if rule == FETCH_ALL:
        return HostComputing(rule=rule, obstacle="all misses are fetched, as the setting says")
    if cache is None:
        return HostComputing(obstacle="there is no host memory for experts beside the slots")
    try:
        costs = _measured(model, blocks, cache, engine)
        if costs is not None:
            costs.check()
    except (MoefitError, OSError, RuntimeError) as error:
        # Fetching all misses always works, so only a rule that was asked for by name is an error.
        if name != AUTO_COMPUTE and not isinstance(error, (CheckpointError, OSError)):
            raise
        return HostComputing(obstacle=f"its speed could not be measured ({in_brief(error)})")
    if costs is None:
        return HostComputing(obstacle="every expert has a slot of its own format")
    side = HostSide(cache, engine, costs, RULES[rule])
    for experts in blocks.values():
        experts.compute_in_host(HostExperts(experts.block, side, experts.importance.relative))
    return HostComputing(side=side, rule=rule, obstacle="")


def _measured(
    model: PreTrainedModel,
    blocks: Mapping[str, VirtualExperts],
    cache: HostCache,
    engine: CopyEngine,
) -> Costs | None:
    """Return the costs of the first block's experts; None if no slot may be overwritten."""
    for experts in blocks.values():
        here = experts.unused_slot()
        if here is None:
            continue
        sample = _Sample(experts.block, here)
        try:
            _fill(sample, cache)
            there = [one.slot for one in sample.held]
            width = model.config.get_text_config(decoder=True).hidden_size
            return measure_costs(
                TwoSides.of(sample.block, there, here, engine, (width, model.dtype))
            )
        finally:
            for held in sample.held:
                cache.release(held)
    return None


def _fill(sample: _Sample, cache: HostCache) -> None:
    """Read as many experts as there is room for."""
    room = min(_MEASURED, sample.block.num_experts, cache.limit // sample.here.nbytes)
    for expert in range(room):
        cache.warm(sample.block.name, expert, sample.here)
        held = cache.hold(sample.block.name, expert, sample.here)
        if held is not None:
            sample.held.append(held)
    if not sample.held:
        raise CheckpointError("no expert stayed in host memory")
