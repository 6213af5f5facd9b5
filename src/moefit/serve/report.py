"""What a served model is made of, once loading has put it together.

Owns the record of it, between `loading.py`, which makes it, and `served.py`, which keeps it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefit.serve.budget import MemoryBudget
from moefit.serve.generation import GenerationDefaults
from moefit.serve.host_tier import HostTier
from moefit.serve.live import Live
from moefit.serve.reckoner import Reckoner
from moefit.serve.store import ExpertStore
from moefit.serve.virtual_experts import VirtualExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedParts:
    """budget: the ledger to begin with. tokenizer: or why there is none. tier: on a GPU."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | str
    generation: GenerationDefaults
    budget: MemoryBudget
    blocks: Mapping[str, VirtualExperts]
    store: ExpertStore
    tier: HostTier | None
    live: Live
    reckoner: Reckoner
    hooks: tuple[RemovableHandle, ...]
