"""Estimate what a model takes in memory, part by part, before anything is loaded.

Works from the configuration, the checkpoint's headers and the load settings. `memory_budget` gives
the parts as a `MemoryBudget`; `PlacementBudget` does the same for a model that is already served
and gets another placement.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moefit.checkpoint.safetensors import Checkpoint
from moefit.device import planned_device
from moefit.dsmoe.config import DsMoeConfig
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.host import (
    available_bytes,
    peak_process_bytes,
    process_bytes,
    swap_bytes,
    tightest_limit,
    total_bytes,
)
from moefit.quant.format import FORMATS, NATIVE, weights_in
from moefit.serve.config import (
    AUTO_PRECISION,
    NATIVE_PRECISION,
    BlockPlacement,
    LoadSettings,
    Placement,
    check_placement,
)
from moefit.serve.hf.quant_linear import decoded_bytes, saved_bytes
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.io.loads import BACKGROUND_READERS
from moefit.serve.io.reader import ExpertStore
from moefit.serve.memory.budget import (
    BlockNeeds,
    MemoryBudget,
    PlannedSlots,
    at_least,
    format_bytes,
    host_limit,
    parse_bytes,
)
from moefit.serve.memory.tokenizer_size import TokenizerSize, tokenizer_size
from moefit.serve.packed.store import PackedStore, open_packed
from moefit.serve.precision.allocate import AUTO_FORMATS, by_expert, ladders_of
from moefit.serve.precision.allocate import initial_choices as first_choices
from moefit.serve.precision.upgrades import MAX_PENDING

# Pages of libraries and of the allocator that only computing touches. Measured by hand: the first
# forward and generate of a model of 50 kB raise the resident set by 60 to 75 MiB
# (tests/serve/memory/test_estimate.py holds the sum to the operating system's figure).
FIRST_USE = 96 << 20
_MIB = 1 << 20
# Bytes for each token of the vocabulary while one is drawn: logits in float64, sorted, with their
# places, as shares and as sums; the same in transformers' `generate`, in float32.
_SAMPLING = 64
_LOG = logging.getLogger(__name__)
_HEADS = ("num_attention_heads", "num_heads", "decoder_attention_heads", "n_heads")


def held_bytes(device: torch.device) -> int:
    """What this process holds of the budget's memory now: on a GPU, what torch has reserved.

    The context that the driver makes on a GPU is not torch's, and not in it.
    """
    return process_bytes() if device.type == "cpu" else torch.cuda.memory_reserved(device)


def peak_held_bytes(device: torch.device) -> int:
    """The most that `held_bytes` has been so far."""
    return peak_process_bytes() if device.type == "cpu" else torch.cuda.max_memory_reserved(device)


def check_system_memory(budget: MemoryBudget, device: torch.device) -> None:
    """Compare what a budget lets the process take with what the system lets it have.

    A process that outgrows its control group is killed without a word, so that this is said while
    it still can be: what surely does not fit is refused, what may not fit is a warning.

    Args:
        budget: With the total that is asked for.
        device: Of the model; a GPU's memory is none of the host's.

    Raises:
        BudgetTooSmallError: The model's floor is above what the system lets the process have.
        ConfigError: The budget would be filled beyond that; a smaller one works.
    """
    if device.type != "cpu":
        return
    most, limit = total_bytes(), tightest_limit()
    taken = budget.max_bytes if budget.total is None else min(budget.total, budget.max_bytes)
    free = available_bytes() + process_bytes()
    where = "this machine's memory"
    if limit is not None and limit.nbytes == most:
        where = f"the limit of this process's control group ({limit.file})"
    surely = not swap_bytes() and taken - FIRST_USE > most
    if surely and budget.min_bytes - FIRST_USE > most:
        raise BudgetTooSmallError(
            f"{where} is {format_bytes(most)}, and this model needs at least "
            f"{format_bytes(budget.min_bytes)}; raise it to {at_least(budget.min_bytes)}, or give "
            "a shorter context"
        )
    if surely:
        asked = "without a budget" if budget.total is None else "in this budget"
        raise ConfigError(
            f"{asked} the model would take {format_bytes(taken)}, but {where} is "
            f"{format_bytes(most)}; give a budget (--memory) of "
            f"{max(budget.min_bytes, min(most, free))} bytes or less, or raise the limit"
        )
    if taken <= free and budget.total is not None and budget.total > most:
        _LOG.warning(
            "warning: the budget of %s is more than %s, %s; the model takes at most %s of it",
            *(format_bytes(budget.total), where, format_bytes(most), format_bytes(taken)),
        )
    if taken > free:
        _LOG.warning(
            "warning: the model may take %s, but %s is %s, of which %s are free; if others need "
            "theirs, this process may be killed",
            *(format_bytes(taken), where, format_bytes(most), format_bytes(free)),
        )


def slot_bytes(size: int, device: torch.device) -> int:
    """What a slot of `size` takes of the budget.

    torch reserves GPU memory in segments: 2 MiB for tensors of up to 1 MiB, 20 MiB for those below
    10 MiB, and one of its own, in steps of 2 MiB, for a larger one. What is left over in a segment
    is no slot's, so every slot bears its share of it.

    >>> slot_bytes(9 << 20, torch.device("cuda")) >> 20
    10
    """
    if device.type == "cpu":
        return size
    segment = 2 * _MIB if size <= _MIB else 20 * _MIB
    if size >= 10 * _MIB:
        segment = -(-size // (2 * _MIB)) * 2 * _MIB
    return -(-segment // (segment // size))


def weight_bytes(checkpoint: Checkpoint, names: Iterable[str], dtype: torch.dtype) -> int:
    """Bytes of these tensors once loaded in `dtype`; integers keep their own."""
    spans = [checkpoint.spans[name] for name in names]
    return sum(
        span.nbytes // span.dtype.itemsize * dtype.itemsize
        if span.dtype.is_floating_point
        else span.nbytes
        for span in spans
    )


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token over all layers; an upper bound where layers differ.

    Where there is an encoder, also what it made of the token, which is kept as long.
    """
    text = config.get_text_config(decoder=True)
    heads = _first(text, *_HEADS)
    layers = _first(text, "num_decoder_layers", "num_hidden_layers", "decoder_layers", "num_layers")
    if not heads or not layers:
        return 0
    sides = 2 if config.is_encoder_decoder else 1  # self-attention and cross-attention
    if latent := _first(text, "kv_lora_rank"):  # multi-head latent attention caches what it expands
        per_layer = latent + sum(_first(text, name) or 0 for name in _BESIDE_LATENT)
    else:
        width = _first(text, "hidden_size", "d_model") or 0
        kv_heads = _first(text, "num_key_value_heads") or heads
        head_dim = _first(text, "head_dim", "d_kv", "kv_channels") or width // heads
        per_layer = 2 * kv_heads * head_dim
    encoded = _first(text, "hidden_size", "d_model") or 0 if config.is_encoder_decoder else 0
    return (layers * per_layer * sides + encoded) * dtype.itemsize


_BESIDE_LATENT = ("qk_rope_head_dim", "index_head_dim")


def _expanded_widths(text: Any) -> tuple[int, int]:
    """Of multi-head latent attention: one head's key and value, once expanded; else zeros."""
    if not _first(text, "kv_lora_rank"):
        return 0, 0
    key = sum(_first(text, name) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    return key, _first(text, "v_head_dim") or key


def workspace_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """What a forward pass over `tokens` needs beside weights and cache, logits of one included.

    Counted: the residual stream and what a block makes of it, sixteen tensors of the model's
    width; K rows a token of the routed experts, thrice; two rows of logits in float32, and what
    sampling makes of one; one layer's expanded keys and values of latent attention, thrice; and one
    layer's attention scores, where the family's attention makes them.
    """
    text = config.get_text_config(decoder=True)
    width = _first(text, "hidden_size", "d_model") or 0
    wide = max(
        _first(text, name) or 0
        for name in ("intermediate_size", "moe_intermediate_size", "d_ff", "decoder_ffn_dim")
    )
    k = _experts_per_token(text)
    vocabulary = _first(text, "vocab_size") or 0
    expanded = (_first(text, *_HEADS) or 0) * sum(_expanded_widths(text))
    per_token = (16 * width + 3 * wide + 3 * k * width + 3 * expanded) * dtype.itemsize
    scores = _score_bytes(config, tokens)
    logits = vocabulary * (2 * (4 + dtype.itemsize) + _SAMPLING)
    return FIRST_USE + tokens * per_token + scores + logits


def extra_logits_bytes(
    config: Any, tokens: int, dtype: torch.dtype, sequences: int, prompt_logits: int
) -> int:
    """Logits of a step that are not in `workspace_bytes`: of other sequences, and of prompts.

    A row is there as the model made it and in float32; of prompts, as the model made them.
    """
    vocabulary = _first(config.get_text_config(decoder=True), "vocab_size") or 0
    others = (sequences - 1) * vocabulary * (4 + dtype.itemsize)
    return others + min(prompt_logits, tokens * vocabulary * dtype.itemsize)


def _score_bytes(config: Any, tokens: int) -> int:
    """Attention scores [H, T, T] where no kernel avoids them, as many as there are at once.

    That is without SDPA (attention sinks, soft caps), and with it where keys and values differ in
    width. Measured by hand, at 1024 to 1536 tokens: 2 to 2.4 tensors in Switch Transformers'
    encoder, 2.2 in Mixtral, 2.5 in DeepSeek-V3, 3.7 in gpt-oss.
    """
    text = config.get_text_config(decoder=True)
    key, value = _expanded_widths(text)
    if config._attn_implementation != "eager" and key == value:
        return 0
    at_once = 3 if config.is_encoder_decoder else 4
    return at_once * (_first(text, *_HEADS) or 0) * tokens**2 * 4


def _experts_per_token(config: Any) -> int:
    """K; of a DS-MoE, whose rule may be changed while it is served, all that there are."""
    if isinstance(config, DsMoeConfig):
        return config.num_experts
    return _first(config, "num_experts_per_tok", "moe_topk", "top_k_experts") or 1


def _first(config: Any, *names: str) -> int | None:
    """The first of these attributes that is a positive number; of lists the largest entry."""
    for name in names:
        value = _of_all_layers(config, name)
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _of_all_layers(config: Any, name: str) -> Any:
    """The attribute; a list of it by layer where transformers keeps it by layer."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(layer, name, None) or 0 for layer in config.per_layer_config]
    return getattr(config, name, None)


SPARES = 2
# By how much the process of a command is larger than that of another, or than in another run.
# Measured on generate, eval, bench, chat, serve and describe: less than 3 MiB.
RUN_TO_RUN = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialFormats:
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


def initial_formats(
    skeleton: Skeleton, settings: LoadSettings, budget: MemoryBudget, packed: PackedStore
) -> InitialFormats:
    """What slots will hold at first; under precision auto, before experts differ by their use."""
    counts, format = budget.slots(), settings.format(skeleton.blocks[0])
    pairs = list(zip(skeleton.blocks, counts, strict=True))
    formats, nbytes = (
        Counter({format.name: sum(counts)}),
        budget.total_for_slots(counts) - budget.fixed,
    )
    if settings.precision == AUTO_PRECISION and all(n == block.num_experts for block, n in pairs):
        ladders = by_expert({block.name: ladders_of(block, packed) for block in skeleton.blocks})
        chosen = first_choices(ladders, budget.remaining_bytes()).values()
        formats = Counter(choice.format for choice in chosen)
        nbytes = sum(choice.nbytes for choice in chosen)
    weights = sum(count * weights_in(block.layout.specs) for block, count in pairs)
    return InitialFormats(
        smallest=format.name, formats=formats, nbytes=nbytes, bits_per_weight=8 * nbytes / weights
    )


def memory_budget(
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
    swapped, fully_resident = _spare_sizes(skeleton, settings)
    largest, upgrades = max(own), 0
    if settings.precision == AUTO_PRECISION:
        largest = max(NATIVE.nbytes(block.layout.specs) for block in skeleton.blocks)
        upgrades = MAX_PENDING * slot_bytes(largest, device)
    on_gpu, readers = device.type != "cpu", settings.readers + BACKGROUND_READERS
    packed = packed or open_packed(skeleton, settings.formats())
    weights = weight_bytes(skeleton.checkpoint, skeleton.map.rest, skeleton.dtype)
    if (rest := settings.dense_format()) is not None:
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
        + extra_logits_bytes(
            config, context, skeleton.dtype, settings.sequences, settings.prompt_logits
        ),
        staging=SPARES * sum(swapped)
        + (0 if on_gpu else readers * _reader_bytes(skeleton, settings, packed))  # in host memory
        + _decoding_bytes(skeleton, settings)
        + upgrades,
        host=host_limit(settings.host_memory, largest=largest, readers=readers) if on_gpu else None,
        blocks=tuple(
            BlockNeeds(name=block.name, num_experts=block.num_experts, slot_bytes=size, min_slots=1)
            for block, size in zip(skeleton.blocks, sizes, strict=True)
        ),
        planned=None
        if settings.placement is None
        else _planned(settings.placement, skeleton, device, SPARES * sum(fully_resident)),
        format_totals=_format_totals(skeleton, device)
        if settings.precision == AUTO_PRECISION
        else (),
    )
    return budget.without_slack()


def _format_totals(skeleton: Skeleton, device: torch.device) -> tuple[tuple[str, int], ...]:
    """What all experts take in each format that precision auto may give them."""
    return tuple(
        (
            name,
            sum(
                block.num_experts * slot_bytes(FORMATS[name].nbytes(block.layout.specs), device)
                for block in skeleton.blocks
            ),
        )
        for name in AUTO_FORMATS
    )


def _spare_sizes(skeleton: Skeleton, settings: LoadSettings) -> tuple[list[int], list[int]]:
    """Sizes of the kinds of slots that there are spares of, by format and size, and of the others.

    Where a placement seats all of a block's experts, none of them is swapped.
    """
    device, placement = planned_device(settings.device), settings.placement
    swapped: set[tuple[str, int]] = set()
    fully_resident: set[tuple[str, int]] = set()
    for block in skeleton.blocks:
        format = settings.format(block)
        kind = format.name, slot_bytes(format.nbytes(block.layout.specs), device)
        all_here = placement is not None and placement[block.name].slots == block.num_experts
        (fully_resident if all_here else swapped).add(kind)
    return [size for _, size in swapped], [size for _, size in fully_resident - swapped]


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
    encoding = (format.encoding_bytes(block.layout.specs) for block, format in missing)
    return ExpertStore(skeleton.checkpoint, experts, unpacked).staging_bytes + max(
        encoding, default=0
    )


def _decoding_bytes(skeleton: Skeleton, settings: LoadSettings) -> int:
    """What a step of many tokens decodes at a time: an expert, or a matrix of the other weights."""
    formats, rest = settings.formats(), 0
    expert = max(
        format.decoding_bytes(block.layout.specs) for block in skeleton.blocks for format in formats
    )
    if settings.dense_format() is not None:
        rest = decoded_bytes(skeleton.model, skeleton.blocks, skeleton.dtype.itemsize)
    return max(expert, rest)


@dataclass(frozen=True)
class PlacementBudget:
    """process, tokenizer: bytes that they take, as they were found when the model was loaded."""

    folder: Path
    settings: LoadSettings
    process: int
    tokenizer: int
    packed: PackedStore

    def budget(self, placement: Placement, total: int | None) -> MemoryBudget:
        """With the slots of this placement. Raises ConfigError for one that cannot be."""
        if self.settings.precision == AUTO_PRECISION:
            raise ConfigError(
                "precision auto gives every expert its format by itself, and a placement does so "
                "too; load with a placement (--plan, --max-loss) to change it while serving"
            )
        settings = replace(
            self.settings, placement=placement, precision=NATIVE_PRECISION, memory=total
        )
        settings.check()
        return self._here(memory_budget(self._skeleton(), settings, self.packed))

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The least and the most that any placement takes."""
        skeleton = self._skeleton()
        each = {block.name: block.num_experts for block in skeleton.blocks}
        fewest = [
            _total_bytes(self._uniform(dict.fromkeys(each, 1), name, skeleton))
            for name in AUTO_FORMATS
        ]
        return min(fewest), _total_bytes(self._uniform(each, NATIVE_PRECISION, skeleton))

    def _uniform(self, slots: dict[str, int], format: str, skeleton: Skeleton) -> MemoryBudget:
        placement = {
            name: BlockPlacement(slots=number, formats=(format,)) for name, number in slots.items()
        }
        settings = replace(
            self.settings, placement=placement, precision=NATIVE_PRECISION, memory=None
        )
        return self._here(memory_budget(skeleton, settings, self.packed))

    def _here(self, budget: MemoryBudget) -> MemoryBudget:
        """The same for the process that serves, whose tokenizer has been read."""
        return replace(budget, process=self.process, slack=0, tokenizer=self.tokenizer, reading=0)

    def _skeleton(self) -> Skeleton:
        return build_skeleton(self.folder, self.settings.dtype)


def _total_bytes(budget: MemoryBudget) -> int:
    assert budget.planned is not None
    return budget.fixed + budget.planned.nbytes
