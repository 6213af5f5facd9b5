"""From a folder and a budget to a served model: the one visible call.

Owns the order of things, which is what keeps the peak under the budget: ledger from headers,
refusal if it can't be, other weights, slots, routers, and experts only as they are asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moefit.device import parse_device
from moefit.errors import ConfigError
from moefit.formats.format import encoding_bytes, parse_format
from moefit.moe.families import MoeBlock
from moefit.serve.budget import BlockNeeds, MemoryBudget, parse_bytes
from moefit.serve.dsmoe_rules import follow_rules
from moefit.serve.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.importance import ExpertImportanceEstimator
from moefit.serve.ledger import kv_bytes_per_token, process_bytes, weight_bytes, workspace_bytes
from moefit.serve.manager import VirtualExpertManager
from moefit.serve.packed import PackedStore, open_packed
from moefit.serve.probe import attach
from moefit.serve.residency import Residency
from moefit.serve.served import ServedModel, ServedParts, grow
from moefit.serve.skeleton import Skeleton, build, load_rest
from moefit.serve.slots import Slot, allocate
from moefit.serve.store import ExpertStore
from moefit.serve.transfer import BACKGROUND_READERS, Transfer
from moefit.serve.virtual_experts import Live, Mode, Policy, VirtualExperts

SPARES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How to serve. `context` is how many tokens the KV cache is reserved for, over all sequences.

    eviction: which resident makes room in the exact and bounded modes (`serve/eviction.py`).
    dtype None: the checkpoint's own. precision: the format of experts in memory, such as int4
    (`formats/format.py`); native is the checkpoint's own.
    """

    memory: str | int | None = None
    mode: Mode = "exact"
    device: str = "cpu"
    context: int = 2048
    eviction: str = DEFAULT_POLICY
    precision: str = "native"
    dtype: torch.dtype | None = None
    readers: int = 4
    half_life_tokens: float = 24.0
    manager: VirtualExpertManager = field(default_factory=VirtualExpertManager)

    def check(self) -> None:
        """Raise ConfigError for a value that does not exist or cannot be."""
        parse_format(self.precision)
        if self.eviction not in POLICIES:
            raise ConfigError(f"eviction {self.eviction!r} is not one of {', '.join(POLICIES)}")
        for name in ("context", "readers"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}, but it is a whole number, 1 or more")
        if not self.half_life_tokens > 0:
            raise ConfigError(f"half_life_tokens={self.half_life_tokens!r} must be above zero")
        if self.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"dtype={self.dtype!r} is not torch.float32, torch.bfloat16 or torch.float16"
            )


def load(folder: str | Path, settings: LoadSettings, **policy: Any) -> ServedModel:
    """Load a model inside a budget. Keyword arguments are settings of `Policy`.

    Raises BudgetTooSmallError, naming the floor; CheckpointError for a missing or damaged
    checkpoint; UnsupportedModelError for a model without servable experts, or a mode that it can't
    be served in; ConfigError for settings that don't exist.
    """
    device = parse_device(settings.device)
    settings.check()
    skeleton = build(Path(folder), settings.dtype)
    packed = open_packed(skeleton, [parse_format(settings.precision)])
    budget = ledger(skeleton, settings, packed)
    counts = budget.slots()
    store = ExpertStore(
        skeleton.checkpoint,
        skeleton.map.experts,
        {block.name: block for block in skeleton.blocks},
        packed,
    )
    live = Live(
        policy=Policy(),
        manager=settings.manager,
        transfer=Transfer(store, readers=settings.readers),
    )
    blocks = {block.name: _served_block(block, live, settings) for block in skeleton.blocks}
    for number, experts in enumerate(blocks.values()):
        experts.depth = (number + 0.5) / len(blocks)
    try:
        model = load_rest(skeleton, blocks, device)
        parts = ServedParts(
            folder=Path(folder),
            model=model,
            tokenizer=_tokenizer(Path(folder)),
            budget=budget,
            blocks=blocks,
            store=store,
            live=live,
            hooks=(*attach(model, blocks), *follow_rules(model, blocks)),
        )
        served = ServedModel(parts)
        served.set_mode(settings.mode, **policy)
        for experts, count in zip(blocks.values(), counts, strict=True):
            grow(experts, count, device)
        live.spares.update(_spares(blocks.values(), device))
    except BaseException:
        live.transfer.close()
        store.close()
        raise
    return served


def ledger(
    skeleton: Skeleton, settings: LoadSettings, packed: PackedStore | None = None
) -> MemoryBudget:
    """What goes where, before anything is loaded. packed None: what there is."""
    config = skeleton.model.config
    context = _context(config, settings.context)
    format = parse_format(settings.precision)
    sizes = [format.nbytes(block.layout.specs) for block in skeleton.blocks]
    packed = packed or open_packed(skeleton, [format])
    unpacked = {b.name: b for b in skeleton.blocks if not packed.has(b.name, format)}
    encoding = max((encoding_bytes(format, b.layout.specs) for b in unpacked.values()), default=0)
    store = ExpertStore(
        skeleton.checkpoint, {name: skeleton.map.experts[name] for name in unpacked}, unpacked
    )
    return MemoryBudget(
        total=None if settings.memory is None else parse_bytes(settings.memory),
        process=process_bytes(),
        weights=weight_bytes(skeleton.checkpoint, skeleton.map.rest, skeleton.dtype),
        context=context,
        kv_cache=context * kv_bytes_per_token(config, skeleton.dtype),
        workspace=workspace_bytes(config, context, skeleton.dtype),
        staging=sum(SPARES * size for size in set(sizes))
        + (settings.readers + BACKGROUND_READERS) * (store.staging_bytes + encoding),
        blocks=tuple(
            BlockNeeds(name=block.name, num_experts=block.num_experts, slot_bytes=size, fewest=1)
            for block, size in zip(skeleton.blocks, sizes, strict=True)
        ),
    )


def _context(config: Any, wanted: int) -> int:
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(wanted, longest) if isinstance(longest, int) else wanted


def _served_block(block: MoeBlock, live: Live, settings: LoadSettings) -> VirtualExperts:
    eviction = POLICIES[settings.eviction]()
    experts = VirtualExperts(
        block,
        live,
        Residency(block.num_experts, 0, eviction),
        {},
        eviction,
        ExpertImportanceEstimator(block.num_experts, half_life_tokens=settings.half_life_tokens),
    )
    experts.format = parse_format(settings.precision)
    return experts


def _spares(blocks: Iterable[VirtualExperts], device: torch.device) -> dict[int, list[Slot]]:
    spares: dict[int, list[Slot]] = {}
    for experts in blocks:
        specs = experts.block.layout.specs
        size = experts.format.nbytes(specs)
        if size not in spares:
            spares[size] = [allocate(experts.format, specs, device) for _ in range(SPARES)]
    return spares


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception:  # noqa: BLE001 - none, or damaged: only asking for it is an error
        return None
