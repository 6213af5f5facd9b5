"""Estimate what a model takes in memory, part by part, before anything is loaded.

Estimates come from the configuration, the checkpoint's headers and the load settings.
`memory_budget` returns them as a `MemoryBudget`; `PlacementBudget` does the same for another
placement of a model that is already being served.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.conv import _ConvNd

from moefit.checkpoint.direct_file import BOUNCE, LEAST
from moefit.checkpoint.safetensors import StoredTensor
from moefit.device import planned_device
from moefit.errors import ConfigError
from moefit.quant.cpu_kernels import kernels
from moefit.quant.format import FORMATS, NATIVE, slot_kind, weights_in
from moefit.quant.kv_int8 import INT8_CACHE
from moefit.serve.config import (
    AUTO_PRECISION,
    NATIVE_PRECISION,
    BlockPlacement,
    LoadSettings,
    Placement,
    check_placement,
)
from moefit.serve.hf.attention import attention_by_kernels
from moefit.serve.hf.dense_groups import dense_groups
from moefit.serve.hf.held_linear import HeldLinear, reading_bytes, saved_by_holding
from moefit.serve.hf.kv_cache import int8_obstacle, refuse_int8
from moefit.serve.hf.mtp import MTP_TOKENS
from moefit.serve.hf.quant_linear import decoded_bytes, saved_bytes
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.io.loads import BACKGROUND_READERS
from moefit.serve.io.reader import ExpertStore
from moefit.serve.layer.expert_executor import fused_experts
from moefit.serve.memory.activations import (
    FIRST_USE,
    KERNEL_FIRST_USE,
    extra_logits_bytes,
    kv_bytes_per_token,
    needs_whole_prompts,
    workspace_bytes,
)
from moefit.serve.memory.budget import (
    BlockNeeds,
    MemoryBudget,
    PlannedSlots,
    host_limit,
    parse_bytes,
)
from moefit.serve.memory.draft import DRAFT_STEP, draft_settings, draft_skeleton
from moefit.serve.memory.held import settled_bytes, unused_bytes
from moefit.serve.memory.tokenizer_size import TokenizerSize, tokenizer_size
from moefit.serve.packed.store import PackedStore, open_packed
from moefit.serve.precision.allocate import (
    AUTO_FORMATS,
    by_expert,
    initial_choices,
    ladders_of,
)
from moefit.serve.precision.upgrades import MAX_PENDING
from moefit.serve.prediction.probes import find_probes

SPARES = 2  # spare slots per format and size
# Allowance for differences of process size between commands and between runs. Measured on
# generate, eval, bench, chat, serve and describe: less than 3 MiB.
RUN_TO_RUN = 8 << 20
MIN_STEP_TOKENS = 64  # what is computed while loading, to compare kernels, is shorter
_MIB = 1 << 20


def slot_bytes(size: int, device: torch.device) -> int:
    """Return how many bytes of the budget a slot of `size` bytes takes.

    torch reserves GPU memory in segments: 2 MiB for tensors of up to 1 MiB, 20 MiB for those below
    10 MiB, and a separate one in steps of 2 MiB for larger ones. The unused end of a segment is
    divided among its slots.

    >>> slot_bytes(9 << 20, torch.device("cuda")) >> 20
    10
    """
    if device.type == "cpu":
        return size
    segment = 2 * _MIB if size <= _MIB else 20 * _MIB
    if size >= 10 * _MIB:
        segment = -(-size // (2 * _MIB)) * 2 * _MIB
    return -(-segment // (segment // size))


def weight_bytes(stored: Iterable[StoredTensor], dtype: torch.dtype) -> int:
    """Return the bytes of these tensors once loaded in `dtype`; integers retain their dtype."""
    return sum(
        prod(one.shape) * (dtype if one.dtype.is_floating_point else one.dtype).itemsize
        for one in stored
    )


def encoding_bytes(skeleton: Skeleton, settings: LoadSettings, packed: PackedStore) -> int:
    """Return the bytes of dense weights while they are being encoded; 0 if they are not.

    These are all encoded ones, and the largest group that is loaded before it is encoded, or what
    packed ones, or codes of the checkpoint, are read through.
    """
    if (format := settings.dense_format()) is None:
        linears = _held(skeleton, settings)
        return _dense_bytes(skeleton, settings) + reading_bytes(linears) if linears else 0
    encoded = packed.dense.of(format).names
    groups = dense_groups(
        skeleton.model, skeleton.map.dense_weights, skeleton.blocks, skeleton.dtype, encoded
    )
    return _dense_bytes(skeleton, settings) + max(groups.peak, BOUNCE if encoded else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialFormats:
    """The formats of slots right after loading.

    Args:
        smallest: The format in which the budget counts slots.
        formats: Number of slots by format.
        nbytes: Of all slots.
        bits_per_weight: Mean over all slots.
    """

    smallest: str
    formats: Mapping[str, int]
    nbytes: int
    bits_per_weight: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"formats": dict(self.formats), "bits_per_weight": self.bits_per_weight}


def initial_formats(
    skeleton: Skeleton, settings: LoadSettings, budget: MemoryBudget, packed: PackedStore
) -> InitialFormats:
    """Return the formats of slots right after loading.

    Under precision auto this is before formats are adapted to the use of experts.

    Raises:
        BudgetTooSmallError: The budget is below the model's minimum.
    """
    counts, format = budget.slots(), settings.format(skeleton.blocks[0])
    pairs = list(zip(skeleton.blocks, counts, strict=True))
    formats = Counter({format.name: sum(counts)})
    nbytes = budget.total_for_slots(counts) - budget.fixed
    if settings.precision == AUTO_PRECISION and all(n == block.num_experts for block, n in pairs):
        ladders = by_expert({block.name: ladders_of(block, packed) for block in skeleton.blocks})
        chosen = initial_choices(ladders, budget.remaining_bytes()).values()
        formats = Counter(choice.format for choice in chosen)
        nbytes = sum(choice.nbytes for choice in chosen)
    weights = sum(count * weights_in(block.layout.specs) for block, count in pairs)
    return InitialFormats(
        smallest=format.name, formats=formats, nbytes=nbytes, bits_per_weight=8 * nbytes / weights
    )


def memory_budget(
    skeleton: Skeleton,
    settings: LoadSettings,
    packed: PackedStore | None = None,
    probe_bytes: int | None = None,
) -> MemoryBudget:
    """Estimate the memory of a model by part, before anything is loaded.

    Args:
        skeleton: The model without weights, with its checkpoint's headers.
        settings: How it is to be loaded; a GPU need not be present.
        packed: Experts encoded already; None opens the store of this model.
        probe_bytes: Of the probes that predict experts; None looks for those of this model.

    Returns:
        The estimate, with the total of the settings.

    Raises:
        ConfigError: The placement or a size in the settings is not valid.
        UnsupportedModelError: The model cannot have an int8 cache.
    """
    device, config = planned_device(settings.device), skeleton.model.config
    dtype, context = skeleton.dtype, _context(config, settings)
    int8 = settings.int8_cache
    if int8 and (reason := int8_obstacle(config)) is not None:
        raise refuse_int8(type(skeleton.model).__name__, reason)
    if settings.placement is not None:
        check_placement(settings.placement, skeleton.blocks)
    packed = packed or open_packed(skeleton, settings.formats(), [settings.dense_format()])
    on_gpu, is_auto = device.type != "cpu", settings.precision == AUTO_PRECISION
    tokenizer = TokenizerSize(0, 0) if on_gpu else tokenizer_size(skeleton.checkpoint.folder)
    first_use = _first_use(skeleton, settings, device)
    probes = find_probes(skeleton, settings).nbytes if probe_bytes is None else probe_bytes
    draft = draft_bytes(settings, first_use) + _mtp_bytes(skeleton, settings, context)
    budget = MemoryBudget(
        total=None if settings.memory is None else parse_bytes(settings.memory),
        process=settled_bytes(device) + (0 if on_gpu else settings.helpers + RUN_TO_RUN),
        unused=unused_bytes(device),
        slack=0 if on_gpu else RUN_TO_RUN,
        tokenizer=tokenizer.held,
        reading=tokenizer.reading,
        encoding=encoding_bytes(skeleton, settings, packed),
        weights=_dense_bytes(skeleton, settings) + probes + draft,
        probes=probes,
        draft=draft,
        context=context,
        kv_cache=context * kv_bytes_per_token(config, dtype, int8=int8),
        kv_dtype=INT8_CACHE if int8 else str(dtype).removeprefix("torch."),
        workspace=step_workspace(config, dtype, settings, context=context, first_use=first_use),
        step_tokens=step_tokens(config, settings, context),
        first_use=first_use,
        staging=_staging_bytes(skeleton, settings, packed),
        host=_host_bytes(skeleton, settings) if on_gpu and skeleton.blocks else None,
        blocks=tuple(
            BlockNeeds(
                name=block.name,
                num_experts=block.num_experts,
                slot_bytes=slot_bytes(settings.format(block).nbytes(block.layout.specs), device),
                min_slots=1,
            )
            for block in skeleton.blocks
        ),
        planned=_planned(skeleton, settings),
        format_totals=_format_totals(skeleton, device) if is_auto else (),
    )
    return budget.without_slack()


def draft_bytes(settings: LoadSettings, first_use: int) -> int:
    """Return what a draft model takes, held whole; 0 without one.

    Args:
        settings: Of the served model.
        first_use: What the first use of libraries touches for the served model already.
    """
    if settings.draft is None:
        return 0
    device, own = planned_device(settings.device), draft_settings(settings)
    skeleton = draft_skeleton(settings)
    config, dtype, rows = skeleton.model.config, skeleton.dtype, settings.sequences
    step = min(settings.context, DRAFT_STEP + rows)
    slots = sum(
        block.num_experts * slot_bytes(NATIVE.nbytes(block.layout.specs), device)
        for block in skeleton.blocks
    )
    more = max(0, _first_use(skeleton, own, device) - first_use)
    return (
        _dense_bytes(skeleton, own)
        + slots
        + _staging_bytes(skeleton, own, PackedStore({}))
        + settings.context * kv_bytes_per_token(config, dtype)
        + workspace_bytes(config, step, dtype, first_use=more, context=settings.context)
        + extra_logits_bytes(config, step, dtype, rows, 0)
    )


def step_workspace(
    config: Any, dtype: torch.dtype, settings: LoadSettings, *, context: int, first_use: int
) -> int:
    """Return the bytes of the activations and logits of the longest pass.

    Args:
        config: The model's transformers configuration.
        dtype: Of activations.
        settings: With the sizes of passes.
        context: Tokens of the KV cache.
        first_use: As in `MemoryBudget`.
    """
    tokens = step_tokens(config, settings, context)
    rows = settings.sequences + settings.draft_rows
    logits = extra_logits_bytes(config, tokens, dtype, rows, settings.prompt_logits)
    copies = first_use == FIRST_USE
    work = workspace_bytes(
        config, tokens, dtype, first_use=first_use, context=context, copies=copies
    )
    return work + logits


def step_tokens(config: Any, settings: LoadSettings, context: int) -> int:
    """Return the tokens of the longest pass: the context where prompts are computed whole."""
    if settings.step_tokens is None or needs_whole_prompts(config):
        return context
    return min(max(settings.step_tokens, MIN_STEP_TOKENS), context)


def _mtp_bytes(skeleton: Skeleton, settings: LoadSettings, context: int) -> int:
    """Return what drafting with the layer for multi-token prediction takes besides its weights."""
    if not settings.mtp:
        return 0
    config: Any = skeleton.model.config
    size = skeleton.dtype.itemsize
    keys = kv_bytes_per_token(config, skeleton.dtype) // config.num_hidden_layers
    rows = settings.sequences * MTP_TOKENS + settings.draft_rows
    return context * keys + rows * 4 * config.hidden_size * size


def _dense_bytes(skeleton: Skeleton, settings: LoadSettings) -> int:
    """Return the bytes of dense weights in the format that they are held in."""
    own = weight_bytes(skeleton.map.dense_weights.values(), skeleton.dtype)
    if (dense := settings.dense_format()) is None:
        return own - saved_by_holding(_held(skeleton, settings), skeleton.dtype.itemsize)
    return own - saved_bytes(skeleton.model, dense, skeleton.blocks, skeleton.dtype.itemsize)


def _held(skeleton: Skeleton, settings: LoadSettings) -> dict[str, HeldLinear]:
    """Return the linear layers that stay in the checkpoint's codes."""
    if not settings.keeps_dense_codes():
        return {}
    return skeleton.held_linears(planned_device(settings.device))


def _staging_bytes(skeleton: Skeleton, settings: LoadSettings, packed: PackedStore) -> int:
    """Return the bytes of spare slots, of readers, of what is decoded, and of upgrades."""
    device, (swapped, _) = planned_device(settings.device), _spare_sizes(skeleton, settings)
    staging = SPARES * sum(swapped) + _decoding_bytes(skeleton, settings)
    if device.type == "cpu":  # on a GPU, readers use host memory
        readers = settings.readers + BACKGROUND_READERS
        staging += readers * _reader_bytes(skeleton, settings, packed)
    if settings.precision == AUTO_PRECISION:
        staging += MAX_PENDING * slot_bytes(_largest_expert(skeleton, settings), device)
    return staging


def _largest_expert(skeleton: Skeleton, settings: LoadSettings) -> int:
    """Return the bytes of the largest expert in any format that it may get."""
    is_auto = settings.precision == AUTO_PRECISION
    return max(
        (NATIVE if is_auto else settings.format(block)).nbytes(block.layout.specs)
        for block in skeleton.blocks
    )


def _host_bytes(skeleton: Skeleton, settings: LoadSettings) -> int:
    largest, readers = _largest_expert(skeleton, settings), settings.readers + BACKGROUND_READERS
    return host_limit(settings.host_memory, largest=largest, readers=readers)


def _format_totals(skeleton: Skeleton, device: torch.device) -> tuple[tuple[str, int], ...]:
    """Return the bytes of all experts in each format that precision auto uses, smallest first.

    Formats that take more than the checkpoint's own are not used.
    """
    totals = {
        name: sum(
            block.num_experts * slot_bytes(FORMATS[name].nbytes(block.layout.specs), device)
            for block in skeleton.blocks
        )
        for name in AUTO_FORMATS
    }
    return tuple(one for one in totals.items() if one[1] <= totals[NATIVE.name])


def _spare_sizes(skeleton: Skeleton, settings: LoadSettings) -> tuple[list[int], list[int]]:
    """Return slot sizes by kind (format and size): of those with spares, and of the others.

    A block in which a placement makes all experts resident needs no spares.
    """
    device, placement = planned_device(settings.device), settings.placement
    swapped: set[tuple[str, int]] = set()
    fully_resident: set[tuple[str, int]] = set()
    for block in skeleton.blocks:
        format = settings.format(block)
        specs = block.layout.specs
        kind = slot_kind(format, specs), slot_bytes(format.nbytes(specs), device)
        all_resident = placement is not None and placement[block.name].slots == block.num_experts
        (fully_resident if all_resident else swapped).add(kind)
    return [size for _, size in swapped], [size for _, size in fully_resident - swapped]


def _planned(skeleton: Skeleton, settings: LoadSettings) -> PlannedSlots | None:
    """Return the slots of the placement; None without one."""
    if (placement := settings.placement) is None:
        return None
    device, (_, fully_resident) = planned_device(settings.device), _spare_sizes(skeleton, settings)
    size = 0
    for block in skeleton.blocks:
        placed, specs = placement[block.name], block.layout.specs
        sizes = [placed.format_of(expert).nbytes(specs) for expert in range(placed.slots)]
        size += sum(slot_bytes(nbytes, device) for nbytes in sizes)
    counts = tuple(placement[block.name].slots for block in skeleton.blocks)
    return PlannedSlots(counts=counts, nbytes=size, spares=SPARES * sum(fully_resident))


def _context(config: Any, settings: LoadSettings) -> int:
    """Return tokens of all sequences together, each limited by the model's positions."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    known = isinstance(longest, int)
    return min(settings.context, longest * settings.sequences) if known else settings.context


def _reader_bytes(skeleton: Skeleton, settings: LoadSettings, packed: PackedStore) -> int:
    """Return the peak bytes besides the slot while one expert is read; zero if all are packed.

    Packed experts are aligned, so that direct reads need no buffer.
    """
    missing = [
        (block, format)
        for block in skeleton.blocks
        for format in settings.formats(block.name)
        if not packed.has(block.name, format)
    ]
    if not missing:
        return 0
    unpacked = {block.name: block for block, _ in missing}
    experts = {name: skeleton.map.experts[name] for name in unpacked}
    encoding = (format.encoding_bytes(block.layout.specs) for block, format in missing)
    staging = ExpertStore(skeleton.checkpoint, experts, unpacked).staging_bytes
    spans = (span for sources in experts.values() for one in sources for span in one.spans)
    bounce = BOUNCE if any(span.nbytes >= LEAST for span in spans) else 0
    return bounce + staging + max(encoding)


def _first_use(skeleton: Skeleton, settings: LoadSettings, device: torch.device) -> int:
    """Return the bytes that only the first use of libraries touches.

    Products of torch take several times as much as kernels: its own are used for experts that are
    no plain MLPs, attention other than SDPA, and convolutions (state-space layers).
    """
    model = skeleton.model
    by_kernels = (
        device.type == "cpu"
        and all(
            (fused := fused_experts(block.layout, device)) and fused.computes_format(format)
            for block in skeleton.blocks
            for format in settings.formats(block.name)
        )
        and attention_by_kernels(model)
        and not any(isinstance(one, _ConvNd) for one in model.modules())
    )
    return KERNEL_FIRST_USE if by_kernels else FIRST_USE


def _decoding_bytes(skeleton: Skeleton, settings: LoadSettings) -> int:
    """Return what a step of many tokens decodes at a time: an expert, or a dense matrix.

    Kernels of a CPU decode neither.
    """
    device, formats, dense = planned_device(settings.device), settings.formats(), 0
    on_cpu = device.type == "cpu"
    decoded = [
        format.decoding_bytes(block.layout.specs)
        for block in skeleton.blocks
        if not (on_cpu and fused_experts(block.layout, device))
        for format in formats
    ]
    if settings.dense_format() is not None and not (on_cpu and kernels()):
        dense = decoded_bytes(skeleton.model, skeleton.blocks, skeleton.dtype.itemsize)
    return max([dense, *decoded])


@dataclass(frozen=True)
class PlacementBudget:
    """Estimate other placements of a model that is being served.

    Args:
        folder: Of the model.
        settings: With which it was loaded.
        process: Bytes of the process, measured while loading.
        tokenizer: Bytes of the tokenizer, measured while loading.
        packed: Experts encoded already.
        probes: Bytes of the probes that were loaded.
    """

    folder: Path
    settings: LoadSettings
    process: int
    tokenizer: int
    packed: PackedStore
    probes: int = 0

    def budget(self, placement: Placement, total: int | None) -> MemoryBudget:
        """Return the estimate for a placement within `total` bytes.

        Raises:
            ConfigError: The placement does not fit the model, or precision auto is in force.
        """
        if self.settings.precision == AUTO_PRECISION:
            raise ConfigError(
                "a placement sets the format of every expert, and so does precision auto; load "
                "with a placement (--plan, --max-loss) to change it while serving"
            )
        settings = replace(
            self.settings, placement=placement, precision=NATIVE_PRECISION, memory=total
        )
        settings.check()
        return self._in_this_process(self._estimate(self._skeleton(), settings))

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest total of any placement, in bytes."""
        skeleton = self._skeleton()
        all_experts = {block.name: block.num_experts for block in skeleton.blocks}
        one_slot = dict.fromkeys(all_experts, 1)
        smallest = min(
            self._uniform(one_slot, name, skeleton).planned_bytes for name in AUTO_FORMATS
        )
        return smallest, self._uniform(all_experts, NATIVE_PRECISION, skeleton).planned_bytes

    def _uniform(self, slots: dict[str, int], format: str, skeleton: Skeleton) -> MemoryBudget:
        placement = {
            name: BlockPlacement(slots=count, formats=(format,)) for name, count in slots.items()
        }
        settings = replace(
            self.settings, placement=placement, precision=NATIVE_PRECISION, memory=None
        )
        return self._in_this_process(self._estimate(skeleton, settings))

    def _estimate(self, skeleton: Skeleton, settings: LoadSettings) -> MemoryBudget:
        return memory_budget(skeleton, settings, self.packed, self.probes)

    def _in_this_process(self, budget: MemoryBudget) -> MemoryBudget:
        """Replace estimates of process and tokenizer by what was measured while loading."""
        measured = {"process": self.process, "tokenizer": self.tokenizer}
        return replace(budget, **measured, slack=0, unused=0, reading=0, encoding=0)

    def _skeleton(self) -> Skeleton:
        settings = self.settings
        return build_skeleton(self.folder, settings.dtype, settings.adapter, mtp=settings.mtp)
