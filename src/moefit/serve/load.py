"""Load a model from a folder inside a memory budget.

The order of steps bounds the peak of memory: estimate from headers, check against the budget and
the system, tokenizer, dense weights, slots, and experts only when they are needed.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moefit.checkpoint.tokenizer import read_tokenizer
from moefit.device import parse_device
from moefit.errors import BudgetTooSmallError, CheckpointError
from moefit.moe.expert_dropout import dropout_record, order_of_blocks
from moefit.moe.families import MoeBlock
from moefit.quant.format import Format, parse_format
from moefit.serve.cache.eviction import POLICIES
from moefit.serve.cache.host_cache import HostCache
from moefit.serve.cache.resize import allocate_spares, grow, load_all_experts
from moefit.serve.cache.scores import ExpertImportanceEstimator
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.cache.swaps import SharedState
from moefit.serve.config import AUTO_PRECISION, LoadSettings, Placement, Policy
from moefit.serve.hf.generation_config import use_generation_config
from moefit.serve.hf.kv_cache import check_int8_cache
from moefit.serve.hf.skeleton import DenseForm, Skeleton, build_skeleton, load_dense_weights
from moefit.serve.io.device_copy import CpuCopies, CudaCopies
from moefit.serve.io.loads import Transfer
from moefit.serve.io.reader import ExpertStore
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.layer.router_probe import attach_hooks, follow_rules
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.memory.draft import check_vocabulary, draft_settings, draft_skeleton
from moefit.serve.memory.estimate import PlacementBudget, memory_budget
from moefit.serve.memory.held import check_system_memory, settled_bytes
from moefit.serve.memory.release import drop_library_pages, return_freed_memory
from moefit.serve.memory.tokenizer_size import TOKENIZER_CACHES
from moefit.serve.model import ServedModel
from moefit.serve.packed.store import PackedStore, open_packed
from moefit.serve.precision.allocate import AUTO_FORMATS, ladders_of
from moefit.serve.precision.upgrades import Upgrades
from moefit.serve.prediction.probes import FoundProbes, find_probes
from moefit.serve.report import ServedParts

Progress = Callable[[str, int, int], None]
"""Called with what is being loaded, how many of it are done, and how many there are."""


def load_model(
    folder: str | Path,
    settings: LoadSettings,
    *,
    progress: Progress = lambda what, done, total: None,
    **policy: Any,
) -> ServedModel:
    """Load a model inside a memory budget.

    Args:
        folder: With the model's checkpoint.
        settings: How to load it.
        progress: Called as loading advances.
        policy: Fields of `Policy`.

    Returns:
        The served model; close it after use.

    Raises:
        BudgetTooSmallError: The budget is below the minimum, which the message names.
        CheckpointError: The checkpoint is missing or damaged.
        UnsupportedModelError: The model has no experts that can be served, or not in this mode.
        ConfigError: A setting is invalid, or the budget exceeds the system's memory.
    """
    device = parse_device(settings.device)
    settings.check()
    skeleton = build_skeleton(Path(folder), settings.dtype, settings.adapter, mtp=settings.mtp)
    packed = open_packed(skeleton, _formats_to_encode(settings), [settings.dense_format()])
    if settings.draft is not None:
        check_vocabulary(skeleton, draft_skeleton(settings))
    budget, probes = _budget(skeleton, settings, packed)
    budget.slots()  # raises for a budget below the minimum
    check_system_memory(budget, device)
    with ExitStack() as undo:
        drop_library_pages()  # those that only importing needs
        tokenizer = _tokenizer(skeleton.checkpoint.folder)
        budget = _with_tokenizer(budget, device, settings.helpers)
        parts = _load_parts(
            _Estimated(skeleton, packed, budget, settings, tokenizer), undo, progress
        )
        served = ServedModel(parts)
        served.set_mode(settings.mode, **policy)
        if settings.int8_cache:
            with served.zero_experts():
                check_int8_cache(served.model, budget.context or settings.context)
        _make_slots(parts, device, settings.placement)
        if device.type != "cpu":
            served.start_host_side(settings.host_compute)
            undo.callback(served.host_computing.close, list(served.blocks.values()))
        if settings.mode == "virtual":
            served.hold_first_experts()
        served.start_prefetching(settings, probes)
        if settings.precision == AUTO_PRECISION:
            ladders = {block.name: ladders_of(block, packed) for block in skeleton.blocks}
            served.start_upgrades(
                Upgrades(parts.blocks, ladders, parts.shared.transfer, device),
                partial(progress, "experts"),
            )
        if settings.draft is not None:
            served.draft = _load_draft(settings)
        undo.pop_all()
    return served


def _load_draft(settings: LoadSettings) -> ServedModel:
    """Load the draft model, with all of its experts; the estimate has its bytes already."""
    own, skeleton = draft_settings(settings), draft_skeleton(settings)
    packed = PackedStore({})
    budget = memory_budget(skeleton, own, packed, probe_bytes=0)
    estimated = _Estimated(skeleton, packed, budget, own, "the draft model's is the served model's")
    with ExitStack() as undo:
        parts = _load_parts(estimated, undo, lambda *_: None)
        served = ServedModel(parts)
        _make_slots(parts, parse_device(own.device), None)
        undo.pop_all()
    served.fill()
    return served


def _budget(
    skeleton: Skeleton, settings: LoadSettings, packed: PackedStore
) -> tuple[MemoryBudget, FoundProbes]:
    """Return the estimate, with the probes only if everything else fits beside them."""
    probes = find_probes(skeleton, settings)
    budget = memory_budget(skeleton, settings, packed, probes.nbytes)
    if probes.nbytes:
        try:
            budget.slots()
        except BudgetTooSmallError:
            probes = probes.left_out()
            budget = memory_budget(skeleton, settings, packed, 0)
    return budget, probes


def _formats_to_encode(settings: LoadSettings) -> list[Format]:
    """Return the formats that experts may get; with a placement, those of any later one too."""
    if settings.placement is None:
        return settings.formats()
    return [parse_format(name) for name in AUTO_FORMATS]


def _with_tokenizer(budget: MemoryBudget, device: torch.device, helpers: int) -> MemoryBudget:
    """Return the budget after the tokenizer has been read, before anything else is loaded.

    The growth of the process replaces the estimate of the tokenizer, and memory needed only while
    reading it becomes available for weights and slots.

    Raises:
        BudgetTooSmallError: The minimum no longer fits.
    """
    return_freed_memory()
    drop_library_pages()
    if device.type != "cpu" or not budget.tokenizer:
        return replace(budget, unused=0)
    grown = settled_bytes(device) + helpers - (budget.process - budget.slack)
    budget = replace(
        budget, reading=0, unused=0, tokenizer=max(0, grown) + TOKENIZER_CACHES
    ).without_slack()
    budget.slots()
    return budget


@dataclass(frozen=True, slots=True)
class _Estimated:
    """A model whose memory is estimated, with its tokenizer, or why it has none."""

    skeleton: Skeleton
    packed: PackedStore
    budget: MemoryBudget
    settings: LoadSettings
    tokenizer: PreTrainedTokenizerBase | str


def _load_parts(estimated: _Estimated, undo: ExitStack, progress: Progress) -> ServedParts:
    """Load everything except slots and experts; `undo` closes what was opened."""
    skeleton, packed, budget = estimated.skeleton, estimated.packed, estimated.budget
    settings, tokenizer = estimated.settings, estimated.tokenizer
    device, folder = parse_device(settings.device), skeleton.checkpoint.folder
    known = None if isinstance(tokenizer, str) else tokenizer
    # Before gigabytes are read, since the file may be damaged.
    generation = use_generation_config(skeleton.model, folder, known, settings.generation_config)
    blocks_by_name = {block.name: block for block in skeleton.blocks}
    store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, blocks_by_name, packed)
    undo.callback(store.close)
    engine = CudaCopies(device) if device.type == "cuda" else CpuCopies()
    host_cache = None if budget.host is None else HostCache(store, engine, limit=budget.host)
    if host_cache is not None:
        undo.callback(host_cache.close)
    transfer = Transfer(host_cache or store, readers=settings.readers, engine=engine)
    undo.callback(transfer.close)
    shared = SharedState(policy=Policy(), manager=settings.manager, transfer=transfer)
    blocks = {block.name: _served_block(block, shared, settings) for block in skeleton.blocks}
    for index, experts in enumerate(blocks.values()):
        experts.depth, experts.index = (index + 0.5) / len(blocks), index
    _set_resident_order(skeleton, blocks)
    dense = settings.dense_format()
    held = skeleton.held_linears(device) if settings.keeps_dense_codes() else {}
    form = DenseForm(dense, packed.dense.of(dense), held)
    encoding = partial(progress, "dense weights")
    model = load_dense_weights(skeleton, blocks, device, form, encoding)
    return_freed_memory()
    drop_library_pages()
    return ServedParts(
        folder=folder,
        stored=skeleton.stored(),
        adapter=None if settings.adapter is None else str(settings.adapter),
        model=model,
        tokenizer=tokenizer,
        generation=generation,
        budget=budget,
        blocks=blocks,
        store=store,
        host_cache=host_cache,
        shared=shared,
        placement_budget=PlacementBudget(
            folder, settings, budget.process, budget.tokenizer, packed, budget.probes
        ),
        int8_cache=settings.int8_cache,
        hooks=(*attach_hooks(model, blocks), *follow_rules(model, blocks)),
    )


def _set_resident_order(skeleton: Skeleton, blocks: Mapping[str, VirtualExperts]) -> None:
    """Tell blocks the order of experts that the checkpoint records, if it does."""
    record = dropout_record(skeleton.model.config)
    orders = order_of_blocks(record, [block.num_experts for block in skeleton.blocks])
    for experts, order in zip(blocks.values(), orders, strict=True):
        experts.resident_order = order


def _make_slots(parts: ServedParts, device: torch.device, placement: Placement | None) -> None:
    for experts, count in zip(parts.blocks.values(), parts.budget.slots(), strict=True):
        placed = None if placement is None else placement[experts.block.name]
        if placed is not None and placed.by_expert:
            load_all_experts(experts, placed, device)
        else:
            grow(experts, count, device)
    spares = allocate_spares(parts.blocks.values(), device, placed=placement is not None)
    parts.shared.spares.update(spares)


def _served_block(block: MoeBlock, shared: SharedState, settings: LoadSettings) -> VirtualExperts:
    eviction = POLICIES[settings.eviction]()
    experts = VirtualExperts(
        block,
        shared,
        SlotTable(block.num_experts, 0, eviction),
        {},
        eviction,
        ExpertImportanceEstimator(block.num_experts, half_life_tokens=settings.half_life_tokens),
    )
    experts.format = settings.format(block)
    return experts


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | str:
    """Return the tokenizer, or the message of the error to raise once it is requested."""
    try:
        return read_tokenizer(folder)
    except CheckpointError as error:
        return str(error)
