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

from moefit.device import parse_device, planned_device
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.formats.format import (
    NATIVE,
    Format,
    GroupedFormat,
    encoding_bytes,
    parse_format,
)
from moefit.moe.families import MoeBlock
from moefit.serve.budget import BlockNeeds, MemoryBudget, format_bytes, host_limit, parse_bytes
from moefit.serve.copies import CpuCopies, CudaCopies
from moefit.serve.dsmoe_rules import follow_rules
from moefit.serve.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.host_tier import HostTier
from moefit.serve.importance import ExpertImportanceEstimator
from moefit.serve.ledger import (
    held_bytes,
    kv_bytes_per_token,
    slot_bytes,
    weight_bytes,
    workspace_bytes,
)
from moefit.serve.manager import VirtualExpertManager
from moefit.serve.packed import PackedStore, open_packed
from moefit.serve.probe import attach
from moefit.serve.residency import Residency
from moefit.serve.rest import encode_rest, saved_bytes
from moefit.serve.served import ServedModel, ServedParts, grow
from moefit.serve.skeleton import Skeleton, build, load_rest
from moefit.serve.slots import Slot, allocate
from moefit.serve.store import ExpertStore
from moefit.serve.transfer import BACKGROUND_READERS, Transfer
from moefit.serve.upgrades import AT_ONCE, AUTO, Upgrades, ladders_of
from moefit.serve.virtual_experts import Live, Mode, Policy, VirtualExperts

SPARES = 2
AUTO_PRECISION = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How to serve. `context` is how many tokens the KV cache is reserved for, over all sequences.

    host_memory: on a GPU, the most that experts may take of host memory on their way from storage
    to slots, where they then can be found again; None is a buffer a reader.
    eviction: which resident makes room in the exact and bounded modes (`serve/eviction.py`).
    dtype None: the checkpoint's own. precision: the format of experts in memory, such as int4
    (`formats/format.py`); native is the checkpoint's own, and auto gives each expert the one that
    it deserves within the budget. rest: the same for the weights that are no experts, but routers
    and vectors; they are in memory as they are while they are being encoded.
    """

    memory: str | int | None = None
    host_memory: str | int | None = None
    mode: Mode = "exact"
    device: str = "cpu"
    context: int = 2048
    eviction: str = DEFAULT_POLICY
    precision: str = "native"
    rest: str = "native"
    dtype: torch.dtype | None = None
    readers: int = 4
    half_life_tokens: float = 24.0
    manager: VirtualExpertManager = field(default_factory=VirtualExpertManager)

    def check(self) -> None:
        """Raise ConfigError for a value that does not exist or cannot be."""
        if self.precision == AUTO_PRECISION and self.memory is None:
            raise ConfigError(
                "precision auto divides a memory budget among experts, and memory is not given; "
                "give memory, or a precision such as int4"
            )
        self.format()
        if self.eviction not in POLICIES:
            raise ConfigError(f"eviction {self.eviction!r} is not one of {', '.join(POLICIES)}")
        for name in ("context", "readers"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}, but it is a whole number, 1 or more")
        if self.host_memory is not None and planned_device(self.device).type == "cpu":
            raise ConfigError(
                f"host_memory={self.host_memory!r}, but on a CPU the slots themselves are in host "
                "memory; give it to memory (--memory), or serve on a GPU (device cuda)"
            )
        if not self.half_life_tokens > 0:
            raise ConfigError(f"half_life_tokens={self.half_life_tokens!r} must be above zero")
        if self.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"dtype={self.dtype!r} is not torch.float32, torch.bfloat16 or torch.float16"
            )

    def rest_format(self) -> GroupedFormat | None:
        """Of the weights that are no experts; None if they stay as they are."""
        format = parse_format(self.rest)
        return format if isinstance(format, GroupedFormat) else None

    def format(self) -> Format:
        """Of every slot; of `auto`, where they begin."""
        return parse_format(AUTO[0] if self.precision == AUTO_PRECISION else self.precision)

    def formats(self) -> list[Format]:
        """All that a slot may come to have."""
        names = AUTO if self.precision == AUTO_PRECISION else (self.precision,)
        return [parse_format(name) for name in names]


def load(folder: str | Path, settings: LoadSettings, **policy: Any) -> ServedModel:
    """Load a model inside a budget. Keyword arguments are settings of `Policy`.

    Raises BudgetTooSmallError, naming the floor; CheckpointError for a missing or damaged
    checkpoint; UnsupportedModelError for a model without servable experts, or a mode that it can't
    be served in; ConfigError for settings that don't exist.
    """
    device = parse_device(settings.device)
    settings.check()
    skeleton = build(Path(folder), settings.dtype)
    packed = open_packed(skeleton, settings.formats())
    budget = ledger(skeleton, settings, packed)
    counts = budget.slots()
    _refuse_encoding(skeleton, settings, budget)
    store = ExpertStore(
        skeleton.checkpoint,
        skeleton.map.experts,
        {block.name: block for block in skeleton.blocks},
        packed,
    )
    engine = CudaCopies(device) if device.type == "cuda" else CpuCopies()
    tier = None if budget.host is None else HostTier(store, engine, limit=budget.host)
    live = Live(
        policy=Policy(),
        manager=settings.manager,
        transfer=Transfer(tier or store, readers=settings.readers, engine=engine),
    )
    blocks = {block.name: _served_block(block, live, settings) for block in skeleton.blocks}
    for number, experts in enumerate(blocks.values()):
        experts.depth, experts.first = (number + 0.5) / len(blocks), number == 0
    try:
        model = load_rest(skeleton, blocks, device)
        if (rest := settings.rest_format()) is not None:
            encode_rest(model, rest, skeleton.blocks)
        parts = ServedParts(
            folder=Path(folder),
            model=model,
            tokenizer=_tokenizer(Path(folder)),
            budget=budget,
            blocks=blocks,
            store=store,
            tier=tier,
            live=live,
            hooks=(*attach(model, blocks), *follow_rules(model, blocks)),
        )
        served = ServedModel(parts)
        served.set_mode(settings.mode, **policy)
        for experts, count in zip(blocks.values(), counts, strict=True):
            grow(experts, count, device)
        live.spares.update(_spares(blocks.values(), device))
        if settings.precision == AUTO_PRECISION:
            ladders = {block.name: ladders_of(block, packed) for block in skeleton.blocks}
            served.start_upgrades(Upgrades(blocks, ladders, live.transfer, device))
    except BaseException:
        live.transfer.close()
        if tier is not None:
            tier.close()
        store.close()
        raise
    return served


def ledger(
    skeleton: Skeleton, settings: LoadSettings, packed: PackedStore | None = None
) -> MemoryBudget:
    """What goes where, before anything is loaded. packed None: what there is.

    A GPU that is not here can be reckoned with.
    """
    device = planned_device(settings.device)
    config = skeleton.model.config
    context = _context(config, settings.context)
    format = settings.format()
    own = [format.nbytes(block.layout.specs) for block in skeleton.blocks]
    sizes = [slot_bytes(size, device) for size in own]
    largest, upgrades = max(own), 0
    if settings.precision == AUTO_PRECISION:
        largest = max(NATIVE.nbytes(block.layout.specs) for block in skeleton.blocks)
        upgrades = AT_ONCE * slot_bytes(largest, device)
    on_gpu, readers = device.type != "cpu", settings.readers + BACKGROUND_READERS
    formats = settings.formats()
    packed = packed or open_packed(skeleton, formats)
    unpacked = {
        b.name: b for b in skeleton.blocks if not all(packed.has(b.name, one) for one in formats)
    }
    room = {
        (b.name, one.name): encoding_bytes(one, b.layout.specs)
        for b in skeleton.blocks
        for one in formats
    }
    encoding = max((room[key] for key in room if key not in packed), default=0)
    store = ExpertStore(
        skeleton.checkpoint, {name: skeleton.map.experts[name] for name in unpacked}, unpacked
    )
    weights = weight_bytes(skeleton.checkpoint, skeleton.map.rest, skeleton.dtype)
    if (rest := settings.rest_format()) is not None:
        weights -= saved_bytes(skeleton.model, rest, skeleton.blocks, skeleton.dtype.itemsize)
    return MemoryBudget(
        total=None if settings.memory is None else parse_bytes(settings.memory),
        process=held_bytes(device),
        weights=weights,
        context=context,
        kv_cache=context * kv_bytes_per_token(config, skeleton.dtype),
        workspace=workspace_bytes(config, context, skeleton.dtype),
        staging=sum(SPARES * size for size in set(sizes))
        + (0 if on_gpu else readers * (store.staging_bytes + encoding))  # made in host memory
        + max(room.values())  # of the one that a step of many tokens decodes
        + upgrades,
        host=host_limit(settings.host_memory, largest=largest, readers=readers) if on_gpu else None,
        blocks=tuple(
            BlockNeeds(name=block.name, num_experts=block.num_experts, slot_bytes=size, fewest=1)
            for block, size in zip(skeleton.blocks, sizes, strict=True)
        ),
    )


def _refuse_encoding(skeleton: Skeleton, settings: LoadSettings, budget: MemoryBudget) -> None:
    """Raise BudgetTooSmallError if the other weights don't fit as they are, to be encoded."""
    if settings.rest_format() is None or budget.total is None:
        return
    native = weight_bytes(skeleton.checkpoint, skeleton.map.rest, skeleton.dtype)
    if budget.process + native > budget.total:
        raise BudgetTooSmallError(
            f"a budget of {format_bytes(budget.total)} does not hold the {format_bytes(native)} "
            f"of weights that are no experts while they are being encoded as {settings.rest}; give "
            f"at least {budget.process + native} bytes"
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
    experts.format = settings.format()
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
