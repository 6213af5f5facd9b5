"""The parts of a served model, and reports on them as plain values.

`ServedParts` is the record of what loading has put together. `report_of` gives bytes by part,
residents and counters for JSON; `view_of` describes one block's experts for the residency map.
Callers hold the lock of a step.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefit.quant.format import NATIVE, Format
from moefit.serve.cache.host_cache import HostCache
from moefit.serve.cache.swaps import SharedState
from moefit.serve.hf.generation_config import GenerationDefaults
from moefit.serve.io.reader import ExpertStore
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.memory.estimate import PlacementBudget, held_bytes, peak_held_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockView:
    """resident: ids of experts in memory. formats: of every expert, None for those that are not.

    importance: of every expert, to four digits, 1 for the most important one; all 0 before
    anything was computed.
    """

    name: str
    experts: int
    slots: int
    resident: tuple[int, ...]
    formats: tuple[str | None, ...]
    importance: tuple[float, ...]


def view_of(name: str, experts: VirtualExperts) -> BlockView:
    """The block as it is now."""
    slot_table, scores = experts.slot_table, experts.importance.scores()
    largest = max(scores, default=0.0) or 1.0
    resident = sorted(slot_table.residents)
    formats: list[str | None] = [None] * experts.num_experts
    for expert in resident:
        formats[expert] = experts.slots[slot_table.slot(expert)].format.name
    return BlockView(
        name=name,
        experts=experts.num_experts,
        slots=slot_table.num_slots,
        resident=tuple(resident),
        formats=tuple(formats),
        importance=tuple(round(score / largest, 4) for score in scores),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedParts:
    """budget: the ledger to begin with. tokenizer: or why there is none. host_cache: on a GPU."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | str
    generation: GenerationDefaults
    budget: MemoryBudget
    blocks: Mapping[str, VirtualExperts]
    store: ExpertStore
    host_cache: HostCache | None
    shared: SharedState
    placement_budget: PlacementBudget
    hooks: tuple[RemovableHandle, ...]


def report_of(parts: ServedParts, budget: MemoryBudget) -> dict[str, Any]:
    """Bytes by part, residents by block, and what happened since loading or `reset`.

    budget: the ledger in force. `process_bytes` and its peak are the process's on the model's
    device: resident set, or GPU memory that torch has reserved. `loads` took `load_seconds`
    together, many side by side. `load_failures` counts reads that failed, on demand and in the
    background; `loads_failing` says whether reading fails now (`LoadFailures`). `host_...` are
    there on a GPU (`HostCache.report`).
    """
    blocks, shared, device = parts.blocks, parts.shared, parts.model.device
    return {
        "mode": shared.policy.mode,
        "prefill": shared.policy.prefill,
        "budget": budget.as_dict(),
        "slot_bytes": sum(s.nbytes for one in blocks.values() for s in one.slots.values()),
        "spare_bytes": shared.spare_bytes,
        "process_bytes": held_bytes(device),
        "peak_process_bytes": peak_held_bytes(device),
        "slots": {name: one.slot_table.num_slots for name, one in blocks.items()},
        "experts": {name: one.num_experts for name, one in blocks.items()},
        "formats": {name: _formats_of(one) for name, one in blocks.items()},
        "resident": {name: sorted(one.slot_table.residents) for name, one in blocks.items()},
        "experts_from": parts.store.source(
            {name: _encoded_format(one) for name, one in blocks.items()}
        ),
        "packed_ignored": list(parts.store.packed.ignored),
        "calibrated_on": parts.store.packed.texts,
        "bytes_read": parts.store.bytes_read,
        "loads": shared.transfer.loads,
        "load_seconds": shared.transfer.load_seconds,
        **shared.transfer.failures.as_dict(),
        **(parts.host_cache.report() if parts.host_cache else {}),
        **shared.counters.as_dict(),
    }


def _encoded_format(experts: VirtualExperts) -> Format:
    """A format of the block's slots that is not the checkpoint's own, if there is one."""
    formats = [slot.format for slot in experts.slots.values()] or [experts.format]
    return next((one for one in formats if one.is_encoded), NATIVE)


def _formats_of(experts: VirtualExperts) -> dict[str, int]:
    """How many slots have which format."""
    return dict(Counter(slot.format.name for slot in experts.slots.values()))
