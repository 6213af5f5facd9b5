"""What a served model tells of itself: plain values, for JSON.

Owns their names. Knows nothing of who reads them; whoever calls holds the lock of a step.
"""

from collections import Counter
from typing import Any

from moefit.formats.format import NATIVE, Format, NativeFormat
from moefit.serve.budget import MemoryBudget
from moefit.serve.ledger import held_bytes, peak_held_bytes
from moefit.serve.parts import ServedParts
from moefit.serve.virtual_experts import VirtualExperts


def report_of(parts: ServedParts, budget: MemoryBudget) -> dict[str, Any]:
    """Bytes by part, residents by block, and what happened since loading or `reset`.

    budget: the ledger in force. `process_bytes` and its peak are the process's on the model's
    device: resident set, or GPU memory that torch has reserved. `loads` took `load_seconds`
    together, many side by side. `load_failures` counts reads that failed, on demand and in the
    background; `loads_failing` says whether reading fails now (`LoadFailures`). `host_...` are
    there on a GPU (`HostTier.report`).
    """
    blocks, live, device = parts.blocks, parts.live, parts.model.device
    return {
        "mode": live.policy.mode,
        "prefill": live.policy.prefill,
        "refetch": live.policy.refetch,
        "budget": budget.as_dict(),
        "slot_bytes": sum(s.nbytes for one in blocks.values() for s in one.slots.values()),
        "spare_bytes": live.spare_bytes,
        "scratch_bytes": 0 if live.copies is None else live.copies.nbytes,
        "process_bytes": held_bytes(device),
        "peak_process_bytes": peak_held_bytes(device),
        "slots": {name: one.residency.number for name, one in blocks.items()},
        "experts": {name: one.num_experts for name, one in blocks.items()},
        "formats": {name: _formats(one) for name, one in blocks.items()},
        "resident": {name: sorted(one.residency.residents) for name, one in blocks.items()},
        "experts_from": parts.store.source({name: _encoded(one) for name, one in blocks.items()}),
        "packed_ignored": list(parts.store.packed.ignored),
        "calibrated_on": parts.store.packed.texts,
        "bytes_read": parts.store.bytes_read,
        "loads": live.transfer.loads,
        "load_seconds": live.transfer.load_seconds,
        **live.transfer.failures.as_dict(),
        **(parts.tier.report() if parts.tier else {}),
        **live.counters.as_dict(),
    }


def _encoded(experts: VirtualExperts) -> Format:
    """A format of the block's slots that is not the checkpoint's own, if there is one."""
    formats = [slot.format for slot in experts.slots.values()] or [experts.format]
    return next((one for one in formats if not isinstance(one, NativeFormat)), NATIVE)


def _formats(experts: VirtualExperts) -> dict[str, int]:
    """How many slots have which format."""
    return dict(Counter(slot.format.name for slot in experts.slots.values()))
