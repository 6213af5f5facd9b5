"""Reports on a served model as plain values, and the parts that loading puts together.

`report_of` returns bytes by part, residents and statistics for JSON; `view_of` describes one block
for the residency map. Callers hold the lock of `SharedState`.
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
from moefit.serve.hf.skeleton import StoredFormats
from moefit.serve.io.reader import ExpertStore
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.memory.estimate import PlacementBudget
from moefit.serve.memory.held import held_bytes, peak_held_bytes
from moefit.serve.packed.store import unpacked_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockView:
    """State of one block for display.

    Args:
        name: Of the block.
        experts: Number of experts.
        slots: Number of slots.
        resident: Ids of resident experts.
        formats: By expert; None for absent ones.
        importance: By expert, relative to the most important one, rounded to four digits; zeros
            before the first step.
    """

    name: str
    experts: int
    slots: int
    resident: tuple[int, ...]
    formats: tuple[str | None, ...]
    importance: tuple[float, ...]


def view_of(name: str, experts: VirtualExperts) -> BlockView:
    """Return the present state of a block."""
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
    """What loading has put together.

    Args:
        folder: Of the model.
        stored: How the checkpoint stores the weights.
        model: The Hugging Face model, with served experts.
        tokenizer: Or the message of the error to raise when it is requested.
        generation: Defaults of generation.
        budget: The estimate after loading.
        blocks: Served experts by block name.
        store: Reads experts from storage.
        host_cache: In front of the store on a GPU; None on a CPU.
        shared: State of all blocks.
        placement_budget: Estimates other placements.
        int8_cache: Whether KV caches are int8.
        adapter: Folder of the adapter that is applied to dense weights, if there is one.
        hooks: To remove on close.
    """

    folder: Path
    stored: StoredFormats
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | str
    generation: GenerationDefaults
    budget: MemoryBudget
    blocks: Mapping[str, VirtualExperts]
    store: ExpertStore
    host_cache: HostCache | None
    shared: SharedState
    placement_budget: PlacementBudget
    int8_cache: bool
    adapter: str | None
    hooks: tuple[RemovableHandle, ...]


def report_of(parts: ServedParts, budget: MemoryBudget) -> dict[str, Any]:
    """Return bytes by part, residents by block and statistics since loading or `reset`, for JSON.

    `process_bytes` and its peak are the resident set of the process, or on a GPU the memory that
    torch has reserved. `load_seconds` is the sum over concurrent `loads`. `load_failures` counts
    failed reads, on demand and in the background; `loads_failing` tells whether reading fails now.
    `unpacked_bytes` is what packing the checkpoint's own codes would write, if it helps.
    Keys `host_...` exist on a GPU only (`HostCache.report`).
    """
    blocks, shared, device = parts.blocks, parts.shared, parts.model.device
    return {
        "mode": shared.policy.mode,
        "prefill": shared.policy.prefill,
        "budget": budget.as_dict(),
        "kv_cache_dtype": budget.kv_dtype,
        "slot_bytes": sum(s.nbytes for one in blocks.values() for s in one.slots.values()),
        "spare_bytes": shared.spare_bytes,
        "process_bytes": held_bytes(device),
        "peak_process_bytes": peak_held_bytes(device),
        "slots": {name: one.slot_table.num_slots for name, one in blocks.items()},
        "experts": {name: one.num_experts for name, one in blocks.items()},
        "formats": {
            name: dict(Counter(slot.format.name for slot in one.slots.values()))
            for name, one in blocks.items()
        },
        "resident": {name: sorted(one.slot_table.residents) for name, one in blocks.items()},
        "experts_from": parts.store.source(
            {name: _encoded_format(one) for name, one in blocks.items()}
        ),
        "dense_from": parts.store.packed.dense.source(
            parts.placement_budget.settings.dense_format()
        ),
        "checkpoint": parts.stored.as_dict(),
        "adapter": parts.adapter,
        "packed_ignored": list(parts.store.packed.ignored),
        "unpacked_bytes": unpacked_bytes(
            ((one.block, one.format, one.slot_table.num_slots) for one in blocks.values()),
            parts.store.packed,
        ),
        "calibrated_on": parts.store.packed.texts,
        "bytes_read": parts.store.bytes_read,
        "loads": shared.transfer.loads,
        "load_seconds": shared.transfer.load_seconds,
        **shared.transfer.failures.as_dict(),
        **(parts.host_cache.report() if parts.host_cache else {}),
        **shared.counters.as_dict(),
    }


def _encoded_format(experts: VirtualExperts) -> Format:
    """Return an encoded format among the block's slots; native if there is none."""
    formats = [slot.format for slot in experts.slots.values()] or [experts.format]
    return next((one for one in formats if one.is_encoded), NATIVE)
