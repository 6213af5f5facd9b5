"""The memory ledger of a model that is to be served, before anything is loaded.

Owns which parts there are and what each takes, from a skeleton and settings. `ledger.py` has the
estimates, `budget.py` what follows from the sum.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moefit.device import planned_device
from moefit.formats.format import FORMATS, NATIVE, GroupedFormat, encoding_bytes, weights_in
from moefit.serve.budget import BlockNeeds, MemoryBudget, PlannedSlots, host_limit, parse_bytes
from moefit.serve.ladders import AUTO, by_expert, ladders_of
from moefit.serve.ladders import beginning as first_choices
from moefit.serve.ledger import (
    held_bytes,
    kv_bytes_per_token,
    more_logits_bytes,
    slot_bytes,
    weight_bytes,
    workspace_bytes,
)
from moefit.serve.packed import PackedStore, open_packed
from moefit.serve.placement import Placement, check_placement
from moefit.serve.refetch import SCRATCH_SLOTS, better_formats, largest_copy
from moefit.serve.rest import decoded_bytes, saved_bytes
from moefit.serve.settings import AUTO_PRECISION, LoadSettings
from moefit.serve.skeleton import Skeleton
from moefit.serve.store import ExpertStore
from moefit.serve.tokenizer_size import TokenizerSize, tokenizer_size
from moefit.serve.transfer import BACKGROUND_READERS
from moefit.serve.upgrades import AT_ONCE

SPARES = 2
# By how much the process of a command is larger than that of another, or than in another run.
# Measured on generate, eval, bench, chat, serve and describe: less than 3 MiB.
RUN_TO_RUN = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """The formats that slots begin with: how many of each, their bytes, and bits a weight.

    `smallest` is the one that the ledger's slots are reckoned in.
    """

    smallest: str
    formats: Mapping[str, int]
    nbytes: int
    bits_per_weight: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"formats": dict(self.formats), "bits_per_weight": self.bits_per_weight}


def beginning(
    skeleton: Skeleton, settings: LoadSettings, budget: MemoryBudget, packed: PackedStore
) -> Beginning:
    """What slots will hold at first; under precision auto, before experts differ by their use."""
    counts, format = budget.slots(), settings.format(skeleton.blocks[0])
    pairs = list(zip(skeleton.blocks, counts, strict=True))
    formats, nbytes = Counter({format.name: sum(counts)}), budget.with_slots(counts) - budget.fixed
    if settings.precision == AUTO_PRECISION and all(n == block.num_experts for block, n in pairs):
        ladders = by_expert({block.name: ladders_of(block, packed) for block in skeleton.blocks})
        chosen = first_choices(ladders, budget.left_over()).values()
        formats = Counter(choice.format for choice in chosen)
        nbytes = sum(choice.nbytes for choice in chosen)
    weights = sum(count * weights_in(block.layout.specs) for block, count in pairs)
    return Beginning(
        smallest=format.name, formats=formats, nbytes=nbytes, bits_per_weight=8 * nbytes / weights
    )


def ledger(
    skeleton: Skeleton, settings: LoadSettings, packed: PackedStore | None = None
) -> MemoryBudget:
    """What goes where, before anything is loaded. packed None: what there is.

    A GPU that is not here can be reckoned with.
    """
    device = planned_device(settings.device)
    config = skeleton.model.config
    context = _context(config, settings)
    if settings.placement is not None:
        check_placement(settings.placement, skeleton.blocks)
    own = [settings.format(block).nbytes(block.layout.specs) for block in skeleton.blocks]
    sizes = [slot_bytes(size, device) for size in own]
    swapped, seated = _spare_sizes(skeleton, settings)
    largest, upgrades = max(own), 0
    if settings.precision == AUTO_PRECISION:
        largest = max(NATIVE.nbytes(block.layout.specs) for block in skeleton.blocks)
        upgrades = AT_ONCE * slot_bytes(largest, device)
    on_gpu, readers = device.type != "cpu", settings.readers + BACKGROUND_READERS
    packed = packed or open_packed(skeleton, settings.formats())
    weights = weight_bytes(skeleton.checkpoint, skeleton.map.rest, skeleton.dtype)
    if (rest := settings.rest_format()) is not None:
        weights -= saved_bytes(skeleton.model, rest, skeleton.blocks, skeleton.dtype.itemsize)
    tokenizer = TokenizerSize(0, 0) if on_gpu else tokenizer_size(skeleton.checkpoint.folder)
    budget = MemoryBudget(
        total=None if settings.memory is None else parse_bytes(settings.memory),
        process=held_bytes(device) + (0 if on_gpu else settings.helpers + RUN_TO_RUN),
        slack=0 if on_gpu else RUN_TO_RUN,
        tokenizer=tokenizer.held,
        reading=tokenizer.reading,
        weights=weights,
        context=context,
        kv_cache=context * kv_bytes_per_token(config, skeleton.dtype),
        workspace=workspace_bytes(config, context, skeleton.dtype)
        + more_logits_bytes(
            config, context, skeleton.dtype, settings.sequences, settings.prompt_logits
        ),
        staging=SPARES * sum(swapped)
        + (0 if on_gpu else readers * _reader_bytes(skeleton, settings, packed))  # in host memory
        + _decoding_bytes(skeleton, settings)
        + upgrades
        + _scratch_bytes(skeleton, settings, packed, device),
        host=host_limit(settings.host_memory, largest=largest, readers=readers) if on_gpu else None,
        blocks=tuple(
            BlockNeeds(name=block.name, num_experts=block.num_experts, slot_bytes=size, fewest=1)
            for block, size in zip(skeleton.blocks, sizes, strict=True)
        ),
        planned=None
        if settings.placement is None
        else _planned(settings.placement, skeleton, device, SPARES * sum(seated)),
        rungs=_rungs(skeleton, device) if settings.precision == AUTO_PRECISION else (),
    )
    return budget.without_slack()


def _scratch_bytes(
    skeleton: Skeleton, settings: LoadSettings, packed: PackedStore, device: torch.device
) -> int:
    """Slots for better copies of experts. Raises ConfigError if there are none to be had."""
    if settings.refetch is None:
        return 0
    formats = better_formats(skeleton.blocks, packed)
    return SCRATCH_SLOTS * slot_bytes(largest_copy(skeleton.blocks, formats), device)


def _rungs(skeleton: Skeleton, device: torch.device) -> tuple[tuple[str, int], ...]:
    """What all experts take in each format that precision auto may give them."""
    return tuple(
        (
            name,
            sum(
                block.num_experts * slot_bytes(FORMATS[name].nbytes(block.layout.specs), device)
                for block in skeleton.blocks
            ),
        )
        for name in AUTO
    )


def _spare_sizes(skeleton: Skeleton, settings: LoadSettings) -> tuple[list[int], list[int]]:
    """Sizes of the kinds of slots that there are spares of, by format and size, and of the others.

    Where a placement seats all of a block's experts, none of them is swapped.
    """
    device, placement = planned_device(settings.device), settings.placement
    swapped: set[tuple[str, int]] = set()
    seated: set[tuple[str, int]] = set()
    for block in skeleton.blocks:
        format = settings.format(block)
        kind = format.name, slot_bytes(format.nbytes(block.layout.specs), device)
        all_here = placement is not None and placement[block.name].slots == block.num_experts
        (seated if all_here else swapped).add(kind)
    return [size for _, size in swapped], [size for _, size in seated - swapped]


def _planned(
    placement: Placement, skeleton: Skeleton, device: torch.device, spares: int
) -> PlannedSlots:
    size = 0
    for block in skeleton.blocks:
        one, specs = placement[block.name], block.layout.specs
        each = [one.format_of(expert).nbytes(specs) for expert in range(one.slots)]
        size += sum(slot_bytes(nbytes, device) for nbytes in each)
    counts = tuple(placement[block.name].slots for block in skeleton.blocks)
    return PlannedSlots(counts=counts, nbytes=size, spares=spares)


def _context(config: Any, settings: LoadSettings) -> int:
    """Tokens of all sequences together; each is no longer than the model's positions reach."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    known = isinstance(longest, int)
    return min(settings.context, longest * settings.sequences) if known else settings.context


def _reader_bytes(skeleton: Skeleton, settings: LoadSettings, packed: PackedStore) -> int:
    """The most that reading one expert holds beside its slot, where not all is packed."""
    missing = [
        (block, format)
        for block in skeleton.blocks
        for format in settings.formats(block.name)
        if not packed.has(block.name, format)
    ]
    unpacked = {block.name: block for block, _ in missing}
    experts = {name: skeleton.map.experts[name] for name in unpacked}
    encoding = (encoding_bytes(format, block.layout.specs) for block, format in missing)
    return ExpertStore(skeleton.checkpoint, experts, unpacked).staging_bytes + max(
        encoding, default=0
    )


def _decoding_bytes(skeleton: Skeleton, settings: LoadSettings) -> int:
    """What a step of many tokens decodes at a time: an expert, or a matrix of the other weights."""
    expert = rest = 0
    if any(isinstance(format, GroupedFormat) for format in settings.formats()):
        expert = max(block.expert_bytes for block in skeleton.blocks)
    if settings.rest_format() is not None:
        rest = decoded_bytes(skeleton.model, skeleton.blocks, skeleton.dtype.itemsize)
    return max(expert, rest)
