"""Measure the times of a model's parts: one block's experts, loading an expert, everything else.

`latency.py` predicts the time per token from them.

Shapes: T tokens, D model width.
"""

import os
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moefit.evaluate.decoding import Decoding
from moefit.plan.reference import Reference
from moefit.serve.cache.slot import allocate_slot
from moefit.serve.io.reader import ExpertStore
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.model import ServedModel
from moefit.serve.windows import PADDING, Windows

TOKENS = (1, 4, 16, 64)
_REPEATS = 12
_READS = 8
_DENSE_TOKENS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatTimes:
    """Times of one format, in seconds.

    Attributes:
        block: Computing the experts of one block, by tokens per step.
        cold: Loading one expert from storage.
        warm: Loading one expert from the page cache.
        packed: Whether experts were loaded as packed; otherwise loading includes encoding.
        nbytes: Bytes of a slot.
    """

    block: dict[str, float]
    cold: float
    warm: float
    packed: bool
    nbytes: int


@torch.inference_mode()
def time_format(served: ServedModel, store: ExpertStore, reference: Reference) -> FormatTimes:
    """Measure the format that all slots of the model have, in the middle block."""
    experts = list(served.blocks.values())[len(served.blocks) // 2]
    block: dict[str, float] = {}
    for count in TOKENS:
        ids_BT = reference.windows.ids_BT
        arguments = _arguments(served, experts, ids_BT[ids_BT != PADDING][:count])
        experts(*arguments)  # fetches what is missing
        block[str(count)] = statistics.median(_timed(experts, arguments))
    cold, warm = _loads(experts, store)
    slot = next(iter(experts.slots.values()))
    return FormatTimes(
        block=block,
        cold=cold,
        warm=warm,
        packed=served.report()["experts_from"] != "encoded while reading",
        nbytes=slot.nbytes,
    )


def _arguments(served: ServedModel, experts: VirtualExperts, ids_T: Tensor) -> Sequence[Tensor]:
    """Return the arguments that the block's experts are called with for these tokens."""
    seen: list[tuple[Tensor, ...]] = []
    hook = experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    try:
        ids_1T = ids_T[None].to(served.model.device)
        both = served.model.config.is_encoder_decoder
        served.model(
            input_ids=ids_1T, use_cache=False, **({"decoder_input_ids": ids_1T} if both else {})
        )
    finally:
        hook.remove()
    return seen[0]


def _timed(experts: VirtualExperts, arguments: Sequence[Tensor]) -> Iterable[float]:
    for _ in range(_REPEATS):
        began = time.perf_counter()
        experts(*arguments)
        yield time.perf_counter() - began


def _loads(experts: VirtualExperts, store: ExpertStore) -> tuple[float, float]:
    """Return the median seconds to read one expert, cold and warm."""
    slot = allocate_slot(experts.format, experts.block.layout.specs, torch.device("cpu"))
    name, times = experts.block.name, ([], [])
    for expert in range(min(_READS, experts.num_experts)):
        drop_page_cache(store.files(name, experts.format))
        for kind in times:
            began = time.perf_counter()
            store.read(name, expert, slot)
            kind.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def drop_page_cache(files: Iterable[Path]) -> None:
    """Drop files from the page cache, as far as the system allows."""
    for path in files:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


@torch.inference_mode()
def time_dense_weights(served: ServedModel, reference: Reference) -> tuple[float, float]:
    """Return the median seconds to decode one token without experts, and to encode one.

    The latter is the time of a whole source over its tokens; zero for decoders.
    """
    windows = reference.windows
    with served.zero_experts():
        decoding = Decoding(served, windows.source(0))
        ids_T = windows.ids(0)[:_DENSE_TOKENS]
        decoded = statistics.median(_steps(decoding, ids_T))
        if windows.sources_BS is None:
            return decoded, 0.0
        return decoded, statistics.median(_encoded(served, windows)) / windows.source_tokens


def _steps(decoding: Decoding, ids_T: Tensor) -> Iterable[float]:
    for at in range(len(ids_T)):
        began = time.perf_counter()
        decoding(ids_T[at : at + 1])[-1].float().log_softmax(-1)
        yield time.perf_counter() - began


def _encoded(served: ServedModel, windows: Windows) -> Iterable[float]:
    for row in range(min(_REPEATS, len(windows))):
        began = time.perf_counter()
        Decoding(served, windows.source(row))
        yield time.perf_counter() - began
